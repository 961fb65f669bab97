"""Every setting of the server, read from `IMPRINT_*` environment variables.

`python -m service.settings` prints docs/settings.md.
"""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import platformdirs
from pydantic import AfterValidator, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "IMPRINT_"
CLIENT_VARIABLES = {
    "IMPRINT_URL": "Where `imprint chat`, `observe`, `score`, `sessions` and the Python client find the server; "
    "default `http://127.0.0.1:8000`.",
    "IMPRINT_API_KEY": "The key that they send, where the server asks for one.",
}
STORE_SCHEMES = (
    "redis",
    "rediss",
    "unix",
    "redis+sentinel",
    "rediss+sentinel",
    "redis+cluster",
    "rediss+cluster",
)

Folder = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class SettingsError(Exception):
    """A setting is unknown or out of bounds. The message is one line naming setting, limit and value."""


class Settings(BaseSettings):
    """The server's settings. `Settings.load()` is the way in: it turns every fault into a `SettingsError`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; `0.0.0.0` for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    data_dir: Folder = Field(
        default_factory=lambda: platformdirs.user_data_path("imprint"),
        description="Folder of the sessions: the embedded store's files and its lock. One server at a time."
        " Default: the platform's data folder (`~/.local/share/imprint` on Linux).",
    )
    cache_dir: Folder = Field(
        default_factory=lambda: platformdirs.user_cache_path("imprint"),
        description="Folder of downloaded and converted base models; safe to delete."
        " Default: the platform's cache folder (`~/.cache/imprint` on Linux).",
    )
    model: str = Field(
        "smollm2-135m-instruct",
        min_length=1,
        description="The frozen base: `smollm2-135m-instruct`, a Hugging Face folder of the Llama family,"
        " a `.gguf` file, or `owner/name` on the Hugging Face hub.",
    )
    memory: str = Field(
        "default",
        min_length=1,
        description="The meta-trained memory: `default` (shipped for the base), or the path of a checkpoint.",
    )
    policies: str = Field(
        "default",
        min_length=1,
        description="The policies served beside text: `default` (those shipped), `none`, or paths with commas between.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs; `auto` takes CUDA if there is any."
    )
    decode_dtype: Literal["fp16", "fp32"] = Field(
        "fp16",
        description="The base's weights for generating on x86 CPUs; `fp16` is a copy, read twice as fast as `fp32`."
        " Prompts, scores and learning take fp32 in any case.",
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the model; 0 = one per core.")
    context: int = Field(
        0, ge=0, description="Tokens that one request may hold, reply included; 0 = the base's own limit."
    )
    redis_url: str | None = Field(
        None,
        repr=False,
        description="A Redis or Valkey server that keeps the sessions: `redis://`, `rediss://`, `unix://`,"
        " `redis+sentinel://host:port,host:port/service` or `redis+cluster://host:port,host:port`"
        " (with TLS: `rediss+…`). Unset: an embedded Valkey in the data folder.",
    )
    idempotency_ttl_s: int = Field(
        86_400,
        ge=0,
        le=31_536_000,
        description="Seconds for which the answer to a learning request with an `Idempotency-Key` is remembered.",
    )
    retry_ttl_s: int = Field(
        600,
        ge=0,
        le=86_400,
        description="Seconds for which the answer to a learning request without a key is remembered, for a retry that"
        " says that it is one (`x-stainless-retry-count`).",
    )
    lease_s: float = Field(
        10.0,
        ge=1,
        le=600,
        description="Seconds after which another replica may take over a session from one that no longer answers.",
    )
    lease_wait_s: float = Field(
        12.0, ge=0, le=600, description="Seconds for which a turn waits for a session that another replica teaches."
    )
    keep_versions: int = Field(32, ge=0, le=1000, description="Versions that a session can go back.")
    keep_bytes: int = Field(
        16 * 2**20, ge=0, description="Bytes, per session, of what leads back to them; the oldest go first."
    )
    store_bytes: int = Field(
        0,
        ge=0,
        description="Bytes of memory that the embedded store may use, all sessions together; then learning is a 503 and"
        " prediction goes on. 0 = no limit; a Redis of your own has its `maxmemory`.",
    )
    session_ttl_s: int = Field(
        0,
        ge=0,
        le=315_360_000,
        description="Seconds after its last use at which a session is erased, unless its option `ttl_s` says otherwise;"
        " 0 = never.",
    )
    session_max_bytes: int = Field(
        64 * 2**20,
        ge=0,
        description="Bytes of rows that a session may have; one that would get more is a 507; 0 = any.",
    )
    export_key: str | None = Field(
        None,
        min_length=16,
        repr=False,
        description="Signs exports (HMAC-SHA256); if set, imports must bear its signature.",
    )
    api_keys: str | None = Field(
        None,
        repr=False,
        description="Who may use the server: entries `TENANT:SHA256` as `imprint keys new TENANT` makes them, commas"
        " between. Without any keys it listens on loopback only and asks nobody for one.",
    )
    api_keys_file: Folder | None = Field(
        None,
        description="A file of such entries, one a line, beside those above; read again whenever it changes."
        " `sessions=`, `bytes=`, `tokens_per_minute=`, `requests=` after an entry go before the four settings below.",
    )
    tenant_sessions: int = Field(0, ge=0, description="Sessions that a tenant may have; 0 = no limit.")
    tenant_bytes: int = Field(
        0,
        ge=0,
        description="Bytes that a tenant's sessions may hold together; from there on they predict and no longer learn."
        " A turn that begins below may end above. 0 = no limit.",
    )
    tenant_tokens_per_minute: int = Field(
        0,
        ge=0,
        description="Tokens that a tenant may learn per minute, on all servers of a store together. A turn may"
        " overdraw, and the next ones wait until that is paid off. 0 = no limit.",
    )
    tenant_requests: int = Field(
        0, ge=0, description="Requests that a tenant may have in flight, on each server; 0 = no limit."
    )
    max_batch: int = Field(32, ge=1, le=4096, description="Sequences that run at the same time.")
    max_queue: int = Field(
        256, ge=1, description="Requests running or waiting; one more is answered 429 with `Retry-After`."
    )
    max_body_bytes: int = Field(
        16 * 2**20, ge=1024, description="Largest request body, in bytes; a larger one is a 413."
    )
    message_special_tokens: Literal["text", "tokens"] = Field(
        "text",
        description="What the text of a special token, such as `<|im_end|>`, is in a message of a chat: plain `text`,"
        " or the `tokens`, with which a message can forge turns. Raw completions always take the tokens.",
    )
    max_connections: int = Field(
        2048,
        ge=1,
        description="Connections at a time. One more ends the one that has waited longest for its client; where none"
        " waits, it is a 503.",
    )
    max_head_bytes: int = Field(
        65_536, ge=1024, le=2**20, description="Bytes of a request's line and headers; more are a 431."
    )
    max_headers: int = Field(100, ge=8, le=10_000, description="Headers of a request; more are a 431.")
    head_timeout_s: float = Field(
        10.0, ge=0.1, le=3600, description="Seconds within which a request's headers must come; then it is a 408."
    )
    body_timeout_s: float = Field(
        120.0, ge=0.1, le=86_400, description="Seconds within which a request's body must come; then it is a 408."
    )
    idle_timeout_s: float = Field(75.0, ge=1, le=86_400, description="Seconds that a connection may be idle.")
    send_timeout_s: float = Field(
        30.0,
        ge=0.1,
        le=3600,
        description="Seconds within which a client must read 16 KiB of an answer that waits for it; then it counts as"
        " gone, and its turn ends by `on_disconnect`.",
    )
    max_upload_bytes: int = Field(
        256 * 2**20,
        ge=2**20,
        description="Bytes of all request bodies in memory; while they are taken, a body of 64 KiB or more is a 429.",
    )
    hosts: str = Field(
        "",
        description="Names, commas between, that requests may call the server by (`Host`); others are a 421. Default:"
        " names of the loopback interface where there are no API keys, any name where there are.",
    )
    kv_tokens: int = Field(
        0,
        ge=0,
        description="Tokens that the key/value caches may hold, all running sequences together;"
        " 0 = from the free memory.",
    )
    hot_rows: int = Field(4_000_000, ge=1, description="Room for rows of fast weights on the device, per site.")
    hot_sessions: int = Field(1024, ge=1, description="Sessions whose fast weights are kept in memory.")
    proof_rate: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the learned requests that are also scored without memory, to prove the gain. It costs"
        " nothing with a memory that only reads at the output, like the shipped one, and a second forward otherwise.",
    )
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        le=3600,
        description="Seconds that running requests are given to finish when the server is told to stop.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log line written."
    )

    @field_validator("redis_url")
    @classmethod
    def _known_store(cls, url: str | None) -> str | None:
        """The address may hold a password, so only its scheme is ever shown."""
        if url is not None and (scheme := urlsplit(url).scheme) not in STORE_SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(STORE_SCHEMES)}, got {scheme!r}")
        return url

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """The environment's settings, each of `overrides` that is not None going first.

        Raises:
            SettingsError: an unknown `IMPRINT_*` variable, or a value out of bounds.
        """
        _reject_unknown_variables()
        explicit = {name: value for name, value in overrides.items() if value is not None}
        try:
            return cls(**explicit)
        except ValidationError as error:
            raise SettingsError("; ".join(_format_errors(error, explicit))) from None


def _reject_unknown_variables() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | CLIENT_VARIABLES.keys()
    for variable in sorted(os.environ):
        if variable.upper().startswith(PREFIX) and variable.upper() not in known:
            matches = difflib.get_close_matches(variable.upper(), known, n=1, cutoff=0.8)
            hint = f"; did you mean {matches[0]}?" if matches else ""
            raise SettingsError(f"unknown environment variable {variable}{hint}")


def _format_errors(error: ValidationError, overrides: dict[str, Any]) -> Iterator[str]:
    for detail in error.errors():
        field = str(detail["loc"][0])
        name = field if field in overrides else PREFIX + field.upper()
        if detail["type"] == "value_error":
            yield f"{name}: {detail['ctx']['error']}"
        else:
            yield f"{name}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {str(detail['input'])!r}"


def markdown() -> str:
    """The page docs/settings.md."""
    rows = "\n".join(
        f"| `{PREFIX}{name.upper()}` | {_default(field)} | {_limits(field)} | {field['description']} |"
        for name, field in Settings.model_json_schema()["properties"].items()
    )
    client = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in CLIENT_VARIABLES.items())
    return f"""\
# Settings

Printed by `python -m service.settings`; edit `service/settings.py` instead of this page.

The server reads its settings from environment variables; options of `imprint serve` go first. An empty
variable counts as unset. A value out of bounds or an unknown `{PREFIX}*` variable stops the server with one
line that names it. (Kubernetes sets such variables for a Service called `imprint`: there, switch
`enableServiceLinks` off.)

| variable | default | limits | meaning |
| --- | --- | --- | --- |
{rows}

Read by those who talk to a server:

| variable | meaning |
| --- | --- |
{client}
"""


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    return "" if value is None else f"`{value}`"


def _limits(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    bounds = [f"{sign} {field[key]}" for key, sign in (("minimum", "≥"), ("maximum", "≤")) if key in field]
    return ", ".join(bounds)


if __name__ == "__main__":
    print(markdown(), end="")
