"""Converting a llama.cpp model file (GGUF) to a Hugging Face folder.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Weights are written in fp32, as the exact values of
the quantised weights. Tensor names and the configuration's keys lie in the family: `model.base.families`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor, TokenType
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from model.base.config import ModelConfig
from model.base.families import family_of_gguf, hf_config
from model.base.families.base import Family, Weight
from model.base.gguf_metadata import GGUFError, Metadata, required


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
    config = family.parse_gguf_config(metadata, tied=all(tensor.name != "output.weight" for tensor in tensors))
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_json(temporary / "config.json", hf_config(config) | _special_ids(metadata))
        _write_json(temporary / "tokenizer_config.json", _tokenizer_config(metadata, config.max_context))
        _tokenizer(metadata, family).save(str(temporary / "tokenizer.json"))
        weights = {
            family.hf_tensor_name(tensor.name): family.hf_weight(tensor.name, _dequantized(tensor), config)
            for tensor in tensors
        }
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
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
    family = family_of_gguf(metadata)
    _tokenizer(metadata, family)
    return family.parse_gguf_config(metadata, tied=all(tensor.name != "output.weight" for tensor in tensors))


def _read(path: Path) -> tuple[dict[str, Any], list[ReaderTensor]]:
    try:
        reader = _BoundedReader(path)
        return {name: field.contents() for name, field in reader.fields.items()}, reader.tensors
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


def _tokenizer(metadata: Metadata, family: Family) -> Tokenizer:
    """Return the file's byte-level BPE."""
    if (kind := required(metadata, "tokenizer.ggml.model")) != "gpt2":
        raise GGUFError(f"tokenizer.ggml.model must be gpt2 (byte-level BPE), got {kind}")
    if (pre := metadata.get("tokenizer.ggml.pre", "default")) not in family.gguf_pre_tokenizers:
        raise GGUFError(f"tokenizer.ggml.pre must be {' or '.join(family.gguf_pre_tokenizers)}, got {pre}")
    tokens: list[str] = required(metadata, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in required(metadata, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = family.gguf_pre_tokenizers[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, required(metadata, "tokenizer.ggml.token_type"), strict=True):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == TokenType.CONTROL)])
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        bos = required(metadata, "tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


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


def _dequantized(tensor: ReaderTensor) -> Weight:
    try:
        weight: Weight = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise GGUFError(f"tensor {tensor.name}: cannot read {tensor.tensor_type.name} weights") from error
    return weight


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
