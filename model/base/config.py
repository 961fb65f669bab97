"""The description of a decoder as plain frozen data. `model.base.families` reads a description from files.

`model.base.layer`, the caches and the fast paths in `model.decode` compute what a description says; none of them knows
a family.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

MAX_LAYERS = 1024


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


@dataclass(frozen=True)
class YarnScaling:
    """Rotary frequencies slowed by wavelength (YaRN, Peng et al. 2023, arXiv 2309.00071): waves that turn less than
    `beta_slow` times in the original context by `factor`, waves that turn more than `beta_fast` times not at all.

    truncate: whether the two bounds are rounded to whole frequencies.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_context: int
    truncate: bool = True


@dataclass(frozen=True)
class FactorScaling:
    """Each rotary frequency divided by a factor of its own (LongRoPE, Ding et al. 2024, arXiv 2402.13753)."""

    factors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FactorScaling


@dataclass(frozen=True)
class Rotary:
    """The rotary position embedding of a layer (Su et al. 2021, arXiv 2104.09864).

    dims: number of dimensions of a head that are rotated; the others are left as they are.
    magnitude: factor of the rotated queries and keys, as YaRN and LongRoPE have it.
    """

    theta: float
    dims: int
    scaling: RopeScaling | None = None
    magnitude: float = 1.0


@dataclass(frozen=True)
class LayerConfig:
    """The computation of one layer, apart from the sizes that all layers share.

    rotary: None = the layer is not told positions (NoPE).
    window: number of newest tokens, including its own, that a token attends to; None = all.
    score_scale: factor of the attention scores on top of 1 / √hd.
    residual_scale: factor of what attention and MLP add to the residual stream.
    qk_norm: norm of queries and keys before their rotation: of each head, or of all heads together.
    norm_before, norm_after: whether attention and MLP have a norm before them, and one after them.
    """

    rotary: Rotary | None
    window: int | None = None
    score_scale: float = 1.0
    residual_scale: float = 1.0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None
    norm_before: bool = True
    norm_after: bool = False
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"


@dataclass(frozen=True)
class ModelConfig:
    """The description of a decoder. Raises `ConfigError` if the numbers do not fit each other.

    embedding_scale: factor of the embedding before the first layer.
    logit_scale: factor of the logits. logit_softcap: bound c of the logits x, which become c · tanh(x / c).
    family: name of the family in `model.base.families`, which names the tensors.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    tie_embeddings: bool
    max_context: int
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
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
        for layer in self.layers:
            self._check_layer(layer)

    def _check_layer(self, layer: LayerConfig) -> None:
        if layer.window is not None and layer.window < 1:
            raise ConfigError(f"sliding_window must be at least 1, got {layer.window}")
        if layer.rotary is None:
            return
        dims, scaling = layer.rotary.dims, layer.rotary.scaling
        if dims % 2 or not 0 < dims <= self.head_dim:
            raise ConfigError(f"rotated dimensions must be even and at most head_dim {self.head_dim}, got {dims}")
        if isinstance(scaling, FactorScaling) and len(scaling.factors) != dims // 2:
            raise ConfigError(f"rotary factors must be {dims // 2}, got {len(scaling.factors)}")

    @property
    def num_layers(self) -> int:
        """Return the number of layers."""
        return len(self.layers)


def tiny_config(*, num_layers: int = 2, layer: LayerConfig | None = None, **changes: Any) -> ModelConfig:
    """Return a configuration small enough for tests, of equal layers. `changes` replaces any of its fields."""
    tiny = ModelConfig(
        vocab_size=512,
        hidden_size=64,
        layers=(LayerConfig(Rotary(10_000.0, 16)),),
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        max_context=512,
    )
    layer = layer or LayerConfig(Rotary(10_000.0, changes.get("head_dim", tiny.head_dim)))
    return replace(tiny, **({"layers": (layer,) * num_layers} | changes))
