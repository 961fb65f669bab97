"""The Numba kernels of a decode step compute the results of torch's operators."""

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
from model.decode import numba_step, torch_step
from model.decode.backend import choose_decode_step
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
    """Return the caches of sequences of some lengths, with room for one to three more tokens."""
    caches = [DenseCache(base.config, n + 1 + n % 3, device="cpu", dtype=torch.float32) for n in lengths]
    for row, cache, length in zip(tokens(len(lengths), 128), caches, lengths, strict=True):
        if length:
            base(row[None, :length], [cache])
    return caches


def stored(caches: list[DenseCache], more: int) -> list[Tensor]:
    """Return the keys and values in the caches, including `more` tokens behind their lengths."""
    return [field[:, :, : cache.length + more] for cache in caches for field in (cache.keys, cache.values)]


@pytest.mark.parametrize("lengths", [[0], [40], [7, 8, 1], LENGTHS], ids=str)
def test_a_step_equals_that_of_the_reference(base: Backbone, lengths: list[int]) -> None:
    caches, ref_caches, ids = prefilled(base, lengths), prefilled(base, lengths), tokens(len(lengths), 1)
    expected = base(ids, ref_caches)[:, 0]
    torch.testing.assert_close(numba_step.decode(base, ids[:, 0], caches), expected, atol=1e-4, rtol=1e-5)
    assert [cache.length for cache in caches] == lengths
    for found, ref_found in zip(stored(caches, 1), stored(ref_caches, 0), strict=True):
        torch.testing.assert_close(found, ref_found, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("base", ["default"], indirect=True)
def test_the_reference_is_the_forward_pass_bit_for_bit(base: Backbone) -> None:
    caches, ref_caches, ids = prefilled(base, LENGTHS), prefilled(base, LENGTHS), tokens(len(LENGTHS), 1)
    assert torch.equal(torch_step.decode(base, ids[:, 0], caches), base(ids, ref_caches)[:, 0])
    assert [cache.length for cache in caches] == LENGTHS
    for found, ref_found in zip(stored(caches, 1), stored(ref_caches, 0), strict=True):
        assert torch.equal(found, ref_found)


def test_the_fast_path_is_chosen_where_its_kernels_fit(base: Backbone, tmp_path: Path) -> None:
    assert choose_decode_step(base) is numba_step.decode
    assert choose_decode_step(load_backbone(tmp_path, dtype=torch.float64)) is torch_step.decode


@pytest.mark.parametrize("base", ["default"], indirect=True)
def test_a_step_is_as_close_to_double_precision_as_the_reference(base: Backbone, tmp_path: Path) -> None:
    caches, ids = prefilled(base, LENGTHS), tokens(len(LENGTHS), 1)
    double = load_backbone(tmp_path, dtype=torch.float64)
    exact = [DenseCache(base.config, cache.capacity, device="cpu", dtype=torch.float64) for cache in caches]
    for cache, exact_cache in zip(caches, exact, strict=True):
        exact_cache.keys.copy_(cache.keys), exact_cache.values.copy_(cache.values)
        exact_cache.length = cache.length
    expected = double(ids, exact)[:, 0]
    errors = [
        (step - expected).abs().max() for step in (numba_step.decode(base, ids[:, 0], caches), base(ids, caches)[:, 0])
    ]
    assert errors[0] < max(2 * errors[1], 1e-5)


@pytest.mark.parametrize("base", ["default"], indirect=True)
def test_hooks_see_and_replace_the_residual_stream_as_in_the_reference(base: Backbone) -> None:
    seen: list[list[Tensor]] = [[], []]

    def hook(inputs: list[Tensor], hidden: Tensor) -> Tensor:
        inputs.append(hidden)
        return hidden.roll(1, dims=-1)

    caches, ref_caches, ids = prefilled(base, LENGTHS), prefilled(base, LENGTHS), tokens(len(LENGTHS), 1)
    hooks = [{layer: lambda hidden, inputs=inputs: hook(inputs, hidden) for layer in (0, 2)} for inputs in seen]
    step, ref_step = numba_step.decode(base, ids[:, 0], caches, hooks[0]), base(ids, ref_caches, hooks[1])[:, 0]
    torch.testing.assert_close(step, ref_step, atol=1e-4, rtol=1e-5)
    for found, ref_found in zip(*seen, strict=True):
        torch.testing.assert_close(found, ref_found, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("base", ["default"], indirect=True)
def test_the_number_of_threads_changes_no_bit(base: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, steps = tokens(len(LENGTHS)), list[Tensor]()
    for threads in (1, 2, 3, 50):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(numba_step, "MIN_TOKENS_PER_THREAD", 10**6 if threads == 1 else 2)
        caches = prefilled(base, LENGTHS)
        steps.append(
            torch.cat([numba_step.decode(base, ids, caches).flatten(), *map(Tensor.flatten, stored(caches, 1))])
        )
    assert all(torch.equal(steps[0], step) for step in steps)


@cached_njit
def each(x: Array, exps: Array, logs: Array) -> None:
    for i in range(len(x)):
        exps[i], logs[i] = exp(x[i]), log(np.float32(1.0) + abs(x[i]))


def test_compiled_functions_compute_those_of_numpy() -> None:
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
