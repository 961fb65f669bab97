"""Online change-point detection for a policy that labels: when did the rule behind the labels last change?

The algorithm is Bayesian online change-point detection (Adams & MacKay 2007, arXiv 0710.3742, equation 3) with at most
J hypotheses. Hypothesis j states that the rule last changed after label `starts[j]`, so that only later labels count;
`probs[j]` is its posterior. With the predictive likelihood l_j of a label under each hypothesis and the hazard h, the
chance of a change per label, a label updates the posterior:

    p_j ← (1 − h) · p_j l_j / Σ_i p_i l_i        the rule did not change with this label
    p_new = h, starts_new = labels so far        the rule changed with this label

The new hypothesis replaces the least likely one, and the posterior is normalised. A session stores one row: J starts,
then J probabilities, float32. The module does not compute the likelihoods: `model.policies.network` does.
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
    """Return the memory site that stores the hypotheses of a session."""
    return SiteConfig(NAME, "journal", slots=1, k=1, width=2 * NUM_HYPOTHESES)


class ChangePointHypotheses(NamedTuple):
    """The J hypotheses of n sessions.

    starts [n, J]: number of labels before the last change. probs [n, J]: posterior, each row sums to 1.
    """

    starts: Tensor
    probs: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> ChangePointHypotheses:
        """Read stored rows [n, 2·J]. Any content gives valid probabilities; an empty row states: no change."""
        starts, probs = rows.chunk(2, dim=1)
        no_change = F.one_hot(torch.zeros_like(starts[:, 0], dtype=torch.long), starts.shape[1]).to(rows.dtype)
        probs = torch.where((probs > 0).any(1, keepdim=True), probs.clamp(0, 1), no_change)
        return cls(starts, probs / probs.sum(1, keepdim=True))

    def update(self, likelihoods: Tensor, hazard: Tensor, num_labels: Tensor) -> Tensor:
        """Return the rows [n, 2·J] after one more label in each session.

        likelihoods [n, J]: probability of the label under each hypothesis. hazard: scalar, chance of a change per
        label. num_labels [n]: labels of the session so far, including the new one.
        """
        probs = self.probs * likelihoods.clamp_min(TINY)
        probs = probs / probs.sum(1, keepdim=True).clamp_min(TINY)
        least_likely = probs.argmin(1, keepdim=True)
        probs = (probs * (1 - hazard)).scatter(1, least_likely, hazard.expand(len(probs), 1))
        starts = self.starts.scatter(1, least_likely, num_labels[:, None].to(self.starts.dtype))
        return torch.cat([starts, probs / probs.sum(1, keepdim=True)], dim=1)
