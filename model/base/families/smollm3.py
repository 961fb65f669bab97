"""SmolLM3 (Bakouch et al. 2025): a Llama layer, of which every fourth is not told positions (NoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.base.config import ConfigError, LayerConfig, ModelConfig
from model.base.families.base import Family
from model.base.hf_config import (
    activation,
    flag,
    integer,
    num_layers,
    read_config,
    read_rotary,
    rope_fields,
    windows,
)

THETA, PERIOD = 2_000_000.0, 4


class SmolLM3Family(Family):
    name = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    gguf_architecture = "smollm3"
    gguf_permutes = True

    def parse_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        rotary, is_rotated = read_rotary(fields, rope_fields(fields, THETA)), _rotated_layers(fields)
        uses_windows = flag(fields, "use_sliding_window") and fields.get("sliding_window") is not None
        layer_windows = windows(fields, lambda index: uses_windows and not is_rotated[index])
        attention_bias, mlp_bias, gate = flag(fields, "attention_bias"), flag(fields, "mlp_bias"), activation(fields)

        def layer(index: int) -> LayerConfig:
            return LayerConfig(
                rotary if is_rotated[index] else None,
                window=layer_windows[index],
                qkv_bias=attention_bias,
                out_bias=attention_bias,
                mlp_bias=mlp_bias,
                activation=gate,
            )

        tied = flag(fields, "tie_word_embeddings", default=True)
        return read_config(fields, self.name, layer, tie_embeddings=tied)


def _rotated_layers(fields: Mapping[str, Any]) -> list[bool]:
    """Return whether each layer is told positions."""
    layers, given = num_layers(fields), fields.get("no_rope_layers")
    period = max(integer(fields, "no_rope_layer_interval", default=PERIOD), 1)
    if given is None:
        return [(index + 1) % period != 0 for index in range(layers)]
    if not isinstance(given, list) or len(given) < layers or any(each not in (0, 1) for each in given):
        raise ConfigError(f"no_rope_layers must be a list of {layers} numbers 0 or 1, got {given!r}")
    return [bool(each) for each in given[:layers]]
