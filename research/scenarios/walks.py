"""Walks over the states of tasks of several steps: how many steps each state is away from where one wants to be."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research.scenarios.core import FloatArray, IntArray


def steps_after(following: IntArray, state: IntArray, wanted: NDArray[np.bool_]) -> FloatArray:
    """Return the number of steps [B, A] from a state [B] to the nearest wanted one, that of each first action included.

    following [B, S, A]: the state that each action leads to; −1 = nowhere. wanted [B, S]. A state without a way counts
    as S steps away.
    """
    (B, S, _), task = following.shape, np.arange(len(state))
    steps = np.where(wanted, 0, S)
    steps = np.concatenate([steps, np.full((B, 1), S)], 1)  # the last one is nowhere
    for _ in range(S):
        nearer = np.minimum(steps[:, :S], 1 + steps[task[:, None, None], following].min(2))
        if (nearer == steps[:, :S]).all():
            break
        steps[:, :S] = nearer
    return (1 + steps[task[:, None], following[task, state]]).astype(np.float32)
