"""OpenAI's words for what a turn yields: whole replies, and the chunks of streams."""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from service.http.schemas import GenerationRequest
from service.metrics import Metrics
from service.turns.completion import CompletionJob, Delta, TokenLogprob, TurnEnd
from service.turns.idempotency import RequestContext
from service.turns.sessions import Sessions

Json = dict[str, Any]

LOWEST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON lacks


class LatencyRecorder:
    """Measures when the pieces of one request's choices come; `arrived` is its `time.perf_counter()`."""

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._last: dict[int, float] = {}

    def __call__(self, choice: int) -> None:
        now = time.perf_counter()
        if not self._last:
            self._metrics.time_to_first_token_seconds.observe(now - self._arrived)
        if choice in self._last:
            self._metrics.inter_token_latency_seconds.observe(now - self._last[choice])
        self._last[choice] = now


class ResponseFormatter(ABC):
    """How one request is answered: in a whole by `reply`, or as the `EventWriter` of a stream."""

    id_prefix: str
    object: str
    chunk_object: str

    def __init__(
        self,
        sessions: Sessions,
        body: GenerationRequest,
        completion_job: CompletionJob,
        ctx: RequestContext,
        record_latency: LatencyRecorder,
    ) -> None:
        self.record_latency = record_latency
        self._choices = len(completion_job.prompts) * completion_job.generation.n
        self._with_logprobs = completion_job.generation.logprobs is not None
        self._with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._ctx = ctx
        self._model = {
            "model": sessions.model_id,
            "system_fingerprint": _system_fingerprint(sessions.fingerprints),
        }

    @property
    def _head(self) -> Json:
        """What every piece of the answer begins with; only known once the answer has begun."""
        return {"id": f"{self.id_prefix}-{self._ctx.id}", "created": self._ctx.created} | self._model

    @abstractmethod
    def choice_json(self, index: int, text: str, logprobs: Json | None, finish_reason: str) -> Json:
        """A finished choice."""

    @abstractmethod
    def chunk_choice_json(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        """A choice in a chunk; the last one has a `finish_reason` and no text."""

    @abstractmethod
    def logprobs(self, tokens: list[TokenLogprob]) -> Json:
        """The log probabilities of a choice's tokens."""

    def reply(self, deltas: Iterable[Delta], end: TurnEnd) -> Json:
        """The whole answer."""
        texts: list[list[str]] = [[] for _ in range(self._choices)]
        tokens: list[list[TokenLogprob]] = [[] for _ in range(self._choices)]
        for delta in deltas:
            texts[delta.choice].append(delta.text)
            tokens[delta.choice] += delta.logprobs
        choices = [
            self.choice_json(i, "".join(texts[i]), self.logprobs(tokens[i]) if self._with_logprobs else None, reason)
            for i, reason in enumerate(end.finish_reasons)
        ]
        body = {"object": self.object, "choices": choices, "usage": _usage(end)}
        return self._head | body | {"adaptation": end.adaptation}

    def opening(self) -> Iterable[str]:
        return ()

    def chunks(self, event: Delta | TurnEnd) -> Iterator[str]:
        if isinstance(event, Delta):
            self.record_latency(event.choice)
            if event.text or event.logprobs:
                logprobs = self.logprobs(event.logprobs) if event.logprobs else None
                yield self._chunk([self.chunk_choice_json(event.choice, event.text, logprobs, None)])
            return
        adaptation = event.adaptation and asdict(event.adaptation)
        for i, reason in enumerate(event.finish_reasons):
            yield self._chunk([self.chunk_choice_json(i, "", None, reason)], adaptation=adaptation)
        if self._with_usage:
            yield self._chunk([], usage=_usage(event))

    def _chunk(self, choices: list[Json], **more: Any) -> str:
        usage = {"usage": None} if self._with_usage else {}
        chunk = self._head | {"object": self.chunk_object, "choices": choices} | usage | more
        return json.dumps(chunk, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class CompletionFormatter(ResponseFormatter):
    """`/v1/completions`."""

    id_prefix = "cmpl"
    object = chunk_object = "text_completion"

    def choice_json(self, index: int, text: str, logprobs: Json | None, finish_reason: str) -> Json:
        return self.chunk_choice_json(index, text, logprobs, finish_reason)

    def chunk_choice_json(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(self, tokens: list[TokenLogprob]) -> Json:
        return {
            "tokens": [_token_text(one.token) for one in tokens],
            "token_logprobs": [None if one.logprob is None else _finite(one.logprob) for one in tokens],
            "top_logprobs": [_alternatives(one) for one in tokens],
            "text_offset": [one.text_offset for one in tokens],
        }


class ChatFormatter(ResponseFormatter):
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> Iterable[str]:
        for index in range(self._choices):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def choice_json(self, index: int, text: str, logprobs: Json | None, finish_reason: str) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def chunk_choice_json(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        delta = {"content": text} if finish_reason is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(self, tokens: list[TokenLogprob]) -> Json:
        content = []
        for one in tokens:
            top = [_chat_token(token, logprob) for _, token, logprob in one.top]
            content.append(_chat_token(one.token, one.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}


def _usage(end: TurnEnd) -> Json:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }


def _system_fingerprint(fingerprints: Mapping[str, str]) -> str:
    return "fp_" + hashlib.sha256(json.dumps(dict(fingerprints), sort_keys=True).encode()).hexdigest()[:10]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _token_text(token: bytes) -> str:
    """The token as OpenAI shows it: its text, or its bytes where these are only a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _alternatives(one: TokenLogprob) -> dict[str, float] | None:
    """The likeliest tokens and the chosen one; nothing was predicted for the first token of all."""
    if one.logprob is None:
        return None
    return {_token_text(token): _finite(logprob) for _, token, logprob in one.top} | {
        _token_text(one.token): _finite(one.logprob)
    }


def _chat_token(token: bytes, logprob: float | None) -> Json:
    return {"token": _token_text(token), "bytes": list(token), "logprob": _finite(logprob or 0.0)}
