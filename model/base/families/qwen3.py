"""Qwen3 (Yang et al. 2025, arXiv 2505.09388): a Llama layer with norms of each head's query and key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.base.config import LayerConfig, ModelConfig
from model.base.families.base import Family
from model.base.families.qwen2 import qwen_windows
from model.base.hf_config import activation, flag, integer, read_config, read_rotary


class Qwen3Family(Family):
    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    gguf_architecture = "qwen3"

    def parse_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        fields = {**fields, "head_dim": integer(fields, "head_dim", default=128)}
        layer_windows, attention_bias = qwen_windows(fields), flag(fields, "attention_bias")
        rotary, gate = read_rotary(fields), activation(fields)

        def layer(index: int) -> LayerConfig:
            return LayerConfig(
                rotary,
                window=layer_windows[index],
                qkv_bias=attention_bias,
                out_bias=attention_bias,
                qk_norm="head",
                activation=gate,
            )

        return read_config(fields, self.name, layer)
