"""What a memory is made of: its sites and their sizes. Frozen, JSON-serialisable, refuses what it does not know."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.site_kind import SiteKind

NGRAM_SIZES = (2, 4, 8)  # how many last tokens of its context a lexical row has a fingerprint of
SESSION_SCALARS_SUFFIX = "_own"  # what a session's own numbers are stored under, after the site's name
TRUST, BALANCE, GATE_CLOSED = range(3)  # places in them


class MemoryConfigError(ValueError):
    """A memory configuration that cannot be built; the message names the field, the limit and the value."""


@dataclass(frozen=True)
class SiteConfig:
    """One place where the memory is read and written.

    name: unique in its memory; part of the store's keys.
    kind: "lexical" (rows are tokens with the keys of their contexts, read into the output distribution), "hidden"
        (rows are vectors of `width` numbers, read into the residual stream) or "journal" (the same rows without slow
        weights: what a policy keeps of its session beside what it has learned).
    layer: the decoder layer whose output a hidden site reads and rewrites; -1 is the output, before the head. A
        lexical site is always at the output.
    slots: N; in a hidden site a perfect square (product keys), in a lexical one a multiple of `cell`.
    k: slots that a token selects (hidden), or cells that it reads (lexical).
    width: numbers in a hidden site's row (d_v), or in a lexical row's key (d_k).
    cell: slots that share an address; 1 in a hidden site.
    surprise: nats; a lexical site does not write tokens that were expected better than that.
    decay: λ of a hidden site's delta rule. cap: largest norm of its rows.
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
        if self.kind not in ("lexical", "hidden", "journal"):
            raise MemoryConfigError(f"{self.name}.kind must be 'lexical', 'hidden' or 'journal', got {self.kind!r}")
        if self.slots < 1:
            raise MemoryConfigError(f"{self.name}.slots must be at least 1, got {self.slots}")
        if self.kind == "hidden" and math.isqrt(self.slots) ** 2 != self.slots:
            raise MemoryConfigError(f"{self.name}.slots must be a perfect square (product keys), got {self.slots}")
        if self.cell < 1 or self.slots % self.cell or (self.kind != "lexical" and self.cell > 1):
            raise MemoryConfigError(f"{self.name}.cell must divide slots, and be 1 in a hidden site, got {self.cell}")
        most = math.isqrt(self.slots) if self.kind == "hidden" else self.cells
        if not 1 <= self.k <= most:
            raise MemoryConfigError(f"{self.name}.k must be in 1..{most}, got {self.k}")
        if self.width < 1:
            raise MemoryConfigError(f"{self.name}.width must be at least 1, got {self.width}")
        if not self.surprise >= 0.0:
            raise MemoryConfigError(f"{self.name}.surprise must not be negative, got {self.surprise}")
        if self.kind == "lexical" and self.layer != -1:
            raise MemoryConfigError(f"{self.name}.layer must be -1 for a lexical site, got {self.layer}")
        if not 0.0 <= self.decay <= 1.0:
            raise MemoryConfigError(f"{self.name}.decay must be in 0..1, got {self.decay}")
        if not self.cap > 0.0:
            raise MemoryConfigError(f"{self.name}.cap must be positive, got {self.cap}")

    @property
    def cells(self) -> int:
        """How many addresses there are."""
        return self.slots // self.cell

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return 8 + 2 * len(NGRAM_SIZES) + self.width if self.kind == "lexical" else 4 * self.width


@dataclass(frozen=True)
class MemoryConfig:
    """The sites of a memory and the block, the number of tokens between two writes of a request."""

    hidden_size: int
    sites: tuple[SiteConfig, ...]
    block: int = 64

    def __post_init__(self) -> None:
        if self.block < 1:
            raise MemoryConfigError(f"block must be at least 1, got {self.block}")
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise MemoryConfigError(f"site names must be unique, got {names}")
        layers = [site.layer for site in self.sites if site.kind == "hidden"]
        if len(set(layers)) != len(layers):
            raise MemoryConfigError(f"at most one hidden site a layer, got layers {layers}")
        if sum(site.kind == "lexical" for site in self.sites) > 1:
            raise MemoryConfigError("at most one lexical site")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryConfig:
        """Raises MemoryConfigError on an unknown or a missing key."""
        try:
            sites = tuple(SiteConfig(**site) for site in data["sites"])
            return cls(**{**data, "sites": sites})
        except (TypeError, KeyError, AttributeError) as error:
            raise MemoryConfigError(f"not a memory configuration: {error}") from error
