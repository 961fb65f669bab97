"""Granite 3 and later dense models (Granite Team 2024): a Llama layer with four multipliers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gguf import ReaderTensor

from model.base.config import LayerConfig, ModelConfig
from model.base.families.base import Family
from model.base.gguf_metadata import Metadata, shortest_decimal
from model.base.hf_config import activation, flag, head_dim, positive_number, read_config, read_rotary

# The multipliers in `config.json` and in a GGUF file.
MULTIPLIERS = {
    "attention_multiplier": "granite.attention.scale",
    "embedding_multiplier": "granite.embedding_scale",
    "residual_multiplier": "granite.residual_scale",
    "logits_scaling": "granite.logit_scale",
}


class GraniteFamily(Family):
    name = "granite"
    architecture = "GraniteForCausalLM"
    gguf_architecture = "granite"
    gguf_permutes = True

    def parse_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        attention_bias = flag(fields, "attention_bias")
        layer = LayerConfig(
            read_rotary(fields),
            score_scale=positive_number(fields, "attention_multiplier", default=1.0) * math.sqrt(head_dim(fields)),
            residual_scale=positive_number(fields, "residual_multiplier", default=1.0),
            qkv_bias=attention_bias,
            out_bias=attention_bias,
            mlp_bias=flag(fields, "mlp_bias"),
            activation=activation(fields),
        )
        return read_config(
            fields,
            self.name,
            lambda index: layer,
            embedding_scale=positive_number(fields, "embedding_multiplier", default=1.0),
            logit_scale=1.0 / positive_number(fields, "logits_scaling", default=1.0),
        )

    def gguf_fields(self, metadata: Metadata, tensors: Mapping[str, ReaderTensor]) -> dict[str, Any]:
        fields = super().gguf_fields(metadata, tensors)
        given = {name: shortest_decimal(metadata[key]) for name, key in MULTIPLIERS.items() if metadata.get(key)}
        return fields | {"attention_multiplier": 1.0 / math.sqrt(fields["head_dim"])} | given
