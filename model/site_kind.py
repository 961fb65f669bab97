"""The kinds of memory sites, apart from `model.memory` because the Python client needs the kinds without torch."""

from typing import Literal

SiteKind = Literal["lexical", "hidden", "episodic", "meaning", "journal", "names"]
