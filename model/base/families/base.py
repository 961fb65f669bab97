"""The interface of a family of decoders: all that differs between the families that `Backbone` can run.

A family has one file in this folder and one line in the registry, `model.base.families.FAMILIES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import PreTokenizer
from torch import Tensor, nn

from model.base.attention import AttentionFn
from model.base.config import ModelConfig
from model.base.gguf_metadata import Metadata
from model.base.kv_cache import Device

Weight = NDArray[np.float32]


class DecoderLayer(nn.Module, ABC):
    """One layer of a decoder."""

    index: int

    @abstractmethod
    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: AttentionFn) -> Tensor:
        """Return the residual stream `[B, T, d]` after the layer.

        hidden: residual stream `[B, T, d]` before the layer.
        cos, sin: rotation `[B, T, 1, hd]` of each token's position.
        attend: attention over the tokens of this pass and of the caches, called once with `self.index`.
        """

    @abstractmethod
    def weight_destinations(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each tensor in Hugging Face's checkpoint, relative to `model.layers.<index>`, with the
        part of this layer's weights that the tensor fills."""


class Family(ABC):
    """A family of decoders: its layer, and its configuration and tensor names in both file formats.

    name: `ModelConfig.family` of its decoders, and `model_type` in `config.json`.
    architecture: the entry of `architectures` in `config.json`.
    gguf_architecture: `general.architecture` in a GGUF file.
    gguf_pre_tokenizers: makers of the pre-tokenizers that its models use, by `tokenizer.ggml.pre`, llama.cpp's name of
        the rule by which text is cut before BPE.
    """

    name: str
    architecture: str
    gguf_architecture: str
    gguf_pre_tokenizers: Mapping[str, Callable[[], PreTokenizer]]

    @abstractmethod
    def parse_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """Read the content of a `config.json`. Raises `ConfigError` for what the layer does not compute."""

    @abstractmethod
    def hf_config(self, config: ModelConfig) -> dict[str, Any]:
        """Return the content of a `config.json` from which `parse_config` reads an equal configuration."""

    @abstractmethod
    def new_layer(self, index: int, config: ModelConfig, *, device: Device, dtype: torch.dtype) -> DecoderLayer:
        """Return layer `index` with undefined weights."""

    @abstractmethod
    def parse_gguf_config(self, metadata: Metadata, *, tied: bool) -> ModelConfig:
        """Read the metadata of a GGUF file. Raises `GGUFError` for what is missing or unsupported.

        tied: whether the file has no output matrix of its own.
        """

    @abstractmethod
    def hf_tensor_name(self, gguf_name: str) -> str:
        """Return Hugging Face's name of a tensor. Raises `GGUFError` for a tensor that the family does not have."""

    @abstractmethod
    def hf_weight(self, gguf_name: str, weight: Weight, config: ModelConfig) -> Weight:
        """Return a tensor of a GGUF file with its rows in Hugging Face's order."""
