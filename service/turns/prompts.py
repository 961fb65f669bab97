"""What a turn's prompts are as tokens, and which of those tokens it may teach (nothing is learned twice)."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from model.text.chat_template import ChatTemplateError
from model.text.tokenizer import Tokenizer
from service.engine import Segment
from service.errors import BadRequest

MAX_DIGESTS = 1024
LONG_TEXT_CHARS = 20_000  # from which on tokenising leaves the event loop's thread


@dataclass(frozen=True)
class TextPrompt:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    token_ids: list[int]


@dataclass(frozen=True)
class ChatPrompt:
    """Messages with `role` and `content`."""

    messages: list[dict[str, str]]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's tokens; learn: which of them are new to the session; digests: of the messages they came from."""

    token_ids: list[int]
    learn: list[bool]
    digests: list[str] = field(default_factory=list)


def encode(prompt: Prompt, tokenizer: Tokenizer, known: Sequence[str], *, reply: bool) -> EncodedPrompt:
    """known: digests of messages that the session has seen; reply: end a chat where the assistant's turn begins.

    Raises BadRequest for a prompt without tokens and for messages that the chat template refuses.
    """
    if isinstance(prompt, ChatPrompt):
        return _encode_chat(prompt.messages, tokenizer, frozenset(known), reply=reply)
    token_ids = prompt.token_ids if isinstance(prompt, TokenPrompt) else tokenizer.encode(prompt.text)
    if not token_ids:
        raise BadRequest("'prompt' must have at least one token, got none.", param="prompt")
    return EncodedPrompt(token_ids, [True] * len(token_ids))


async def encode_async(prompt: Prompt, tokenizer: Tokenizer, known: Sequence[str], *, reply: bool) -> EncodedPrompt:
    """Encode a prompt as `encode` does; a long text on another thread, so that the event loop goes on."""
    if isinstance(prompt, TextPrompt) and len(prompt.text) > LONG_TEXT_CHARS:
        return await asyncio.to_thread(encode, prompt, tokenizer, known, reply=reply)
    return encode(prompt, tokenizer, known, reply=reply)


async def encode_text(prompt: TextPrompt | ChatPrompt, tokenizer: Tokenizer, known: Sequence[str]) -> EncodedPrompt:
    """Return the tokens of a text or a chat, which may be empty, without BOS."""
    if isinstance(prompt, TextPrompt) and not prompt.text:
        return EncodedPrompt([], [])
    encoded = await encode_async(prompt, tokenizer, known, reply=False)
    return without_bos(encoded, tokenizer.start_token_id)


def _encode_chat(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, known: frozenset[str], *, reply: bool
) -> EncodedPrompt:
    """Only the contents of new messages are learned: the template around them says nothing about the session."""
    try:
        chat = tokenizer.encode_chat(messages, add_generation_prompt=reply)
    except ChatTemplateError as error:
        raise BadRequest(f"The chat template refuses 'messages': {error}.", param="messages") from error
    learn = [False] * len(chat.token_ids)
    digests = list(message_digests(messages))
    for digest, (start, end) in zip(digests, chat.spans, strict=True):
        if digest not in known:
            learn[start:end] = [True] * (end - start)
    return EncodedPrompt(chat.token_ids, learn, digests)


def message_digests(messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """One digest a message, of its role, its content and how often it came before in this chat.

    A client that resends its history, cut at the front or edited at the end, thus sends known digests for what is old,
    while a message said again is new.
    """
    seen: Counter[tuple[str, str]] = Counter()
    for message in messages:
        said = (message["role"], message["content"].strip())
        text = f"{said[0]}\x00{seen[said]}\x00{said[1]}"
        seen[said] += 1
        yield hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def reply_digests(messages: Sequence[Mapping[str, str]], replies: Sequence[str]) -> list[str]:
    """The digests under which the replies to a chat come back as its history."""
    chats = ([*messages, {"role": "assistant", "content": reply}] for reply in replies)
    return [list(message_digests(chat))[-1] for chat in chats]


def merge_digests(known: Sequence[str], new: Sequence[str]) -> tuple[str, ...]:
    """The digests to keep: the latest ones, those just seen last."""
    return tuple(dict.fromkeys(reversed([*known, *new])))[:MAX_DIGESTS][::-1]


def without_bos(encoded: EncodedPrompt, bos: int) -> EncodedPrompt:
    """The same without the BOS that a tokenizer or a chat template may have put first; `windows` puts it back."""
    if encoded.token_ids[:1] != [bos]:
        return encoded
    return EncodedPrompt(encoded.token_ids[1:], encoded.learn[1:], encoded.digests)


def windows(token_ids: Sequence[int], size: int, bos: int) -> Iterator[tuple[list[int], int]]:
    """Cuts a text of any length into requests of at most `size` tokens; yields each, with BOS before it so that all of
    its tokens have a predictor, and its start in the text."""
    for start in range(0, len(token_ids), size - 1):
        yield [bos, *token_ids[start : start + size - 1]], start


def segments(encoded: EncodedPrompt, size: int, bos: int, *, learn: bool, score: bool) -> list[Segment]:
    """The requests of a text of any length, none of which generates."""
    return [
        Segment(
            part,
            learn=[False, *encoded.learn[start : start + size - 1]] if learn else None,
            score=[False] + [True] * (len(part) - 1) if score else None,
        )
        for part, start in windows(encoded.token_ids, size, bos)
    ]
