"""Guesses of what a sequence will say next, that a decoding step may check several of at once."""

from __future__ import annotations

from collections.abc import Iterable


class Lookup:
    """Guesses that what followed the last two tokens before follows them again (prompt lookup, Saxena 2023).

    A guess that is wrong costs a row of a decoding step, and no more: what is said does not depend on it.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens = list(tokens)
        self._after: dict[tuple[int, int], int] = {}  # where it last went on after these two
        self._noted = 2

    def add(self, token: int) -> None:
        """The sequence goes on with this token."""
        self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """At most so many next tokens; none if the last two are new."""
        tokens = self._tokens
        for at in range(self._noted, len(tokens)):
            self._after[tokens[at - 2], tokens[at - 1]] = at
        self._noted = max(2, len(tokens))
        start = self._after.get((tokens[-2], tokens[-1])) if len(tokens) > 1 else None
        guessed: list[int] = []
        if start is not None:
            for at in range(start, start + most):
                guessed.append(tokens[at] if at < len(tokens) else guessed[at - len(tokens)])
        return guessed
