"""`imprint train --lexicon`: the words of texts, their frequencies, and vectors that fit a teacher's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.memory.episodic.lexicon import FREQUENCY_WORDS, shipped_lexicon
from model.memory.episodic.word_tables import build_tables, words_of
from model.text.tokenizer import Tokenizer
from research.evaluation.recall import embedder
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


def test_word_vectors_learn_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BATCH", 32)
    monkeypatch.setattr(training, "HELD_OUT", 50)
    rng, names = np.random.default_rng(0), [f"word{number}" for number in range(40)]
    truth = torch.randn(40, 8)
    rows = [rng.choice(40, 5) for _ in range(4000)]
    teacher = F.normalize(torch.stack([truth[row].sum(0) for row in rows]), dim=-1)
    student = training._Student(truth + torch.randn(40, 8), torch.full((40,), 0.01), names)
    texts = [" ".join(names[word] for word in row) for row in rows]

    @torch.no_grad()
    def error() -> float:
        return float((1 - (student._texts([row.tolist() for row in rows]) * teacher).sum(-1)).mean())

    before = error()
    student.fit(texts, teacher, seed=0)
    assert error() < 0.5 * before


def test_without_texts_or_teacher_the_command_says_so(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="found no texts"):
        train_lexicon([tmp_path], tmp_path / "out", tmp_path, seed=0)
    if not embedder.is_installed():
        (tmp_path / "a.txt").write_text("My cat is called Pixel. " * 200)
        with pytest.raises(CommandError, match="embedder"):
            train_lexicon([tmp_path / "a.txt"], tmp_path / "out", tmp_path, seed=0)


def test_the_shipped_words_know_their_language() -> None:
    lexicon = shipped_lexicon()

    def vector(text: str) -> np.ndarray:
        return lexicon.vector(np.array([word_hash(word) for word in words_in(text)], np.uint32))

    assert vector("pet") @ vector("cat") > vector("pet") @ vector("invoice")
    assert vector("Who pays my wages?") @ vector("My employer is") > vector("Who pays my wages?") @ vector("My cat is")
    the, pixel, sister = lexicon.frequencies(np.array([word_hash(w) for w in ("the", "qxzk", "sister")], np.uint32))
    assert the > 0.5 > sister > pixel
