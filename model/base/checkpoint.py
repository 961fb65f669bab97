"""Loading a frozen `Backbone` from a Hugging Face folder, and the fingerprint of such a folder.

The folder holds `config.json`, safetensors in one file or in shards, and a tokenizer. `model.base.gguf` makes such a
folder from a GGUF file; tensor names within a layer lie in `model.base.families`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.base.backbone import Backbone
from model.base.config import ConfigError, ModelConfig
from model.base.families import family_of, parse_config
from model.base.layer import DecoderLayer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
MAX_JSON_BYTES = 64 * 2**20
SETTINGS = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class CheckpointError(Exception):
    """A model folder that is incomplete, damaged or in contradiction with its configuration."""


def load_backbone(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trainable: bool = False,
) -> Backbone:
    """Load `config.json` and the safetensors of its folder, in one file or in shards. Raises `CheckpointError`.

    trainable: keep the linear maps in a layout that gradients can pass. The weights themselves are always frozen.
    """
    config = load_config(folder)
    files = _weight_files(folder)
    backbone = Backbone(config, device=device, dtype=dtype)
    missing = dict(_weight_destinations(backbone))
    with torch.no_grad():
        for file in files:
            for name, tensor in _read(file):
                if name in missing:
                    _copy(name, tensor, missing.pop(name))
                elif not _is_redundant(name, config):
                    raise CheckpointError(f"{file}: unexpected tensor {name}")
        if missing:
            raise CheckpointError(f"{folder}: missing tensor {', '.join(missing)}")
        _complete_norms(backbone)
        backbone.fold()
    if not trainable:
        backbone.pack()
    return backbone


def check_files(folder: Path) -> None:
    """Raise `CheckpointError` if a file is missing, or if a weight file is cut off or not safetensors."""
    model_files(folder)
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: damaged or not safetensors: {error}") from error


def load_config(folder: Path) -> ModelConfig:
    """Read the folder's `config.json`. Raises `CheckpointError` if the file is absent, damaged or unsupported."""
    try:
        return parse_config(read_json(folder / CONFIG))
    except (ConfigError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises `CheckpointError`."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: may have {MAX_JSON_BYTES} bytes, has {path.stat().st_size}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content


def fingerprint(folder: Path) -> str:
    """Return `sha256:<hex>` over names and bytes of the files that define the model. Raises `CheckpointError`."""
    digest = hashlib.sha256()
    for path in model_files(folder):
        with path.open("rb") as file:
            part = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {part}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def model_files(folder: Path) -> list[Path]:
    """Return the files that define the model. Raises `CheckpointError` if a required file is missing."""
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
    settings = [folder / name for name in SETTINGS if (folder / name).is_file()]
    return [folder / CONFIG, *_weight_files(folder), folder / TOKENIZER, *settings]


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must map tensor names to file names")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: named in {INDEX} but not there")
    return files


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or not safetensors: {error}") from error


def _weight_destinations(backbone: Backbone) -> Iterator[tuple[str, Tensor]]:
    """Yield Hugging Face's tensor names, each with the part of our (fused) weights that the tensor fills."""
    yield "model.embed_tokens.weight", backbone.embedding
    yield "model.norm.weight", backbone.norm.weight
    if not backbone.config.tie_embeddings:
        yield "lm_head.weight", backbone.head.weight
    family = family_of(backbone.config)
    for layer in backbone.layers:
        assert isinstance(layer, DecoderLayer)
        yield from family.layer_tensors(layer)


def _complete_norms(backbone: Backbone) -> None:
    """Add what the norms of the family's checkpoints lack."""
    if offset := family_of(backbone.config).norm_offset:
        for module in backbone.modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.add_(offset)


def _copy(name: str, source: Tensor, destination: Tensor) -> None:
    if source.shape != destination.shape:
        expected, got = list(destination.shape), list(source.shape)
        raise CheckpointError(f"tensor {name} must have shape {expected}, got {got}")
    destination.copy_(source)


def _is_redundant(name: str, config: ModelConfig) -> bool:
    """Return whether the tensor follows from the others. Some exporters write such tensors."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings)
