"""What is compiled between the linear maps of a decoding step computes what torch's operators do there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.base.backbone import Backbone
from model.base.checkpoint import load_backbone
from model.base.kv_cache import DenseCache
from model.decode import numba_step
from model.numba_support import MIN_EXP_INPUT, Array, cached_njit, exp, log, row_max
from tests.model.random_models import random_llama, tokens
from tests.model.test_backbone import CONFIGS

LENGTHS = [90, 3, 0, 5, 6, 17, 18, 19, 20]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=["default", *CONFIGS])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Backbone:
    random_llama(**CONFIGS.get(request.param, {})).save_pretrained(tmp_path)
    return load_backbone(tmp_path)


def prefilled(base: Backbone, lengths: list[int]) -> list[DenseCache]:
    """The caches of sequences of some lengths, with room for one token more, and some for more than that."""
    caches = [DenseCache(base.config, n + 1 + n % 3, device="cpu", dtype=torch.float32) for n in lengths]
    for row, cache, length in zip(tokens(len(lengths), 128), caches, lengths, strict=True):
        if length:
            base(row[None, :length], [cache])
    return caches


def kept(caches: list[DenseCache], more: int) -> list[Tensor]:
    """What is in the caches, `more` tokens behind their lengths included."""
    return [field[:, :, : cache.length + more] for cache in caches for field in (cache.keys, cache.values)]


@pytest.mark.parametrize("lengths", [[0], [40], [7, 8, 1], LENGTHS], ids=str)
def test_a_step_is_that_of_its_twin(base: Backbone, lengths: list[int]) -> None:
    mine, its, ids = prefilled(base, lengths), prefilled(base, lengths), tokens(len(lengths), 1)
    torch.testing.assert_close(numba_step.decode(base, ids[:, 0], mine), base(ids, its)[:, 0], atol=1e-4, rtol=1e-5)
    assert [cache.length for cache in mine] == lengths
    for told, twin_told in zip(kept(mine, 1), kept(its, 0), strict=True):
        torch.testing.assert_close(told, twin_told, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("base", ["default"], indirect=True)
def test_it_is_as_close_to_double_precision_as_its_twin(base: Backbone, tmp_path: Path) -> None:
    caches, ids = prefilled(base, LENGTHS), tokens(len(LENGTHS), 1)
    double = load_backbone(tmp_path, dtype=torch.float64)
    exact = [DenseCache(base.config, cache.capacity, device="cpu", dtype=torch.float64) for cache in caches]
    for cache, its in zip(caches, exact, strict=True):
        its.keys.copy_(cache.keys), its.values.copy_(cache.values)
        its.length = cache.length
    expected = double(ids, exact)[:, 0]
    errors = [
        (step - expected).abs().max() for step in (numba_step.decode(base, ids[:, 0], caches), base(ids, caches)[:, 0])
    ]
    assert errors[0] < max(2 * errors[1], 1e-5)


@pytest.mark.parametrize("base", ["default"], indirect=True)
def test_sites_see_and_replace_the_residual_stream_as_in_the_twin(base: Backbone) -> None:
    seen: list[list[Tensor]] = [[], []]

    def site(notes: list[Tensor], hidden: Tensor) -> Tensor:
        notes.append(hidden)
        return hidden.roll(1, dims=-1)

    mine, its, ids = prefilled(base, LENGTHS), prefilled(base, LENGTHS), tokens(len(LENGTHS), 1)
    hooks = [{layer: lambda hidden, notes=notes: site(notes, hidden) for layer in (0, 2)} for notes in seen]
    step, twin_step = numba_step.decode(base, ids[:, 0], mine, hooks[0]), base(ids, its, hooks[1])[:, 0]
    torch.testing.assert_close(step, twin_step, atol=1e-4, rtol=1e-5)
    for told, twin_told in zip(*seen, strict=True):
        torch.testing.assert_close(told, twin_told, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("base", ["default"], indirect=True)
def test_threads_share_the_work_and_change_no_bit(base: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, steps = tokens(len(LENGTHS)), list[Tensor]()
    for threads in (1, 2, 3, 50):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(numba_step, "MIN_TOKENS_PER_THREAD", 10**6 if threads == 1 else 2)
        caches = prefilled(base, LENGTHS)
        steps.append(torch.cat([numba_step.decode(base, ids, caches).flatten(), *map(Tensor.flatten, kept(caches, 1))]))
    assert all(torch.equal(steps[0], step) for step in steps)


@cached_njit
def each(x: Array, exps: Array, logs: Array) -> None:
    for i in range(len(x)):
        exps[i], logs[i] = exp(x[i]), log(np.float32(1.0) + abs(x[i]))


def test_compiled_functions_are_those_of_numpy() -> None:
    g = np.random.default_rng(0)
    x = np.concatenate([g.uniform(-87, 88, 9999), g.normal(0, 1e-3, 999), [0.0, -0.0, MIN_EXP_INPUT, 88.0]]).astype(
        np.float32
    )
    exps, logs = np.empty((2, len(x)), np.float32)
    each(x, exps, logs)
    np.testing.assert_allclose(exps, np.exp(x.astype(float)), rtol=3e-7)
    np.testing.assert_allclose(logs, np.log1p(np.abs(x.astype(float))), rtol=3e-7, atol=1e-7)
    for size in (1, 2, 15, 64, 1001):
        for row in (g.normal(size=size), -np.exp(g.normal(size=size)), np.full(size, -1e30)):
            for dtype in (np.float32, np.float64):
                assert row_max(row.astype(dtype)) == row.astype(np.float32).max()
