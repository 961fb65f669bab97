"""Fingerprints of contexts: equal their twin, know a run and no more (law 2)."""

from __future__ import annotations

import torch

from model.memory.config import NGRAM_SIZES
from model.memory.lexical import reference, torch_backend

R = len(NGRAM_SIZES)


def test_fingerprints_equal_their_twin() -> None:
    ids = torch.tensor([*[-1] * 5, *torch.randint(0, 50_000, (40,), generator=_noise(0)).tolist(), 0, 0, 0])
    ngram_hashes = torch_backend.hash_ngrams(ids)
    assert ngram_hashes.dtype == torch.int16
    assert ngram_hashes.shape == (len(ids) - 7, R)
    assert torch.equal(ngram_hashes, reference.hash_ngrams(ids))
    assert torch_backend.hash_ngrams(ids[:8]).shape == (1, R)


def test_a_fingerprint_knows_its_run_and_no_more() -> None:
    """Equal runs have equal fingerprints, wherever they stand; other runs other ones; 0 is none, before the start."""
    g, repeat = _noise(1), [7, 7, 3, 9, 1, 4, 4, 2]
    ids = torch.tensor([1, *repeat, *torch.randint(0, 99, (2000,), generator=g).tolist(), *repeat])
    ngram_hashes = torch_backend.hash_ngrams(torch.cat([torch.full((7,), -1), ids]))
    assert [int((ngram_hashes[:, r] == 0).sum()) for r in range(R)] == [ngram_size - 1 for ngram_size in NGRAM_SIZES]
    assert torch.equal(ngram_hashes[8], ngram_hashes[-1]), "all runs that end there lie within what is repeated"
    assert ngram_hashes[7, -1] != ngram_hashes[-2, -1], "one token more than that was another"
    for r, ngram_size in enumerate(NGRAM_SIZES):
        kinds = len({tuple(window) for window in ids.unfold(0, ngram_size, 1).tolist()})
        assert kinds - len(set(ngram_hashes[ngram_size - 1 :, r].tolist())) < 0.05 * kinds


def test_a_request_is_a_context_from_its_first_token_on() -> None:
    targets = torch.tensor([5, 6, 7, 8])
    expected = reference.hash_ngrams(torch.tensor([*[-1] * 7, 2, 5, 6, 7]))
    assert torch.equal(torch_backend.hash_request_ngrams(targets, 2), expected)


def _noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
