"""Law 2 for the Triton kernels: each equals its twin in torch's operators. Here in Triton's interpreter, on a CPU; on a
GPU as they are compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.graphs import SteppedLM
from model.memory import Draft, MemoryConfig, Pool, SiteConfig, ops
from model.memory.config import RUNS
from model.memory.pool import SitePool
from model.paged import attend_in_pages
from tests.model.tiny_lm import (
    BLOCK,
    DEVICE,
    LEXICAL,
    build,
    carried,
    image,
    learn,
    new_pool,
    read,
    text,
    tiny_backbone,
)

pytest.importorskip("triton", reason="Triton is not installed: the kernels' twins are all that runs here")
from model import kernels
from model.selfcheck import check_kernels

pytestmark = pytest.mark.gpu
R = len(RUNS)


def rows_of(n: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, fingerprints (few kinds, 0 among them) and tokens of n contexts."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randint(-127, 128, (n, width), generator=g).to(torch.int8)
    prints = torch.randint(0, 3, (n, R), generator=g).to(torch.int16)
    return keys.to(DEVICE), prints.to(DEVICE), torch.randint(0, 99, (n,), generator=g).to(DEVICE)


def teach(draft: Draft, cells: list[int], seed: int) -> None:
    """Writes a row to each of some cells, which may come again."""
    touched, at = torch.unique(torch.tensor(cells, device=DEVICE), return_inverse=True)
    draft.write("words", touched, at, *rows_of(len(cells), draft.pool.config.sites[0].width, seed))


def pool_of(P: int, width: int, *, twin: bool) -> Pool:
    config = MemoryConfig(8, (SiteConfig("words", "lexical", slots=7 * P, cell=P, k=3, width=width),))
    pool = Pool(config, rows=40 * P, sessions=6, device=DEVICE)
    pool.sites["words"].kernels = None if twin else kernels
    return pool


def bits(site: SitePool) -> list[Tensor]:
    """Everything that a site holds, the places that nobody uses included."""
    return [site.tables, *site.fields]


SIZES = [(1, 1), (3, 5), (8, 16), (50, 64)]  # rows a cell, numbers a key


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_a_block_written_by_the_kernel_leaves_the_bits_of_its_twin(P: int, width: int) -> None:
    """New cells and copied ones, cells with room and cells whose oldest rows give way, in one draft and the next."""
    pools = [pool_of(P, width, twin=twin) for twin in (True, False)]
    for pool in pools:
        session = pool.open()
        for turn, blocks in enumerate([[[2, 5, 2, 2], [5], [6, 2, 5]], [[2, 0, 2]], [[2] * 9, [1, 2]]]):
            draft = pool.draft(session)
            for number, cells in enumerate(blocks):
                teach(draft, cells, seed=10 * turn + number)
            if turn == 1:
                draft.rollback()
            else:
                draft.commit()
    ours, twins = (bits(pool.sites["words"]) for pool in pools)
    assert all(torch.equal(a, b) for a, b in zip(ours, twins, strict=True))
    assert pools[0].rows(session)["words"] > 0


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_rows_compared_by_the_kernel_are_compared_as_by_its_twin(P: int, width: int) -> None:
    """Sessions in a batch, one of them without rows, and the empty one."""
    pool = pool_of(P, width, twin=False)
    site, sessions = pool.sites["words"], [pool.open() for _ in range(3)]
    for session in sessions[:2]:
        draft = pool.draft(session)
        teach(draft, [3, 1, 3, 6, 1, 0, 3, 3], seed=session)
        draft.commit()
    g = torch.Generator().manual_seed(0)
    asked = torch.tensor([sessions[0], 0, sessions[1], sessions[2], sessions[0]], device=DEVICE)
    cells = torch.stack([torch.randperm(7, generator=g)[:3] for _ in asked]).to(DEVICE)
    query = torch.nn.functional.normalize(torch.randn(len(asked), width, generator=g), dim=-1).to(DEVICE)
    context = torch.randint(0, 3, (len(asked), R), generator=g).to(torch.int16).to(DEVICE)
    ours = site.compare(asked, cells, query, context)
    twin = ops.compare(ops.Rows(*site.read(asked, cells)), query, context)
    for name, one, other in zip(ops.Compared._fields, ours, twin, strict=True):
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
    place = (tables.to(DEVICE), sequences.to(DEVICE), positions.to(DEVICE))
    found = kernels.attend_in_pages(q, k, v, ours[0], ours[1], *place, page)
    twin = attend_in_pages(q, k, v, twins[0], twins[1], *place, page)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[:5], twin[:5], atol=bound, rtol=bound)
    assert found.isfinite().all()
    for one, other, before in zip(ours, twins, held, strict=True):
        assert torch.equal(one[page:], other[page:])
        assert int((one != before).any(-1).any(-1).sum()) == 6, "a place for each, and one for all that fill up"


@torch.inference_mode()
def test_a_model_on_all_kernels_learns_and_says_what_it_does_on_none() -> None:
    twin = build(tiny_backbone().to(DEVICE), LEXICAL)
    ours = SteppedLM(twin, kv_tokens=256, max_batch=2)
    ours.pages.kernels = kernels
    seen = []
    for lm in (ours, twin):
        pool, ids = new_pool(lm), text(1, 2 * BLOCK)
        pool.sites[LEXICAL.name].kernels = kernels if lm is ours else None
        session = pool.open()
        learn(lm, pool, session, ids)
        request = read(lm, pool, session, ids[:-3])
        cache, carry = lm.new_cache(99), carried(request)
        lm.block(ids[:-3], cache, pool, session)
        rows = []
        for token in ids[-3:]:
            (carry,) = lm.decode([token], [cache], [carry], pool, [session])
            rows.append(lm.predict([carry], pool, [session]).log_softmax(-1))
        seen.append((image(pool.dump(session)), request.adapted, torch.cat(rows)))
    (state, adapted, said), (twin_state, twin_adapted, twin_said) = seen
    assert {at: row for at, row in state.items() if "_own" not in at[0]}, "something was learned"
    if DEVICE.type == "cpu":  # elsewhere other attention rounds otherwise, and so may keys
        assert state.keys() == twin_state.keys()
        assert all(state[at] == twin_state[at] for at in state if "_own" not in at[0])
    torch.testing.assert_close(adapted, twin_adapted, atol=1e-4, rtol=0)
    torch.testing.assert_close(said, twin_said, atol=1e-4, rtol=0)


def test_kernels_are_checked_before_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    check_kernels(DEVICE)
    monkeypatch.setattr(kernels, "LIKENESS_STEP", 1.1 * ops.LIKENESS_STEP)
    with pytest.raises(RuntimeError, match="the kernel compare does not compute what its twin does"):
        check_kernels(DEVICE)


def test_every_kernel_compiles_for_an_h100() -> None:
    # As a file: importing `tests` chooses the interpreter.
    script = Path(__file__).with_name("compiled.py")
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean["PYTHONPATH"] = str(script.parent.parent.parent)
    done = subprocess.run([sys.executable, script], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["_compare", "_write", "_store_in_pages", "_attend_in_pages"]
