"""`imprint train --lexicon`: the frequencies and the vectors of words, by which questions find episodes.

The vector of a text is the sum of its words' vectors. It is trained to be the vector of a sentence embedder, the
teacher, reduced to `DIMENSIONS` principal components. The teacher is needed for training only.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.memory.episodic.lexicon import FREQUENCY_WORDS, Lexicon, save_lexicon
from model.memory.episodic.word_tables import hash_bytes
from research.corpus import console, progress_bar, read_text, text_files
from research.evaluation.recall.embedder import load_embedder
from research.evaluation.recall.people import invent_scenes
from research.evaluation.recall.scenes import Scene
from research.evaluation.recall.statements import correction_scenes, number_scenes
from research.runs import ResultCache, content_hash
from service.errors import CommandError

DIMENSIONS = 64
WORDS = 48_000  # most words
MIN_SPANS = 4  # in which a word occurs
CHARS_OF_A_KIND = 4_000_000  # that words are counted in
CHARS_OF_A_FILE = 400_000
SENTENCES = 44_000  # of the texts
STATEMENTS = 6_000  # invented, with their questions
INVENTIONS = 10  # seeds
EPOCHS, BATCH = 8, 512
TEACHER_BATCH = 2_048
RELATIONS = 5.0  # weight of the cosines between texts, beside those to the teacher's vectors
HELD_OUT = 1_500
ABOUT_SOMEBODY = re.compile(r"\b(I|you|we|he|she|they|my|your|our|his|her|me|us)\b|\?", re.IGNORECASE)


def train_lexicon(paths: Sequence[Path], out: Path, work: Path, seed: int) -> None:
    """Train on texts and write a lexicon to `out`; a stopped run resumes from `work`. Raises CommandError."""
    torch.manual_seed(seed)
    texts = _texts_by_kind(paths, seed)
    names, frequency = _count_words(texts)
    sentences = sorted({*_sentences(texts, seed), *_statements(seed)}, key=lambda text: (len(text), text))
    console.print(f"{len(names):,} words, {len(sentences):,} sentences")
    cache = ResultCache(work / "words")
    teacher = _embed(sentences, cache, "sentences")
    components = torch.linalg.svd(teacher[:: max(1, len(teacher) // 12_000)], full_matrices=False)[2][:DIMENSIONS].T
    first = _embed(names, cache, "words") @ components
    student = _Student(first, torch.from_numpy(frequency), names)
    student.fit(sentences, F.normalize(teacher @ components, dim=-1), seed)
    hashes = np.array([word_hash(name) for name in names], np.uint32)
    lexicon = Lexicon.quantised(hashes, frequency, student.weighted_vectors().numpy())
    out.parent.mkdir(parents=True, exist_ok=True)
    save_lexicon(lexicon, out)
    console.print(f"{out}: {out.stat().st_size:,} bytes")


def words_in(text: str) -> list[str]:
    """Return the words of a text as `word_tables.words_of` cuts them, without a final "s"."""
    return [word.lower().removesuffix("s") for word in re.findall(r"[^\W_]+", text)]


def word_hash(word: str) -> int:
    """Return the hash by which `word_tables.words_of` knows a word of `words_in`."""
    return hash_bytes(word.encode())[0]


def _texts_by_kind(paths: Sequence[Path], seed: int) -> dict[str, list[str]]:
    """Return parts of the texts of each kind, of `CHARS_OF_A_KIND` characters in total."""
    by_kind: dict[str, list[Path]] = {}
    for file, kind in text_files(paths):
        by_kind.setdefault(kind, []).append(file)
    if not by_kind:
        raise CommandError("found no texts to count words in")
    found = {}
    for kind, its_files in by_kind.items():
        rng, parts, size = random.Random(f"{kind} {seed}"), list[str](), 0
        share = max(20_000, 2 * CHARS_OF_A_KIND // len(its_files))
        for file in rng.sample(its_files, len(its_files)):
            text = read_text(file)
            limit = share if len(its_files) > 1 else CHARS_OF_A_KIND
            start = rng.randrange(max(1, len(text) - limit))
            parts.append(text[start : start + limit])
            if (size := size + len(parts[-1])) >= CHARS_OF_A_KIND:
                break
        found[kind] = parts
    return found


def _count_words(texts: dict[str, list[str]]) -> tuple[list[str], np.ndarray]:
    """Return the most frequent words, and the share [N] of spans of `FREQUENCY_WORDS` words that have each."""
    counts, spans = Counter[str](), 0
    for text in (text for parts in texts.values() for text in parts):
        words = words_in(text)
        for start in range(0, len(words), FREQUENCY_WORDS):
            counts.update(set(words[start : start + FREQUENCY_WORDS]))
            spans += 1
    found = [(word, count) for word, count in counts.most_common(WORDS) if count >= MIN_SPANS]
    return [word for word, _ in found], np.array([count / spans for _, count in found], np.float32)


def _sentences(texts: dict[str, list[str]], seed: int) -> Iterator[str]:
    """Yield sentences of 4 to 40 words, of each kind as many, half of them about somebody or asking."""
    for kind, parts in texts.items():
        rng, share = random.Random(f"{kind} {seed}"), SENTENCES // len(texts)
        found = [
            sentence
            for part in parts
            for line in re.split(r"(?<=[.!?])[\"”']?\s+|\n\s*\n", part)
            if 4 <= len((sentence := " ".join(line.split()).strip('"“”')).split()) <= 40 and len(sentence) < 300
        ]
        about = [sentence for sentence in found if ABOUT_SOMEBODY.search(sentence)]
        other = [sentence for sentence in found if not ABOUT_SOMEBODY.search(sentence)]
        for some in (about, other):
            yield from rng.sample(some, min(len(some), share // 2))


def _statements(seed: int) -> list[str]:
    """Return invented statements and questions, in the wordings of the split for training."""
    scenes: list[Scene] = []
    for number in range(INVENTIONS):
        for invent, size in ((invent_scenes, 30), (number_scenes, 60), (correction_scenes, 60)):
            scenes += invent(size, seed * INVENTIONS + number, "train")
    taught = {message["content"] for scene in scenes for request in scene.requests for message in request}
    texts = sorted(taught | {question.text for scene in scenes for question in scene.questions})
    return random.Random(seed).sample(texts, min(STATEMENTS, len(texts)))


def _embed(texts: Sequence[str], cache: ResultCache, what: str) -> Tensor:
    """Return the teacher's vectors [n, D] of texts, part by part from the cache if possible."""
    embed, found = load_embedder(), list[Tensor]()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # of one length together: less padding
    with progress_bar() as bar:
        task = bar.add_task(f"vectors of {what}", total=len(texts))
        for start in range(0, len(texts), TEACHER_BATCH):
            part = [texts[index] for index in order[start : start + TEACHER_BATCH]]
            key = content_hash("teacher", part)
            if (known := cache.load(key)) is None:
                known = {"vectors": torch.from_numpy(embed(part)).half()}, None
                cache.save(key, *known)
            found.append(known[0]["vectors"].float())
            bar.advance(task, len(part))
    vectors = torch.cat(found)
    return vectors[torch.tensor(order).argsort()]


