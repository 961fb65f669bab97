"""N-gram hashes: they equal the reference (law 2), and each depends on its n-gram alone."""

from __future__ import annotations

import torch

from model.memory.lexical import ops, reference
from model.memory.lexical.types import NGRAM_SIZES

R = len(NGRAM_SIZES)


def test_hashes_equal_the_reference() -> None:
    ids = torch.tensor([*[-1] * 5, *torch.randint(0, 50_000, (40,), generator=_noise(0)).tolist(), 0, 0, 0])
    ngram_hashes = ops.hash_ngrams(ids)
    assert ngram_hashes.dtype == torch.int16
    assert ngram_hashes.shape == (len(ids) - 7, R)
    assert torch.equal(ngram_hashes, reference.hash_ngrams(ids))
    assert ops.hash_ngrams(ids[:8]).shape == (1, R)


def test_a_hash_depends_on_its_ngram_alone() -> None:
    """Equal n-grams have equal hashes at any position; other n-grams have others; 0 stands for no n-gram."""
    g, repeat = _noise(1), [7, 7, 3, 9, 1, 4, 4, 2]
    ids = torch.tensor([1, *repeat, *torch.randint(0, 99, (2000,), generator=g).tolist(), *repeat])
    ngram_hashes = ops.hash_ngrams(torch.cat([torch.full((7,), -1), ids]))
    assert [int((ngram_hashes[:, r] == 0).sum()) for r in range(R)] == [ngram_size - 1 for ngram_size in NGRAM_SIZES]
    assert torch.equal(ngram_hashes[8], ngram_hashes[-1]), "all n-grams that end there lie within the repeated tokens"
    assert ngram_hashes[7, -1] != ngram_hashes[-2, -1], "the longest n-gram there begins with another token"
    for r, ngram_size in enumerate(NGRAM_SIZES):
        kinds = len({tuple(window) for window in ids.unfold(0, ngram_size, 1).tolist()})
        assert kinds - len(set(ngram_hashes[ngram_size - 1 :, r].tolist())) < 0.05 * kinds


def test_a_request_is_hashed_from_its_first_token() -> None:
    targets = torch.tensor([5, 6, 7, 8])
    expected = reference.hash_ngrams(torch.tensor([*[-1] * 7, 2, 5, 6, 7]))
    assert torch.equal(ops.hash_request_ngrams(targets, 2), expected)


def _noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
