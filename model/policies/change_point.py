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
from model.memory.numerics import TINY

NAME = "since"
NUM_HYPOTHESES = 8


def change_point_site() -> SiteConfig:
    """The site of the guesses of a policy that labels what may change."""
    return SiteConfig(NAME, "journal", slots=1, k=1, width=2 * NUM_HYPOTHESES)


class ChangePointHypotheses(NamedTuple):
    """What n sessions guess: starts [n, J], how many labels came before, and chances [n, J]."""

    starts: Tensor
    probs: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> ChangePointHypotheses:
        """From rows [n, 2·J], be they forged; in a session that has none, everything counts."""
        starts, probs = rows.chunk(2, dim=1)
        whole = F.one_hot(torch.zeros_like(starts[:, 0], dtype=torch.long), starts.shape[1]).to(rows.dtype)
        probs = torch.where((probs > 0).any(1, keepdim=True), probs.clamp(0, 1), whole)
        return cls(starts, probs / probs.sum(1, keepdim=True))

    def update(self, likelihoods: Tensor, hazard: Tensor, num_labels: Tensor) -> Tensor:
        """The rows [n, 2·J] after a label each: foretold [n, J], how likely each guess took it for; doubt: the chance
        of a change; seen [n]: the number of labels so far, this one among them."""
        probs = self.probs * likelihoods.clamp_min(TINY)
        probs = probs / probs.sum(1, keepdim=True).clamp_min(TINY)
        least = probs.argmin(1, keepdim=True)
        probs = (probs * (1 - hazard)).scatter(1, least, hazard.expand(len(probs), 1))
        starts = self.starts.scatter(1, least, num_labels[:, None].to(self.starts.dtype))
        return torch.cat([starts, probs / probs.sum(1, keepdim=True)], dim=1)
