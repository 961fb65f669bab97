"""Text from tokens, as far as the text may be shown: whole characters only, and no part of a stop string."""

from __future__ import annotations

import re

from model.text.tokenizer import DecodeStream

LINE_START = re.compile(r"\n([ \t]*)(?=[^ \t\r\n])")


class TextStream:
    """The text of one sequence.

    Attributes:
        text: all text that may ever be shown.
        num_released_chars: number of characters of `text` that may be shown now.
        stop: the stop string that ended the text, or None.
    """

    def __init__(self, decode: DecodeStream, stops: tuple[str, ...], min_tokens: int = 0, min_indent: int = 0) -> None:
        """min_tokens: number of tokens in whose text nothing is looked for that ends it. min_indent: white space with
        which each line after the first begins; the text ends before another line, unless the line is blank."""
        self._decode = decode
        self._stops = [_StopSearch(stop) for stop in stops]
        self._min_tokens, self._min_indent = min_tokens, min_indent
        self._num_indented = 0  # characters up to the last line that is known to be indented
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
        """Add a token; return whether a stop string is complete, or a line that is not indented has begun.

        The text then ends before the string or the line, and all of the text is released.
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
            self.num_released_chars = self._num_indented = len(self.text)
            return False
        ends = [(search, search.find(piece)) for search in self._stops]
        starts: list[tuple[int, str | None]]
        starts = [(before + end - len(search.stop), search.stop) for search, end in ends if end is not None]
        if self._min_indent and (outdent := self._find_outdent()) is not None:
            starts.append((outdent, None))
        if starts:
            start, self.stop = min(starts, key=lambda found: found[0])
            self.text = self.text[:start]
            self.num_released_chars = len(self.text)
            return True
        held_back = max((search.num_matched for search in self._stops), default=0)
        if self._min_indent:
            held_back = max(held_back, len(self.text) - len(self.text.rstrip()))
        self.num_released_chars = max(self.num_released_chars, len(self.text) - held_back)
        return False

    def _find_outdent(self) -> int | None:
        """Return the end of the text before its first line with less white space than asked; None if there is none."""
        for line in LINE_START.finditer(self.text, self._num_indented):
            if len(line[1]) < self._min_indent:
                return len(self.text[: line.start()].rstrip("\r\n"))
            self._num_indented = line.end()
        return None


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
