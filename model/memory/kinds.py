"""The registry of the kinds' slow weights: one line per kind. README.md says how to add a kind."""

from __future__ import annotations

from collections.abc import Callable

from model.memory.config import SiteConfig
from model.memory.delta.site import DeltaSite
from model.memory.lexical.site import LexicalSite
from model.memory.site import MemorySite
from model.site_kind import SiteKind

# The constructor of a site from its configuration and the base's hidden size; None: the kind has no slow weights.
SITES: dict[SiteKind, Callable[[SiteConfig, int], MemorySite] | None] = {
    "lexical": LexicalSite,
    "hidden": DeltaSite,
    "episodic": None,
    "meaning": None,
    "journal": None,
    "names": None,
}
