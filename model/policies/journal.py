"""The actions of a session that may still be rewarded: rows of its own memory, so they are versioned with the rest.

Row 0 counts the actions and knows the last one; action number n stands in one of the other rows until another takes
its place. Rows: [number, action, chance, state, the inputs it asked with …], all float32.
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
MAX_TOUCHED_ROWS = 3  # rows that one request changes, at most
HEADER_SIZE = 4  # numbers before the inputs
COUNTER_WRAP = 2**24 - 2**24 % MAX_PENDING  # float32 counts no further; a multiple of KEPT keeps the rows in turn
OPEN, CLOSED = 1.0, 2.0
COUNT, LAST, HAS_REWARD, REWARD = range(HEADER_SIZE)  # places in row 0
NUMBER, ACTION, PROBABILITY, STATE = range(HEADER_SIZE)  # places in the others


class JournalError(Exception):
    """An action cannot be rewarded; `was_taken` says whether it was ever taken."""

    def __init__(self, message: str, *, was_taken: bool) -> None:
        super().__init__(message)
        self.was_taken = was_taken


def journal_site(inputs: int) -> SiteConfig:
    """The site of the journal of a policy whose actions ask with so many numbers."""
    return SiteConfig(NAME, "journal", slots=SLOTS, k=MAX_TOUCHED_ROWS, width=HEADER_SIZE + inputs)


class Journal:
    """A session's journal; rows [SLOTS, HEAD + F], which are changed in place. `touched`: which ones were."""

    def __init__(self, rows: FloatArray) -> None:
        self.rows = rows
        self.touched: set[int] = set()

    @property
    def is_valid(self) -> bool:
        """Whether a policy could have written it."""
        numbers = self.rows[:, NUMBER]
        whole = bool((self.rows[:, :LAST] == self.rows[:, :LAST].round()).all())
        return whole and bool((numbers >= 0).all()) and bool((numbers < COUNTER_WRAP + MAX_PENDING).all())

    @property
    def count(self) -> int:
        """Actions taken so far, which is the number of the last one."""
        return int(self.rows[0, COUNT])

    @property
    def last(self) -> tuple[int, float]:
        """The last action (−1: none) and its reward (NaN: not known yet)."""
        if not self.count:
            return -1, math.nan
        has_reward = bool(self.rows[0, HAS_REWARD])
        return int(self.rows[0, LAST]), float(self.rows[0, REWARD]) if has_reward else math.nan

    def open(self, number: int | None) -> int:
        """The row of the action of this number (None: the last), which waits for its reward. Raises JournalError."""
        if not self.count:
            raise JournalError("the session has taken no action yet", was_taken=False)
        number = self.count if number is None else number
        row = _row(number)
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
        """What an action asked with [F]."""
        return self.rows[row, HEADER_SIZE:]

    def reward(self, row: int, reward: float) -> None:
        """An action's reward is known."""
        self.rows[row, STATE] = CLOSED
        self.touched.add(row)
        if int(self.rows[row, NUMBER]) == self.count:
            self.rows[0, HAS_REWARD], self.rows[0, REWARD] = 1.0, reward
            self.touched.add(0)

    def take(self, action: int, probability: float, inputs: FloatArray) -> int:
        """Another action is taken, with inputs [F]; returns its number."""
        number = self.count + 1 if self.count < COUNTER_WRAP else 1
        row = _row(number)
        self.rows[row, :HEADER_SIZE] = number, action, probability, OPEN
        self.rows[row, HEADER_SIZE:] = inputs
        self.rows[0, :HEADER_SIZE] = number, action, 0.0, 0.0
        self.touched |= {0, row}
        return number


def _row(number: int) -> int:
    return 1 + (number - 1) % MAX_PENDING
