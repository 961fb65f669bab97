"""The check of the Triton backend: its kernels run once on this GPU before the GPU serves."""

from __future__ import annotations

import torch
from torch import Tensor

from model.memory.lexical.torch_backend import TorchBackend
from model.memory.lexical.triton_backend import TritonBackend
from model.memory.lexical.types import NGRAM_SIZES
from model.triton_check import assert_close

POOL_CELLS, P, D, R = 7, 5, 16, len(NGRAM_SIZES)


def check_memory_kernels(device: torch.device) -> None:
    """Run each kernel on a few random numbers. Raise RuntimeError if a result differs from that of torch operators, and
    Triton's own error if a kernel cannot be run."""
    g = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.randint(low, high, shape, generator=g).to(device, dtype)

    triton_backend, torch_backend = TritonBackend(), TorchBackend()
    fields = [
        integers(0, 9, POOL_CELLS, P, dtype=torch.int32),
        integers(0, 99, POOL_CELLS, P, dtype=torch.int32),
        integers(0, 3, POOL_CELLS, P, R, dtype=torch.int16),
        integers(-127, 128, POOL_CELLS, P, D, dtype=torch.int8),
    ]
    tables = torch.tensor([[0, 0, 0], [3, 0, 6]], dtype=torch.int32, device=device)
    session, cells = integers(0, 2, 4), integers(0, 3, 4, 2)
    query, context = torch.randn(4, D, generator=g).to(device), integers(0, 3, 4, R, dtype=torch.int16)
    compared = (tables, fields, session, cells, query, context)
    assert_close("match_rows", triton_backend.match_rows(*compared), torch_backend.match_rows(*compared))

    old, new = (torch.tensor(cell, dtype=torch.int32, device=device) for cell in ([1, 6], [2, 6]))
    at = torch.tensor([0, 1, 0, 0, 0, 0, 0], device=device)
    rows = (integers(-127, 128, 7, D, dtype=torch.int8), integers(0, 3, 7, R, dtype=torch.int16), integers(0, 99, 7))
    expected = [field.clone() for field in fields]
    torch_backend.write(expected, old, new, at, *rows)
    triton_backend.write(fields, old, new, at, *rows)
    assert_close("write", fields, expected)
