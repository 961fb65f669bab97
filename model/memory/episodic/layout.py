"""The row formats of the episodic memory: episodes as token ids, and the vectors of their meaning, slot by slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from model.memory.row_layout import MemoryConfigError, RowLayout, SiteSizes

HEADER = 4  # int32 numbers before the tokens
ORDINAL, LENGTH, VERSION, OFFSET = range(HEADER)  # 1, 2, 3 …; number of tokens; where the episode was learned
HEADER_BYTES = 4 * HEADER
MADE_BY_BYTES = 8  # before a vector: the ordinal of its episode, and the id of the encoder


def learned_at(rows: NDArray[np.uint8], version: int) -> NDArray[np.uint8]:
    """Return stored rows [n, row_bytes] with another version as the one that learned them."""
    numbers = np.ascontiguousarray(rows).view("<i4").copy()
    numbers[:, VERSION] = version
    return numbers.view(np.uint8)


class _HostLayout(RowLayout):
    """The rules of sites whose rows are one an episode, slot by slot. name: of such a site, with its article."""

    on_host = True
    rows_divisor = 8  # a span has many tokens, of which each may be a row of another kind
    name: ClassVar[str]

    def check_addresses(self, config: SiteSizes) -> None:
        if config.cell != 1:
            raise MemoryConfigError(f"{config.name}.cell must be 1 in {self.name}, got {config.cell}")

    def check_layer(self, config: SiteSizes) -> None:
        if config.layer != -1:
            raise MemoryConfigError(f"{config.name}.layer must be -1 for {self.name}, got {config.layer}")

    def check_together(self, sites: Sequence[SiteSizes]) -> None:
        if len(sites) > 1:
            raise MemoryConfigError(f"at most one {self.name.split(' ', 1)[1]}")


class EpisodicLayout(_HostLayout):
    """A row has a header (`ORDINAL` and the fields after it) and `width` token ids, of which the first `LENGTH` count.

    A slot is (ordinal − 1) modulo the number of slots, so the newest episode replaces the oldest.
    """

    name = "an episodic site"

    def cell_fields(self, config: SiteSizes) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [((HEADER,), torch.int32), ((config.width,), torch.int32)]

    def are_valid_rows(self, data: NDArray[np.uint8], *, vocab_size: int) -> bool:
        rows = np.ascontiguousarray(data).view("<i4")
        header, tokens = rows[:, :HEADER], rows[:, HEADER:]
        lengths = header[:, LENGTH]
        return bool(
            (header[:, ORDINAL] > 0).all()
            and (lengths > 0).all()
            and (lengths <= tokens.shape[1]).all()
            and (header[:, VERSION:] >= 0).all()
            and (tokens >= 0).all()
            and (tokens < vocab_size).all()
        )


class MeaningLayout(_HostLayout):
    """A row has the ordinal of the episode in the same slot, the id of the encoder, and a vector of `width` numbers."""

    name = "a site of meanings"

    def cell_fields(self, config: SiteSizes) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [((2,), torch.int32), ((config.width,), torch.int8)]

    def are_valid_rows(self, data: NDArray[np.uint8], *, vocab_size: int) -> bool:
        return bool((np.ascontiguousarray(data[:, :4]).view("<i4") > 0).all())

    def check_addresses(self, config: SiteSizes) -> None:
        super().check_addresses(config)
        if config.width % 4:
            raise MemoryConfigError(f"{config.name}.width must be a multiple of 4, got {config.width}")
