"""The row format of the names that a session has met: of columns, of their values, of labels and of arms."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from model.memory.row_layout import MemoryConfigError, RowLayout, SiteSizes

HEAD_SIZE = 4  # int32 before the text: kind (0 where the row is empty), group, parent, bytes of the text
MAX_KIND = 5


class NameLayout(RowLayout):
    """Rows of a head [HEAD_SIZE] int32 and a text of at most `width` bytes in UTF-8, one row per address.

    No kernel reads the rows: they stay on the host.
    """

    on_host = True
    rows_divisor = 4

    def cell_fields(self, config: SiteSizes) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [((HEAD_SIZE,), torch.int32), ((config.width,), torch.uint8)]

    def are_valid_rows(self, data: NDArray[np.uint8], *, vocab_size: int) -> bool:
        heads = np.ascontiguousarray(data[:, : 4 * HEAD_SIZE]).view("<i4")
        kinds, lengths = heads[:, 0], heads[:, 3]
        if (kinds < 1).any() or (kinds > MAX_KIND).any() or (heads < 0).any():
            return False
        if (lengths > data.shape[1] - 4 * HEAD_SIZE).any():
            return False
        texts = (
            row[4 * HEAD_SIZE : 4 * HEAD_SIZE + length].tobytes() for row, length in zip(data, lengths, strict=True)
        )
        return all(map(_is_utf8, texts))

    def check_addresses(self, config: SiteSizes) -> None:
        if config.cell != 1:
            raise MemoryConfigError(f"{config.name}.cell must be 1 where rows are names, got {config.cell}")


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
