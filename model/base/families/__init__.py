"""The families of decoders that a `Backbone` can be loaded from, one file a family, and the lookup of a family.

A new family is one file here and one entry of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.base.config import ConfigError, ModelConfig
from model.base.families.base import Family
from model.base.families.gemma3 import Gemma3Family
from model.base.families.granite import GraniteFamily
from model.base.families.llama import LlamaFamily
from model.base.families.mistral import MistralFamily
from model.base.families.olmo2 import Olmo2Family
from model.base.families.phi3 import Phi3Family
from model.base.families.qwen2 import Qwen2Family
from model.base.families.qwen3 import Qwen3Family
from model.base.families.smollm3 import SmolLM3Family
from model.base.gguf_metadata import GGUFError, Metadata, required

FAMILIES: tuple[Family, ...] = (
    LlamaFamily(),
    Qwen2Family(),
    Qwen3Family(),
    MistralFamily(),
    Gemma3Family(),
    Phi3Family(),
    Olmo2Family(),
    GraniteFamily(),
    SmolLM3Family(),
)


def family_of(config: ModelConfig) -> Family:
    """Return the family that `config` names. Raises `ConfigError` if there is no such family."""
    for family in FAMILIES:
        if family.name == config.family:
            return family
    known = " or ".join(family.name for family in FAMILIES)
    raise ConfigError(f"family must be {known}, got {config.family}")


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Read the content of a Hugging Face `config.json`. Raises `ConfigError` if the model is unsupported."""
    architectures = fields.get("architectures") or [fields.get("model_type", "nothing")]
    for family in FAMILIES:
        if architectures in ([family.architecture], [family.name]):
            return family.parse_config(fields)
    known = " or ".join(family.architecture for family in FAMILIES)
    raise ConfigError(f"architectures must be {known}, got {', '.join(map(str, architectures))}")


def family_of_gguf(metadata: Metadata) -> Family:
    """Return the family of a GGUF file. Raises `GGUFError` if the architecture is unsupported."""
    architecture = required(metadata, "general.architecture")
    for family in FAMILIES:
        if architecture == family.gguf_architecture:
            return family
    known = " or ".join(family.gguf_architecture for family in FAMILIES if family.gguf_architecture)
    raise GGUFError(f"general.architecture must be {known}, got {architecture}")
