"""Reading the fields of a Hugging Face `config.json` that the families share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from model.base.config import (
    MAX_LAYERS,
    ConfigError,
    FactorScaling,
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    Rotary,
    YarnScaling,
)

Fields = Mapping[str, Any]
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def read_config(fields: Fields, family: str, layer: Callable[[int], LayerConfig], **changes: Any) -> ModelConfig:
    """Return the configuration of a `config.json`.

    layer: returns the description of a layer by its index. changes: fields of the configuration that are not the same
    in all families. Raises `ConfigError` for what is missing or unsupported.
    """
    if fields.get("quantization_config") is not None:
        raise ConfigError("quantization_config must be absent: only plain weights can be run")
    shared = {
        "vocab_size": integer(fields, "vocab_size"),
        "hidden_size": integer(fields, "hidden_size"),
        "num_heads": integer(fields, "num_attention_heads"),
        "num_kv_heads": integer(fields, "num_key_value_heads", default=integer(fields, "num_attention_heads")),
        "head_dim": head_dim(fields),
        "intermediate_size": integer(fields, "intermediate_size"),
        "rms_norm_eps": positive_number(fields, "rms_norm_eps"),
        "tie_embeddings": flag(fields, "tie_word_embeddings"),
        "max_context": _usable_context(fields),
    }
    layers = tuple(layer(index) for index in range(num_layers(fields)))
    return ModelConfig(**(shared | {"layers": layers, "family": family} | changes))


def integer(fields: Fields, name: str, default: int | None = None) -> int:
    """Return an integer field. Raises `ConfigError` if the field is absent without a default, or no integer."""
    value = fields.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be an integer, got {value!r}")
    return value


def positive_number(fields: Fields, name: str, default: float | None = None) -> float:
    """Return a number field. Raises `ConfigError` if the field is absent without a default, or no positive number."""
    value = fields.get(name)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def flag(fields: Fields, name: str, default: bool = False) -> bool:
    """Return a field that is true or false. Raises `ConfigError` for anything else."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
    return value


def refuse(fields: Fields, *names: str) -> None:
    """Raise `ConfigError` for a field that is set and that no layer computes."""
    for name in names:
        if fields.get(name):
            raise ConfigError(f"{name} must be absent, got {fields[name]!r}")


def num_layers(fields: Fields) -> int:
    """Return the number of layers. Raises `ConfigError`."""
    number = integer(fields, "num_hidden_layers")
    if not 0 < number <= MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers must be from 1 to {MAX_LAYERS}, got {number}")
    return number


