"""The interface of a family of decoders: how its files describe a decoder and name the tensors.

A family has one file in this folder and one line in the registry, `model.base.families.FAMILIES`. It computes nothing:
`model.base.layer` computes every description.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from gguf import ReaderTensor
from torch import Tensor

from model.base.config import ModelConfig
from model.base.gguf_metadata import GGUFError, Metadata, Weight, read_fields
from model.base.layer import DecoderLayer

# Parts of a layer (`DecoderLayer.weights`), as most families name them in a Hugging Face checkpoint.
TENSOR_NAMES = MappingProxyType(
    {
        "attention_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
)
# The same parts in a GGUF file.
_GGUF_LAYER_NAMES = {
    "attn_norm": "attention_norm",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_qkv": "qkv",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "attn_output": "out",
    "post_attention_norm": "attention_out_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
    "post_ffw_norm": "mlp_out_norm",
}
_GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class Family(ABC):
    """A family of decoders: how to read its configuration and its tensors in both file formats.

    name: `ModelConfig.family` of its decoders, and `model_type` in `config.json`.
    architecture: the entry of `architectures` in `config.json`.
    gguf_architecture: `general.architecture` in a GGUF file; None = llama.cpp has no architecture of its own for it.
    tensor_names: each part of a layer, as `config.json`'s checkpoint names it, relative to `model.layers.<index>`.
    norm_offset: what a norm's weight in a checkpoint lacks.
    gguf_permutes: whether llama.cpp's converter reorders the rows of q and k.
    """

    name: str
    architecture: str
    gguf_architecture: str | None = None
    tensor_names: Mapping[str, str] = TENSOR_NAMES
    norm_offset = 0.0
    gguf_permutes = False

    @abstractmethod
    def parse_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        """Read the content of a `config.json`. Raises `ConfigError` for what is missing or not computed."""

    def layer_tensors(self, layer: DecoderLayer) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each tensor of a layer in a checkpoint, with the part of the weights that it fills."""
        for name, weight in layer.weights():
            part, kind = name.split(".")
            if part in self.tensor_names:
                yield f"model.layers.{layer.index}.{self.tensor_names[part]}.{kind}", weight

    def gguf_fields(self, metadata: Metadata, tensors: Mapping[str, ReaderTensor]) -> dict[str, Any]:
        """Return the content of a `config.json` for a GGUF file. Raises `GGUFError` for what is missing."""
        assert self.gguf_architecture
        names = {"architectures": [self.architecture], "model_type": self.name}
        return names | read_fields(metadata, self.gguf_architecture, tensors)

    def hf_tensor_name(self, gguf_name: str) -> str:
        """Return Hugging Face's name of a tensor. Raises `GGUFError` for a tensor that the family does not have."""
        if gguf_name in _GGUF_NAMES:
            return _GGUF_NAMES[gguf_name]
        match gguf_name.split("."):
            case ["blk", layer, name, kind]:
                part = _GGUF_LAYER_NAMES.get(name, "")
                if part == "up" and "gate_up" in self.tensor_names:
                    part = "gate_up"
                if part in self.tensor_names:
                    return f"model.layers.{layer}.{self.tensor_names[part]}.{kind}"
        raise GGUFError(f"tensor {gguf_name} has no place in a model of the architecture {self.gguf_architecture}")

    def hf_weight(self, gguf_name: str, weight: Weight, config: ModelConfig) -> Weight:
        """Return a tensor of a GGUF file as a Hugging Face checkpoint has it."""
        part = gguf_name.split(".")[-2]
        if self.gguf_permutes and part in ("attn_q", "attn_k"):
            return _unpermute(weight, config.num_heads if part == "attn_q" else config.num_kv_heads)
        if self.norm_offset and part.endswith("norm"):
            return weight - weight.dtype.type(self.norm_offset)
        return weight


def _unpermute(weight: Weight, heads: int) -> Weight:
    """Reorder the rows of q or k `[heads * hd, ...]`.

    llama.cpp rotates neighbouring rows of a head; Hugging Face rotates row i of its first half with row i of its second
    half.
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
