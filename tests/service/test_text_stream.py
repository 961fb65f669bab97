"""The streamed text of a sequence: whole characters, nothing of a stop string, and at the end all other text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.text.tokenizer import Tokenizer
from service.engine.text_sequence import TextStream

ALPHABET = "ab \né猫🐈"


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.load(tiny_base)


@pytest.fixture(scope="module")
def token_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Return the token of each byte string that is one token, single bytes included."""
    return {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}


def stops() -> st.SearchStrategy[list[str]]:
    return st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3)


def first_stop(text: str, stops: list[str]) -> int | None:
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def num_held_back(text: str, stops: list[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    sizes = (n for n in range(1, len(text) + 1) for stop in stops if n < len(stop) and stop.startswith(text[-n:]))
    return max(sizes, default=0)


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the complete characters of the tokens."""
    return b"".join(map(tokenizer.token_bytes, ids)).decode(errors="ignore")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(ALPHABET, min_size=1, max_size=6), max_size=8),
    st.lists(st.booleans(), min_size=8, max_size=8),
    stops(),
)
@example(["ab", "a", "b"], [False] * 8, ["bab"])
@example(["a", "🐈", "b"], [True] * 8, ["🐈b"])
@example(["aab", "aa"], [True] * 8, ["aabaab", "aaa"])
def test_nothing_of_a_stop_string_is_ever_shown_at_any_split(
    tokenizer: Tokenizer, token_of: dict[bytes, int], pieces: list[str], bytewise: list[bool], stops: list[str]
) -> None:
    """Push text as whole tokens or byte by byte, and compare each step with the plain definitions above."""
    ids: list[int] = []
    for piece, single in zip(pieces, bytewise, strict=False):
        ids += [token_of[bytes([b])] for b in piece.encode()] if single else tokenizer.encode(piece)
    stream, shown, stopped = TextStream(tokenizer.stream(), tuple(stops)), "", False
    for n, token in enumerate(ids, 1):
        assert not stopped
        stopped = stream.push(token)
        text = decoded(tokenizer, ids[:n])
        cut = first_stop(text, stops)
        assert stopped == (cut is not None)
        visible = text[:cut] if cut is not None else text[: len(text) - num_held_back(text, stops)]
        assert stream.text[: stream.num_released_chars] == visible
        assert visible.startswith(shown), "shown text stays"
        shown = visible
        assert stream.num_released_tokens == complete(tokenizer, ids[:n], visible)
        if stopped:
            break
    else:
        stream.finish()
        assert stream.num_released_chars == len(stream.text)
        assert stream.text == "".join(pieces[: len(bytewise)])
        assert stream.num_released_tokens == len(ids)
    assert first_stop(stream.text, stops) is None
    assert "\ufffd" not in stream.text


def complete(tokenizer: Tokenizer, ids: list[int], visible: str) -> int:
    """Return how many tokens lie in the visible text with all their bytes and with their last character complete."""
    done, all_bytes = 0, b"".join(map(tokenizer.token_bytes, ids))
    for n in range(1, len(ids) + 1):
        end = len(b"".join(map(tokenizer.token_bytes, ids[:n])))
        while end < len(all_bytes) and all_bytes[end] & 0xC0 == 0x80:
            end += 1
        try:
            text = all_bytes[:end].decode()
        except UnicodeDecodeError:
            return done
        if not visible.startswith(text):
            return done
        done = n
    return done


def push_all(stream: TextStream, ids: list[int]) -> list[str]:
    """Push all tokens, and return the text that may be shown after each."""
    shown = []
    for token in ids:
        stream.push(token)
        shown.append(stream.text[: stream.num_released_chars])
    return shown


def test_a_character_is_shown_whole_or_not_at_all(tokenizer: Tokenizer, token_of: dict[bytes, int]) -> None:
    stream = TextStream(tokenizer.stream(), ())
    ids = [token_of[bytes([b])] for b in "a🐈b".encode()]
    assert push_all(stream, ids) == ["a", "a", "a", "a", "a🐈", "a🐈b"]
    assert stream.num_released_tokens == 6


def test_the_tokens_of_a_character_are_released_with_its_last(tokenizer: Tokenizer, token_of: dict[bytes, int]) -> None:
    stream, counts = TextStream(tokenizer.stream(), ()), []
    for b in "a猫".encode():
        stream.push(token_of[bytes([b])])
        counts.append(stream.num_released_tokens)
    assert counts == [1, 1, 1, 4]


def test_a_token_that_is_partly_in_a_stop_string_is_not_released(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The quick brown fox")
    quick = next(i for i, token in enumerate(ids) if tokenizer.token_bytes(token) == b" quick")
    stream = TextStream(tokenizer.stream(), ("ick",))
    assert [stream.push(token) for token in ids[: quick + 1]] == [False] * quick + [True]
    assert stream.text == "The qu"
    assert stream.num_released_tokens == quick


def test_the_stop_string_that_begins_first_wins(tokenizer: Tokenizer, token_of: dict[bytes, int]) -> None:
    stream = TextStream(tokenizer.stream(), ("n f", "own", "brown f"))
    for token in tokenizer.encode("quick brow"):
        assert not stream.push(token)
    assert stream.text[: stream.num_released_chars] == "quick "
    assert stream.push(token_of[b"n"])
    assert stream.text == "quick br"


def test_the_end_releases_the_text_that_was_held_back(tokenizer: Tokenizer, token_of: dict[bytes, int]) -> None:
    stream = TextStream(tokenizer.stream(), ("END!",))
    ids = [token_of[c.encode()] for c in "aEND"]
    assert push_all(stream, ids) == ["a"] * 4
    assert stream.num_released_tokens == 1
    stream.finish()
    assert stream.text == "aEND"
    assert (stream.num_released_chars, stream.num_released_tokens) == (4, 4)


def test_an_end_within_a_character_shows_a_replacement_character(
    tokenizer: Tokenizer, token_of: dict[bytes, int]
) -> None:
    ids = [token_of[b"a"], *(token_of[bytes([b])] for b in "🐈".encode()[:3])]
    stream = TextStream(tokenizer.stream(), ())
    assert push_all(stream, ids) == ["a"] * 4
    stream.finish()
    assert stream.text == tokenizer.decode(ids) == "a\ufffd"
    assert stream.num_released_tokens == 4


def test_invalid_bytes_are_shown_as_replacement_characters(tokenizer: Tokenizer, token_of: dict[bytes, int]) -> None:
    ids = [token_of[b] for b in (b"\xf0", b"a", b"\xff", b"b")]
    stream = TextStream(tokenizer.stream(), ("b",))
    assert push_all(stream, ids) == ["", "\ufffda", "\ufffda\ufffd", "\ufffda\ufffd"]
    assert stream.num_released_tokens == 3


def test_special_tokens_show_nothing_and_stop_nothing(tokenizer: Tokenizer, token_of: dict[bytes, int]) -> None:
    special = tokenizer.bos_token_id
    assert special is not None
    stream = TextStream(tokenizer.stream(), ("<|", "ab"))
    assert push_all(stream, [special, token_of[b"a"], special]) == ["", "", ""]
    assert stream.push(token_of[b"b"])
    assert stream.text == ""
    end = TextStream(tokenizer.stream(), ())
    assert push_all(end, [token_of[b"a"], special]) == ["a", "a"]
    end.finish()
    assert end.num_released_tokens == 2


def test_an_empty_sequence_has_no_text(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer.stream(), ("x",))
    stream.finish()
    assert (stream.text, stream.num_released_chars, stream.num_released_tokens) == ("", 0, 0)
