"""The Llama family (Touvron et al. 2023, arXiv 2302.13971): Llama 1 to 3, SmolLM2 and other models of its
architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.base.config import LayerConfig, ModelConfig
from model.base.families.base import Family
from model.base.hf_config import activation, flag, read_config, read_rotary


class LlamaFamily(Family):
    name = "llama"
    architecture = "LlamaForCausalLM"
    gguf_architecture = "llama"
    gguf_permutes = True

    def parse_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        attention_bias = flag(fields, "attention_bias")
        layer = LayerConfig(
            rotary=read_rotary(fields),
            qkv_bias=attention_bias,
            out_bias=attention_bias,
            mlp_bias=flag(fields, "mlp_bias"),
            activation=activation(fields),
        )
        return read_config(fields, self.name, lambda index: layer)
