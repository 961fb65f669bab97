"""The shape of a decoder as plain frozen data. `model.base.families` reads a configuration from files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


class ConfigError(ValueError):
    """A model configuration that is incomplete, contradictory or unsupported."""


@dataclass(frozen=True)
class LinearScaling:
    """Rotary frequencies divided by one factor ("position interpolation", Chen et al. 2023, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Rotary frequencies slowed by wavelength, as in Llama 3.1: long waves by `factor`, short waves not at all."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


RopeScaling = LinearScaling | Llama3Scaling


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. Raises `ConfigError` if the numbers do not fit each other.

    family: name of the family in `model.base.families`, which builds the layers.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    tie_embeddings: bool
    max_context: int
    attention_bias: bool = False
    mlp_bias: bool = False
    family: str = "llama"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                     "intermediate_size", "max_context"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            heads = f"{self.num_heads} and {self.num_kv_heads}"
            raise ConfigError(f"num_heads must be a multiple of num_kv_heads, got {heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")


def tiny_config(**changes: Any) -> ModelConfig:
    """Return a configuration small enough for tests. `changes` replaces any of its fields."""
    tiny = ModelConfig(
        vocab_size=512,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        rope_theta=10_000.0,
        rope_scaling=None,
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        max_context=512,
    )
    return replace(tiny, **changes)
