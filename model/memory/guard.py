"""Closes the read gate of a memory that recently raised the loss (law 12, equation S2 of README.md)."""

from __future__ import annotations

import torch
from torch import Tensor

GUARD_DECAY_TOKENS, GUARD_LIMIT_NATS = 1024, 8.0


def guard_step(balance: Tensor, closed: Tensor, gain: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the balance and the state of each guard after the next `tokens`, all of one shape (equation S2).

    balance: summed gain in nats of the tokens that were learned. The balance fades over GUARD_DECAY_TOKENS and is at
    most GUARD_LIMIT_NATS, so that earlier gains cannot outweigh a later harm. gain: nats over the frozen base of the
    next `tokens`, computed as if the gate were open. A gate closes (1.0) when the balance falls below
    −GUARD_LIMIT_NATS and opens (0.0) when the balance is above 0.
    """
    balance = (balance * (1.0 - 1.0 / GUARD_DECAY_TOKENS) ** tokens + gain).clamp_max(GUARD_LIMIT_NATS)
    return balance, torch.where(balance < -GUARD_LIMIT_NATS, torch.ones_like(closed), closed * (balance <= 0))
