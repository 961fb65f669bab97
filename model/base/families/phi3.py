"""Phi-3 and Phi-4 mini (Abdin et al. 2024, arXiv 2404.14219): a Llama layer with fused weights, of which a part of
each head may be rotated."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gguf import ReaderTensor

from model.base.config import LayerConfig, ModelConfig
from model.base.families.base import Family
from model.base.gguf_metadata import Metadata, dequantized, required
from model.base.hf_config import activation, integer, read_config, read_rotary, rope_fields


class Phi3Family(Family):
    name = "phi3"
    architecture = "Phi3ForCausalLM"
    gguf_architecture = "phi3"
    tensor_names = MappingProxyType(
        {
            "attention_norm": "input_layernorm",
            "qkv": "self_attn.qkv_proj",
            "out": "self_attn.o_proj",
            "mlp_norm": "post_attention_layernorm",
            "gate_up": "mlp.gate_up_proj",
            "down": "mlp.down_proj",
        }
    )

    def parse_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        fields = {"original_max_position_embeddings": 4096} | dict(fields)
        window = None if fields.get("sliding_window") is None else integer(fields, "sliding_window")
        rotary = read_rotary(fields, rope_fields(fields), partial=True)
        layer = LayerConfig(rotary, window=window, activation=activation(fields))
        return read_config(fields, self.name, lambda index: layer)

    def gguf_fields(self, metadata: Metadata, tensors: Mapping[str, ReaderTensor]) -> dict[str, Any]:
        fields = super().gguf_fields(metadata, tensors)
        fields["sliding_window"] = metadata.get("phi3.attention.sliding_window") or None
        if "rope_factors_short.weight" in tensors:
            short, long = (dequantized(tensors[f"rope_factors_{kind}.weight"]).tolist() for kind in ("short", "long"))
            fields["rope_scaling"] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
            key = "phi3.rope.scaling.original_context_length"
            fields["original_max_position_embeddings"] = required(metadata, key)
        return fields
