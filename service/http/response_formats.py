"""OpenAI's formats for the events of a turn: whole replies, and the chunks of streams."""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from itertools import chain
from typing import Any

from model.text.tool_calls import ReplyPiece, ReplyReader, tool_names
from service.concurrency import LARGE, dump_json_pieces, run_off_loop
from service.http.generation_schemas import GenerationRequest
from service.metrics import Metrics
from service.turns.completion import Delta, PromptLogprobs, TokenLogprob, TurnEnd
from service.turns.completion_job import CompletionJob
from service.turns.idempotency import RequestContext
from service.turns.prompts import ChatPrompt
from service.turns.run import TurnRestarted
from service.turns.sessions import Sessions

Json = dict[str, Any]

LARGE_REPLY = 512  # tokens with their log-probabilities; each may have 20 alternatives
LOWEST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON lacks


class LatencyRecorder:
    """Measures the time to a request's first token and the time between the tokens of each choice.

    Args:
        metrics: the metrics that get the measurements.
        arrived: the `time.perf_counter()` of the request's arrival.
    """

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._last: dict[int, float] = {}

    def record(self, choice: int) -> None:
        """Record that new output of a choice is there."""
        now = time.perf_counter()
        if not self._last:
            self._metrics.time_to_first_token_seconds.observe(now - self._arrived)
        if choice in self._last:
            self._metrics.inter_token_latency_seconds.observe(now - self._last[choice])
        self._last[choice] = now


