"""Triton kernels, for GPUs. Each has a twin in torch's operators, named beside it, which runs everywhere else.

Import it through `device.triton_backend_for`: Triton may not be installed. The tests run it in Triton's interpreter,
on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.memory.lexical.torch_backend import (
    SIMILARITY_STEP,
    Candidates,
    HeadParams,
    Prediction,
    RowMatches,
    scale_query,
    score_row_matches,
)
from model.memory.lexical.torch_backend import (
    gate_mixture as gate_mixture,  # torch's operators are the kernels of these
)
from model.memory.lexical.torch_backend import load_rows as load_rows


def find_candidates(
    tables: Tensor,
    fields: Sequence[Tensor],
    session: Tensor,
    cells: Tensor,
    query: Tensor,
    context: Tensor,
    base: Prediction,
    head_params: HeadParams,
) -> tuple[Candidates, Tensor]:
    """`SitePool.find_candidates`, by `match_rows`; torch's operators weigh."""
    rows = match_rows(tables, fields, session, cells, query, context)
    return score_row_matches(rows, base, head_params), rows.missing.view(*cells.shape, -1).sum(-1)


def match_rows(
    tables: Tensor, fields: Sequence[Tensor], session: Tensor, cells: Tensor, query: Tensor, context: Tensor
) -> RowMatches:
    """The rows in `cells` [n, k] of sessions [n], beside a query [n, d_k] and the fingerprints of a context [n, R]:
    from address to comparison without a copy of the keys. Twin: `SitePool.read` and `ops.match_rows`."""
    n, k = cells.shape
    ages, tokens, ngram_hashes, keys = fields
    P, R, D = ages.shape[1], ngram_hashes.shape[2], keys.shape[2]
    K, device = k * P, cells.device
    found = RowMatches(
        torch.empty(n, K, dtype=torch.long, device=device),
        torch.empty(n, K, device=device),
        torch.empty(n, K, dtype=torch.long, device=device),
        torch.empty(n, K, dtype=torch.bool, device=device),
    )
    inputs = (
        tables,
        ages,
        tokens,
        ngram_hashes,
        keys,
        *(x.contiguous() for x in (session, cells, scale_query(query), context)),
    )
    outputs = (found.tokens, found.cosines, found.ngram_matches, found.missing.view(torch.uint8))
    sizes = (triton.next_power_of_2(P), triton.next_power_of_2(D))
    _match_rows[(n, k)](*inputs, *outputs, tables.shape[1], SIMILARITY_STEP, P, R, D, *sizes)
    return found


