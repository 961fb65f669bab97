"""Since when what a session has seen holds: guesses in one row of its own memory, each believed as it foretold labels.

Guess j says that nothing before the `starts[j]`-th label counts any more. A label judges them all (Bayes), and from
each on there is one more, that everything changes with it; the least likely one makes room for it. This is the change
point detection of Adams & MacKay (arXiv 0710.3742) with a bounded number of run lengths. Row: J starts, then J chances.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.memory import SiteConfig
from model.memory.lexical import torch_backend

NAME = "since"
GUESSES = 8


def since_site() -> SiteConfig:
    """The site of the guesses of a policy that labels what may change."""
    return SiteConfig(NAME, "journal", slots=1, k=1, width=2 * GUESSES)


class Guesses(NamedTuple):
    """What n sessions guess: starts [n, J], how many labels came before, and chances [n, J]."""

    starts: Tensor
    chances: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Guesses:
        """From rows [n, 2·J], be they forged; in a session that has none, everything counts."""
        starts, chances = rows.chunk(2, dim=1)
        whole = F.one_hot(torch.zeros_like(starts[:, 0], dtype=torch.long), starts.shape[1]).to(rows.dtype)
        chances = torch.where((chances > 0).any(1, keepdim=True), chances.clamp(0, 1), whole)
        return cls(starts, chances / chances.sum(1, keepdim=True))

    def judged(self, foretold: Tensor, doubt: Tensor, seen: Tensor) -> Tensor:
        """The rows [n, 2·J] after a label each: foretold [n, J], how likely each guess took it for; doubt: the chance
        of a change; seen [n]: the number of labels so far, this one among them."""
        chances = self.chances * foretold.clamp_min(torch_backend.TINY)
        chances = chances / chances.sum(1, keepdim=True).clamp_min(torch_backend.TINY)
        least = chances.argmin(1, keepdim=True)
        chances = (chances * (1 - doubt)).scatter(1, least, doubt.expand(len(chances), 1))
        starts = self.starts.scatter(1, least, seen[:, None].to(self.starts.dtype))
        return torch.cat([starts, chances / chances.sum(1, keepdim=True)], dim=1)
