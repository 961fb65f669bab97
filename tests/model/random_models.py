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


def random_family_model(case: str, **more: Any) -> PreTrainedModel:
    """Return a model of `transformers` with random weights, of a case of `FAMILY_MODELS` with more changes."""
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
    return _randomised(family, sizes | changes | more)


def _randomised(family: str, fields: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **fields)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
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
    model: PreTrainedModel,
    *,
    metadata: Mapping[str, Any] = {},
    tensors: Mapping[str, np.ndarray[Any, Any]] = {},
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> None:
    """Write the model as llama.cpp does, with matrices of type `kind`.

    metadata: changes keys or (None) drops them. tensors: are written besides those of the model.
    """
    arch = ARCHITECTURES[model.config.model_type]
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    for key, value in (_metadata(model.config) | dict(metadata)).items():
        _add(writer, key, value)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, weight in model.named_parameters():
        array = _as_stored(name, weight.numpy(), model.config)
        stored = kind if array.ndim == 2 else GGMLQuantizationType.F32
        stem, suffix = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", quantized(array, stored), raw_dtype=stored)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(array: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """Return a matrix as blocks of a type; random blocks, if the `gguf` package only reads the type."""
    try:
        return quantize(array, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape = (array.shape[0], array.shape[1] // block * size)
        return np.random.default_rng(array.shape[0]).integers(0, 60, shape).astype(np.uint8)  # finite scales


# llama.cpp's architecture of each model type of transformers.
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}
PERMUTED = ("llama", "mistral", "granite", "smollm3")  # by llama.cpp's converter


def _metadata(config: PreTrainedConfig) -> dict[str, Any]:
    arch = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    return {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
        **{key: getattr(config, name) for name, key in _FAMILY_KEYS.get(config.model_type, {}).items()},
        **_tokenizer_metadata(),
    }


def _tokenizer_metadata() -> dict[str, Any]:
    bpe = json.loads(byte_level_bpe().to_str())["model"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": sorted(bpe["vocab"], key=bpe["vocab"].__getitem__),
        "tokenizer.ggml.token_type": [
            int(TokenType.CONTROL if i < len(SPECIAL) else TokenType.NORMAL) for i in range(VOCAB_SIZE)
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in bpe["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


_FAMILY_KEYS = {
    "gemma3_text": {"sliding_window": gguf.Keys.Attention.SLIDING_WINDOW.format(arch="gemma3")},
    "phi3": {
        "sliding_window": gguf.Keys.Attention.SLIDING_WINDOW.format(arch="phi3"),
        "original_max_position_embeddings": gguf.Keys.Rope.SCALING_ORIG_CTX_LEN.format(arch="phi3"),
    },
    "granite": {
        "attention_multiplier": gguf.Keys.Attention.SCALE.format(arch="granite"),
        "embedding_multiplier": gguf.Keys.LLM.EMBEDDING_SCALE.format(arch="granite"),
        "residual_multiplier": gguf.Keys.LLM.RESIDUAL_SCALE.format(arch="granite"),
        "logits_scaling": gguf.Keys.LLM.LOGIT_SCALE.format(arch="granite"),
    },
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


def _as_stored(name: str, weight: np.ndarray[Any, Any], config: PreTrainedConfig) -> np.ndarray[Any, Any]:
    """Return a weight as llama.cpp's converter stores it: q and k permuted, a norm's weight complete."""
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return weight + 1
    if config.model_type not in PERMUTED or not any(f"{part}_proj." in name for part in "qk"):
        return weight
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