class _Student:
    """Vectors [N, d] and weights [N] of words. A word's weight begins with its rarity."""

    def __init__(self, first: Tensor, frequency: Tensor, names: Sequence[str]) -> None:
        self._rows = {name: row for row, name in enumerate(names)}
        self._vectors = torch.nn.Parameter(first.clone())
        self._weights = torch.nn.Parameter(torch.log(1e-3 / (1e-3 + frequency)).clamp_min(-4))

    def weighted_vectors(self) -> Tensor:
        return (self._vectors * self._weights.exp()[:, None]).detach()

    def fit(self, texts: Sequence[str], teacher: Tensor, seed: int) -> None:
        """Train on texts and the teacher's unit vectors [n, d]; print how well held-out texts fit."""
        rows = [[self._rows[word] for word in words_in(text) if word in self._rows] for text in texts]
        numbers = [number for number, known in enumerate(rows) if known]
        rng = random.Random(seed)
        rng.shuffle(numbers)
        held_out, taught = numbers[:HELD_OUT], numbers[HELD_OUT:]
        optimiser = torch.optim.Adam([{"params": [self._vectors], "lr": 3e-3}, {"params": [self._weights], "lr": 1e-2}])
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, gamma=0.75)
        with progress_bar() as bar:
            task = bar.add_task("training", total=EPOCHS)
            for _ in range(EPOCHS):
                rng.shuffle(taught)
                for start in range(0, len(taught) - BATCH + 1, BATCH):
                    batch = taught[start : start + BATCH]
                    optimiser.zero_grad()
                    self._loss([rows[number] for number in batch], teacher[batch]).backward()
                    optimiser.step()
                schedule.step()
                bar.advance(task)
        with torch.no_grad():
            fit = (self._texts([rows[number] for number in held_out]) * teacher[held_out]).sum(-1).mean()
        console.print(f"held-out sentences: mean cosine to the teacher's vectors {fit:.3f}")

    def _texts(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the unit vectors [n, d] of texts, given their words."""
        words = torch.tensor([row for text in rows for row in text])
        texts = torch.tensor([number for number, text in enumerate(rows) for _ in text])
        parts = self._vectors[words] * self._weights[words].exp()[:, None]
        return F.normalize(torch.zeros(len(rows), parts.shape[1]).index_add(0, texts, parts), dim=-1)

    def _loss(self, rows: Sequence[Sequence[int]], teacher: Tensor) -> Tensor:
        student = self._texts(rows)
        relations = (student @ student.T - teacher @ teacher.T).square().mean()
        return (1 - (student * teacher).sum(-1)).mean() + RELATIONS * relations
