"""OLMo 2 (OLMo Team 2024, arXiv 2501.00656): a Llama layer with norms after attention and MLP instead of before, and
norms over the queries and the keys of all heads."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from model.base.config import LayerConfig, ModelConfig
from model.base.families.base import TENSOR_NAMES, Family
from model.base.hf_config import activation, flag, read_config, read_rotary


class Olmo2Family(Family):
    name = "olmo2"
    architecture = "Olmo2ForCausalLM"
    gguf_architecture = "olmo2"
    tensor_names = MappingProxyType(
        {
            **TENSOR_NAMES,
            "attention_out_norm": "post_attention_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        }
    )

    def parse_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        attention_bias = flag(fields, "attention_bias")
        layer = LayerConfig(
            read_rotary(fields),
            qkv_bias=attention_bias,
            out_bias=attention_bias,
            qk_norm="all",
            norm_before=False,
            norm_after=True,
            activation=activation(fields),
        )
        return read_config(fields, self.name, lambda index: layer)
