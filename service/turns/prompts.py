"""Prompts as tokens, and which tokens may be learned: only new ones, so that nothing is learned twice."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from model.memory.episodic.borrowed import LEARNED, REPLY
from model.text import tool_calls
from model.text.chat_template import ChatTemplateError
from model.text.infill import infill_tokens
from model.text.tokenizer import Tokenizer
from service.concurrency import run_off_loop
from service.engine import Segment
from service.errors import BadRequest

MAX_DIGESTS = 1024  # a chat may have this many messages: a session could not know more of them again
MAX_LOGPROBS = 2**18  # tokens of an answer that come with their log-probabilities
BY_USER, BY_OTHERS = "0", "1"  # last digit of the digest of a message
MESSAGE_CHARS = 64  # the work on a message, in characters, that comes on top of the work on its content


@dataclass(frozen=True)
class TextPrompt:
    """A prompt of plain text."""

    text: str


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt of token ids, used unchanged."""

    token_ids: list[int]


@dataclass(frozen=True)
class PartsPrompt:
    """A prompt of texts and token ids, one after the other."""

    parts: list[str | int]


@dataclass(frozen=True)
class ChatPrompt:
    """A chat: messages with `role` and `content`; the calls of an assistant's message are a part of its content.

    ending: after the messages the assistant's turn begins ("reply"), the last message goes on ("continue"), or nothing
    comes ("none"). tools: the tools that the reply may call, as JSON, one a line. learn_tool_results: whether the
    messages of tools are learned; otherwise the session does not know them again either.
    """

    messages: list[dict[str, str]]
    ending: Literal["reply", "continue", "none"] = "reply"
    tools: str = ""
    learn_tool_results: bool = False


@dataclass(frozen=True)
class EncodedPrompt:
    """The tokens of a prompt.

    learn: `LEARNED` for each token that is new to the session, `REPLY` in a reply of a chat. digests: of the messages
    of a chat that the session knows from then on. question: the tokens [start, stop) of a chat's last message of the
    user, or before the gap of a text; None where there is none.

    The ids of a long text are an array, and `learn` has a byte a token: lists would take ten times the memory, and
    freeing them would hold the interpreter's lock.
    """

    token_ids: Sequence[int]
    learn: bytearray
    digests: list[str] = field(default_factory=list)
    question: tuple[int, int] | None = None


Prompt = TextPrompt | TokenPrompt | PartsPrompt | ChatPrompt | EncodedPrompt


def prompt_size(prompt: Prompt) -> int:
    """Return what the work on a prompt grows with: its characters, or its tokens."""
    match prompt:
        case TextPrompt(text):
            return len(text)
        case TokenPrompt(token_ids):
            return len(token_ids)
        case PartsPrompt(parts):
            return sum(len(part) if isinstance(part, str) else 1 for part in parts)
        case ChatPrompt(messages, tools=tools):
            return len(tools) + sum(len(message["content"]) + MESSAGE_CHARS for message in messages)
        case EncodedPrompt():
            return 0


def require_fits(prompt: Prompt, tokenizer: Tokenizer, context: int, param: str = "") -> None:
    """Refuse a prompt whose size alone tells that it does not fit the context, before it is tokenised.

    Raises:
        BadRequest: the prompt has more than `context` tokens for sure.
    """
    match prompt:
        case TextPrompt(text):
            fewest = tokenizer.fewest_tokens(len(text))  # a character has at least one byte
        case TokenPrompt(token_ids):
            fewest = len(token_ids)
        case PartsPrompt(parts):
            texts = [part for part in parts if isinstance(part, str)]
            fewest = len(parts) - len(texts) + tokenizer.fewest_tokens(sum(map(len, texts)))
        case ChatPrompt(messages):  # templates trim the white space around a content
            fewest = tokenizer.fewest_tokens(sum(len(message["content"].strip()) for message in messages))
        case EncodedPrompt(token_ids):
            fewest = len(token_ids)
    param = param or ("messages" if isinstance(prompt, ChatPrompt) else "prompt")
    if fewest > context:
        raise BadRequest(
            f"'{param}' and completion may hold {context} tokens together (the model's context), "
            f"got {param} of at least {fewest} tokens.",
            param=param,
            code="context_length_exceeded",
        )


