"""Triton kernels of paged attention (Kwon et al. 2023, arXiv 2309.06180): one decoding step of B sequences on a GPU.

`paged_cache.paged_attention` is the reference in torch operators.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.triton_check import assert_close

NO_WINDOW = 2**30  # tokens


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    sequences: Tensor,
    positions: Tensor,
    page: int,
    window: int | None = None,
) -> Tensor:
    """Store one token of each of B sequences in its pages and return its attention `[B, H, hd]`; arguments as in
    `paged_cache.paged_attention`, which is the reference."""
    B, H, D = q.shape
    H_kv, D2 = k.shape[1], triton.next_power_of_2(D)
    out = torch.empty(B, H, D, device=q.device, dtype=q.dtype)
    pages = (keys, values, tables, sequences, positions)
    strides = (*k.stride()[:2], *v.stride()[:2], tables.shape[1])
    # Two launches: rows of a batch may follow one another in one sequence, so all are stored before any is read.
    _store_paged_kv[(B, H_kv)](k, v, *pages, *strides, H_kv, D, D2, page)
    sizes = (H_kv, H // H_kv, D, triton.next_power_of_2(H // H_kv), D2, page)
    _paged_attention[(B, H_kv)](q, *pages, out, *q.stride()[:2], tables.shape[1], D**-0.5, window or NO_WINDOW, *sizes)
    return out


@triton.jit
def _store_paged_kv(
    k, v, keys, values, tables, sequences, positions, k_row, k_head, v_row, v_head, table_size,
    H_KV: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Store keys and values of one row: one program for each row and each of its key heads."""
    b, h, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, D2)
    table, position = tables + tl.load(sequences + b) * table_size, tl.load(positions + b)
    slot = tl.load(table + position // PAGE).to(tl.int64) * PAGE + position % PAGE
    at, is_dim = (slot * H_KV + h) * D + d, d < D
    tl.store(keys + at, tl.load(k + b * k_row + h * k_head + d, mask=is_dim), mask=is_dim)
    tl.store(values + at, tl.load(v + b * v_row + h * v_head + d, mask=is_dim), mask=is_dim)


@triton.jit
def _paged_attention(
    q, keys, values, tables, sequences, positions, out, q_row, q_head, table_size, scale, window,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, G2: tl.constexpr, D2: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Compute the attention of one row: one program for each row and each key head, which G query heads share."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    table, position = tables + tl.load(sequences + b) * table_size, tl.load(positions + b)
    g, d, t = tl.arange(0, G2), tl.arange(0, D2), tl.arange(0, PAGE)
    is_dim = (d < D)[None, :]
    is_query = (g < G)[:, None] & is_dim
    query = tl.load(q + b * q_row + (h * G + g)[:, None] * q_head + d[None, :], mask=is_query, other=0.0)
    query = query.to(tl.float32) * scale
    top = tl.full([G2], float("-inf"), dtype=tl.float32)
    total = tl.zeros([G2], dtype=tl.float32)
    sums = tl.zeros([G2, D2], dtype=tl.float32)
    first = tl.maximum(position - window + 1, 0)
    for start in range(first // PAGE * PAGE, position + 1, PAGE):
        known = (start + t <= position) & (start + t >= first)
        at = ((tl.load(table + start // PAGE).to(tl.int64) * PAGE + t) * H_KV + h)[:, None] * D + d[None, :]
        is_known = known[:, None] & is_dim
        page_keys = tl.load(keys + at, mask=is_known, other=0.0).to(tl.float32)
        scores = tl.sum(query[:, None, :] * page_keys[None, :, :], axis=2)
        scores = tl.where(known[None, :], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=1))
        fade, weights = tl.exp(top - highest), tl.exp(scores - highest[:, None])
        page_values = tl.load(values + at, mask=is_known, other=0.0).to(tl.float32)
        sums = sums * fade[:, None] + tl.sum(weights[:, :, None] * page_values[None, :, :], axis=1)
        total = total * fade + tl.sum(weights, axis=1)
        top = highest
    head = (b * H_KV + h) * G + g
    attended = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + head[:, None] * D + d[None, :], attended, mask=is_query)


def check_paged_attention(device: torch.device, *, reference: Callable[..., Tensor]) -> None:
    """Run the kernels on a few random numbers. Raise RuntimeError if a result differs from that of the reference."""
    g = torch.Generator().manual_seed(0)
    D, page, pages = 16, 4, 8
    tables = torch.tensor([[0, 0, 0], [4, 1, 7]], dtype=torch.int32, device=device)
    sequences, positions = (torch.tensor(x, device=device) for x in ([0, 1, 1], [0, 9, 8]))
    q, k, v = torch.randn(3, 5, D, generator=g).to(device).split([3, 1, 1], dim=1)
    stored = [torch.randn(pages * page, 1, D, generator=g).to(device) for _ in range(2)]
    expected = [field.clone() for field in stored]
    kv_args = (tables, sequences, positions, page)
    for window in (None, 5):
        attended = paged_attention(q, k, v, stored[0], stored[1], *kv_args, window)
        expected_attended = reference(q, k, v, expected[0], expected[1], *kv_args, window)
        assert_close("paged_attention", [attended, *stored], [expected_attended, *expected])
