"""The journal of a session that acts: a ring buffer of the actions whose reward may still arrive.

The buffer is a site of the session's memory, so actions are versioned, committed and rolled back with everything else.
Row 0 is the header; action number i (from 1) is stored in row 1 + (i − 1) mod MAX_PENDING until a later action takes
the row. All values are float32:

    row 0       [number of actions, last action, whether its reward is known, its reward, 0 …]
    other rows  [action number, action, probability, OPEN or CLOSED, inputs of the action [F]]

The module does not learn from rewards: `model.policies.network` does, with the stored inputs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from model.memory import SiteConfig

FloatArray = NDArray[np.float32]
NAME = "journal"
SLOTS = 64
MAX_PENDING = SLOTS - 1  # actions that can still be rewarded
MAX_TOUCHED_ROWS = 3  # rows that one request changes: the header, a rewarded action and a new action
HEADER_SIZE = 4  # values before the inputs
COUNTER_WRAP = 2**24 - 2**24 % MAX_PENDING  # float32 counts no further; a multiple keeps the ring's order
OPEN, CLOSED = 1.0, 2.0
COUNT, LAST, HAS_REWARD, REWARD = range(HEADER_SIZE)  # columns of row 0
NUMBER, ACTION, PROBABILITY, STATE = range(HEADER_SIZE)  # columns of the other rows


class JournalError(Exception):
    """An action that cannot be rewarded; `was_taken` tells whether the session ever took the action."""

    def __init__(self, message: str, *, was_taken: bool) -> None:
        super().__init__(message)
        self.was_taken = was_taken


def journal_site(inputs: int) -> SiteConfig:
    """Return the memory site of the journal of a policy whose actions have `inputs` (F) inputs."""
    return SiteConfig(NAME, "journal", slots=SLOTS, k=MAX_TOUCHED_ROWS, width=HEADER_SIZE + inputs)


class Journal:
    """A session's journal over `rows` [SLOTS, HEADER_SIZE + F], which are changed in place.

    touched: indices of the rows that were changed and must be written back.
    """

    def __init__(self, rows: FloatArray) -> None:
        self.rows = rows
        self.touched: set[int] = set()

    @property
    def is_valid(self) -> bool:
        """Return whether a policy could have written the rows."""
        numbers = self.rows[:, NUMBER]
        whole = bool((self.rows[:, :LAST] == self.rows[:, :LAST].round()).all())
        return whole and bool((numbers >= 0).all()) and bool((numbers < COUNTER_WRAP + MAX_PENDING).all())

    @property
    def count(self) -> int:
        """Return the number of actions taken so far, which is also the number of the last action."""
        return int(self.rows[0, COUNT])

    @property
    def last(self) -> tuple[int, float]:
        """Return the last action (−1: none yet) and its reward (NaN: not known yet)."""
        if not self.count:
            return -1, math.nan
        has_reward = bool(self.rows[0, HAS_REWARD])
        return int(self.rows[0, LAST]), float(self.rows[0, REWARD]) if has_reward else math.nan

    def pending_row(self, number: int | None) -> int:
        """Return the row of an action that waits for its reward (None: the last action).

        Raises JournalError when the session never took the action, when a later action took its row, or when the
        action has been rewarded.
        """
        if not self.count:
            raise JournalError("the session has taken no action yet", was_taken=False)
        number = self.count if number is None else number
        row = _row_of(number)
        if not number or int(self.rows[row, NUMBER]) != number:
            if 0 < number < self.count:
                raise JournalError(
                    f"the action is no longer kept: of {self.count} the last {MAX_PENDING} are", was_taken=True
                )
            raise JournalError(f"the session has taken the actions 1 to {self.count}", was_taken=False)
        if self.rows[row, STATE] != OPEN:
            raise JournalError("the action has been rewarded before", was_taken=True)
        return row

    def inputs(self, row: int) -> FloatArray:
        """Return the inputs [F] of the action in a row."""
        return self.rows[row, HEADER_SIZE:]

    def reward(self, row: int, reward: float) -> None:
        """Close the action in a row with its reward."""
        self.rows[row, STATE] = CLOSED
        self.touched.add(row)
        if int(self.rows[row, NUMBER]) == self.count:
            self.rows[0, HAS_REWARD], self.rows[0, REWARD] = 1.0, reward
            self.touched.add(0)

    def record_action(self, action: int, probability: float, inputs: FloatArray) -> int:
        """Append an action with its probability and its inputs [F]; return the action's number."""
        number = self.count + 1 if self.count < COUNTER_WRAP else 1
        row = _row_of(number)
        self.rows[row, :HEADER_SIZE] = number, action, probability, OPEN
        self.rows[row, HEADER_SIZE:] = inputs
        self.rows[0, :HEADER_SIZE] = number, action, 0.0, 0.0
        self.touched |= {0, row}
        return number


def _row_of(number: int) -> int:
    return 1 + (number - 1) % MAX_PENDING
