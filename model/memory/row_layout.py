"""The contract of a kind's row format, and the sizes of a site that the format depends on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class MemoryConfigError(ValueError):
    """An error in a memory configuration; the message names the field, the limit and the value."""


class SiteSizes(Protocol):
    """The fields of a `SiteConfig` on which a row format depends."""

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def cell(self) -> int: ...
    @property
    def cells(self) -> int: ...
    @property
    def width(self) -> int: ...


class RowLayout(ABC):
    """The row format of one kind of memory, and the limits of its sites. A layout has no state.

    on_host: whether the rows stay on the host, whatever the device: a kind that no kernel on the device reads.
    rows_divisor: the pool has room for so many times fewer rows of this kind.
    """

    on_host = False
    rows_divisor = 1

    @abstractmethod
    def cell_fields(self, config: SiteSizes) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and the type of each field of one cell. The first field is 0 where a row is empty."""

    @abstractmethod
    def are_valid_rows(self, data: NDArray[np.uint8], *, vocab_size: int) -> bool:
        """Return True if the memory could have written the stored rows, data [n, row_bytes]."""

    @abstractmethod
    def check_addresses(self, config: SiteSizes) -> None:
        """Raise MemoryConfigError if `slots` and `cell` do not make addresses of this kind."""

    def max_k(self, config: SiteSizes) -> int:
        """Return the largest number of addresses that a token may select."""
        return config.cells

    def check_layer(self, config: SiteSizes) -> None:
        """Raise MemoryConfigError if this kind cannot be read at `layer`."""
        return

    def check_together(self, sites: Sequence[SiteSizes]) -> None:
        """Raise MemoryConfigError if one memory cannot have all these sites, which are of this kind."""
        return
