"""The families of decoders that `Backbone` can run, one file a family, and the lookup of a family.

A new family is one file here and one entry of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.base.config import ConfigError, ModelConfig
from model.base.families.base import Family
from model.base.families.llama import LlamaFamily
from model.base.gguf_metadata import GGUFError, Metadata, required

FAMILIES: tuple[Family, ...] = (LlamaFamily(),)


def family_of(config: ModelConfig) -> Family:
    """Return the family that `config` names. Raises `ConfigError` if there is no such family."""
    for family in FAMILIES:
        if family.name == config.family:
            return family
    known = " or ".join(family.name for family in FAMILIES)
    raise ConfigError(f"family must be {known}, got {config.family}")


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read the content of a Hugging Face `config.json`. Raises `ConfigError` if the model is unsupported."""
    architectures = config.get("architectures") or [config.get("model_type", "nothing")]
    for family in FAMILIES:
        if architectures in ([family.architecture], [family.name]):
            return family.parse_config(config)
    known = " or ".join(family.architecture for family in FAMILIES)
    raise ConfigError(f"architectures must be {known}, got {', '.join(map(str, architectures))}")


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the content of a Hugging Face `config.json` from which `parse_config` reads an equal configuration."""
    return family_of(config).hf_config(config)


def family_of_gguf(metadata: Metadata) -> Family:
    """Return the family of a GGUF file. Raises `GGUFError` if the architecture is unsupported."""
    architecture = required(metadata, "general.architecture")
    for family in FAMILIES:
        if architecture == family.gguf_architecture:
            return family
    known = " or ".join(family.gguf_architecture for family in FAMILIES)
    raise GGUFError(f"general.architecture must be {known}, got {architecture}")
