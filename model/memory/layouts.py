"""The registry of row formats: one line per kind of memory. `kinds.py` has the slow weights of the kinds."""

from __future__ import annotations

from model.memory.delta.layout import DeltaLayout, VectorLayout
from model.memory.episodic.layout import EpisodicLayout, MeaningLayout
from model.memory.lexical.layout import LexicalLayout
from model.memory.name_layout import NameLayout
from model.memory.row_layout import RowLayout
from model.site_kind import SiteKind

LAYOUTS: dict[SiteKind, RowLayout] = {
    "lexical": LexicalLayout(),
    "hidden": DeltaLayout(),  # delta; checkpoints and the API call the kind "hidden"
    "episodic": EpisodicLayout(),
    "meaning": MeaningLayout(),
    "journal": VectorLayout(),  # rows that a policy itself reads and writes
    "names": NameLayout(),
}
