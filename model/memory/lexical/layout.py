"""The row format of the lexical memory and the limits of its sites."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model.memory.lexical.types import NGRAM_SIZES
from model.memory.row_layout import MemoryConfigError, RowLayout, SiteSizes

AGE_AND_TOKEN_BYTES = 8  # a stored row begins with two int32


class LexicalLayout(RowLayout):
    """Cells of P rows; each row has an age, a token, n-gram hashes and an int8 key (`types.LexicalRows`)."""

    def cell_fields(self, config: SiteSizes) -> list[tuple[tuple[int, ...], torch.dtype]]:
        P = config.cell
        return [
            ((P,), torch.int32),
            ((P,), torch.int32),
            ((P, len(NGRAM_SIZES)), torch.int16),
            ((P, config.width), torch.int8),
        ]

    def are_valid_rows(self, data: NDArray[np.uint8], *, vocab_size: int) -> bool:
        ages, tokens = np.ascontiguousarray(data[:, :AGE_AND_TOKEN_BYTES]).view("<i4").T
        return bool((ages > 0).all() and (tokens >= 0).all() and (tokens < vocab_size).all())

    def check_addresses(self, config: SiteSizes) -> None:
        if config.cell < 1 or config.slots % config.cell:
            raise MemoryConfigError(
                f"{config.name}.cell must divide slots, and be 1 in a hidden site, got {config.cell}"
            )

    def check_layer(self, config: SiteSizes) -> None:
        if config.layer != -1:
            raise MemoryConfigError(f"{config.name}.layer must be -1 for a lexical site, got {config.layer}")

    def check_together(self, sites: Sequence[SiteSizes]) -> None:
        if len(sites) > 1:
            raise MemoryConfigError("at most one lexical site")
