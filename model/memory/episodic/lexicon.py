"""The lexicon: how frequent each word is in texts, without any session.

A word is known by its hash (`word_tables`), so one file serves the tokenizers of all bases.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from model import weights

FREQUENCY_WORDS = 48  # words of the spans in which frequencies are counted
UNKNOWN = 1e-5  # frequency of a word that is not in the table

Words = NDArray[np.uint32]


@dataclass(frozen=True)
class Lexicon:
    """Frequencies of N words.

    hashes: [N], sorted. frequency: [N], share of the spans of `FREQUENCY_WORDS` words that have the word.
    """

    hashes: Words
    frequency: NDArray[np.float32]

    @classmethod
    def of(cls, hashes: Words, frequency: NDArray[np.float32]) -> Lexicon:
        """Return the lexicon of words in any order; of equal hashes the first counts."""
        hashes, first = np.unique(hashes, return_index=True)
        return cls(hashes, frequency[first].astype(np.float32))

    def frequencies(self, hashes: Words) -> NDArray[np.float64]:
        """Return the frequency [Q] of words, given their hashes [Q]."""
        rows, known = self._rows(hashes)
        return np.where(known, self.frequency[rows], UNKNOWN).astype(np.float64)

    def knows(self, hashes: Words) -> NDArray[np.bool_]:
        """Return whether words [Q] are in the table, given their hashes [Q]."""
        return self._rows(hashes)[1]

    def _rows(self, hashes: Words) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        rows = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return rows, self.hashes[rows] == hashes


def load_lexicon(path: Path) -> Lexicon:
    """Return the lexicon of a file. Raises OSError, SafetensorError or KeyError."""
    _, tensors = weights.read(path)
    return Lexicon(tensors["hashes"].numpy().view(np.uint32), tensors["frequency"].numpy())


def save_lexicon(lexicon: Lexicon, path: Path) -> None:
    """Write a lexicon to a file."""
    hashes = torch.from_numpy(lexicon.hashes.view(np.int32))
    save_file({"hashes": hashes, "frequency": torch.from_numpy(lexicon.frequency)}, path)


@cache
def shipped_lexicon() -> Lexicon:
    """Return the lexicon that comes with the package."""
    with as_file(files("model") / "checkpoints" / "lexicon.safetensors") as path:
        return load_lexicon(path)
