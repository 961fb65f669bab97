"""Law 2 for the Triton kernels: each equals its twin in torch's operators. Here in Triton's interpreter, on a CPU; on a
GPU as they are compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.decode.cuda_graphs import CudaGraphLM
from model.decode.paged_cache import paged_attention
from model.memory.config import NGRAM_SIZES
from model.memory.lexical import torch_backend
from model.memory.lexical.types import SIMILARITY_STEP, LexicalRows, RowMatches
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

pytest.importorskip("triton", reason="Triton is not installed: the kernels' twins are all that runs here")
from model.memory.lexical import triton_backend
from model.triton_check import check_triton_kernels

pytestmark = pytest.mark.gpu
R = len(NGRAM_SIZES)


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_a_block_written_by_the_kernel_leaves_the_bits_of_its_twin(P: int, width: int) -> None:
    ours, twins = (pool_bits_after_writes(build_pool(P, width, which, DEVICE)) for which in (triton_backend, None))
    assert all(torch.equal(a, b) for a, b in zip(ours, twins, strict=True))


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_rows_compared_by_the_kernel_are_compared_as_by_its_twin(P: int, width: int) -> None:
    pool = build_pool(P, width, triton_backend, DEVICE)
    site, (asked, cells, query, context) = pool.sites["words"], build_queries(pool)
    ours = triton_backend.match_rows(site.tables, site.fields, asked, cells, query, context)
    reference = torch_backend.match_rows(LexicalRows(*site.read(asked, cells)), query, context)
    for name, one, other in zip(RowMatches._fields, ours, reference, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)
    assert not ours.missing.all() and ours.missing[1].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "page"), [(3, 1, 10, 4), (4, 2, 16, 8), (9, 3, 64, 32)])
def test_attention_in_pages_is_that_of_its_twin(
    heads: int, kv_heads: int, width: int, page: int, dtype: torch.dtype
) -> None:
    """A first token, pages just begun and just full, the token after one of the others, and two rows that fill up the
    batch."""
    g = torch.Generator().manual_seed(0)
    positions = torch.tensor([0, page - 1, page, 2 * page + 1, 1, 0, 0])
    tables = torch.zeros(5, 3, dtype=torch.int32)
    tables[1:] = torch.randperm(12, generator=g).view(4, 3) + 1
    sequences = torch.tensor([3, 1, 2, 4, 3, 0, 0])
    # As the base has them: slices of one product.
    qkv = torch.randn(7, heads + 2 * kv_heads, width, generator=g).to(DEVICE, dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    held = [torch.randn(13 * page, kv_heads, width, generator=g).to(DEVICE, dtype) for _ in range(2)]
    ours, twins = [x.clone() for x in held], [x.clone() for x in held]
    kv_args = (tables.to(DEVICE), sequences.to(DEVICE), positions.to(DEVICE))
    found = triton_backend.paged_attention(q, k, v, ours[0], ours[1], *kv_args, page)
    reference = paged_attention(q, k, v, twins[0], twins[1], *kv_args, page)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[:5], reference[:5], atol=bound, rtol=bound)
    assert found.isfinite().all()
    for one, other, before in zip(ours, twins, held, strict=True):
        assert torch.equal(one[page:], other[page:])
        assert int((one != before).any(-1).any(-1).sum()) == 6, "a place for each, and one for all that fill up"


@torch.inference_mode()
def test_a_model_on_all_kernels_learns_and_says_what_it_does_on_none() -> None:
    reference = build(tiny_backbone().to(DEVICE), LEXICAL)
    ours = CudaGraphLM(reference, kv_tokens=256, max_batch=2)
    ours.pages.kernels = triton_backend
    seen = []
    for lm in (ours, reference):
        pool, ids = new_pool(lm), text(1, 2 * BLOCK)
        pool.sites[LEXICAL.name].kernels = triton_backend if lm is ours else None
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
    (state, adapted, said), (twin_state, twin_adapted, twin_said) = seen
    assert {at: row for at, row in state.items() if "_own" not in at[0]}, "something was learned"
    if DEVICE.type == "cpu":  # elsewhere other attention rounds otherwise, and so may keys
        assert state.keys() == twin_state.keys()
        assert all(state[at] == twin_state[at] for at in state if "_own" not in at[0])
    torch.testing.assert_close(adapted, twin_adapted, atol=1e-4, rtol=0)
    torch.testing.assert_close(said, twin_said, atol=1e-4, rtol=0)


def test_kernels_are_checked_before_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    check_triton_kernels(DEVICE)
    monkeypatch.setattr(triton_backend, "SIMILARITY_STEP", 1.1 * SIMILARITY_STEP)
    with pytest.raises(RuntimeError, match="the kernel compare does not compute what its twin does"):
        check_triton_kernels(DEVICE)


def test_every_kernel_compiles_for_an_h100() -> None:
    # As a file: importing `tests` chooses the interpreter.
    script = Path(__file__).with_name("triton_compile.py")
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean["PYTHONPATH"] = str(script.parent.parent.parent)
    done = subprocess.run([sys.executable, script], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["_match_rows", "_write", "_store_paged_kv", "_paged_attention"]
