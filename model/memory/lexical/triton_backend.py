"""The Triton backend of the lexical memory, for GPUs.

Two kernels replace torch operators: the comparison of rows (equation L3), which copies no keys, and the write (L7). The
kernels are compared with `ops.py`. The tests run them in Triton's interpreter, on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.memory.lexical.ops import scale_query
from model.memory.lexical.torch_backend import TorchBackend
from model.memory.lexical.types import SIMILARITY_STEP, RowMatches


class TritonBackend(TorchBackend):
    """The memory's kernels for GPUs: torch operators, but for the comparison and the write of rows."""

    name = "triton"

    def match_rows(
        self,
        tables: Tensor,
        fields: Sequence[Tensor],
        session: Tensor,
        cells: Tensor,
        query: Tensor,
        context: Tensor,
    ) -> RowMatches:
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
        contexts = (x.contiguous() for x in (session, cells, scale_query(query), context))
        outputs = (found.tokens, found.cosines, found.ngram_matches, found.missing.view(torch.uint8))
        sizes = (P, R, D, triton.next_power_of_2(P), triton.next_power_of_2(D))
        _match_rows[(n, k)](
            tables, ages, tokens, ngram_hashes, keys, *contexts, *outputs, tables.shape[1], SIMILARITY_STEP, *sizes
        )
        return found

    def write(
        self,
        fields: Sequence[Tensor],
        old: Tensor,
        new: Tensor,
        at: Tensor,
        keys: Tensor,
        ngram_hashes: Tensor,
        targets: Tensor,
    ) -> None:
        P, R, D = fields[0].shape[1], ngram_hashes.shape[1], keys.shape[1]
        inputs = (x.contiguous() for x in (old, new, at, keys, ngram_hashes, targets))
        sizes = (P, R, D, triton.next_power_of_2(P), triton.next_power_of_2(D))
        _write[(len(old),)](*fields, *inputs, len(at), *sizes)


@triton.jit
def _match_rows(
    tables, ages, tokens, ngram_hashes, keys, session, cells, query, context, out_tokens, out_cosines,
    out_ngram_matches, out_missing, table_size, step,
    P: tl.constexpr, R: tl.constexpr, D: tl.constexpr, P2: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Compare the rows of one cell with one context (equation L3): one program for each cell of each token."""
    at, n = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.program_id(0)
    physical_cell = tl.load(tables + tl.load(session + n) * table_size + tl.load(cells + at)).to(tl.int64)
    p, d = tl.arange(0, P2), tl.arange(0, D2)
    is_row, is_dim = p < P, d < D
    row = physical_cell * P + p
    key = tl.load(keys + row[:, None] * D + d[None, :], mask=is_row[:, None] & is_dim[None, :], other=0)
    cosine = tl.sum(key.to(tl.float32) * tl.load(query + n * D + d, mask=is_dim, other=0.0)[None, :], axis=1) * step
    ngram_matches = tl.zeros([P2], dtype=tl.int64)
    for r in tl.static_range(R):
        wanted = tl.load(context + n * R + r)
        stored = tl.load(ngram_hashes + row * R + r, mask=is_row, other=0)
        ngram_matches += ((stored == wanted) & (wanted != 0)).to(tl.int64)
    out = at.to(tl.int64) * P + p
    tl.store(out_tokens + out, tl.load(tokens + row, mask=is_row, other=0).to(tl.int64), mask=is_row)
    tl.store(out_cosines + out, cosine, mask=is_row)
    tl.store(out_ngram_matches + out, ngram_matches, mask=is_row)
    tl.store(out_missing + out, (tl.load(ages + row, mask=is_row, other=0) == 0).to(tl.uint8), mask=is_row)


@triton.jit(do_not_specialize=["n"])
def _write(
    ages, tokens, ngram_hashes, keys, old, new, at, new_keys, new_ngram_hashes, targets, n, P: tl.constexpr, R:
    tl.constexpr, D: tl.constexpr, P2: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Write one block to one touched cell (equation L7): one program for each touched cell.

    The program first finds the token that each row comes from. Every row is then stored once, by the thread that loads
    the row, so the order of stores does not matter.
    """
    cell = tl.program_id(0)
    p, d = tl.arange(0, P2), tl.arange(0, D2)
    is_row = p < P
    before = tl.load(old + cell).to(tl.int64) * P + p
    after = tl.load(new + cell).to(tl.int64) * P + p
    age = tl.load(ages + before, mask=is_row, other=2147483647)
    youngest = tl.max(tl.where(is_row, age, 0), axis=0)
    source = tl.full([P2], -1, dtype=tl.int32)
    for t in range(n):
        if tl.load(at + t) == cell:
            oldest = tl.argmin(age, axis=0)  # the first of equal ages, as in a stable sort
            youngest += 1
            age = tl.where(p == oldest, youngest, age)
            source = tl.where(p == oldest, t, source)
    fresh, kept = is_row & (source >= 0), is_row & (source < 0)
    # A masked load gives 0, so each sum takes a row from the old cell or from the block.
    token = tl.load(tokens + before, mask=kept, other=0) + tl.load(targets + source, mask=fresh, other=0).to(tl.int32)
    tl.store(ages + after, age, mask=is_row)
    tl.store(tokens + after, token, mask=is_row)
    for r in tl.static_range(R):
        ngram_hash_kept = tl.load(ngram_hashes + before * R + r, mask=kept, other=0)
        ngram_hash_new = tl.load(new_ngram_hashes + source * R + r, mask=fresh, other=0)
        tl.store(ngram_hashes + after * R + r, ngram_hash_kept + ngram_hash_new, mask=is_row)
    is_dim = (d < D)[None, :]
    key_kept = tl.load(keys + before[:, None] * D + d[None, :], mask=kept[:, None] & is_dim, other=0)
    key_new = tl.load(new_keys + source[:, None] * D + d[None, :], mask=fresh[:, None] & is_dim, other=0)
    tl.store(keys + after[:, None] * D + d[None, :], key_kept + key_new, mask=is_row[:, None] & is_dim)
