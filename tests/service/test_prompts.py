"""Encoding of prompts: their tokens, and which of them are learned: everything new, nothing twice (law 9)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.text.tokenizer import Tokenizer
from model.text.tool_calls import message_text
from service.errors import BadRequest
from service.turns.prompts import (
    MAX_DIGESTS,
    ChatPrompt,
    EncodedPrompt,
    TextPrompt,
    TokenPrompt,
    encode,
    merge_digests,
    message_digests,
    reply_digests,
    segments,
    windows,
    without_bos,
)

Messages = list[dict[str, str]]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.load(tiny_base)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def digests(messages: Messages) -> list[str]:
    return list(message_digests(messages))


def learned_text(encoded: EncodedPrompt, tokenizer: Tokenizer) -> str:
    """Return the text of the tokens that will be learned."""
    return tokenizer.decode([token for token, new in zip(encoded.token_ids, encoded.learn, strict=True) if new])


# Texts and tokens.


def test_a_repeated_text_is_learned_again(tokenizer: Tokenizer) -> None:
    encoded = encode(TextPrompt("The quick brown fox"), tokenizer, ["seen"], reply=True)
    assert list(encoded.token_ids) == tokenizer.encode("The quick brown fox")
    assert all(encoded.learn)
    assert len(encoded.learn) == len(encoded.token_ids)
    assert encoded.digests == []


def test_token_ids_are_kept_unchanged(tokenizer: Tokenizer) -> None:
    encoded = encode(TokenPrompt([5, 1, 5]), tokenizer, [], reply=True)
    assert (encoded.token_ids, list(encoded.learn)) == ([5, 1, 5], [1] * 3)


@pytest.mark.parametrize("prompt", [TextPrompt(""), TokenPrompt([])])
def test_a_prompt_without_tokens_is_refused(prompt: TextPrompt | TokenPrompt, tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="'prompt' must have at least one token") as error:
        encode(prompt, tokenizer, [], reply=True)
    assert error.value.param == "prompt"


# Chats.


def test_a_chat_teaches_its_messages_contents_and_nothing_of_the_template(tokenizer: Tokenizer) -> None:
    chat: Messages = [{"role": "system", "content": "Be kind."}, user("What was said?"), assistant("A fox.")]
    for reply in (True, False):
        encoded = encode(ChatPrompt(chat), tokenizer, [], reply=reply)
        assert learned_text(encoded, tokenizer) == "Be kind.What was said?A fox."
        assert encoded.digests == digests(chat)
        assert tokenizer.decode(encoded.token_ids).endswith("assistant\n") == reply
        assert not encoded.learn[-1]


def test_a_history_that_is_resent_teaches_its_new_part_only(tokenizer: Tokenizer) -> None:
    first = [user("The dog sleeps.")]
    known = merge_digests((), [*digests(first), *reply_digests(first, ["So it does."])])
    chat = [*first, assistant("So it does."), user("And the fox?")]
    assert learned_text(encode(ChatPrompt(chat), tokenizer, known, reply=True), tokenizer) == "And the fox?"
    known = merge_digests(known, digests(chat))
    again = encode(ChatPrompt(chat), tokenizer, known, reply=True)
    assert not any(again.learn), "a retry teaches nothing"
    assert again.token_ids == encode(ChatPrompt(chat), tokenizer, [], reply=True).token_ids, (
        "but the whole history is read"
    )


def test_a_history_cut_at_the_front_is_still_known(tokenizer: Tokenizer) -> None:
    chat = [user("one"), assistant("two"), user("three"), assistant("four")]
    known = digests(chat)
    for cut in range(5):
        encoded = encode(ChatPrompt([*chat[cut:], user("five")]), tokenizer, known, reply=True)
        assert learned_text(encoded, tokenizer) == "five"


def test_an_edited_message_is_new_and_its_neighbours_are_not(tokenizer: Tokenizer) -> None:
    chat = [user("one"), assistant("two"), user("three")]
    edited = [user("one"), assistant("2"), user("three")]
    assert learned_text(encode(ChatPrompt(edited), tokenizer, digests(chat), reply=True), tokenizer) == "2"


def test_a_repeated_message_is_new(tokenizer: Tokenizer) -> None:
    chat = [user("yes"), assistant("Really?")]
    repeated = [*chat, user("yes")]
    assert len(set(digests(repeated))) == 3
    assert learned_text(encode(ChatPrompt(repeated), tokenizer, digests(chat), reply=True), tokenizer) == "yes"
    assert learned_text(encode(ChatPrompt([user("no"), user("no")]), tokenizer, [], reply=True), tokenizer) == "nono"


def test_what_is_said_anew_in_another_chat_is_new(tokenizer: Tokenizer) -> None:
    bonn, ulm = [user("I live in Bonn.")], [user("I live in Ulm.")]
    known = merge_digests((), [*digests(bonn), *reply_digests(bonn, ["Nice.", "I see."])])
    assert not any(encode(ChatPrompt(bonn), tokenizer, known, reply=True).learn), "another reply is asked for"
    known = merge_digests(known, [*digests(ulm), *reply_digests(ulm, ["Nice."])])
    assert learned_text(encode(ChatPrompt(bonn), tokenizer, known, reply=True), tokenizer) == "I live in Bonn."
    longer = [*ulm, assistant("Nice."), *bonn]
    assert learned_text(encode(ChatPrompt(longer), tokenizer, known, reply=True), tokenizer) == "I live in Bonn."
    resent = [*bonn, assistant("Nice."), user("And where do I work?")]
    assert learned_text(encode(ChatPrompt(resent), tokenizer, known, reply=True), tokenizer) == resent[-1]["content"]
    known = merge_digests(known, digests(bonn))
    assert not any(encode(ChatPrompt(bonn), tokenizer, known, reply=True).learn)


def test_digests_of_older_sessions_are_known(tokenizer: Tokenizer) -> None:
    chat = [user("one"), assistant("two"), user("three")]
    for digit in "089f":
        old = [digest[:-1] + digit for digest in digests(chat)]
        assert not any(encode(ChatPrompt(chat), tokenizer, old, reply=True).learn)
        assert merge_digests(old, digests(chat)) == tuple(digests(chat))


def test_a_digest_depends_on_role_and_content_and_ignores_surrounding_white_space() -> None:
    """White space is ignored because templates and clients trim contents."""
    digest = digests([user("a\x000\x00b")])[0]
    others: list[Messages] = [[assistant("a\x000\x00b")], [user("a")], [user("b")], [user("a\x001\x00b")]]
    assert digest not in [digests(messages)[0] for messages in others]
    assert digests([user("  yes\n"), user("yes")]) == digests([user("yes"), user("yes ")])


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.sampled_from(["a", "b", " a"])), max_size=8))
def test_every_message_of_a_chat_has_its_own_digest_that_a_longer_chat_keeps(turns: list[tuple[str, str]]) -> None:
    chat = [{"role": role, "content": content} for role, content in turns]
    known = digests(chat)
    assert len(set(known)) == len(chat)
    for end in range(len(chat)):
        assert digests(chat[:end]) == known[:end]
        assert set(digests(chat[end:])) <= set(known), "the rest of a chat without its first messages has no new digest"


def test_a_replys_digest_is_that_of_the_resent_reply() -> None:
    chat = [user("yes"), assistant("yes"), user("again")]
    for reply, digest in zip(["yes", "no"], reply_digests(chat, ["yes", "no"]), strict=True):
        assert digests([*chat, assistant(reply + " "), user("and then")])[3] == digest
    assert reply_digests(chat, []) == []


def test_an_empty_message_teaches_nothing(tokenizer: Tokenizer) -> None:
    encoded = encode(ChatPrompt([user(""), assistant("ok")]), tokenizer, [], reply=True)
    assert learned_text(encoded, tokenizer) == "ok"


def test_messages_that_the_template_refuses_are_a_bad_request(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="The chat template refuses 'messages'") as error:
        encode(ChatPrompt([{"content": "no role"}]), tokenizer, [], reply=True)
    assert error.value.param == "messages"


# Tools.


def test_calls_are_known_again_and_results_are_learned_by_choice(tokenizer: Tokenizer) -> None:
    asked = [user("How long does the dog sleep?")]
    reply = message_text("I ask.", [("sleep", '{"a": 1,  "b": [2]}'), ("sleep", "{}")])
    tools = '{"function": {"name": "sleep"}}'
    known = [*digests(asked), *reply_digests(asked, [reply + "\n"], tools=tools)]
    resent = message_text("I ask.\n", [("sleep", '{"b": [2], "a": 1}'), ("sleep", "{}")])
    chat = [*asked, assistant(resent), {"role": "tool", "content": "2 hours", "tool_call_id": "c"}]
    encoded = encode(ChatPrompt(chat, tools=tools), tokenizer, known, reply=True)
    assert not any(encoded.learn) and encoded.digests == known
    assert f"<tools>\n{tools}\n</tools>" in tokenizer.decode(encoded.token_ids)
    by_choice = ChatPrompt(chat, tools=tools, learn_tool_results=True)
    assert learned_text(encode(by_choice, tokenizer, encoded.digests, reply=True), tokenizer) == "2 hours"
    assert not any(encode(by_choice, tokenizer, digests(chat), reply=True).learn)
    other = assistant(message_text("I ask.", [("sleep", '{"a": 2, "b": [2]}'), ("sleep", "{}")]))
    assert any(encode(ChatPrompt([*asked, other]), tokenizer, known, reply=True).learn)


def test_a_reply_that_is_cut_off_in_a_call_is_known_as_its_client_got_it() -> None:
    asked = [user("How long does the dog sleep?")]
    for cut, got in (
        ('So.\n<tool_call>\n{"name": "sle', "So."),
        ('So.\n<tool_call>\n{"name": "sleep", "arguments": {"a', message_text("So.", [("sleep", '{"a')])),
        ('```json\n{"name": "sleep", "arguments": {}}\n```', message_text("", [("sleep", "{}")])),
    ):
        assert (
            reply_digests(asked, [cut], tools='{"function": {"name": "sleep"}}')
            == digests([*asked, assistant(got)])[1:]
        )


# Remembered digests.


def test_merging_keeps_each_digest_once_at_its_latest_position() -> None:
    assert merge_digests(["a0", "b0", "c0"], ["d0", "b0"]) == ("a0", "c0", "d0", "b0")
    assert merge_digests((), ()) == ()


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first() -> None:
    merged = merge_digests([f"old {i}:0" for i in range(MAX_DIGESTS)], ["new:0", "old 5:0"])
    assert len(merged) == MAX_DIGESTS
    assert merged[-2:] == ("new:0", "old 5:0")
    assert merged[0] == "old 1:0"


# Texts of any length.


@given(st.integers(0, 40), st.integers(2, 9))
def test_windows_cover_every_token_once_each_with_a_predictor(length: int, size: int) -> None:
    text, bos = list(range(100, 100 + length)), 1
    parts = list(windows(text, size, bos))
    assert [token for part, _ in parts for token in part[1:]] == text
    assert all(part[0] == bos and 2 <= len(part) <= size for part, _ in parts)
    assert all(part[1] == text[start] for part, start in parts)
    assert all(len(part) == size for part, _ in parts[:-1]), "only the last window may be short"


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("score", [False, True])
def test_segments_score_and_learn_each_token_of_the_text_once(learn: bool, score: bool) -> None:
    encoded = EncodedPrompt(list(range(10, 21)), bytearray(n % 3 == 0 for n in range(11)))
    parts = segments(encoded, 5, 1, learn=learn, score=score)
    assert [part.token_ids[0] for part in parts] == [1, 1, 1]
    scored = [t for p in parts if p.score is not None for t, on in zip(p.token_ids, p.score, strict=True) if on]
    learned = [t for p in parts if p.learn is not None for t, on in zip(p.token_ids, p.learn, strict=True) if on]
    assert scored == (encoded.token_ids if score else [])
    assert learned == ([10, 13, 16, 19] if learn else [])
    assert all(part.generate is None for part in parts)
    assert all((part.learn is None, part.score is None) == (not learn, not score) for part in parts)
    assert segments(EncodedPrompt([], bytearray()), 5, 1, learn=learn, score=score) == []


def test_bos_stands_once_before_a_text_whoever_put_it_there() -> None:
    with_bos, plain = EncodedPrompt([1, 7, 8], bytearray(3), ["d"]), EncodedPrompt([7, 8], bytearray(2), ["d"])
    assert without_bos(with_bos, 1) == without_bos(plain, 1) == plain
    assert [list(part) for part, _ in windows(without_bos(with_bos, 1).token_ids, 8, 1)] == [[1, 7, 8]]
    assert without_bos(EncodedPrompt([], bytearray()), 1) == EncodedPrompt([], bytearray())
