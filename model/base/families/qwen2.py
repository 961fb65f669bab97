"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv 2412.15115): a Llama layer with biases of q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.base.config import LayerConfig, ModelConfig
from model.base.families.base import Family
from model.base.hf_config import activation, flag, integer, read_config, read_rotary, windows


class Qwen2Family(Family):
    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    gguf_architecture = "qwen2"

    def parse_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        layer_windows = qwen_windows(fields)
        rotary, gate = read_rotary(fields), activation(fields)

        def layer(index: int) -> LayerConfig:
            return LayerConfig(rotary, window=layer_windows[index], qkv_bias=True, activation=gate)

        return read_config(fields, self.name, layer)


def qwen_windows(fields: Mapping[str, Any]) -> list[int | None]:
    """Return the window of each layer: where windows are used, the layers from `max_window_layers` on have them."""
    uses_windows = flag(fields, "use_sliding_window") and fields.get("sliding_window") is not None
    first = integer(fields, "max_window_layers", default=28)
    return windows(
        {**fields, "sliding_window": fields.get("sliding_window") if uses_windows else None},
        lambda index: uses_windows and index >= first,
    )
