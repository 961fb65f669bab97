"""Text from tokens, as far as the text may be shown: whole characters only, and no part of a stop string."""

from __future__ import annotations

from model.text.tokenizer import DecodeStream


class TextStream:
    """The text of one sequence.

    Attributes:
        text: all text that may ever be shown.
        num_released_chars: number of characters of `text` that may be shown now.
    """

    def __init__(self, decode: DecodeStream, stops: tuple[str, ...]) -> None:
        self._decode = decode
        self._stops = stops
        # For each token, the length of the text after the token. A token in the middle of a character ends with the
        # token that completes the character.
        self._text_ends: list[int] = []
        self._num_undecoded = 0
        self.text = ""
        self.num_released_chars = 0

    @property
    def num_released_tokens(self) -> int:
        """Number of tokens whose whole text is released."""
        count = len(self._text_ends)
        while count and self._text_ends[count - 1] > self.num_released_chars:
            count -= 1
        return count

    def push(self, token_id: int) -> bool:
        """Add a token; return whether a stop string is complete.

        The text then ends before the stop string, and all of the text is released.
        """
        piece = self._decode.step(token_id)
        self._num_undecoded += 1
        return bool(piece) and self._extend(piece)

    def finish(self) -> None:
        """End the sequence: release the text that was held back."""
        if self._num_undecoded:
            self._extend(self._decode.flush())
        self.num_released_chars = len(self.text)

    def _extend(self, piece: str) -> bool:
        before = len(self.text)
        self.text += piece
        self._text_ends += [len(self.text)] * self._num_undecoded
        self._num_undecoded = 0
        stop = self._find_stop(before)
        if stop is not None:
            self.text = self.text[:stop]
            self.num_released_chars = stop
            return True
        self.num_released_chars = max(self.num_released_chars, len(self.text) - self._partial_stop_length())
        return False

    def _find_stop(self, before: int) -> int | None:
        positions = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stops]
        return min((position for position in positions if position >= 0), default=None)

    def _partial_stop_length(self) -> int:
        """Return the length of the longest suffix of the text that is a prefix of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stops):
                return size
        return 0
