"""The base's prediction of the next tokens, which every kind of memory may read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """The base's prediction of n next tokens: logits [n, V], log Σ exp(logits) [n] and entropy [n] in nats."""

    logits: Tensor
    log_z: Tensor
    entropy: Tensor

    def log_prob(self, tokens: Tensor) -> Tensor:
        """Return log p_LM of tokens, long, [n] or [n, K]; the result has the same shape."""
        if tokens.dim() == 1:
            return self.log_prob(tokens[:, None])[:, 0]
        return self.logits.gather(1, tokens) - self.log_z[:, None]

    def select(self, mask: Tensor) -> Prediction:
        """Return the prediction of the tokens that mask [n] selects."""
        return Prediction(*(part[mask] for part in self))


def base_prediction(logits: Tensor) -> Prediction:
    """Return the prediction that logits [n, V] make. Each row is rounded as if the row were alone (law 4)."""
    probs = torch.softmax(logits, -1)
    log_z = logits.amax(-1) - probs.amax(-1).log()
    # torch splits the reduction of a single row over threads, which changes its bits: duplicate the row.
    pair = (probs.expand(2, -1), logits.expand(2, -1)) if len(logits) == 1 else (probs, logits)
    return Prediction(logits, log_z, log_z - torch.linalg.vecdot(*pair)[: len(logits)])
