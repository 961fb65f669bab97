"""Random models small enough for tests, in the formats that real ones come in."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.tiny import CHAT_TEMPLATE, SPECIAL

VOCAB_SIZE = 300
TEXT = "The cat sat on the mat; 12 cats on 345 mats. Naïve café – 猫 в доме, γάτα 🐈"


def tokens(*shape: int, vocab_size: int = VOCAB_SIZE) -> Tensor:
    """Return random token ids, the same at every call."""
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(1))


def random_llama(**changes: Any) -> LlamaForCausalLM:
    """Return a model of `transformers` with random weights, none of them near 0 or 1, which would hide its use."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 60,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "intermediate_size": 101,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    model = _randomised("llama", sizes | changes)
    assert isinstance(model, LlamaForCausalLM)
    return model


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 2.5], "long_factor": [4.0] * 6}
# Tiny decoders of every family: what is set and random besides the sizes. Windows are shorter than the texts of tests.
FAMILY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-bias": ("qwen3", {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"head_dim": 12, "sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 24, "sliding_window": 8, "query_pre_attn_scalar": 30, "num_hidden_layers": 7},
    ),
    "gemma3-capped": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": 9}),
    "phi3-part": (
        "phi3",
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 128,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75, "rope_theta": 1e4},
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2-bias": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.1,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "logits_scaling": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3-window": (
        "smollm3",
        {
            "no_rope_layers": [0, 1, 1],
            "use_sliding_window": True,
            "sliding_window": 6,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
}


def random_family_model(case: str) -> PreTrainedModel:
    """Return a model of `transformers` with random weights, of a case of `FAMILY_MODELS`."""
    family, changes = FAMILY_MODELS[case]
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 90,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _randomised(family, sizes | changes)


def _randomised(family: str, fields: dict[str, Any]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.requires_grad_(False)


@functools.cache
def byte_level_bpe() -> Tokenizer:
    """Return a byte-level BPE of `VOCAB_SIZE` tokens, trained on a few words of several scripts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    return tokenizer


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    metadata: Mapping[str, Any] = {},
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> None:
    """Write the model as llama.cpp does, with matrices of type `kind`; `metadata` changes keys or (None) drops them."""
    writer = GGUFWriter(path, "llama")
    for key, value in (_metadata(model.config) | dict(metadata)).items():
        _add(writer, key, value)
    for name, weight in model.named_parameters():
        array = _permuted(name, weight.numpy(), model.config)
        stored = kind if array.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(config: PreTrainedConfig) -> dict[str, Any]:
    bpe = json.loads(byte_level_bpe().to_str())["model"]
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": sorted(bpe["vocab"], key=bpe["vocab"].__getitem__),
        "tokenizer.ggml.token_type": [
            int(TokenType.CONTROL if i < len(SPECIAL) else TokenType.NORMAL) for i in range(VOCAB_SIZE)
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in bpe["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            pass
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _permuted(name: str, weight: np.ndarray[Any, Any], config: PreTrainedConfig) -> np.ndarray[Any, Any]:
    """Permute the rows of q and k as llama.cpp's converter does."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    assert config.head_dim
    halves = weight.reshape(-1, 2, config.head_dim // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _gguf_name(name: str) -> str:
    """Return the GGUF name of a tensor, from the table of the `gguf` package."""
    stem, suffix = name.rsplit(".", 1)
    return f"{_NAMES.get_name(stem)}.{suffix}"


_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
