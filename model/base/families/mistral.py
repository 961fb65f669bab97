"""Mistral (Jiang et al. 2023, arXiv 2310.06825): a Llama layer whose attention may have a window.

llama.cpp converts these models to its Llama architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.base.config import LayerConfig, ModelConfig
from model.base.families.base import Family
from model.base.hf_config import activation, integer, read_config, read_rotary, refuse


class MistralFamily(Family):
    name = "mistral"
    architecture = "MistralForCausalLM"

    def parse_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        refuse(fields, "layer_types", "attention_bias", "mlp_bias")
        window = None if fields.get("sliding_window") is None else integer(fields, "sliding_window")
        layer = LayerConfig(read_rotary(fields), window=window, activation=activation(fields))
        return read_config(fields, self.name, lambda index: layer)
