"""Fingerprints of contexts: equal their twin, know a run and no more (law 2)."""

from __future__ import annotations

import torch

from model.memory.config import RUNS
from model.memory.lexical import reference, torch_backend

R = len(RUNS)


def test_fingerprints_equal_their_twin() -> None:
    ids = torch.tensor([*[-1] * 5, *torch.randint(0, 50_000, (40,), generator=_noise(0)).tolist(), 0, 0, 0])
    prints = torch_backend.fingerprints(ids)
    assert prints.dtype == torch.int16
    assert prints.shape == (len(ids) - 7, R)
    assert torch.equal(prints, reference.fingerprints(ids))
    assert torch_backend.fingerprints(ids[:8]).shape == (1, R)


def test_a_fingerprint_knows_its_run_and_no_more() -> None:
    """Equal runs have equal fingerprints, wherever they stand; other runs other ones; 0 is none, before the start."""
    g, repeat = _noise(1), [7, 7, 3, 9, 1, 4, 4, 2]
    ids = torch.tensor([1, *repeat, *torch.randint(0, 99, (2000,), generator=g).tolist(), *repeat])
    prints = torch_backend.fingerprints(torch.cat([torch.full((7,), -1), ids]))
    assert [int((prints[:, r] == 0).sum()) for r in range(R)] == [run - 1 for run in RUNS]
    assert torch.equal(prints[8], prints[-1]), "all runs that end there lie within what is repeated"
    assert prints[7, -1] != prints[-2, -1], "one token more than that was another"
    for r, run in enumerate(RUNS):
        kinds = len({tuple(window) for window in ids.unfold(0, run, 1).tolist()})
        assert kinds - len(set(prints[run - 1 :, r].tolist())) < 0.05 * kinds


def test_a_request_is_a_context_from_its_first_token_on() -> None:
    targets = torch.tensor([5, 6, 7, 8])
    expected = reference.fingerprints(torch.tensor([*[-1] * 7, 2, 5, 6, 7]))
    assert torch.equal(torch_backend.request_fingerprints(targets, 2), expected)


def _noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