def head_dim(fields: Fields) -> int:
    """Return the number of dimensions of a head. Raises `ConfigError`."""
    heads = max(integer(fields, "num_attention_heads"), 1)
    return integer(fields, "head_dim", default=integer(fields, "hidden_size") // heads)


def activation(fields: Fields, name: str = "hidden_act", default: str = "silu") -> Any:
    """Return the activation of the MLP. Raises `ConfigError` for one that is not computed."""
    value = fields.get(name) or default
    if value not in ("silu", "gelu_pytorch_tanh"):
        raise ConfigError(f"{name} must be silu or gelu_pytorch_tanh, got {value}")
    return value


def windows(fields: Fields, default: Callable[[int], bool]) -> list[int | None]:
    """Return the window of each layer.

    default: whether a layer attends to a window, by its index, where `layer_types` is absent. Raises `ConfigError`.
    """
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if default(i) else "full_attention" for i in range(num_layers(fields))]
    if not isinstance(kinds, list) or len(kinds) != num_layers(fields):
        raise ConfigError(f"layer_types must be a list of {num_layers(fields)} names, got {kinds!r}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"layer_types must be full_attention or sliding_attention, got {kind}")
    return [integer(fields, "sliding_window") if kind == "sliding_attention" else None for kind in kinds]


def rope_fields(fields: Fields, theta: float = 10_000.0) -> dict[str, Any]:
    """Return the fields of the rotary position embedding; `theta` is the family's default base.

    transformers 5 writes `rope_parameters`; older versions write `rope_theta` and `rope_scaling`.
    """
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    rope = {"rope_theta": fields.get("rope_theta", theta)} | given
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if rope["rope_type"] == "su":  # the older name
        rope["rope_type"] = "longrope"
    if "original_max_position_embeddings" not in rope:
        own = fields.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = own or integer(fields, "max_position_embeddings")
    return rope


def read_rotary(fields: Fields, rope: Fields | None = None, *, partial: bool = False) -> Rotary:
    """Return the rotary position embedding. Raises `ConfigError` for an unsupported one.

    rope: by default the result of `rope_fields`. partial: whether the family rotates only some dimensions.
    """
    rope = rope_fields(fields) if rope is None else rope
    share = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if share != 1.0 and not partial:
        raise ConfigError(f"partial_rotary_factor must be 1, got {share}")
    scaling, magnitude = _scaling(fields, rope)
    return Rotary(positive_number(rope, "rope_theta"), int(head_dim(fields) * share), scaling, magnitude)


def _scaling(fields: Fields, rope: Fields) -> tuple[RopeScaling | None, float]:
    """Return the scaling of the frequencies, and the magnitude of what is rotated."""
    match rope["rope_type"]:
        case "default":
            return None, 1.0
        case "linear":
            return LinearScaling(positive_number(rope, "factor")), 1.0
        case "llama3":
            scaling = Llama3Scaling(
                factor=positive_number(rope, "factor"),
                low_freq_factor=positive_number(rope, "low_freq_factor"),
                high_freq_factor=positive_number(rope, "high_freq_factor"),
                original_context=integer(rope, "original_max_position_embeddings"),
            )
            return scaling, 1.0
        case "yarn":
            yarn = YarnScaling(
                factor=positive_number(rope, "factor"),
                beta_fast=positive_number(rope, "beta_fast", default=32.0),
                beta_slow=positive_number(rope, "beta_slow", default=1.0),
                original_context=integer(rope, "original_max_position_embeddings"),
                truncate=flag(rope, "truncate", default=True),
            )
            return yarn, _yarn_magnitude(rope)
        case "longrope":
            return FactorScaling(_factors(rope, "short_factor")), _longrope_magnitude(fields, rope)
        case other:
            raise ConfigError(f"rope_type must be {' or '.join(ROPE_TYPES)}, got {other}")


def _yarn_magnitude(rope: Fields) -> float:
    factor = positive_number(rope, "factor")

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return positive_number(rope, "attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return magnitude(positive_number(rope, "mscale")) / magnitude(positive_number(rope, "mscale_all_dim"))
    return magnitude(1.0)


def _longrope_magnitude(fields: Fields, rope: Fields) -> float:
    original = integer(rope, "original_max_position_embeddings")
    factor = positive_number(rope, "factor", default=integer(fields, "max_position_embeddings") / max(original, 1))
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return positive_number(rope, "attention_factor", default=usual)


def _factors(rope: Fields, name: str) -> tuple[float, ...]:
    given = rope.get(name)
    if not isinstance(given, list):
        raise ConfigError(f"{name} must be a list of numbers, got {given!r}")
    return tuple(positive_number({name: factor}, name) for factor in given)


def _usable_context(fields: Fields) -> int:
    """Return the number of tokens of the longest sequence.

    LongRoPE has other frequencies for sequences longer than the original context, and keys that are cached have been
    rotated by the frequencies for short ones. Sequences therefore end there if the two differ.
    """
    context, rope = integer(fields, "max_position_embeddings"), rope_fields(fields)
    if rope["rope_type"] == "longrope" and _factors(rope, "short_factor") != _factors(rope, "long_factor"):
        return min(context, integer(rope, "original_max_position_embeddings"))
    return context