class ResponseFormatter(ABC):
    """Formats the events of one request's turn: into one reply, or into the chunks of a stream."""

    id_prefix: str
    object: str
    chunk_object: str

    def __init__(
        self,
        sessions: Sessions,
        body: GenerationRequest,
        completion_job: CompletionJob,
        ctx: RequestContext,
        latency: LatencyRecorder,
    ) -> None:
        self._latency = latency
        self._n = completion_job.generation.n
        self._num_choices = len(completion_job.prompts) * self._n
        self._with_logprobs = completion_job.generation.logprobs is not None
        options = body.stream_options
        self._with_usage = options is not None and bool(options.include_usage)
        self._counts = self._with_usage and options is not None and bool(options.continuous_usage_stats)
        self._generated = [0] * self._num_choices
        self._ctx = ctx
        self._model = {
            "model": sessions.model_id,
            "system_fingerprint": _system_fingerprint(sessions.fingerprints),
        }

    async def reply(self, events: AsyncIterator[Delta | TurnRestarted | TurnEnd]) -> Json | list[bytes]:
        """Return the whole reply to a turn with these events; pieces of JSON, the last one first, if it is large."""
        deltas: list[Delta] = []
        end: TurnEnd | None = None
        async for event in events:
            if isinstance(event, TurnEnd):
                end = event
            elif isinstance(event, TurnRestarted):
                deltas.clear()
            else:
                self._latency.record(event.choice)
                deltas.append(event)
        assert end is not None, "a turn ends with a TurnEnd"
        if sum(map(len, [*(delta.logprobs for delta in deltas), *end.prompt_logprobs])) < LARGE_REPLY:
            reply = self._reply_json(deltas, end)
            return reply | {"choices": list(reply["choices"])}
        return await run_off_loop(LARGE, self._reply_pieces, deltas, end)

    async def stream(self, events: AsyncGenerator[Delta | TurnRestarted | TurnEnd, None]) -> AsyncGenerator[str, None]:
        """Yield the chunks of a stream as JSON, and close `events` at the end."""
        async with aclosing(events):
            opened = False
            async for event in events:
                assert not isinstance(event, TurnRestarted), "a streamed turn is never restarted"
                for chunk in () if opened else self.opening_chunks(self._usage_so_far(event, 0)):
                    yield chunk
                opened = True
                is_large = isinstance(event, Delta) and len(event.logprobs) >= LARGE_REPLY  # the echo of a prompt
                for chunk in await run_off_loop(LARGE if is_large else 0, list, self._chunks(event)):
                    yield chunk

    def opening_chunks(self, usage: Json) -> Iterable[str]:
        """Return the chunks before the text. usage: their field of that name, or none."""
        return ()

    @abstractmethod
    def choice_json(self, index: int, text: str, logprobs: Json | None, finish_reason: str) -> Json:
        """Return a finished choice of a reply."""

    @abstractmethod
    def chunk_choice_json(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        """Return a choice of a chunk; the last chunk of a choice has a `finish_reason`, and `text` is empty."""

    @abstractmethod
    def logprobs_json(self, tokens: Iterable[TokenLogprob]) -> Json:
        """Return the log-probabilities of a choice's tokens, in nats."""

    def _reply_json(self, deltas: list[Delta], end: TurnEnd) -> Json:
        """Return the reply with an iterator for its choices, and empty `deltas`."""
        by_choice: list[list[Delta]] = [[] for _ in range(self._num_choices)]
        for delta in deltas:
            by_choice[delta.choice].append(delta)
        deltas.clear()
        body = {
            "object": self.object,
            "choices": self._choices(by_choice, end),
            "usage": _usage(end.prompt_tokens, end.completion_tokens),
        }
        body |= self.prompt_logprobs_json(end) | {"timings": timings(end)}
        return self._head() | body | {"adaptation": end.adaptation and asdict(end.adaptation)}

    def prompt_logprobs_json(self, end: TurnEnd) -> Json:
        """Return the fields of a reply with the log-probabilities of the prompt, unless the choices have them."""
        return {}

    def _choices(self, by_choice: list[list[Delta]], end: TurnEnd) -> Iterator[Json]:
        """Yield the choices; free the deltas of each before the next, because freeing all at once takes 0.1 s."""
        for index, reason in enumerate(end.finish_reasons):
            deltas, by_choice[index] = by_choice[index], []
            tokens = chain.from_iterable(delta.logprobs for delta in deltas)
            logprobs = self.logprobs_json(tokens) if self._with_logprobs else None
            choice = self.choice_json(index, "".join(delta.text for delta in deltas), logprobs, reason)
            yield choice | self.choice_prompt_logprobs_json(index // self._n, end)

    def choice_prompt_logprobs_json(self, prompt: int, end: TurnEnd) -> Json:
        """Return the fields of a choice with the log-probabilities of its prompt, unless the reply has them."""
        return {}

    def _reply_pieces(self, deltas: list[Delta], end: TurnEnd) -> list[bytes]:
        return dump_json_pieces(self._reply_json(deltas, end))

    def _chunks(self, event: Delta | TurnEnd) -> Iterator[str]:
        if isinstance(event, Delta):
            self._latency.record(event.choice)
            self._generated[event.choice] += len(event.token_ids)
            if event.text or event.logprobs:
                logprobs = self.logprobs_json(event.logprobs) if event.logprobs else None
                choice = self.chunk_choice_json(event.choice, event.text, logprobs, None)
                if logprobs or choice.get("delta") != {}:
                    yield self._chunk([choice], **self._usage_so_far(event, self._generated[event.choice]))
            return
        adaptation = event.adaptation and asdict(event.adaptation)
        for i, reason in enumerate(event.finish_reasons):
            choice = self.chunk_choice_json(i, "", None, reason)
            usage = self._usage_so_far(event, self._generated[i])
            yield self._chunk([choice], adaptation=adaptation, timings=timings(event), **usage)
        if self._with_usage:
            yield self._chunk([], usage=_usage(event.prompt_tokens, event.completion_tokens))

    def _usage_so_far(self, event: Delta | TurnEnd, generated: int) -> Json:
        """Return the field of a chunk with the numbers of tokens so far, if they are asked for."""
        return {"usage": _usage(event.prompt_tokens, generated)} if self._counts else {}

    def _chunk(self, choices: list[Json], **more: Any) -> str:
        usage = {"usage": None} if self._with_usage else {}
        chunk = self._head() | {"object": self.chunk_object, "choices": choices} | usage | more
        return json.dumps(chunk, ensure_ascii=False, separators=(",", ":"), allow_nan=False)

    def _head(self) -> Json:
        """Return the first fields of a reply or chunk; a replay sets the id and the time just before the first one."""
        return {"id": f"{self.id_prefix}-{self._ctx.id}", "created": self._ctx.created} | self._model


class CompletionFormatter(ResponseFormatter):
    """The format of `/v1/completions`."""

    id_prefix = "cmpl"
    object = chunk_object = "text_completion"

    def choice_json(self, index: int, text: str, logprobs: Json | None, finish_reason: str) -> Json:
        return self.chunk_choice_json(index, text, logprobs, finish_reason)

    def chunk_choice_json(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs_json(self, tokens: Iterable[TokenLogprob]) -> Json:
        columns: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in tokens:
            columns["tokens"].append(_token_text(one.token))
            columns["token_logprobs"].append(None if one.logprob is None else _finite(one.logprob))
            columns["top_logprobs"].append(_alternatives(one))
            columns["text_offset"].append(one.text_offset)
        return columns

    def choice_prompt_logprobs_json(self, prompt: int, end: TurnEnd) -> Json:
        return {"prompt_logprobs": _prompt_tokens(end.prompt_logprobs[prompt]) if end.prompt_logprobs else None}


class ChatFormatter(ResponseFormatter):
    """The format of `/v1/chat/completions`."""

    no_content: str | None = ""  # before the text
    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening_chunks(self, usage: Json) -> Iterable[str]:
        for index in range(self._num_choices):
            delta = {"role": "assistant", "content": self.no_content}
            yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}], **usage)

    def choice_json(self, index: int, text: str, logprobs: Json | None, finish_reason: str) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def chunk_choice_json(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        delta = {"content": text} if finish_reason is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs_json(self, tokens: Iterable[TokenLogprob]) -> Json:
        content = []
        for one in tokens:
            top = [chat_token(token, logprob) for _, token, logprob in one.top]
            content.append(chat_token(one.token, one.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def prompt_logprobs_json(self, end: TurnEnd) -> Json:
        return {"prompt_logprobs": _prompt_tokens(end.prompt_logprobs[0]) if end.prompt_logprobs else None}


class ToolChatFormatter(ChatFormatter):
    """The format of `/v1/chat/completions` where the reply may call tools."""

    no_content = None

    def __init__(
        self,
        sessions: Sessions,
        body: GenerationRequest,
        completion_job: CompletionJob,
        ctx: RequestContext,
        latency: LatencyRecorder,
    ) -> None:
        super().__init__(sessions, body, completion_job, ctx, latency)
        (chat,) = completion_job.prompts
        assert isinstance(chat, ChatPrompt)
        names = tool_names(chat.tools)
        self._readers = [ReplyReader(names) for _ in range(self._num_choices)]

    def choice_json(self, index: int, text: str, logprobs: Json | None, finish_reason: str) -> Json:
        reader = self._readers[index]
        found = self._additions(index, [*reader.feed(text), *reader.finish()])
        content = found.get("content", None if reader.num_calls else "")
        message = {"role": "assistant", "content": content, "refusal": None}
        if "tool_calls" in found:
            message["tool_calls"] = [
                {name: call[name] for name in ("id", "type", "function")} for call in found["tool_calls"]
            ]
        reason = _finish_reason(reader, finish_reason)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def chunk_choice_json(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        reader = self._readers[index]
        pieces = list(reader.feed(text) if finish_reason is None else reader.finish())
        reason = None if finish_reason is None else _finish_reason(reader, finish_reason)
        return {"index": index, "delta": self._additions(index, pieces), "logprobs": logprobs, "finish_reason": reason}

    def _additions(self, index: int, pieces: Sequence[ReplyPiece]) -> Json:
        """Return what pieces of a choice add to its message: the fields `content` and `tool_calls`, unless empty."""
        calls: dict[int, Json] = {}
        for piece in pieces:
            if piece.call is None:
                continue
            call = calls.setdefault(piece.call, {"index": piece.call, "function": {"arguments": ""}})
            if piece.name is not None:
                call |= {"id": call_id(self._ctx.id, index, piece.call), "type": "function"}
                call["function"] = {"name": piece.name, "arguments": ""}
            call["function"]["arguments"] += piece.text
        content = "".join(piece.text for piece in pieces if piece.call is None)
        return ({"content": content} if content else {}) | ({"tool_calls": list(calls.values())} if calls else {})


def call_id(answer_id: str, choice: int, number: int, *, prefix: str = "call") -> str:
    """Return the id of a call, which is the same in the replay of an answer."""
    return f"{prefix}_" + hashlib.blake2b(f"{answer_id}/{choice}/{number}".encode(), digest_size=12).hexdigest()


def _finish_reason(reader: ReplyReader, reason: str) -> str:
    return "tool_calls" if reason == "stop" and reader.num_calls and not reader.in_call else reason


def _usage(prompt: int, completion: int) -> Json:
    """Return the numbers of tokens. No prompt is cached: what a session has learned is no part of the prompt."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def timings(end: TurnEnd) -> Json:
    """Return the times of the work by llama.cpp's names; a rate is null where no time was taken."""
    times: Json = {"cache_n": 0}
    for name, count, ms in (
        ("prompt", end.prompt_tokens, end.prompt_ms),
        ("predicted", end.completion_tokens, end.predicted_ms),
    ):
        times |= {
            f"{name}_n": count,
            f"{name}_ms": ms,
            f"{name}_per_token_ms": ms / count if count else None,
            f"{name}_per_second": 1000 * count / ms if ms else None,
        }
    return times


def _system_fingerprint(fingerprints: Mapping[str, str]) -> str:
    return "fp_" + hashlib.sha256(json.dumps(dict(fingerprints), sort_keys=True).encode()).hexdigest()[:10]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _token_text(token: bytes) -> str:
    """Return a token as OpenAI shows tokens: the text, or the bytes of a token that is only a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _prompt_tokens(tokens: Sequence[TokenLogprob] | PromptLogprobs) -> Iterator[Json | None]:
    """Yield vLLM's `prompt_logprobs`: for each token the likeliest tokens and the token itself, by their ids.

    `frozen_logprob` is the token's log-probability without memory.
    """
    for one in tokens:
        if one.logprob is None:
            yield None
            continue
        entries = {
            str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": _token_text(token)}
            for rank, (token_id, token, logprob) in enumerate(one.top, 1)
        }
        entry = {"logprob": _finite(one.logprob), "rank": None, "decoded_token": _token_text(one.token)}
        frozen = None if one.frozen is None else _finite(one.frozen)
        entries[str(one.token_id)] = entry | entries.get(str(one.token_id), {}) | {"frozen_logprob": frozen}
        yield entries


def _alternatives(one: TokenLogprob) -> dict[str, float] | None:
    """Return the likeliest tokens and the chosen token; None for the first token of a text, which nothing predicts."""
    if one.logprob is None:
        return None
    return {_token_text(token): _finite(logprob) for _, token, logprob in one.top} | {
        _token_text(one.token): _finite(one.logprob)
    }


def chat_token(token: bytes, logprob: float | None) -> Json:
    """Return a token as chats show it."""
    return {"token": _token_text(token), "bytes": list(token), "logprob": _finite(logprob or 0.0)}
