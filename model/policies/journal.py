"""The actions of a session that may still be rewarded: rows of its own memory, so they are versioned with the rest.

Row 0 counts the actions and knows the last one; action number n stands in one of the other rows until another takes
its place. Rows: [number, action, chance, state, the inputs it asked with …], all float32.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from model.memory import SiteConfig

Numbers = NDArray[np.float32]
NAME = "journal"
SLOTS = 64
KEPT = SLOTS - 1  # actions that can still be rewarded
TOUCHED = 3  # rows that one request changes, at most
HEAD = 4  # numbers before the inputs
WRAP = 2**24 - 2**24 % KEPT  # float32 counts no further; a multiple of KEPT keeps the rows in turn
OPEN, CLOSED = 1.0, 2.0
COUNT, LAST, TOLD, REWARD = range(HEAD)  # places in row 0
NUMBER, ACTION, CHANCE, STATE = range(HEAD)  # places in the others


class JournalError(Exception):
    """An action cannot be rewarded; `known` says whether it was ever taken."""

    def __init__(self, message: str, *, known: bool) -> None:
        super().__init__(message)
        self.known = known


def journal_site(inputs: int) -> SiteConfig:
    """The site of the journal of a policy whose actions ask with so many numbers."""
    return SiteConfig(NAME, "journal", slots=SLOTS, k=TOUCHED, width=HEAD + inputs)


class Journal:
    """A session's journal; rows [SLOTS, HEAD + F], which are changed in place. `touched`: which ones were."""

    def __init__(self, rows: Numbers) -> None:
        self.rows = rows
        self.touched: set[int] = set()

    @property
    def sound(self) -> bool:
        """Whether a policy could have written it."""
        numbers = self.rows[:, NUMBER]
        whole = bool((self.rows[:, :LAST] == self.rows[:, :LAST].round()).all())
        return whole and bool((numbers >= 0).all()) and bool((numbers < WRAP + KEPT).all())

    @property
    def count(self) -> int:
        """Actions taken so far, which is the number of the last one."""
        return int(self.rows[0, COUNT])

    @property
    def last(self) -> tuple[int, float]:
        """The last action (−1: none) and its reward (NaN: not known yet)."""
        if not self.count:
            return -1, math.nan
        told = bool(self.rows[0, TOLD])
        return int(self.rows[0, LAST]), float(self.rows[0, REWARD]) if told else math.nan

    def open(self, number: int | None) -> int:
        """The row of the action of this number (None: the last), which waits for its reward. Raises JournalError."""
        if not self.count:
            raise JournalError("the session has taken no action yet", known=False)
        number = self.count if number is None else number
        row = _row(number)
        if not number or int(self.rows[row, NUMBER]) != number:
            if 0 < number < self.count:
                raise JournalError(f"the action is no longer kept: of {self.count} the last {KEPT} are", known=True)
            raise JournalError(f"the session has taken the actions 1 to {self.count}", known=False)
        if self.rows[row, STATE] != OPEN:
            raise JournalError("the action has been rewarded before", known=True)
        return row

    def inputs(self, row: int) -> Numbers:
        """What an action asked with [F]."""
        return self.rows[row, HEAD:]

    def reward(self, row: int, reward: float) -> None:
        """An action's reward is known."""
        self.rows[row, STATE] = CLOSED
        self.touched.add(row)
        if int(self.rows[row, NUMBER]) == self.count:
            self.rows[0, TOLD], self.rows[0, REWARD] = 1.0, reward
            self.touched.add(0)

    def take(self, action: int, chance: float, inputs: Numbers) -> int:
        """Another action is taken, with inputs [F]; returns its number."""
        number = self.count + 1 if self.count < WRAP else 1
        row = _row(number)
        self.rows[row, :HEAD] = number, action, chance, OPEN
        self.rows[row, HEAD:] = inputs
        self.rows[0, :HEAD] = number, action, 0.0, 0.0
        self.touched |= {0, row}
        return number


def _row(number: int) -> int:
    return 1 + (number - 1) % KEPT
