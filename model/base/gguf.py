"""Converting a llama.cpp model file (GGUF) to a Hugging Face folder.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Weights are written in fp32, as the exact values of
the quantised weights. Tensor names and the configuration's keys lie in the family: `model.base.families`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor
from safetensors.numpy import save_file

from model.base.config import ConfigError, ModelConfig
from model.base.families import family_of_gguf
from model.base.families.base import Family
from model.base.gguf_metadata import GGUFError, Metadata, Weight, dequantized, required
from model.base.gguf_tokenizer import build_tokenizer

Tensors = Mapping[str, ReaderTensor]
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # in the configuration


def convert(gguf_path: Path, folder: Path) -> None:
    """Convert a GGUF file to `folder`, which must not exist. Raises `GGUFError`, and then leaves no files behind.

    The folder gets `config.json`, `model.safetensors` (fp32), `tokenizer.json` and `tokenizer_config.json`.
    """
    try:
        _convert(gguf_path, folder)
    except (GGUFError, OSError):
        raise
    except Exception as error:  # a file may contradict itself in any way
        raise GGUFError(f"{gguf_path}: damaged or not GGUF: {error}") from error


def _convert(gguf_path: Path, folder: Path) -> None:
    metadata, tensors = _read(gguf_path)
    family = family_of_gguf(metadata)
    fields, config = _configuration(family, metadata, tensors)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_json(temporary / "config.json", fields | _special_ids(metadata))
        _write_json(temporary / "tokenizer_config.json", _tokenizer_config(metadata, config.max_context))
        build_tokenizer(metadata).save(str(temporary / "tokenizer.json"))
        save_file(_weights(family, tensors, config), temporary / "model.safetensors", metadata={"format": "pt"})
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_config(gguf_path: Path) -> ModelConfig:
    """Return the configuration that `convert` would write, without reading the weights' values.

    Raises `GGUFError` for most files that `convert` refuses: one that is damaged or cut off, of another family, or with
    another tokenizer.
    """
    metadata, tensors = _read(gguf_path)
    build_tokenizer(metadata)
    return _configuration(family_of_gguf(metadata), metadata, tensors)[1]


def _configuration(family: Family, metadata: Metadata, tensors: Tensors) -> tuple[dict[str, Any], ModelConfig]:
    """Return the content of `config.json` and what the family reads from it."""
    fields = family.gguf_fields(metadata, tensors)
    key = f"{family.gguf_architecture}.attention.sliding_window"
    if metadata.get(key) and not fields.get("sliding_window"):
        raise GGUFError(f"{key} must be absent, got {metadata[key]}")
    try:
        return fields, family.parse_config(fields)
    except ConfigError as error:
        raise GGUFError(str(error)) from error


def _weights(family: Family, tensors: Tensors, config: ModelConfig) -> dict[str, Weight]:
    """Return the tensors of a Hugging Face checkpoint."""
    return {
        family.hf_tensor_name(name): family.hf_weight(name, dequantized(tensor), config)
        for name, tensor in tensors.items()
        if name not in ROPE_FACTORS
    }


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    try:
        reader = _BoundedReader(path)
        return {name: field.contents() for name, field in reader.fields.items()}, {
            tensor.name: tensor for tensor in reader.tensors
        }
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise GGUFError(f"{path}: damaged or not GGUF: {error}") from error


class _BoundedReader(GGUFReader):
    """A reader that reads nothing beyond the end of a file, so that a count in a damaged file costs no more than it."""

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"{end} bytes are needed, the file has {len(self.data)}")
        return super()._get(offset, dtype, count, override_order)


def _special_ids(metadata: Metadata) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    keys = {name: f"tokenizer.ggml.{short}_token_id" for name, short in names.items()}
    return {name: metadata[key] for name, key in keys.items() if key in metadata}


def _tokenizer_config(metadata: Metadata, max_context: int) -> dict[str, Any]:
    tokens: list[str] = required(metadata, "tokenizer.ggml.tokens")
    special = {name.removesuffix("_id"): tokens[index] for name, index in _special_ids(metadata).items()}
    template = metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", False),
        **special,
        **({"chat_template": template} if template else {}),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
