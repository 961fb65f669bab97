"""Text from tokens, as far as the text may be shown: whole characters only, and no part of a stop string."""

from __future__ import annotations

from model.text.tokenizer import DecodeStream


class TextStream:
    """The text of one sequence.

    Attributes:
        text: all text that may ever be shown.
        num_released_chars: number of characters of `text` that may be shown now.
        stop: the stop string that ended the text, or None.
    """

    def __init__(self, decode: DecodeStream, stops: tuple[str, ...], min_tokens: int = 0) -> None:
        """min_tokens: number of tokens in whose text no stop string is looked for."""
        self._decode = decode
        self._stops = [_StopSearch(stop) for stop in stops]
        self._min_tokens = min_tokens
        self._num_tokens = 0
        # For each token, the length of the text after the token. A token in the middle of a character ends with the
        # token that completes the character.
        self._text_ends: list[int] = []
        self._num_undecoded = 0
        self.text = ""
        self.num_released_chars = 0
        self.stop: str | None = None

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
        self._num_tokens += 1
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
        if self._num_tokens <= self._min_tokens:
            self.num_released_chars = len(self.text)
            return False
        ends = [(search, search.find(piece)) for search in self._stops]
        starts = [(before + end - len(search.stop), search.stop) for search, end in ends if end is not None]
        if starts:
            start, self.stop = min(starts)
            self.text = self.text[:start]
            self.num_released_chars = len(self.text)
            return True
        held_back = max((search.num_matched for search in self._stops), default=0)
        self.num_released_chars = max(self.num_released_chars, len(self.text) - held_back)
        return False


class _StopSearch:
    """Looks for one stop string in a text that grows, each character once (Knuth, Morris and Pratt 1977).

    Attributes:
        num_matched: characters at the end of the text that may be the beginning of the stop string.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._borders = [0]  # for each beginning of the string, the longest shorter beginning that is its end too
        for character in stop[1:]:
            self._borders.append(self._extended(self._borders[-1], character))

    def find(self, piece: str) -> int | None:
        """Add a piece of text; return the length of the piece up to the end of the string, if the string is there."""
        for index, character in enumerate(piece):
            self.num_matched = self._extended(self.num_matched, character)
            if self.num_matched == len(self.stop):
                return index + 1
        return None

    def _extended(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.stop[matched] == character)
