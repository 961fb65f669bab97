"""Every parser of bytes from elsewhere either understands them or raises its one error, within bounds.

`FUZZ_EXAMPLES` in the environment is the number of examples of each fuzz test.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from model.base.checkpoint import CheckpointError, load_config, read_json
from model.base.gguf import convert
from model.base.gguf_metadata import GGUFError
from model.memory import MemoryConfigError, load_memory
from model.policies.config import PolicyError
from model.policies.network import load_policy
from model.text.chat_template import ChatTemplate, ChatTemplateError
from model.text.sentence_encoder import FILES
from model.text.tokenizer import Tokenizer
from service.base_cache import BaseError
from service.errors import BadRequest
from service.http.json_route import parse_json
from service.model_loading import load_encoder
from service.settings import Settings
from service.tenants import ApiKeys, ApiKeysError
from service.versions.export_file import read_export
from tests.conftest import Server
from tests.live import Client, assert_error, assert_success
from tests.loop_gap import deep_manifest
from tests.model.random_models import random_llama, write_gguf
from tests.model.tiny_encoder import save_encoder
from tests.service.cli_in_process import run_rejected
from tests.tiny import CHAT_TEMPLATE, build_tiny_policies

CHAT = [{"role": "user", "content": "hi"}]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
Edits = st.lists(st.tuples(st.integers(0, 2**16), st.binary(max_size=12), st.integers(0, 12)), min_size=1, max_size=4)
JsonValue = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "tiny", ["text", "weight"])


def edited(data: bytes, edits: list[tuple[int, bytes, int]], within: int) -> bytes:
    """`data` with bytes of its first `within` replaced, inserted or left out."""
    for position, new, cut in edits:
        start = position % (min(within, len(data)) + 1)
        data = data[:start] + new + data[start + cut :]
    return data


def with_values(content: dict[str, Any], values: dict[int, Any]) -> dict[str, Any]:
    """`content` with other values under some of its keys."""
    keys = sorted(content)
    return content | {keys[number % len(keys)]: value for number, value in values.items()}


def understood(parse: Callable[[], object], error: type[Exception]) -> None:
    """Parse; the one error is fine, any other fails the test."""
    try:
        parse()
    except error as found:
        assert str(found) and len(str(found)) < 4000


@pytest.fixture(scope="module")
def scratch() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def exported(server: Server) -> bytes:
    with Client(server.url) as client:
        client.observe("foreign", "The fox learns the way home.")
        return client.http.get("/v1/sessions/foreign/export").content


@FUZZ
@given(Edits)
def test_exports(exported: bytes, edits: list[tuple[int, bytes, int]]) -> None:
    understood(lambda: read_export(edited(exported, edits, 2000), ""), BadRequest)


@FUZZ
@given(JsonValue, st.dictionaries(st.integers(0, 20), JsonValue, max_size=3))
def test_manifests(value: Any, values: dict[int, Any]) -> None:
    arrays: dict[str, np.ndarray[Any, np.dtype[Any]]] = {
        "a.slots": np.zeros(1, np.int32),
        "a.rows": np.zeros((1, 4), np.uint8),
    }
    sound = {"format": 1, "version": 1, "tokens_learned": 1, "model": "m", "id": "i", "digests": [], "sha256": ""}
    for manifest in (value, with_values(sound, values)):
        data = save(arrays, {"imprint": json.dumps(manifest)})

        def read(data: bytes = data) -> object:
            return read_export(data, "key")

        understood(read, BadRequest)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 900 + "1" + "}" * 900, "9" * 5000, '{"format": 1e999}'])
def test_hostile_manifests(text: str) -> None:
    with pytest.raises(BadRequest):
        read_export(save({}, {"imprint": text}), "")
    with pytest.raises(BadRequest):
        read_export(deep_manifest(), "")


@FUZZ
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_json_bodies(body: bytes) -> None:
    understood(lambda: parse_json(body), BadRequest)


@pytest.mark.parametrize("depth", [100_000, 10_000_000])
def test_deep_json_bodies(depth: int) -> None:
    for opening in (b"[", b'{"a":', b'[{"a":'):
        with pytest.raises(BadRequest):
            parse_json(opening * depth)


@FUZZ
@given(Edits)
def test_sentence_encoders(encoder: Path, scratch: Path, edits: list[tuple[int, bytes, int]]) -> None:
    folder = scratch / "encoder"
    folder.mkdir(exist_ok=True)
    for name in FILES:
        (folder / name).write_bytes(edited((encoder / name).read_bytes(), edits, 4000))
        settings = Settings(recall_encoder=str(folder))
        understood(lambda: load_encoder(settings, torch.device("cpu"), progress=pytest.fail), BaseError)  # noqa: B023


@FUZZ
@given(Edits)
def test_tokenizers(tiny_base: Path, scratch: Path, edits: list[tuple[int, bytes, int]]) -> None:
    folder = scratch / "tokenizer"
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_bytes(edited((tiny_base / name).read_bytes(), edits, 4000))
        understood(lambda: Tokenizer.load(folder), CheckpointError)
        understood(lambda: load_config(folder), CheckpointError)
        (folder / name).write_bytes((tiny_base / name).read_bytes())


@FUZZ
@given(st.dictionaries(st.integers(0, 20), JsonValue, max_size=4))
def test_settings_of_bases(tiny_base: Path, scratch: Path, values: dict[int, Any]) -> None:
    folder = scratch / "settings"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes((tiny_base / "tokenizer.json").read_bytes())
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((tiny_base / name).read_text())
        (folder / name).write_text(json.dumps(with_values(content, values)))
        understood(lambda: load_config(folder), CheckpointError)
        understood(lambda: Tokenizer.load(folder), CheckpointError)
        (folder / name).write_text(json.dumps(content))


def test_deep_settings_of_bases(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError):
        read_json(tmp_path / "config.json")


@FUZZ
@given(Edits, st.text("{%}- 'abc()[]|", max_size=40))
def test_chat_templates(edits: list[tuple[int, bytes, int]], source: str) -> None:
    for text in (edited(CHAT_TEMPLATE.encode(), edits, 400).decode(errors="replace"), source):

        def render(text: str = text) -> None:
            ChatTemplate(text, {}).render_with_spans(CHAT, add_generation_prompt=True)

        understood(render, ChatTemplateError)


@pytest.mark.parametrize(
    "source", ["{{" + "(" * 50_000, "{{" + "-" * 50_000 + "1}}", "x" * 2**21, "{{ 'a' * 10**12 }}"]
)
def test_hostile_chat_templates(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render([], add_generation_prompt=False)


@pytest.fixture(scope="module")
def gguf(scratch: Path) -> bytes:
    write_gguf(scratch / "sound.gguf", random_llama())
    return (scratch / "sound.gguf").read_bytes()


@FUZZ
@given(Edits)
def test_gguf_files(gguf: bytes, scratch: Path, edits: list[tuple[int, bytes, int]]) -> None:
    source, folder = scratch / "edited.gguf", scratch / "converted"
    source.write_bytes(edited(gguf, edits, 3000))
    understood(lambda: convert(source, folder), GGUFError)
    for file in folder.glob("*"):
        file.unlink()
    if folder.exists():
        folder.rmdir()


def test_a_gguf_file_cannot_claim_more_than_it_has(gguf: bytes, scratch: Path) -> None:
    source = scratch / "claims.gguf"
    for position in (8, 16, 24):  # tensors, fields, the length of the first name
        source.write_bytes(gguf[:position] + b"\xff" * 6 + b"\0\0" + gguf[position + 8 :])
        with pytest.raises(GGUFError):
            convert(source, scratch / "never")


def test_a_gguf_file_that_contradicts_itself(gguf: bytes, scratch: Path) -> None:
    source = scratch / "contradicts.gguf"
    source.write_bytes(gguf[:266] + b"\0\0" + gguf[268:])
    understood(lambda: convert(source, scratch / "contradiction"), GGUFError)


@FUZZ
@given(Edits, st.dictionaries(st.integers(0, 20), JsonValue, max_size=3))
def test_policies_and_memories(
    sound_policy: Path, scratch: Path, edits: list[tuple[int, bytes, int]], values: dict[int, Any]
) -> None:
    path = scratch / "edited.safetensors"
    path.write_bytes(edited(sound_policy.read_bytes(), edits, 2000))
    understood(lambda: load_policy(path), PolicyError)
    understood(lambda: load_memory(path, hidden_size=64), MemoryConfigError)
    config = {"hidden_size": 64, "sites": [{"name": "a", "kind": "lexical", "slots": 8, "cell": 8, "k": 2, "width": 8}]}
    for name, kind in (("policy", "1"), ("memory", "3")):
        text = json.dumps(with_values(config, values))
        save_file(load_file(sound_policy), path, metadata={"format": kind, name: text})
        understood(lambda: load_policy(path), PolicyError)
        understood(lambda: load_memory(path, hidden_size=64), MemoryConfigError)


@pytest.fixture(scope="module")
def sound_policy(scratch: Path) -> Path:
    return build_tiny_policies(scratch / "policies")[0]


@FUZZ
@given(st.text(max_size=80) | st.from_regex(r"a:[0-9a-f]{64}( [a-z_]{1,8}=[0-9]{1,30}){0,3}", fullmatch=True))
def test_key_files(scratch: Path, text: str) -> None:
    path = scratch / "keys"
    path.write_text(text, encoding="utf-8", errors="replace")
    understood(lambda: ApiKeys(Settings(api_keys_file=path)), ApiKeysError)
    path.write_bytes(text.encode("utf-16", errors="replace"))
    understood(lambda: ApiKeys(Settings(api_keys_file=path)), ApiKeysError)


def test_a_number_in_a_key_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"a:{'0' * 64} bytes={'9' * 5000}\n")
    with pytest.raises(ApiKeysError):
        ApiKeys(Settings(api_keys_file=path))


# --- bodies as clients send them -------------------------------------------------------------------------------------


def post(server: Server, body: bytes, **headers: str) -> httpx.Response:
    given = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{server.url}/v1/sessions/bytes/score", content=body, headers=given, timeout=60)


def test_a_compressed_body_is_read(server: Server) -> None:
    body = json.dumps({"text": "The fox learns the way home."}).encode()
    plain = assert_success(post(server, body))
    for encoding in ("gzip", "x-gzip", "GZIP"):
        assert assert_success(post(server, gzip.compress(body), Content_Encoding=encoding)) == plain


def test_a_compressed_body_is_bounded_and_whole(server: Server) -> None:
    bomb = gzip.compress(b" " * 200_000_000, 9)
    assert len(bomb) < 2**20
    assert_error(post(server, bomb, Content_Encoding="gzip"), 413, "payload_too_large")
    sound = gzip.compress(b'{"text": "hi"}')
    for broken in (b"no gzip", sound[:-1], sound + b"x", zlib.compress(b"{}"), b"\x1f\x8b"):
        assert_error(post(server, broken, Content_Encoding="gzip"), 400, "invalid_gzip")
    for encoding in ("br", "deflate", "gzip, gzip", ""):
        response = post(server, sound, Content_Encoding=encoding)
        assert response.status_code in (400, 415), encoding


def test_a_byte_order_mark_is_no_text(server: Server) -> None:
    plain = assert_success(post(server, b'{"text": "The fox"}'))
    assert assert_success(post(server, b'\xef\xbb\xbf{"text": "The fox"}')) == plain
    assert assert_success(post(server, '{"text": "\ufeffThe fox"}'.encode())) == plain
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        error = assert_error(post(server, '{"text": "The fox"}'.encode(encoding)), 400, "invalid_json")
        assert "UTF-8" in error["message"]


def test_a_number_without_a_fraction_is_an_integer(server: Server) -> None:
    with Client(server.url) as client:
        whole = client.complete("The fox", max_tokens=4)
        assert client.complete("The fox", max_tokens=4.0)["choices"] == whole["choices"]
        ids = client.complete([7, 8, 9], max_tokens=1)
        assert client.complete([7, 8.0, 9], max_tokens=1)["choices"] == ids["choices"]
        response = client.post("completions", client.completion("The fox", max_tokens=4.5))
        assert response.status_code == 400


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b", "é", "a" * 129])
def test_the_command_line_speaks_of_the_name_of_a_session(server: Server, name: str) -> None:
    line = run_rejected("sessions", "show", "--url", server.url, "--", name, settings={})
    assert "session id" in line and "route" not in line
