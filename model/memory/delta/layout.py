"""The row formats of memories whose rows are vectors, and the limits of their sites."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model.memory.row_layout import MemoryConfigError, RowLayout, SiteSizes


class VectorLayout(RowLayout):
    """Rows of d_v fp32 numbers, one row per address."""

    def cell_fields(self, config: SiteSizes) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [((config.width,), torch.float32)]

    def are_valid_rows(self, data: NDArray[np.uint8], *, vocab_size: int) -> bool:
        return bool(np.isfinite(np.ascontiguousarray(data).view("<f4")).all())

    def check_addresses(self, config: SiteSizes) -> None:
        if config.cell != 1:
            raise MemoryConfigError(
                f"{config.name}.cell must divide slots, and be 1 in a hidden site, got {config.cell}"
            )


class DeltaLayout(VectorLayout):
    """Vectors that product keys address: N = √N · √N slots (equation D1 of README.md)."""

    def check_addresses(self, config: SiteSizes) -> None:
        if math.isqrt(config.slots) ** 2 != config.slots:
            raise MemoryConfigError(f"{config.name}.slots must be a perfect square (product keys), got {config.slots}")
        super().check_addresses(config)

    def max_k(self, config: SiteSizes) -> int:
        return math.isqrt(config.slots)

    def check_together(self, sites: Sequence[SiteSizes]) -> None:
        layers = [site.layer for site in sites]
        if len(set(layers)) != len(layers):
            raise MemoryConfigError(f"at most one hidden site a layer, got layers {layers}")
