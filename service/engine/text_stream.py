"""From tokens to text that may be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from model.text.tokenizer import DecodeStream


class TextStream:
    """The text of one sequence. `text` is all that may ever be shown, `released` how much of it already may be."""

    def __init__(self, decode: DecodeStream, stops: tuple[str, ...]) -> None:
        self._decode = decode
        self._stops = stops
        self._text_ends: list[
            int
        ] = []  # for each token, the length of text after it; unfinished characters end with the next
        self._num_undecoded = 0
        self.text = ""
        self.released = 0

    @property
    def tokens_released(self) -> int:
        """How many tokens have all of their text released."""
        done = len(self._text_ends)
        while done and self._text_ends[done - 1] > self.released:
            done -= 1
        return done

    def push(self, token_id: int) -> bool:
        """Adds a token; True if a stop string is complete: the text then ends before it, and all of it is released."""
        piece = self._decode.step(token_id)
        self._num_undecoded += 1
        return bool(piece) and self._extend(piece)

    def finish(self) -> None:
        """The sequence is over: releases what was held back."""
        if self._num_undecoded and not self._extend(self._decode.flush()):
            self.released = len(self.text)
        self.released = len(self.text)

    def _extend(self, piece: str) -> bool:
        before = len(self.text)
        self.text += piece
        self._text_ends += [len(self.text)] * self._num_undecoded
        self._num_undecoded = 0
        stop = self._find_stop(before)
        if stop is not None:
            self.text = self.text[:stop]
            self.released = stop
            return True
        self.released = max(self.released, len(self.text) - self._partial_stop_length())
        return False

    def _find_stop(self, before: int) -> int | None:
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stops]
        return min((at for at in found if at >= 0), default=None)

    def _partial_stop_length(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stops):
                return size
        return 0
