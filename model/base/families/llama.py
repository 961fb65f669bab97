"""The Llama family (Touvron et al. 2023, arXiv 2302.13971): Llama 1 to 3, SmolLM2 and other models of its architecture.

A layer has RMS norms, rotary attention with grouped queries and a SwiGLU MLP. The tests compare its results with those
of `transformers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import Tensor, nn

from model.base.attention import AttentionFn
from model.base.config import ConfigError, LinearScaling, ModelConfig
from model.base.families.base import DecoderLayer, Family, Weight
from model.base.gguf_metadata import GGUFError, Metadata, required, shortest_decimal
from model.base.hf_config import integer, positive_number, read_rope, rope_scaling_field
from model.base.kv_cache import Device
from model.base.linear import Linear
from model.base.rotary import apply_rotary

_GGUF_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class LlamaLayer(DecoderLayer):
    """A layer of the Llama family. q, k and v share one matrix, and so do the gate and the up projection."""

    def __init__(self, index: int, config: ModelConfig, *, device: Device, dtype: torch.dtype) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        d, heads, kv_heads, hd = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.index, self.heads, self.kv_heads, self.head_dim = index, heads, kv_heads, hd
        self.attention_norm = nn.RMSNorm(d, config.rms_norm_eps, device=device, dtype=dtype)
        self.qkv = linear(d, (heads + 2 * kv_heads) * hd, config.attention_bias)
        self.out = linear(heads * hd, d, config.attention_bias)
        self.mlp_norm = nn.RMSNorm(d, config.rms_norm_eps, device=device, dtype=dtype)
        self.gate_up = linear(d, 2 * config.intermediate_size, config.mlp_bias)
        self.down = linear(config.intermediate_size, d, config.mlp_bias)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: AttentionFn) -> Tensor:
        B, T, _ = hidden.shape
        qkv: Tensor = self.qkv(self.attention_norm(hidden)).view(B, T, -1, self.head_dim)
        qk, v = qkv.split_with_sizes([self.heads + self.kv_heads, self.kv_heads], dim=2)
        q, k = apply_rotary(qk, cos, sin).split_with_sizes([self.heads, self.kv_heads], dim=2)
        attended = attend(self.index, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return torch.add(hidden, self.down(F.silu(gate) * up))

    def weight_destinations(self) -> Iterator[tuple[str, Tensor]]:
        yield "input_layernorm.weight", self.attention_norm.weight
        yield "post_attention_layernorm.weight", self.mlp_norm.weight
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for linear, parts, sizes in (
            (self.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), [q, kv, kv]),
            (self.out, ("self_attn.o_proj",), [self.out.weight.shape[0]]),
            (self.gate_up, ("mlp.gate_proj", "mlp.up_proj"), [self.gate_up.weight.shape[0] // 2] * 2),
            (self.down, ("mlp.down_proj",), [self.down.weight.shape[0]]),
        ):
            for kind, parameter in linear.named_parameters():
                for part, rows in zip(parts, parameter.split_with_sizes(sizes), strict=True):
                    yield f"{part}.{kind}", rows


def _smollm_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


class LlamaFamily(Family):
    """The Llama family, for the registry."""

    name = "llama"
    architecture = "LlamaForCausalLM"
    gguf_architecture = "llama"
    gguf_pre_tokenizers = MappingProxyType({"smollm": _smollm_pre_tokenizer})

    def new_layer(self, index: int, config: ModelConfig, *, device: Device, dtype: torch.dtype) -> DecoderLayer:
        return LlamaLayer(index, config, device=device, dtype=dtype)

    # Hugging Face's config.json

    def parse_config(self, config: Mapping[str, Any]) -> ModelConfig:
        _check_supported(config)
        hidden_size, num_heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
        max_context = integer(config, "max_position_embeddings")
        rope_theta, rope_scaling = read_rope(config, max_context)
        return ModelConfig(
            vocab_size=integer(config, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=integer(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=integer(config, "num_key_value_heads", default=num_heads),
            head_dim=integer(config, "head_dim", default=hidden_size // max(num_heads, 1)),
            intermediate_size=integer(config, "intermediate_size"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rms_norm_eps=positive_number(config, "rms_norm_eps"),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_context=max_context,
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            family=self.name,
        )

    def hf_config(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.intermediate_size,
            "hidden_act": "silu",
            "rope_theta": config.rope_theta,
            "rope_scaling": rope_scaling_field(config.rope_scaling),
            "rms_norm_eps": config.rms_norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "max_position_embeddings": config.max_context,
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
        }

    # GGUF

    def parse_gguf_config(self, metadata: Metadata, *, tied: bool) -> ModelConfig:
        prefix = self.gguf_architecture
        heads = required(metadata, f"{prefix}.attention.head_count")
        hidden_size = required(metadata, f"{prefix}.embedding_length")
        head_dim = metadata.get(f"{prefix}.attention.key_length", hidden_size // heads)
        if (rotated := metadata.get(f"{prefix}.rope.dimension_count", head_dim)) != head_dim:
            raise GGUFError(f"{prefix}.rope.dimension_count must be the head size {head_dim}, got {rotated}")
        try:
            return ModelConfig(
                vocab_size=len(required(metadata, "tokenizer.ggml.tokens")),
                hidden_size=hidden_size,
                num_layers=required(metadata, f"{prefix}.block_count"),
                num_heads=heads,
                num_kv_heads=metadata.get(f"{prefix}.attention.head_count_kv", heads),
                head_dim=head_dim,
                intermediate_size=required(metadata, f"{prefix}.feed_forward_length"),
                rope_theta=shortest_decimal(metadata.get(f"{prefix}.rope.freq_base", 10_000.0)),
                rope_scaling=_gguf_rope_scaling(metadata, prefix),
                rms_norm_eps=shortest_decimal(required(metadata, f"{prefix}.attention.layer_norm_rms_epsilon")),
                tie_embeddings=tied,
                max_context=required(metadata, f"{prefix}.context_length"),
                family=self.name,
            )
        except ConfigError as error:
            raise GGUFError(str(error)) from error

    def hf_tensor_name(self, gguf_name: str) -> str:
        if gguf_name in _GGUF_TENSORS:
            return _GGUF_TENSORS[gguf_name]
        match gguf_name.split("."):
            case ["blk", layer, kind, "weight"] if kind in _GGUF_LAYER_TENSORS:
                return f"model.layers.{layer}.{_GGUF_LAYER_TENSORS[kind]}.weight"
        raise GGUFError(f"tensor {gguf_name} has no place in a plain Llama model")

    def hf_weight(self, gguf_name: str, weight: Weight, config: ModelConfig) -> Weight:
        if gguf_name.endswith("attn_q.weight"):
            return _unpermute(weight, config.num_heads)
        if gguf_name.endswith("attn_k.weight"):
            return _unpermute(weight, config.num_kv_heads)
        return weight


def _check_supported(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for options that change what a layer computes."""
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"hidden_act must be silu, got {activation}")
    if config.get("quantization_config") is not None:
        raise ConfigError("quantization_config must be absent: only plain weights can be run")
    if (factor := config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"partial_rotary_factor must be 1, got {factor}")


def _gguf_rope_scaling(metadata: Metadata, prefix: str) -> LinearScaling | None:
    kind = metadata.get(f"{prefix}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return LinearScaling(shortest_decimal(required(metadata, f"{prefix}.rope.scaling.factor")))
    raise GGUFError(f"{prefix}.rope.scaling.type must be none or linear, got {kind}")


def _unpermute(weight: Weight, heads: int) -> Weight:
    """Reorder the rows of a q or k matrix `[heads * hd, d]`.

    llama.cpp rotates neighbouring rows of a head; Hugging Face rotates row i of its first half with row i of its second
    half.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
