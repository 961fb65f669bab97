"""Rows as bytes: the form in which rows are stored, moved and compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SiteRows:
    """The stored rows of one site: slots int32 [n], ascending, and data uint8 [n, row_bytes]."""

    slots: Tensor
    data: Tensor


def as_bytes(values: Tensor) -> Tensor:
    """Return rows [..., w] of numbers as uint8 [..., bytes of a row]."""
    # A copy: with 0 or 1 rows, `contiguous` keeps strides that `view` refuses.
    return values.clone(memory_format=torch.contiguous_format).view(torch.uint8)
