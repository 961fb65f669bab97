"""`imprint train --lexicon`: the words of texts, and their frequencies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.memory.episodic.lexicon import FREQUENCY_WORDS, load_lexicon, shipped_lexicon
from model.memory.episodic.word_tables import build_tables, words_of
from model.text.tokenizer import Tokenizer
from research.training import lexicon as training
from research.training.lexicon import train_lexicon, word_hash, words_in
from service.errors import CommandError


@pytest.mark.parametrize("text", ["My cat's tail, 12 boxes", "Zoë is naïve", "a_b x-y 3.5", ""])
def test_the_words_of_a_text_are_those_of_its_tokens(text: str, tiny_base: Path) -> None:
    tokenizer = Tokenizer.load(tiny_base)
    tokens = tokenizer.encode(text)
    tables = build_tables([tokenizer.text_bytes(token) for token in range(max(tokens, default=0) + 1)])
    assert [word_hash(word) for word in words_in(text)] == words_of(tokens, tables)


def test_a_frequency_is_the_share_of_spans_that_have_the_word() -> None:
    span = " ".join(["the"] * (FREQUENCY_WORDS - 1))
    texts = {"kind": [f"{span} cats {span} cat {span} dog"] * training.MIN_SPANS}
    names, frequency = training._count_words(texts)
    assert dict(zip(names, frequency.tolist(), strict=True)) == pytest.approx({"the": 1, "cat": 2 / 3, "dog": 1 / 3})


def test_without_texts_the_command_says_so(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="found no texts"):
        train_lexicon([tmp_path], tmp_path / "out", seed=0)


def test_the_command_writes_a_lexicon(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("My cat is called Pixel. " * 200)
    train_lexicon([tmp_path / "a.txt"], tmp_path / "out" / "lexicon.safetensors", seed=0)
    lexicon = load_lexicon(tmp_path / "out" / "lexicon.safetensors")
    assert lexicon.knows(np.array([word_hash("cat"), word_hash("dog")], np.uint32)).tolist() == [True, False]


def test_the_shipped_words_know_their_language() -> None:
    lexicon = shipped_lexicon()
    the, pixel, sister = lexicon.frequencies(np.array([word_hash(w) for w in ("the", "qxzk", "sister")], np.uint32))
    assert the > 0.5 > sister > pixel
