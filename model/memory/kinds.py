"""The registry of memory kinds: one line per kind. README.md says how to add a kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from model.memory.config import RowLayout, SiteConfig, register_layout
from model.memory.delta.layout import DeltaLayout, VectorLayout
from model.memory.delta.site import DeltaSite
from model.memory.lexical.layout import LexicalLayout
from model.memory.lexical.site import LexicalSite
from model.memory.site import MemorySite
from model.site_kind import SiteKind


@dataclass(frozen=True)
class MemoryKind:
    """A kind of memory.

    layout: format of its rows. site: constructor of its slow weights from a configuration and the base's hidden size;
    None if the kind has no slow weights.
    """

    layout: RowLayout
    site: Callable[[SiteConfig, int], MemorySite] | None


KINDS: dict[SiteKind, MemoryKind] = {
    "lexical": MemoryKind(LexicalLayout(), LexicalSite),
    "hidden": MemoryKind(DeltaLayout(), DeltaSite),  # delta; checkpoints and the API call the kind "hidden"
    "journal": MemoryKind(VectorLayout(), None),  # rows that a policy itself reads and writes
}

for _name, _kind in KINDS.items():
    register_layout(_name, _kind.layout)
