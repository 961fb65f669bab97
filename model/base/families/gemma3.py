"""Gemma 3, text only (Gemma Team 2025, arXiv 2503.19786).

Norms stand before and after attention and MLP, and their weights in a checkpoint are one less. Five of six layers
attend to a window and have rotary frequencies of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gguf import ReaderTensor

from model.base.config import LayerConfig, ModelConfig
from model.base.families.base import TENSOR_NAMES, Family
from model.base.gguf_metadata import Metadata, required
from model.base.hf_config import (
    activation,
    flag,
    head_dim,
    integer,
    positive_number,
    read_config,
    read_rotary,
    refuse,
    rope_fields,
    windows,
)

GLOBAL_THETA, LOCAL_THETA, PERIOD = 1_000_000.0, 10_000.0, 6
LARGEST_LAYERS = 62  # of the 27B model, whose scores are scaled by its width


class Gemma3Family(Family):
    name = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    gguf_architecture = "gemma3"
    norm_offset = 1.0
    tensor_names = MappingProxyType(
        {
            **TENSOR_NAMES,
            "attention_out_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        }
    )

    def parse_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        refuse(fields, "attn_logit_softcapping", "use_bidirectional_attention")
        period = integer(fields, "sliding_window_pattern", default=PERIOD)
        layer_windows = windows(fields, lambda index: bool((index + 1) % max(period, 1)))
        everywhere, local = _rotations(fields)
        scale = math.sqrt(head_dim(fields) / positive_number(fields, "query_pre_attn_scalar", default=256))
        attention_bias, gate = (
            flag(fields, "attention_bias"),
            activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        )

        def layer(index: int) -> LayerConfig:
            window = layer_windows[index]
            return LayerConfig(
                read_rotary(fields, everywhere if window is None else local),
                window=window,
                score_scale=scale,
                qkv_bias=attention_bias,
                out_bias=attention_bias,
                qk_norm="head",
                norm_after=True,
                activation=gate,
            )

        cap = fields.get("final_logit_softcapping")
        return read_config(
            fields,
            self.name,
            layer,
            tie_embeddings=flag(fields, "tie_word_embeddings", default=True),
            embedding_scale=math.sqrt(integer(fields, "hidden_size")),
            logit_softcap=None if cap is None else positive_number(fields, "final_logit_softcapping"),
        )

    def gguf_fields(self, metadata: Metadata, tensors: Mapping[str, ReaderTensor]) -> dict[str, Any]:
        fields = super().gguf_fields(metadata, tensors)
        by_width = fields["num_hidden_layers"] == LARGEST_LAYERS
        return fields | {
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": required(metadata, "gemma3.attention.sliding_window"),
            "rope_local_base_freq": metadata.get("gemma3.rope.freq_base_swa", LOCAL_THETA),
            "query_pre_attn_scalar": (
                fields["hidden_size"] // fields["num_attention_heads"] if by_width else fields["head_dim"]
            ),
            "final_logit_softcapping": metadata.get("gemma3.final_logit_softcapping"),
        }


def _rotations(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rotary fields of the layers without a window, and of the others."""
    given = fields.get("rope_parameters")
    if given is None:
        local = {"rope_theta": fields.get("rope_local_base_freq", LOCAL_THETA)}
        return rope_fields(fields, GLOBAL_THETA), rope_fields({**fields, "rope_scaling": local})
    by_kind = [
        {"rope_theta": theta} | (given.get(kind) or {})
        for kind, theta in (("full_attention", GLOBAL_THETA), ("sliding_attention", LOCAL_THETA))
    ]
    everywhere, local = (rope_fields({**fields, "rope_parameters": rope}) for rope in by_kind)
    return everywhere, local
