"""The sentence encoder: the network of `transformers`, text by text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model.text.sentence_encoder import MAX_TOKENS, SentenceEncoder
from tests.model.tiny_encoder import bert, word_tokenizer

WORDS = ["my", "cat", "is", "called", "pixel"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of an encoder of three layers."""
    network, tokenizer = bert(len(WORDS) + 1, size=20, layers=3), word_tokenizer(WORDS)
    (tmp_path / "config.json").write_text(json.dumps(network.config.to_dict()))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


@torch.inference_mode()
@pytest.mark.parametrize("text", ["my cat is called pixel", "cat", "what ? " * 40, "cat pixel " * MAX_TOKENS])
def test_a_vector_is_that_of_transformers(folder: Path, text: str) -> None:
    encoder, network = SentenceEncoder.load(folder), bert(len(WORDS) + 1, size=20, layers=3)
    ids = word_tokenizer(WORDS).encode(text).ids[:MAX_TOKENS]
    states = network(input_ids=torch.tensor([ids])).last_hidden_state[0]
    assert np.abs(encoder(text) - 127 * F.normalize(states.mean(0), dim=0).numpy()).max() <= 0.51


@torch.inference_mode()
def test_the_windows_of_a_long_text_hold_all_of_it(folder: Path) -> None:
    encoder, network = SentenceEncoder.load(folder), bert(len(WORDS) + 1, size=20, layers=3)
    ids = word_tokenizer(WORDS).encode(text := "cat pixel my " * MAX_TOKENS).ids
    windows = encoder.windows(text)
    assert [len(window) for window in windows] == [MAX_TOKENS] * 3
    assert [token for window in windows for token in window] == ids
    assert encoder.windows("") == []
    states = network(input_ids=torch.tensor(windows[1:2])).last_hidden_state[0]
    assert np.allclose(encoder.sum_of_states(windows[1]), states.sum(0).numpy(), atol=1e-3)


def test_encoders_of_other_weights_have_other_ids(folder: Path) -> None:
    first = SentenceEncoder.load(folder)
    assert first.id > 0 and first.id == SentenceEncoder.load(folder).id
    weights = bert(len(WORDS) + 1, size=20, layers=3).state_dict()
    save_file({name: 2 * weight for name, weight in weights.items()}, folder / "model.safetensors")
    assert SentenceEncoder.load(folder).id != first.id


def test_a_text_without_tokens_has_a_vector(folder: Path) -> None:
    assert not SentenceEncoder.load(folder)("").any()
