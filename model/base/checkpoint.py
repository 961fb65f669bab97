"""Slow weights on disk: an ordinary Hugging Face folder in, a frozen `Backbone` out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.base.backbone import Backbone, Layer
from model.base.config import ConfigError, ModelConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
MAX_JSON_BYTES = 64 * 2**20
SETTINGS = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class CheckpointError(Exception):
    """A model folder that is incomplete, damaged or not what its configuration says."""


def load_backbone(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trainable: bool = False,
) -> Backbone:
    """Load `config.json` and the safetensors beside it (one file or shards). Raises `CheckpointError`.

    The weights are frozen in any case; `trainable` lets gradients pass them, on the way to what is trained.
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
    if not trainable:
        backbone.pack()
    return backbone


def load_config(folder: Path) -> ModelConfig:
    """Read the folder's `config.json`; raises `CheckpointError` if it is absent, damaged or cannot be run."""
    try:
        return ModelConfig.from_hf(read_json(folder / CONFIG))
    except (ConfigError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises `CheckpointError`."""
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
    """`sha256:<hex>` over names and bytes of the files that define the model. Raises `CheckpointError`."""
    digest = hashlib.sha256()
    for path in model_files(folder):
        with path.open("rb") as file:
            part = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {part}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def model_files(folder: Path) -> list[Path]:
    """The files that define the model. Raises `CheckpointError` if one that must be there is missing."""
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
    """Hugging Face's tensor names, with the part of our (fused) weights that each fills."""
    yield "model.embed_tokens.weight", backbone.embedding
    yield "model.norm.weight", backbone.norm.weight
    if not backbone.config.tie_embeddings:
        yield "lm_head.weight", backbone.head.weight
    for layer in backbone.layers:
        assert isinstance(layer, Layer)
        prefix = f"model.layers.{layer.index}"
        yield f"{prefix}.input_layernorm.weight", layer.attention_norm.weight
        yield f"{prefix}.post_attention_layernorm.weight", layer.mlp_norm.weight
        q, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        for linear, parts, sizes in (
            (layer.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), [q, kv, kv]),
            (layer.out, ("self_attn.o_proj",), [layer.out.weight.shape[0]]),
            (layer.gate_up, ("mlp.gate_proj", "mlp.up_proj"), [layer.gate_up.weight.shape[0] // 2] * 2),
            (layer.down, ("mlp.down_proj",), [layer.down.weight.shape[0]]),
        ):
            for kind, parameter in linear.named_parameters():
                for part, rows in zip(parts, parameter.split_with_sizes(sizes), strict=True):
                    yield f"{prefix}.{part}.{kind}", rows


def _copy(name: str, source: Tensor, destination: Tensor) -> None:
    if source.shape != destination.shape:
        expected, got = list(destination.shape), list(source.shape)
        raise CheckpointError(f"tensor {name} must have shape {expected}, got {got}")
    destination.copy_(source)


def _is_redundant(name: str, config: ModelConfig) -> bool:
    """Tensors that some exporters write although they follow from the rest."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings)
