"""Drafts of the next tokens of a sequence, which one decode step verifies together."""

from __future__ import annotations

from collections.abc import Iterable


class PromptLookup:
    """Drafts the tokens that followed the sequence's last two tokens where they last occurred (prompt lookup, Saxena
    2023).

    A wrong draft costs a row of a decode step and nothing else: the generated tokens do not depend on drafts.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens = list(tokens)
        self._next_position: dict[tuple[int, int], int] = {}  # index of the token after the last occurrence of a pair
        self._num_indexed = 2

    def add(self, token: int) -> None:
        """Append a token to the sequence."""
        self._tokens.append(token)

    def draft_tokens(self, max_drafts: int) -> list[int]:
        """Return at most `max_drafts` next tokens, or none if the last two tokens have not occurred before."""
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
