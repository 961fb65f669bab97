"""Whether the Triton kernels compute on this GPU what their twins do: asked once, before anything is served so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.decode.paged_cache import paged_attention
from model.memory.config import NGRAM_SIZES
from model.memory.lexical import torch_backend, triton_backend

POOL_CELLS, P, D, R = 7, 5, 16, len(NGRAM_SIZES)


def check_triton_kernels(device: torch.device) -> None:
    """Runs each kernel on a few random numbers. Raises RuntimeError where one differs from its twin, and what Triton
    raises where it can't be run at all."""
    g = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.randint(low, high, shape, generator=g).to(device, dtype)

    def reals(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    fields = [
        integers(0, 9, POOL_CELLS, P, dtype=torch.int32),
        integers(0, 99, POOL_CELLS, P, dtype=torch.int32),
        integers(0, 3, POOL_CELLS, P, R, dtype=torch.int16),
        integers(-127, 128, POOL_CELLS, P, D, dtype=torch.int8),
    ]
    tables = torch.tensor([[0, 0, 0], [3, 0, 6]], dtype=torch.int32, device=device)
    session, cells = integers(0, 2, 4), integers(0, 3, 4, 2)
    query, context = reals(4, D), integers(0, 3, 4, R, dtype=torch.int16)
    gathered = torch_backend.LexicalRows(*(field[tables[session[:, None], cells]] for field in fields))
    found = triton_backend.match_rows(tables, fields, session, cells, query, context)
    _check_close("compare", found, torch_backend.match_rows(gathered, query, context))

    old, new = (torch.tensor(places, dtype=torch.int32, device=device) for places in ([1, 6], [2, 6]))
    rows = (integers(-127, 128, 7, D, dtype=torch.int8), integers(0, 3, 7, R, dtype=torch.int16), integers(0, 99, 7))
    at = torch.tensor([0, 1, 0, 0, 0, 0, 0], device=device)
    expected_fields = [field.clone() for field in fields]
    written = torch_backend.write_lexical(torch_backend.LexicalRows(*(field[old] for field in fields)), at, *rows)
    for twin, part in zip(expected_fields, written, strict=True):
        twin[new] = part
    triton_backend.write(fields, old, new, at, *rows)
    _check_close("write", fields, expected_fields)

    pages, positions = tables + torch.tensor([[0], [1]], device=device), torch.tensor([0, 9, 8], device=device)
    sequences, (q, k, v) = torch.tensor([0, 1, 1], device=device), reals(3, 5, D).split([3, 1, 1], dim=1)
    kv_fields = [reals(8 * 4, 1, D) for _ in range(2)]
    expected_fields = [field.clone() for field in kv_fields]
    kv_args = (pages.int(), sequences, positions, 4)
    ours = triton_backend.paged_attention(q, k, v, kv_fields[0], kv_fields[1], *kv_args)
    _check_close(
        "attend_in_pages",
        [ours, *kv_fields],
        [paged_attention(q, k, v, expected_fields[0], expected_fields[1], *kv_args), *expected_fields],
    )


def _check_close(name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        if not torch.allclose(one.float(), other.float(), atol=1e-3, rtol=1e-3):
            raise RuntimeError(f"the kernel {name} does not compute what its twin does")
