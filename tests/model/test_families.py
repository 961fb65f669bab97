"""A new family is one file and one registry entry: a family as such a file would have it computes its own model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from model.base import families
from model.base.checkpoint import load_backbone
from model.base.config import ConfigError, ModelConfig, tiny_config
from model.base.families import hf_config, parse_config
from model.base.families.base import DecoderLayer
from model.base.families.llama import LlamaFamily, LlamaLayer
from model.base.kv_cache import Device
from model.base.linear import Linear
from model.decode import torch_step
from model.decode.backend import choose_decode_step
from tests.model.random_models import VOCAB_SIZE, tokens


class BiasedLayer(LlamaLayer):
    """A layer with biases of q, k and v only, as Qwen2 has it."""

    def __init__(self, index: int, config: ModelConfig, *, device: Device, dtype: torch.dtype) -> None:
        super().__init__(index, config, device=device, dtype=dtype)
        inputs = config.num_heads * config.head_dim
        self.out = Linear(inputs, config.hidden_size, bias=False, device=device, dtype=dtype)


class Qwen2Family(LlamaFamily):
    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    gguf_architecture = "qwen2"

    def new_layer(self, index: int, config: ModelConfig, *, device: Device, dtype: torch.dtype) -> DecoderLayer:
        return BiasedLayer(index, config, device=device, dtype=dtype)

    def parse_config(self, config: Mapping[str, Any]) -> ModelConfig:
        return super().parse_config({**config, "attention_bias": True})


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, Qwen2Family()))


@torch.inference_mode()
def test_a_family_of_one_class_and_one_entry_computes_its_model(registered: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    original = Qwen2ForCausalLM(Qwen2Config(**sizes, initializer_range=0.2)).eval()  # type: ignore[no-untyped-call]
    for name, weight in original.named_parameters():
        if "bias" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    original.save_pretrained(tmp_path)
    backbone, ids = load_backbone(tmp_path), tokens(2, 40)
    torch.testing.assert_close(backbone.logits(backbone(ids)), original(ids).logits, atol=1e-4, rtol=0)
    assert backbone.config.family == "qwen2"
    assert choose_decode_step(backbone) is torch_step.decode, "the kernels know the layers of the Llama family only"


def test_messages_name_all_families(registered: None) -> None:
    assert parse_config(hf_config(tiny_config(family="qwen2", attention_bias=True))).family == "qwen2"
    with pytest.raises(ConfigError, match="must be LlamaForCausalLM or Qwen2ForCausalLM, got GPT2LMHeadModel"):
        parse_config({"architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(ConfigError, match="family must be llama or qwen2, got gpt2"):
        hf_config(tiny_config(family="gpt2"))
