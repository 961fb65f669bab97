"""Reading the metadata of a GGUF file, as a mapping from key to value, and the error of a bad file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Metadata = Mapping[str, Any]


class GGUFError(Exception):
    """A GGUF file that is damaged, incomplete or cannot be converted."""


def required(metadata: Metadata, key: str) -> Any:
    """Return the value of a key. Raises `GGUFError` if the key is missing."""
    if key not in metadata:
        raise GGUFError(f"{key} is missing")
    return metadata[key]


def shortest_decimal(value: float) -> float:
    """Return the shortest decimal that rounds to the stored fp32 value: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(value)))
