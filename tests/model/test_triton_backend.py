"""Law 2 for the Triton kernels: each computes what its reference in torch operators computes.

On a CPU the kernels run in Triton's interpreter, on a GPU compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.decode.cuda_graphs import CudaGraphLM
from model.decode.paged_cache import paged_attention
from model.memory.lexical.torch_backend import TorchBackend
from model.memory.lexical.types import NGRAM_SIZES, SIMILARITY_STEP, RowMatches
from tests.model.memory_cases import SIZES, build_pool, build_queries, pool_bits_after_writes
from tests.model.tiny_lm import (
    BLOCK,
    DEVICE,
    LEXICAL,
    build,
    decode_state_of,
    learn,
    new_pool,
    read,
    rows_by_slot,
    text,
    tiny_backbone,
)

pytest.importorskip("triton", reason="Triton is not installed: only torch operators run here")
from model.decode import triton_attention
from model.memory.lexical import triton_backend
from model.memory.lexical.triton_backend import TritonBackend
from model.memory.lexical.triton_check import check_memory_kernels
from model.triton_check import passes_check

pytestmark = pytest.mark.gpu
R = len(NGRAM_SIZES)
TRITON, TORCH = TritonBackend(), TorchBackend()


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_a_written_block_leaves_the_bits_that_torch_leaves(P: int, width: int) -> None:
    found, expected = (pool_bits_after_writes(build_pool(P, width, backend, DEVICE)) for backend in (TRITON, TORCH))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_rows_are_compared_as_by_torch(P: int, width: int) -> None:
    pool = build_pool(P, width, TRITON, DEVICE)
    site, (session, cells, query, context) = pool.sites["words"], build_queries(pool)
    found, expected = (
        backend.match_rows(site.tables, site.fields, session, cells, query, context) for backend in (TRITON, TORCH)
    )
    for name, one, other in zip(RowMatches._fields, found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)
    assert not found.missing.all() and found.missing[1].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "page"), [(3, 1, 10, 4), (4, 2, 16, 8), (9, 3, 64, 32)])
def test_paged_attention_is_that_of_torch(
    heads: int, kv_heads: int, width: int, page: int, window: int | None, dtype: torch.dtype
) -> None:
    """The batch has a first token, pages just begun and just full, a token after another row, and two padding rows."""
    g = torch.Generator().manual_seed(0)
    positions = torch.tensor([0, page - 1, page, 2 * page + 1, 1, 0, 0])
    tables = torch.zeros(5, 3, dtype=torch.int32)
    tables[1:] = torch.randperm(12, generator=g).view(4, 3) + 1
    sequences = torch.tensor([3, 1, 2, 4, 3, 0, 0])
    # Slices of one product, as in the base.
    qkv = torch.randn(7, heads + 2 * kv_heads, width, generator=g).to(DEVICE, dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    stored = [torch.randn(13 * page, kv_heads, width, generator=g).to(DEVICE, dtype) for _ in range(2)]
    by_kernel, by_torch = [x.clone() for x in stored], [x.clone() for x in stored]
    kv_args = (tables.to(DEVICE), sequences.to(DEVICE), positions.to(DEVICE))
    found = triton_attention.paged_attention(q, k, v, by_kernel[0], by_kernel[1], *kv_args, page, window)
    expected = paged_attention(q, k, v, by_torch[0], by_torch[1], *kv_args, page, window)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[:5], expected[:5], atol=bound, rtol=bound)
    assert found.isfinite().all()
    for one, other, before in zip(by_kernel, by_torch, stored, strict=True):
        assert torch.equal(one[page:], other[page:])
        assert int((one != before).any(-1).any(-1).sum()) == 6, "one slot for each row, and one for all padding"


@torch.inference_mode()
def test_a_model_on_all_kernels_learns_and_predicts_as_without_kernels() -> None:
    reference = build(tiny_backbone().to(DEVICE), LEXICAL)
    ours = CudaGraphLM(reference, kv_tokens=256, max_batch=2)
    ours.pages.attend = triton_attention.paged_attention
    seen = []
    for lm in (ours, reference):
        pool, ids = new_pool(lm), text(1, 2 * BLOCK)
        pool.sites[LEXICAL.name].backend = TRITON if lm is ours else TORCH
        session = pool.open()
        learn(lm, pool, session, ids)
        request = read(lm, pool, session, ids[:-3])
        cache, decode_state = lm.new_cache(99), decode_state_of(request)
        lm.block(ids[:-3], cache, pool, session)
        rows = []
        for token in ids[-3:]:
            (decode_state,) = lm.decode([token], [cache], [decode_state], pool, [session])
            rows.append(lm.predict([decode_state], pool, [session]).log_softmax(-1))
        seen.append((rows_by_slot(pool.dump(session)), request.adapted, torch.cat(rows)))
    (state, adapted, predicted), (expected_state, expected_adapted, expected_predicted) = seen
    assert {at: row for at, row in state.items() if "_own" not in at[0]}, "something was learned"
    if DEVICE.type == "cpu":  # on a GPU, other attention kernels round differently, and so may keys
        assert state.keys() == expected_state.keys()
        assert all(state[at] == expected_state[at] for at in state if "_own" not in at[0])
    torch.testing.assert_close(adapted, expected_adapted, atol=1e-4, rtol=0)
    torch.testing.assert_close(predicted, expected_predicted, atol=1e-4, rtol=0)


def test_kernels_are_checked_before_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    check_memory_kernels(DEVICE)
    triton_attention.check_paged_attention(DEVICE, reference=paged_attention)
    monkeypatch.setattr(triton_backend, "SIMILARITY_STEP", 1.1 * SIMILARITY_STEP)
    with pytest.raises(RuntimeError, match="the kernel match_rows does not compute what its reference does"):
        check_memory_kernels(DEVICE)


def test_a_kernel_that_fails_its_check_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    def check(device: torch.device) -> None:
        raise RuntimeError(f"no compiler for {device}")

    assert not passes_check(check, DEVICE)
    assert f"no compiler for {DEVICE}" in caplog.text


def test_every_kernel_compiles_for_an_h100() -> None:
    # A script of its own: importing `tests` chooses the interpreter.
    script = Path(__file__).with_name("triton_compile.py")
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean["PYTHONPATH"] = str(script.parent.parent.parent)
    done = subprocess.run([sys.executable, script], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["_match_rows", "_write", "_store_paged_kv", "_paged_attention"]