@triton.jit
def _match_rows(
    tables, ages, tokens, ngram_hashes, keys, session, cells, query, context, out_tokens, out_cosines,
    out_ngram_matches, out_missing, table_size, step,
    P: tl.constexpr, R: tl.constexpr, D: tl.constexpr, P2: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """One program for each cell of each token."""
    at, n = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.program_id(0)
    physical_cell = tl.load(tables + tl.load(session + n) * table_size + tl.load(cells + at)).to(tl.int64)
    p, d = tl.arange(0, P2), tl.arange(0, D2)
    here, wide = p < P, d < D
    row = physical_cell * P + p
    key = tl.load(keys + row[:, None] * D + d[None, :], mask=here[:, None] & wide[None, :], other=0)
    cosine = tl.sum(key.to(tl.float32) * tl.load(query + n * D + d, mask=wide, other=0.0)[None, :], axis=1) * step
    ngram_matches = tl.zeros([P2], dtype=tl.int64)
    for r in tl.static_range(R):
        mine = tl.load(context + n * R + r)
        ngram_matches += ((tl.load(ngram_hashes + row * R + r, mask=here, other=0) == mine) & (mine != 0)).to(tl.int64)
    out = at.to(tl.int64) * P + p
    tl.store(out_tokens + out, tl.load(tokens + row, mask=here, other=0).to(tl.int64), mask=here)
    tl.store(out_cosines + out, cosine, mask=here)
    tl.store(out_ngram_matches + out, ngram_matches, mask=here)
    tl.store(out_missing + out, (tl.load(ages + row, mask=here, other=0) == 0).to(tl.uint8), mask=here)


def write(
    fields: Sequence[Tensor],
    old: Tensor,
    new: Tensor,
    at: Tensor,
    keys: Tensor,
    ngram_hashes: Tensor,
    targets: Tensor,
) -> None:
    """One block's sparse write: the cells at places old [U] go to places new [U] (the same or free ones), with the rows
    of n tokens in them. The other arguments are those of `ops.write_lexical`, which is its twin between `Draft.get` and
    `Draft.put`."""
    ages, tokens, field_ngram_hashes, field_keys = fields
    P, R, D = ages.shape[1], ngram_hashes.shape[1], keys.shape[1]
    inputs = (x.contiguous() for x in (old, new, at, keys, ngram_hashes, targets))
    sizes = (triton.next_power_of_2(P), triton.next_power_of_2(D))
    _write[(len(old),)](ages, tokens, field_ngram_hashes, field_keys, *inputs, len(at), P, R, D, *sizes)


@triton.jit(do_not_specialize=["n"])
def _write(
    ages, tokens, ngram_hashes, keys, old, new, at, new_keys, new_ngram_hashes, targets, n, P: tl.constexpr, R:
    tl.constexpr, D: tl.constexpr, P2: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """One program for each touched cell. It first finds out which token each of the rows comes from, so that every row
    is stored once, by the thread that loads it: no order of stores to keep."""
    cell = tl.program_id(0)
    p, d = tl.arange(0, P2), tl.arange(0, D2)
    here = p < P
    before = tl.load(old + cell).to(tl.int64) * P + p
    after = tl.load(new + cell).to(tl.int64) * P + p
    age = tl.load(ages + before, mask=here, other=2147483647)
    youngest = tl.max(tl.where(here, age, 0), axis=0)
    source = tl.full([P2], -1, dtype=tl.int32)
    for t in range(n):
        if tl.load(at + t) == cell:
            oldest = tl.argmin(age, axis=0)  # the first one of equals, as a stable sort has it
            youngest += 1
            age = tl.where(p == oldest, youngest, age)
            source = tl.where(p == oldest, t, source)
    fresh, kept = here & (source >= 0), here & (source < 0)
    # What is not written is loaded from before, what is from the block.
    token = tl.load(tokens + before, mask=kept, other=0) + tl.load(targets + source, mask=fresh, other=0).to(tl.int32)
    tl.store(ages + after, age, mask=here)
    tl.store(tokens + after, token, mask=here)
    for r in tl.static_range(R):
        ngram_hash_kept = tl.load(ngram_hashes + before * R + r, mask=kept, other=0)
        ngram_hash_new = tl.load(new_ngram_hashes + source * R + r, mask=fresh, other=0)
        tl.store(ngram_hashes + after * R + r, ngram_hash_kept + ngram_hash_new, mask=here)
    wide = (d < D)[None, :]
    key_kept = tl.load(keys + before[:, None] * D + d[None, :], mask=kept[:, None] & wide, other=0)
    key_new = tl.load(new_keys + source[:, None] * D + d[None, :], mask=fresh[:, None] & wide, other=0)
    tl.store(keys + after[:, None] * D + d[None, :], key_kept + key_new, mask=here[:, None] & wide)


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
) -> Tensor:
    """One token of each of B sequences attends to the pages of its own, and is added to them. Twin:
    `paged.paged_attention`, which says what the arguments are."""
    B, H, D = q.shape
    H_kv, D2 = k.shape[1], triton.next_power_of_2(D)
    out = torch.empty(B, H, D, device=q.device, dtype=q.dtype)
    pages = (keys, values, tables, sequences, positions)
    strides = (*k.stride()[:2], *v.stride()[:2], tables.shape[1])
    # A launch of its own: rows of a batch may follow one another in one sequence.
    _store_paged_kv[(B, H_kv)](k, v, *pages, *strides, H_kv, D, D2, page)
    sizes = (H_kv, H // H_kv, D, triton.next_power_of_2(H // H_kv), D2, page)
    _paged_attention[(B, H_kv)](q, *pages, out, *q.stride()[:2], tables.shape[1], D**-0.5, *sizes)
    return out


@triton.jit
def _store_paged_kv(
    k, v, keys, values, tables, sequences, positions, k_row, k_head, v_row, v_head, table_size,
    H_KV: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One program for each row and each of its heads of keys."""
    b, h, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, D2)
    table, position = tables + tl.load(sequences + b) * table_size, tl.load(positions + b)
    slot = tl.load(table + position // PAGE).to(tl.int64) * PAGE + position % PAGE
    at, wide = (slot * H_KV + h) * D + d, d < D
    tl.store(keys + at, tl.load(k + b * k_row + h * k_head + d, mask=wide), mask=wide)
    tl.store(values + at, tl.load(v + b * v_row + h * v_head + d, mask=wide), mask=wide)


@triton.jit
def _paged_attention(
    q, keys, values, tables, sequences, positions, out, q_row, q_head, table_size, scale,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, G2: tl.constexpr, D2: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One program for each row and each of its heads of keys; G heads of queries share one."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    table, position = tables + tl.load(sequences + b) * table_size, tl.load(positions + b)
    g, d, t = tl.arange(0, G2), tl.arange(0, D2), tl.arange(0, PAGE)
    wide = (d < D)[None, :]
    asked = (g < G)[:, None] & wide
    query = tl.load(q + b * q_row + (h * G + g)[:, None] * q_head + d[None, :], mask=asked, other=0.0)
    query = query.to(tl.float32) * scale
    top = tl.full([G2], float("-inf"), dtype=tl.float32)
    total = tl.zeros([G2], dtype=tl.float32)
    sums = tl.zeros([G2, D2], dtype=tl.float32)
    for start in range(0, position + 1, PAGE):
        known = start + t <= position
        at = ((tl.load(table + start // PAGE).to(tl.int64) * PAGE + t) * H_KV + h)[:, None] * D + d[None, :]
        there = known[:, None] & wide
        page_keys = tl.load(keys + at, mask=there, other=0.0).to(tl.float32)
        scores = tl.sum(query[:, None, :] * page_keys[None, :, :], axis=2)
        scores = tl.where(known[None, :], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=1))
        fade, weights = tl.exp(top - highest), tl.exp(scores - highest[:, None])
        page_values = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
        sums = sums * fade[:, None] + tl.sum(weights[:, :, None] * page_values[None, :, :], axis=1)
        total = total * fade + tl.sum(weights, axis=1)
        top = highest
    head = (b * H_KV + h) * G + g
    attended = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + head[:, None] * D + d[None, :], attended, mask=asked)
