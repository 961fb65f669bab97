"""Reading the metadata of a GGUF file: values by key, and the fields of `config.json` that all families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray

Metadata = Mapping[str, Any]
Weight = NDArray[np.float32]


class GGUFError(Exception):
    """A GGUF file that is damaged, incomplete or cannot be converted."""


def required(metadata: Metadata, key: str) -> Any:
    """Return the value of a key. Raises `GGUFError` if the key is missing."""
    if key not in metadata:
        raise GGUFError(f"{key} is missing")
    return metadata[key]


def shortest_decimal(value: float) -> float:
    """Return the shortest decimal that rounds to the stored fp32 value: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def dequantized(tensor: ReaderTensor) -> Weight:
    """Return the values of a tensor. Raises `GGUFError` for a kind of quantisation that cannot be read."""
    try:
        weight: Weight = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise GGUFError(f"tensor {tensor.name}: cannot read {tensor.tensor_type.name} weights") from error
    return weight


def read_fields(metadata: Metadata, prefix: str, tensors: Mapping[str, ReaderTensor]) -> dict[str, Any]:
    """Return the fields of a `config.json` that all families share. Raises `GGUFError`.

    prefix: of the keys that belong to the architecture.
    """
    heads = required(metadata, f"{prefix}.attention.head_count")
    hidden_size = required(metadata, f"{prefix}.embedding_length")
    head_dim = metadata.get(f"{prefix}.attention.key_length", hidden_size // heads)
    if (value_dim := metadata.get(f"{prefix}.attention.value_length", head_dim)) != head_dim:
        raise GGUFError(f"{prefix}.attention.value_length must be the size of keys {head_dim}, got {value_dim}")
    rotated = metadata.get(f"{prefix}.rope.dimension_count", head_dim)
    return {
        "vocab_size": len(required(metadata, "tokenizer.ggml.tokens")),
        "hidden_size": hidden_size,
        "num_hidden_layers": required(metadata, f"{prefix}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{prefix}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": required(metadata, f"{prefix}.feed_forward_length"),
        "hidden_act": "silu",
        "rope_theta": shortest_decimal(metadata.get(f"{prefix}.rope.freq_base", 10_000.0)),
        "rope_scaling": _rope_scaling(metadata, prefix, tensors),
        "rms_norm_eps": shortest_decimal(required(metadata, f"{prefix}.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "max_position_embeddings": required(metadata, f"{prefix}.context_length"),
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        **({"partial_rotary_factor": rotated / head_dim} if rotated != head_dim else {}),
    }


def _rope_scaling(metadata: Metadata, prefix: str, tensors: Mapping[str, ReaderTensor]) -> dict[str, Any] | None:
    if "rope_freqs.weight" in tensors:  # a factor for each frequency, whatever rule made them
        factors = dequantized(tensors["rope_freqs.weight"]).tolist()
        same = {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
        return {"rope_type": "longrope", **same}
    kind = metadata.get(f"{prefix}.rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = shortest_decimal(required(metadata, f"{prefix}.rope.scaling.factor"))
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        context = required(metadata, f"{prefix}.rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
    raise GGUFError(f"{prefix}.rope.scaling.type must be none, linear or yarn, got {kind}")
