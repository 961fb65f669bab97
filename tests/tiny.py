"""Builders of tiny checkpoints in the real file formats: a base with a byte-level tokenizer, and two policies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from model.base.config import ModelConfig, tiny_config
from model.memory import MemoryConfig, SiteConfig
from model.policies.config import PolicyConfig
from model.policies.journal import journal_site
from model.policies.network import new_policy, save_policy

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
INFILL_SPECIAL = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = (
    "The quick brown fox jumps over the lazy dog. A memory that learns while it serves is written sparsely and read "
    "often; the fox learns the way home, and the dog learns to sleep. What was said before is said again. "
)


def build_tiny_base(
    folder: Path, config: ModelConfig | None = None, seed: int = 0, special: Sequence[str] = SPECIAL
) -> Path:
    """Write a Hugging Face folder with random weights and some special tokens, and return the folder."""
    config = config or tiny_config(max_context=512)
    folder.mkdir(parents=True)
    fields = llama_fields(config)
    torch.manual_seed(seed)
    reference = LlamaForCausalLM(LlamaConfig(**fields, initializer_range=0.2))
    reference.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 8, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def llama_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the content of the `config.json` of a plain Llama model of a configuration's sizes."""
    rotary = config.layers[0].rotary
    assert rotary is not None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rope_theta": rotary.theta,
        "rope_scaling": None,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_context,
        "attention_bias": False,
        "mlp_bias": False,
    }


def build_tiny_policies(folder: Path) -> list[Path]:
    """Write two untrained policies, and return their files.

    "chooser" picks one of 3 actions; an observation is 2 numbers of context and 2 numbers for each action. "namer"
    gives one of 5 labels to 6 numbers.
    """
    folder.mkdir(parents=True)
    memory = MemoryConfig(16 + 2, (SiteConfig("memory", "hidden", slots=64, k=2, width=8, decay=0.5), journal_site(7)))
    act_policy = PolicyConfig("chooser", "act", 2, 3, memory, features=2, identity=False, cue=2, width=16)
    labels = MemoryConfig(16, (SiteConfig("memory", "lexical", slots=32, cell=8, k=2, width=8),))
    label_policy = PolicyConfig("namer", "label", 6, 5, labels, width=16)
    paths = []
    for config in (act_policy, label_policy):
        policy = new_policy(config, seed=1)
        policy.head.weight.mul_(10)  # sharper decisions, so that learning changes them
        paths.append(folder / f"{config.name}.safetensors")
        save_policy(policy, paths[-1])
    return paths