def text_of(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """Return the text of a prompt that is no chat."""
    match prompt:
        case TextPrompt(text):
            return text
        case PartsPrompt(parts):
            pieces = [part.encode() if isinstance(part, str) else tokenizer.token_bytes(part) for part in parts]
        case TokenPrompt(token_ids) | EncodedPrompt(token_ids):
            pieces = [tokenizer.token_bytes(token_id) for token_id in token_ids]
        case ChatPrompt():
            raise AssertionError("a chat is rendered by its template")
    return b"".join(pieces).decode(errors="replace")


def require_few_logprobs(tokens: int, param: str) -> None:
    """Refuse a request whose answer would hold the log-probabilities of more than `MAX_LOGPROBS` tokens.

    Raises:
        BadRequest: `tokens`, of which `param` asks for the log-probabilities, is more.
    """
    if tokens > MAX_LOGPROBS:
        raise BadRequest(
            f"One answer may hold the log-probabilities of {MAX_LOGPROBS} tokens, '{param}' asks for {tokens}.",
            param=param,
            code="too_many_logprobs",
        )


def encode(prompt: Prompt, tokenizer: Tokenizer, known: Sequence[str], *, reply: bool) -> EncodedPrompt:
    """Encode a prompt.

    known: digests of the messages that the session has seen; reply: end a chat where the assistant's turn begins.

    Raises BadRequest for a prompt without tokens and for messages that the chat template refuses.
    """
    if isinstance(prompt, EncodedPrompt):
        return prompt
    if isinstance(prompt, ChatPrompt):
        return _encode_chat(prompt if reply else replace(prompt, ending="none"), tokenizer, known)
    token_ids: Sequence[int]
    match prompt:
        case TextPrompt(text):
            token_ids = tokenizer.encode_array(text)
        case TokenPrompt(token_ids):
            pass
        case PartsPrompt(parts):
            token_ids = _encode_parts(parts, tokenizer)
    if not token_ids:
        raise BadRequest("'prompt' must have at least one token, got none.", param="prompt")
    infill = infill_tokens(tokenizer)
    gap = None if infill is None else infill.find_prefix(token_ids)
    return EncodedPrompt(token_ids, bytearray(b"\1") * len(token_ids), question=gap)


async def encode_async(prompt: Prompt, tokenizer: Tokenizer, known: Sequence[str], *, reply: bool) -> EncodedPrompt:
    """Encode a prompt as `encode` does; a large prompt on another thread, so that the event loop goes on."""
    return await run_off_loop(prompt_size(prompt), encode, prompt, tokenizer, known, reply=reply)


async def render_async(prompt: ChatPrompt, tokenizer: Tokenizer) -> str:
    """Return the text of a chat; of a large one from another thread. Raises BadRequest as `encode` does."""

    def render() -> str:
        ending = prompt.ending
        return tokenizer.render_chat(
            prompt.messages,
            add_generation_prompt=ending == "reply",
            continues=ending == "continue",
            tools=prompt.tools,
        )

    try:
        return await run_off_loop(prompt_size(prompt), render)
    except ChatTemplateError as error:
        raise BadRequest(f"The chat template refuses 'messages': {error}.", param="messages") from error


async def encode_text(prompt: TextPrompt | ChatPrompt, tokenizer: Tokenizer, known: Sequence[str]) -> EncodedPrompt:
    """Return the tokens of a text or a chat, which may be empty, without BOS."""
    if isinstance(prompt, TextPrompt) and not prompt.text:
        return EncodedPrompt([], bytearray())
    encoded = await encode_async(prompt, tokenizer, known, reply=False)
    return without_bos(encoded, tokenizer.start_token_id)


def _encode_parts(parts: Sequence[str | int], tokenizer: Tokenizer) -> array[int]:
    """Return the tokens of texts and token ids, one after the other; only a text at the start may begin with BOS."""
    token_ids = array("i")
    for index, part in enumerate(parts):
        if isinstance(part, int):
            token_ids.append(part)
        else:
            encoded = tokenizer.encode_array(part)
            token_ids.extend(encoded[1:] if index and tokenizer.add_bos else encoded)
    return token_ids


def _encode_chat(prompt: ChatPrompt, tokenizer: Tokenizer, known: Sequence[str]) -> EncodedPrompt:
    """Encode a chat. Only the contents of new messages are learned: the template says nothing about the session.

    A last message that is said anew is new. A last message that goes on is a part of the reply: the message is neither
    learned nor known again by itself. The same holds for the results of tools, unless the prompt says otherwise.
    """
    messages = prompt.messages
    try:
        chat = tokenizer.encode_chat(
            messages,
            add_generation_prompt=prompt.ending == "reply",
            continues=prompt.ending == "continue",
            tools=prompt.tools,
        )
    except ChatTemplateError as error:
        raise BadRequest(f"The chat template refuses 'messages': {error}.", param="messages") from error
    learn, digests = bytearray(len(chat.token_ids)), list[str]()
    past = messages if prompt.ending != "continue" else messages[:-1]
    of_chat = list(message_digests(past))
    not_new = {_content_digits(digest) for digest in known}
    if of_chat and prompt.ending != "continue" and said_anew(of_chat[-1], known):
        not_new.remove(_content_digits(of_chat[-1]))
    for message, digest, (start, end) in zip(past, of_chat, chat.spans, strict=False):
        if message["role"] == "tool" and not prompt.learn_tool_results:
            continue
        digests.append(digest)
        if _content_digits(digest) not in not_new:
            mark = REPLY if message["role"] == "assistant" else LEARNED
            learn[start:end] = bytes([mark]) * (end - start)
    asked = [span for message, span in zip(messages, chat.spans, strict=True) if message["role"] == "user"]
    return EncodedPrompt(chat.token_ids, learn, digests, asked[-1] if asked and asked[-1][0] < asked[-1][1] else None)


def message_digests(messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Yield one digest a message: of the role, the content with its calls of tools, and how often the same message came
    before in this chat.

    A client that resends its history, cut at the front or edited at the end, sends known digests for old messages;
    the same message sent once more in one chat is new. The last digit says whether the user is the author.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for message in messages:
        role, content = message["role"], message["content"].strip()
        if role == "assistant" and tool_calls.BEGIN in content:
            content = tool_calls.known_text(content)
        text = f"{role}\x00{counts[role, content]}\x00{content}"
        counts[role, content] += 1
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        yield _content_digits(digest) + (BY_USER if role == "user" else BY_OTHERS)


def said_anew(last: str, known: Sequence[str]) -> bool:
    """Return whether the last message of a chat, which the session knows, is said once more: the user has said
    something else since ("I live in Bonn.", "I live in Ulm.", "I live in Bonn.").

    A chat that is sent again for another reply says nothing anew: nothing but replies to it came since.

    last, known: digests of the message, and of the messages that the session has seen, the newest last.
    """
    contents = [_content_digits(digest) for digest in known]
    if last[-1] != BY_USER or _content_digits(last) not in contents:
        return False
    return any(digest[-1] == BY_USER for digest in known[contents.index(_content_digits(last)) + 1 :])


def _content_digits(digest: str) -> str:
    """Return what of a digest names the message. Sessions from before 2026-12-01 have any last digit."""
    return digest[:-1]


def reply_digests(messages: Sequence[Mapping[str, str]], replies: Sequence[str], *, tools: str = "") -> list[str]:
    """Return the digests with which the replies to a chat come back as part of its history.

    tools: the tools that the replies may call; clients get the calls apart from the content.
    """
    if tools:
        names = tool_calls.tool_names(tools)
        replies = [tool_calls.message_text(*tool_calls.read_message(reply, names)) for reply in replies]
    chats = ([*messages, {"role": "assistant", "content": reply}] for reply in replies)
    return [list(message_digests(chat))[-1] for chat in chats]


def merge_digests(known: Sequence[str], new: Sequence[str]) -> tuple[str, ...]:
    """Return the digests to keep: the latest `MAX_DIGESTS`, with the new digests last."""
    newest = dict[str, str]()
    for digest in reversed([*known, *new]):
        newest.setdefault(_content_digits(digest), digest)
    return tuple(newest.values())[:MAX_DIGESTS][::-1]


def without_bos(encoded: EncodedPrompt, bos: int) -> EncodedPrompt:
    """Return the prompt without a leading BOS; `windows` puts a BOS before each window."""
    if not encoded.token_ids or encoded.token_ids[0] != bos:
        return encoded
    return EncodedPrompt(encoded.token_ids[1:], encoded.learn[1:], encoded.digests)


def windows(token_ids: Sequence[int], size: int, bos: int) -> Iterator[tuple[array[int], int]]:
    """Cut a text of any length into windows of at most `size` tokens; yield each window and its start in the text.

    BOS stands before each window, so that each token of the text has a predictor.
    """
    for start in range(0, len(token_ids), size - 1):
        window = array("i", [bos])
        window.extend(token_ids[start : start + size - 1])
        yield window, start


async def segments_async(encoded: EncodedPrompt, size: int, bos: int, *, learn: bool, score: bool) -> list[Segment]:
    """Return the segments of a text as `segments` does; of a long text on another thread."""
    return await run_off_loop(len(encoded.token_ids), segments, encoded, size, bos, learn=learn, score=score)


def segments(encoded: EncodedPrompt, size: int, bos: int, *, learn: bool, score: bool) -> list[Segment]:
    """Return the segments that learn or score a text of any length and generate nothing."""
    return [
        Segment(
            part,
            learn=bytearray(1) + encoded.learn[start : start + size - 1] if learn else None,
            score=bytearray(1) + b"\1" * (len(part) - 1) if score else None,
        )
        for part, start in windows(encoded.token_ids, size, bos)
    ]
