"""What a model is made of, as plain frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

ARCHITECTURE = "LlamaForCausalLM"


class ConfigError(ValueError):
    """A model configuration that is incomplete, contradictory or of a kind that cannot be run."""


@dataclass(frozen=True)
class LinearScaling:
    """Rotary frequencies divided by one factor ("position interpolation", Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Rotary frequencies slowed by wavelength, as in Llama 3.1: long waves by `factor`, short ones not."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


RopeScaling = LinearScaling | Llama3Scaling


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder of the Llama family. Raises `ConfigError` if the numbers do not fit each other."""

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

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read the content of a Hugging Face `config.json`; raises `ConfigError` for what cannot be run."""
        _refuse_unsupported(config)
        hidden_size, num_heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
        max_context = _integer(config, "max_position_embeddings")
        rope_theta, rope_scaling = _rope(config, max_context)
        return cls(
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=_integer(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_integer(config, "num_key_value_heads", default=num_heads),
            head_dim=_integer(config, "head_dim", default=hidden_size // max(num_heads, 1)),
            intermediate_size=_integer(config, "intermediate_size"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rms_norm_eps=_number(config, "rms_norm_eps"),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_context=max_context,
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a Hugging Face `config.json` from which `from_hf` reads the same back."""
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rope_scaling": _rope_scaling_to_hf(self.rope_scaling),
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_context,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        }


def tiny_config(**changes: Any) -> ModelConfig:
    """A configuration small enough for tests, with any field changed."""
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


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures") or [config.get("model_type", "nothing")]
    if architectures not in ([ARCHITECTURE], ["llama"]):
        raise ConfigError(f"architectures must be {ARCHITECTURE}, got {', '.join(map(str, architectures))}")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"hidden_act must be silu, got {activation}")
    if config.get("quantization_config") is not None:
        raise ConfigError("quantization_config must be absent: only plain weights can be run")
    if (factor := config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"partial_rotary_factor must be 1, got {factor}")


def _rope(config: Mapping[str, Any], max_context: int) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from `rope_parameters` (transformers 5) or the two fields it replaced."""
    rope = {"rope_theta": config.get("rope_theta", 10_000.0)}
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = _number(rope, "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(_number(rope, "factor"))
    if kind == "llama3":
        return theta, Llama3Scaling(
            factor=_number(rope, "factor"),
            low_freq_factor=_number(rope, "low_freq_factor"),
            high_freq_factor=_number(rope, "high_freq_factor"),
            original_context=_integer(rope, "original_max_position_embeddings", default=max_context),
        )
    raise ConfigError(f"rope_type must be default, linear or llama3, got {kind}")


def _rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def _integer(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be an integer, got {value!r}")
    return value


def _number(config: Mapping[str, Any], name: str) -> float:
    value = config.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"{name} must be a positive number, got {value!r}")
    return float(value)
