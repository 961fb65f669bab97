"""From a llama.cpp model file (GGUF) to an ordinary Hugging Face folder, done once.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Weights are written as the exact values, in
fp32, that the quantised ones stand for.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor, TokenType
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from model.base.config import ConfigError, LinearScaling, ModelConfig

Array = npt.NDArray[np.float32]

_GLOBAL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp's names for how text is cut before BPE, with the same rule in `tokenizers`.
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


class GGUFError(Exception):
    """A GGUF file that is damaged, incomplete or of a kind that cannot be converted."""


def convert(gguf_path: Path, folder: Path) -> None:
    """Write `folder`, which must not exist yet. Raises `GGUFError`, and then leaves nothing behind.

    The folder holds `config.json`, `model.safetensors` (fp32), `tokenizer.json` and `tokenizer_config.json`.
    """
    try:
        _convert(gguf_path, folder)
    except (GGUFError, OSError):
        raise
    except Exception as error:  # a file may contradict itself in any way
        raise GGUFError(f"{gguf_path}: damaged or not GGUF: {error}") from error


def _convert(gguf_path: Path, folder: Path) -> None:
    metadata, tensors = _read(gguf_path)
    config = _model_config(metadata, tied=all(tensor.name != "output.weight" for tensor in tensors))
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_json(temporary / "config.json", config.to_hf() | _special_ids(metadata))
        _write_json(temporary / "tokenizer_config.json", _tokenizer_config(metadata))
        _tokenizer(metadata).save(str(temporary / "tokenizer.json"))
        weights = {_hf_name(tensor.name): _weight(tensor, config) for tensor in tensors}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def _model_config(metadata: dict[str, Any], *, tied: bool) -> ModelConfig:
    if (architecture := _get(metadata, "general.architecture")) != "llama":
        raise GGUFError(f"general.architecture must be llama, got {architecture}")
    heads = _get(metadata, "llama.attention.head_count")
    head_dim = metadata.get("llama.attention.key_length", _get(metadata, "llama.embedding_length") // heads)
    if (rotated := metadata.get("llama.rope.dimension_count", head_dim)) != head_dim:
        raise GGUFError(f"llama.rope.dimension_count must be the head size {head_dim}, got {rotated}")
    try:
        return ModelConfig(
            vocab_size=len(_get(metadata, "tokenizer.ggml.tokens")),
            hidden_size=_get(metadata, "llama.embedding_length"),
            num_layers=_get(metadata, "llama.block_count"),
            num_heads=heads,
            num_kv_heads=metadata.get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            intermediate_size=_get(metadata, "llama.feed_forward_length"),
            rope_theta=_decimal(metadata.get("llama.rope.freq_base", 10_000.0)),
            rope_scaling=_rope_scaling(metadata),
            rms_norm_eps=_decimal(_get(metadata, "llama.attention.layer_norm_rms_epsilon")),
            tie_embeddings=tied,
            max_context=_get(metadata, "llama.context_length"),
        )
    except ConfigError as error:
        raise GGUFError(str(error)) from error


def _rope_scaling(metadata: dict[str, Any]) -> LinearScaling | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return LinearScaling(_decimal(_get(metadata, "llama.rope.scaling.factor")))
    raise GGUFError(f"llama.rope.scaling.type must be none or linear, got {kind}")


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE, as `tokenizers` runs it."""
    if (kind := _get(metadata, "tokenizer.ggml.model")) != "gpt2":
        raise GGUFError(f"tokenizer.ggml.model must be gpt2 (byte-level BPE), got {kind}")
    if (pre := metadata.get("tokenizer.ggml.pre", "default")) not in _PRE_TOKENIZERS:
        raise GGUFError(f"tokenizer.ggml.pre must be {' or '.join(_PRE_TOKENIZERS)}, got {pre}")
    tokens: list[str] = _get(metadata, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _get(metadata, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, _get(metadata, "tokenizer.ggml.token_type"), strict=True):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == TokenType.CONTROL)])
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        bos = _get(metadata, "tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    keys = {name: f"tokenizer.ggml.{short}_token_id" for name, short in names.items()}
    return {name: metadata[key] for name, key in keys.items() if key in metadata}


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens: list[str] = _get(metadata, "tokenizer.ggml.tokens")
    special = {name.removesuffix("_id"): tokens[index] for name, index in _special_ids(metadata).items()}
    template = metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _get(metadata, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", False),
        **special,
        **({"chat_template": template} if template else {}),
    }


def _hf_name(name: str) -> str:
    if name in _GLOBAL_TENSORS:
        return _GLOBAL_TENSORS[name]
    match name.split("."):
        case ["blk", layer, kind, "weight"] if kind in _LAYER_TENSORS:
            return f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.weight"
    raise GGUFError(f"tensor {name} has no place in a plain Llama model")


def _weight(tensor: ReaderTensor, config: ModelConfig) -> Array:
    try:
        weight: Array = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise GGUFError(f"tensor {tensor.name}: cannot read {tensor.tensor_type.name} weights") from error
    if tensor.name.endswith("attn_q.weight"):
        return _unpermute(weight, config.num_heads)
    if tensor.name.endswith("attn_k.weight"):
        return _unpermute(weight, config.num_kv_heads)
    return weight


def _unpermute(weight: Array, heads: int) -> Array:
    """llama.cpp rotates neighbouring rows, Hugging Face the halves of a head: put each row in its half."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _get(metadata: dict[str, Any], key: str) -> Any:
    if key not in metadata:
        raise GGUFError(f"{key} is missing")
    return metadata[key]


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to the stored fp32 value: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
