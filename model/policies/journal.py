"""The journal of a session that acts: a ring buffer of the actions whose reward may still arrive.

The buffer is a site of the session's memory, so actions are versioned, committed and rolled back with everything else.
Row 0 is the header; action number i (from 1) is stored in row 1 + (i − 1) mod (slots − 1) until a later action takes
the row. A number is never given twice, so numbers that a rollback has undone are missing. All values are float32:

    row 0       [number of the last action, last action, whether its reward is known, its reward, 0 …]
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
MAX_PENDING = SLOTS - 1  # actions that can still be rewarded, of a policy of fixed shapes
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


def journal_site(inputs: int, slots: int = SLOTS) -> SiteConfig:
    """Return the memory site of the journal of a policy whose actions have `inputs` (F) inputs."""
    return SiteConfig(NAME, "journal", slots=slots, k=MAX_TOUCHED_ROWS, width=HEADER_SIZE + inputs)


class Journal:
    """A session's journal over `rows` [slots, HEADER_SIZE + F], which are changed in place.

    touched: indices of the rows that were changed and must be written back.
    """

    def __init__(self, rows: FloatArray) -> None:
        self.rows = rows
        self._pending = len(rows) - 1
        self._wrap = 2**24 - 2**24 % self._pending
        self.touched: set[int] = set()

    @property
    def is_valid(self) -> bool:
        """Return whether a policy could have written the rows."""
        numbers = self.rows[:, NUMBER]
        whole = bool((self.rows[:, :LAST] == self.rows[:, :LAST].round()).all())
        return whole and bool((numbers >= 0).all()) and bool((numbers < self._wrap + self._pending).all())

    @property
    def count(self) -> int:
        """Return the number of the last action, as stored; 0 before the first action."""
        return int(self.rows[0, COUNT])

    @property
    def last(self) -> tuple[int, float]:
        """Return the last action (−1: none yet) and its reward (NaN: not known yet)."""
        if not self.count:
            return -1, math.nan
        has_reward = bool(self.rows[0, HAS_REWARD])
        return int(self.rows[0, LAST]), float(self.rows[0, REWARD]) if has_reward else math.nan

    def pending_row(self, number: int | None, highest: int = 0) -> int:
        """Return the row of an action that waits for its reward (None: the last action).

        Args:
            number: number of the action.
            highest: the highest number that the session has given, to actions that a rollback has undone, too.

        Raises:
            JournalError: the session never took the action, the action has been undone, a later action took its row,
                or the action has been rewarded.
        """
        highest = max(highest, self.count)
        if not highest or (number is None and not self.count):
            raise JournalError("the session has taken no action yet", was_taken=False)
        number = self.count if number is None else number
        row = self._row_of(number)
        if int(self.rows[row, NUMBER]) != self._stored_number(number):
            if 0 < number <= highest:
                raise JournalError(
                    f"the action has been undone or is no longer kept: the last {self._pending} are", was_taken=True
                )
            raise JournalError(f"the session has taken the actions 1 to {highest}", was_taken=False)
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

    def record_action(self, action: int, probability: float, inputs: FloatArray, highest: int = 0) -> int:
        """Append an action with its probability and its inputs [F]; return the action's number.

        The number is above `highest`, the highest number that the session has given so far. After a rollback the
        journal skips numbers, fewer than it has rows, so that the next row of the ring stays the row of its oldest
        action.
        """
        highest = max(highest, self.count)
        number = highest + 1 + (self.count - highest) % self._pending
        row, stored = self._row_of(number), self._stored_number(number)
        self.rows[row, :HEADER_SIZE] = stored, action, probability, OPEN
        self.rows[row, HEADER_SIZE:] = inputs
        self.rows[0, :HEADER_SIZE] = stored, action, 0.0, 0.0
        self.touched |= {0, row}
        return number

    def _row_of(self, number: int) -> int:
        return 1 + (number - 1) % self._pending

    def _stored_number(self, number: int) -> int:
        return 1 + (number - 1) % self._wrap
