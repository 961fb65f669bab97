"""Clients that teach a session each, at a server that fails all the time, and know in the end what they have taught."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from tests.tiny import TEXT

Json = dict[str, Any]
OnDisconnect = Literal["rollback", "commit"]

WORDS = TEXT.split()
CHAT_WINDOW = 3  # messages of a chat that a client sends again
TURNS_PER_SESSION = 300  # the log of a session must hold them all
MAX_ROLLBACK = 6  # versions that a client goes back at most
RETRYABLE_STATUSES = (429, 503)  # statuses after which a turn is sent again
HANG_UP_PROBABILITY = 0.12  # the share of turns whose client goes before their end, and does not come back
EARLY_RETRY_PROBABILITY = 0.15  # the share of attempts that their client gives up soon, to try again


class ContractViolation(AssertionError):
    """A server said what it must not say."""


@dataclass
class Turn:
    """What a client asks, and what became of it.

    keyed: each attempt bears the same `Idempotency-Key`; else a retry says that it is one, as OpenAI's client does.
    leaves: the client goes in its midst, and wants it rolled back or committed. version: that it made, if it was
    acknowledged and made one; said: the text of the answer.
    """

    number: int
    path: str
    body: Json
    has_key: bool
    on_disconnect: OnDisconnect | None = None
    acknowledged: bool = False
    version: int | None = None
    output: str | None = None

    def told(self) -> str:
        """The turn, for a report."""
        kept = {name: value for name, value in self.body.items() if name not in ("prompt", "messages", "text")}
        how = "keyed" if self.has_key else "without a key"
        return f"turn {self.number} {self.path} {kept} {how}, version {self.version}"


@dataclass
class SessionHistory:
    """One session, and all that its client did with it."""

    name: str
    random: random.Random
    turns: list[Turn] = field(default_factory=list)
    known_versions: list[int] = field(default_factory=list)  # versions, as they were told
    chat: list[Json] = field(default_factory=list)

    def next_turn(self, model: str) -> Turn:
        """No two turns of a session have the same body: without a key, the second would pass for a retry."""
        rng, number = self.random, len(self.turns)
        kind = rng.choices(["observe", "completion", "chat", "rollback"], [4, 5, 4, 1 if self.known_versions else 0])[0]
        turn = Turn(number, f"sessions/{self.name}/{kind}", {}, has_key=rng.random() < 0.5)
        if kind == "rollback":
            turn.body, turn.has_key = {"version": rng.choice(self.known_versions[-MAX_ROLLBACK:])}, True
        elif kind == "observe":
            turn.body["text"] = f"{number} {self._words(1, 120)}"
        else:
            self._completion(turn, model, kind)
        if kind != "rollback" and rng.random() < HANG_UP_PROBABILITY:
            turn.on_disconnect = turn.body["on_disconnect"] = rng.choice(("rollback", "commit"))
        elif turn.has_key and kind != "rollback" and rng.random() < 0.2:
            turn.body["on_disconnect"] = "commit"
        self.turns.append(turn)
        return turn

    def _completion(self, turn: Turn, model: str, kind: str) -> None:
        rng = self.random
        turn.path = "chat/completions" if kind == "chat" else "completions"
        turn.body |= {
            "model": model,
            "session": self.name,
            "max_tokens": rng.choice((1, 8, 24, 90)),
            "stream": rng.random() < 0.6,
            "adapt": rng.choices(("both", "predict", "observe"), (8, 2, 1))[0],
            "learn": rng.choice(("prompt", "completion", "all")),
            "temperature": rng.choice((0, 1)),
            "seed": rng.randrange(2**31),
        }
        if rng.random() < 0.3:
            turn.body["stop"] = [rng.choice(WORDS)]
        if kind == "completion":
            turn.body["prompt"] = f"{turn.number} {self._words(1, 45)}"
            return
        if rng.random() < 0.1:
            self.chat.clear()
        self.chat = [*self.chat[1 - CHAT_WINDOW :], {"role": "user", "content": self._words(1, 10)}]
        turn.body["messages"] = list(self.chat)

    def record_answer(self, turn: Turn, answer: Json) -> None:
        """The turn is acknowledged. Raises Wrong where the answer contradicts what was told before."""
        turn.acknowledged, turn.output = True, answer.get("said")
        before, after = answer["from"], answer["to"]
        if after != before:
            if self.known_versions and after <= self.known_versions[-1]:
                raise ContractViolation(f"version {after} after {self.known_versions[-1]}")
            turn.version = after
            self.known_versions.append(after)
        if "messages" in turn.body and turn.body["adapt"] != "observe" and turn.output:
            self.chat.append({"role": "assistant", "content": turn.output})

    def _words(self, least: int, most: int) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randint(least, most)))


class SessionClient:
    """A client: takes turn after turn of a session, each until it is acknowledged, until it is told to end; and goes on
    with another session when one has had all its turns.

    urls: of the replicas, which it asks at random. patience_s: how long it waits for one of them.
    """

    def __init__(self, name: str, urls: list[str], model: str, counts: Counter[str], *, timeout_s: float) -> None:
        self.histories = [SessionHistory(f"{name}.0", random.Random(f"{name}.0"))]
        self._name = name
        self._urls = urls
        self._model = model
        self._counts = counts
        self._patience_s = timeout_s
        self._http = httpx.AsyncClient(timeout=None)

    @property
    def history(self) -> SessionHistory:
        return self.histories[-1]

    async def live(self, over: Callable[[], bool], pause_s: float) -> None:
        """Raises Wrong."""
        async with self._http:
            while not over():
                if len(self.history.turns) == TURNS_PER_SESSION:
                    name = f"{self._name}.{len(self.histories)}"
                    self.histories.append(SessionHistory(name, random.Random(name)))
                turn = self.history.next_turn(self._model)
                self._counts["turns"] += 1
                if turn.on_disconnect is None:
                    await self._send_until_acknowledged(turn)
                else:
                    await self._send_and_hang_up(turn)
                await asyncio.sleep(self.history.random.expovariate(1 / pause_s))

    async def _send_until_acknowledged(self, turn: Turn) -> None:
        """Sends a turn until it is acknowledged."""
        attempt, rng = 0, self.history.random
        while True:
            timeout_s = rng.uniform(0, 0.3) if rng.random() < EARLY_RETRY_PROBABILITY else self._patience_s
            try:
                async with asyncio.timeout(timeout_s), self._post(turn, attempt) as response:
                    answer = await self._answer(turn, response)
                if answer is not None:
                    break
            except TimeoutError:
                self._counts["given up"] += 1
            except httpx.TransportError:
                self._counts["broken"] += 1
            attempt += 1
            self._counts["retries"] += 1
            await asyncio.sleep(rng.uniform(0.05, 0.5))
        self._counts["acknowledged"] += 1
        self._counts["replays"] += response.headers.get("Idempotent-Replayed") == "true"
        self.history.record_answer(turn, answer)

    async def _send_and_hang_up(self, turn: Turn) -> None:
        """Sends a turn and goes at some moment, mostly before its end."""
        self._counts["hang-ups"] += 1
        patience = self.history.random.choice((0.0, 0.01, 0.03, 0.1, 0.3))
        try:
            async with asyncio.timeout(patience), self._post(turn, 0) as response:
                async for _ in response.aiter_raw():
                    pass
        except (TimeoutError, httpx.TransportError):
            pass

    def _post(self, turn: Turn, attempt: int) -> Any:
        headers = {"X-Request-Id": f"{self.history.name}/{turn.number}/{attempt}"}
        if turn.has_key:
            headers["Idempotency-Key"] = f"{self.history.name}/{turn.number}"
        else:
            headers["x-stainless-retry-count"] = str(attempt)
        url = f"{self.history.random.choice(self._urls)}/v1/{turn.path}"
        return self._http.stream("POST", url, json=turn.body, headers=headers)

    async def _answer(self, turn: Turn, response: httpx.Response) -> Json | None:
        """What was acknowledged; None if the turn has to be sent again."""
        if response.status_code in RETRYABLE_STATUSES:
            self._counts[f"refused {response.status_code}"] += 1
            return None
        if response.status_code != 200:
            await response.aread()
            raise ContractViolation(
                f"{turn.path} {json.dumps(turn.body)[:200]}: {response.status_code} {response.text[:300]}"
            )
        if turn.body.get("stream"):
            return await self._streamed(response)
        await response.aread()
        body = response.json()
        if "choices" not in body:
            return {"from": None, "to": body["version"]}  # there is always something to learn
        (choice,) = body["choices"]
        output = choice["text"] if "text" in choice else choice["message"]["content"]
        return told(body["adaptation"]) | {"said": output}

    async def _streamed(self, response: httpx.Response) -> Json | None:
        """The final chunk is the acknowledgement, with [DONE] or without."""
        output, last = "", None
        async for chunk in events(response):
            if "error" in chunk:
                if chunk["error"]["type"] != "server_error" or chunk["error"]["code"] == "internal_error":
                    raise ContractViolation(f"in a stream: {chunk}")
                self._counts["broken streams"] += 1
                return None
            (choice,) = chunk["choices"]
            output += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            if choice["finish_reason"] is not None:
                last = chunk["adaptation"]
                break
        return None if last is None else told(last) | {"said": output}


def told(adaptation: Json) -> Json:
    """From which to which version an answer says that its turn went."""
    return {"from": adaptation["version_from"], "to": adaptation["version_to"]}


async def events(response: httpx.Response) -> AsyncIterator[Json]:
    """The JSON of each server-sent event."""
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
