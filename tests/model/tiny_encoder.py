"""A sentence encoder of one layer with random weights, to which some words mean the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import BertConfig, BertModel

from model.episodes import MEANING_NUMBERS
from model.text.sentence_encoder import SentenceEncoder


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Return a tokenizer with a token for each word, and one for all others."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(("?", *words))}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def bert(vocab_size: int, *, size: int = MEANING_NUMBERS, layers: int = 1) -> BertModel:
    """Return a network of `transformers` with random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * size,
    )
    network = BertModel(config, add_pooling_layer=False)
    network.train(False)
    return network


def save_encoder(folder: Path, words: Sequence[str]) -> Path:
    """Write the files of a tiny encoder to a new folder, and return the folder."""
    encoder = tiny_encoder(words)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(bert(len(words) + 1).config.to_dict()))
    word_tokenizer(words).save(str(folder / "tokenizer.json"))
    save_file(encoder._weights, folder / "model.safetensors")
    return folder


def tiny_encoder(words: Sequence[str], same: Sequence[tuple[str, str]] = (), number: int = 1) -> SentenceEncoder:
    """Return an encoder to which the two words of each pair of `same` mean the same; its id is `number`."""
    tokenizer = word_tokenizer(words)
    network = bert(tokenizer.get_vocab_size())
    weights: dict[str, Tensor] = dict(network.state_dict())
    for name in ("position_embeddings", "token_type_embeddings"):  # all texts share them, which makes all alike
        weights[f"embeddings.{name}.weight"].zero_()
    embeddings = weights["embeddings.word_embeddings.weight"]
    for one, other in same:
        embeddings[tokenizer.token_to_id(other)] = embeddings[tokenizer.token_to_id(one)]
    return SentenceEncoder(network.config.to_dict(), tokenizer, weights, number)
