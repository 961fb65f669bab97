"""Guesses of what a sequence will say next, that a decoding step may check several of at once."""

from __future__ import annotations

from collections.abc import Iterable


class PromptLookup:
    """Guesses that what followed the last two tokens before follows them again (prompt lookup, Saxena 2023).

    A guess that is wrong costs a row of a decoding step, and no more: what is said does not depend on it.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens = list(tokens)
        self._next_position: dict[tuple[int, int], int] = {}  # where it last went on after these two
        self._num_indexed = 2

    def add(self, token: int) -> None:
        """The sequence goes on with this token."""
        self._tokens.append(token)

    def draft_tokens(self, max_drafts: int) -> list[int]:
        """At most so many next tokens; none if the last two are new."""
        tokens = self._tokens
        for at in range(self._num_indexed, len(tokens)):
            self._next_position[tokens[at - 2], tokens[at - 1]] = at
        self._num_indexed = max(2, len(tokens))
        start = self._next_position.get((tokens[-2], tokens[-1])) if len(tokens) > 1 else None
        drafted: list[int] = []
        if start is not None:
            for at in range(start, start + max_drafts):
                drafted.append(tokens[at] if at < len(tokens) else drafted[at - len(tokens)])
        return drafted
