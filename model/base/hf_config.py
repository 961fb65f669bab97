"""Reading and writing the fields of a Hugging Face `config.json` that the families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.base.config import ConfigError, LinearScaling, Llama3Scaling, RopeScaling


def integer(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Return an integer field. Raises `ConfigError` if the field is absent without a default, or no integer."""
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be an integer, got {value!r}")
    return value


def positive_number(config: Mapping[str, Any], name: str) -> float:
    """Return a number field. Raises `ConfigError` if the field is absent or not a positive number."""
    value = config.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def read_rope(config: Mapping[str, Any], max_context: int) -> tuple[float, RopeScaling | None]:
    """Return the rotary base and scaling. Raises `ConfigError` for an unsupported scaling.

    transformers 5 writes `rope_parameters`; older versions write `rope_theta` and `rope_scaling`.
    """
    rope = {"rope_theta": config.get("rope_theta", 10_000.0)}
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = positive_number(rope, "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(positive_number(rope, "factor"))
    if kind == "llama3":
        return theta, Llama3Scaling(
            factor=positive_number(rope, "factor"),
            low_freq_factor=positive_number(rope, "low_freq_factor"),
            high_freq_factor=positive_number(rope, "high_freq_factor"),
            original_context=integer(rope, "original_max_position_embeddings", default=max_context),
        )
    raise ConfigError(f"rope_type must be default, linear or llama3, got {kind}")


def rope_scaling_field(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Return the value of `rope_scaling` from which `read_rope` reads the same scaling."""
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
