"""The configuration of a memory: its sites, their sizes and the limits of these sizes.

The configuration is frozen, JSON-serialisable and strict: an unknown key is an error. The rules of each kind of memory
are in its `RowLayout` (`layouts.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.memory.layouts import LAYOUTS
from model.memory.row_layout import MemoryConfigError, RowLayout
from model.site_kind import SiteKind

SESSION_SCALARS_SUFFIX = "_own"  # session scalars are stored under the name of their site and this suffix
TRUST, BALANCE, GATE_CLOSED = range(3)  # indices into the session scalars [3, R + 1]


@dataclass(frozen=True)
class SiteConfig:
    """The configuration of one site: a part of the network at which the memory is read and written.

    name: an identifier that is unique in the memory; part of the store's keys.
    kind: "lexical" (rows are tokens with the keys of their contexts, read into the output distribution), "hidden" (a
        delta site: rows are vectors of `width` numbers, read into the residual stream), "episodic" (rows are spans of
        the session's past, whose keys and values attention reads), "meaning" (a vector for each episode), "journal"
        (vectors without slow weights: what a policy keeps of its session besides what it has learned) or "names" (the
        names of columns, labels and arms).
    layer: index of the decoder layer whose output a delta site reads and rewrites; -1 is the output, before the head.
        A lexical site is always at the output.
    slots: number of rows that a session can hold (N): a perfect square in a delta site (product keys), a multiple of
        `cell` in a lexical site.
    k: number of slots that a token selects (delta), or of cells that a token reads (lexical).
    width: numbers in a row of a delta site (d_v), or in the key of a lexical row (d_k); most tokens of an episode;
        numbers in the vector of its meaning; most bytes of a name.
    cell: slots that share an address (P); 1 in a delta site.
    surprise: nats; a lexical site does not write a token that had a lower loss.
    decay: λ of the delta rule. cap: largest norm of a delta row.
    """

    name: str
    kind: SiteKind
    slots: int
    k: int
    layer: int = -1
    width: int = 0
    cell: int = 1
    surprise: float = 0.0
    decay: float = 0.0
    cap: float = 1e4

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise MemoryConfigError(f"site name must be an identifier, got {self.name!r}")
        if self.name.endswith(SESSION_SCALARS_SUFFIX):
            raise MemoryConfigError(f"site name must not end in {SESSION_SCALARS_SUFFIX!r}, got {self.name!r}")
        if self.kind not in LAYOUTS:
            *others, last = (repr(kind) for kind in LAYOUTS)
            raise MemoryConfigError(f"{self.name}.kind must be {', '.join(others)} or {last}, got {self.kind!r}")
        if self.slots < 1:
            raise MemoryConfigError(f"{self.name}.slots must be at least 1, got {self.slots}")
        self.layout.check_addresses(self)
        max_k = self.layout.max_k(self)
        if not 1 <= self.k <= max_k:
            raise MemoryConfigError(f"{self.name}.k must be in 1..{max_k}, got {self.k}")
        if self.width < 1:
            raise MemoryConfigError(f"{self.name}.width must be at least 1, got {self.width}")
        if not self.surprise >= 0.0:
            raise MemoryConfigError(f"{self.name}.surprise must not be negative, got {self.surprise}")
        self.layout.check_layer(self)
        if not 0.0 <= self.decay <= 1.0:
            raise MemoryConfigError(f"{self.name}.decay must be in 0..1, got {self.decay}")
        if not self.cap > 0.0:
            raise MemoryConfigError(f"{self.name}.cap must be positive, got {self.cap}")

    @property
    def layout(self) -> RowLayout:
        """Return the row layout of the site's kind."""
        return LAYOUTS[self.kind]

    @property
    def cells(self) -> int:
        """Return the number of addresses."""
        return self.slots // self.cell

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one stored row."""
        fields = self.layout.cell_fields(self)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in fields) // self.cell


@dataclass(frozen=True)
class MemoryConfig:
    """The configuration of a memory.

    hidden_size: d of the base. sites: one configuration for each site. block: tokens between two writes of a request.
    """

    hidden_size: int
    sites: tuple[SiteConfig, ...]
    block: int = 64

    def __post_init__(self) -> None:
        if self.block < 1:
            raise MemoryConfigError(f"block must be at least 1, got {self.block}")
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise MemoryConfigError(f"site names must be unique, got {names}")
        for kind in dict.fromkeys(site.kind for site in self.sites):
            LAYOUTS[kind].check_together([site for site in self.sites if site.kind == kind])

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON-serialisable values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryConfig:
        """Return the configuration that `to_dict` has written. Raise MemoryConfigError on an unknown or missing key."""
        try:
            sites = tuple(SiteConfig(**site) for site in data["sites"])
            return cls(**{**data, "sites": sites})
        except (TypeError, KeyError, AttributeError) as error:
            raise MemoryConfigError(f"not a memory configuration: {error}") from error
