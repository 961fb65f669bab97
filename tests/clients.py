"""Clients that each teach a session on a server that keeps failing, and record what they have taught.

`tests.oracle` runs them and compares their records with what the server stored.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import httpx

from tests.tiny import TEXT

Json = dict[str, Any]
OnDisconnect = Literal["rollback", "commit"]

WORDS = TEXT.split()
CHAT_WINDOW = 3  # messages of a chat that a client resends
TURNS_PER_SESSION = 300  # the log of a session must hold them all
MAX_ROLLBACK = 6  # versions that a client rolls back at most
IMPATIENT_ATTEMPTS = 5  # after which a client waits longer for the next attempt
RETRYABLE_STATUSES = (429, 503)  # statuses after which a turn is sent again
HANG_UP_PROBABILITY = 0.12  # share of turns that the client abandons before their end
TURNS_AFTER_LOSS = 8  # turns of a session whose store lost a key, before a new session follows
UNUSABLE_WITHOUT = ("meta", "rows", "log")  # keys without which every turn of their session must be refused
EARLY_RETRY_PROBABILITY = 0.15  # share of attempts that the client gives up after a moment, to try again


class ContractViolation(AssertionError):
    """A server's answer contradicts its API or its earlier answers."""


class DamagedSession(Exception):
    """The server refused a turn because the session's store has lost a key."""


@dataclass
class Turn:
    """One request of a client, and its outcome.

    Attributes:
        number: position of the turn in its session.
        path: path of the route, behind /v1/.
        body: the JSON body.
        has_key: whether all attempts have the same `Idempotency-Key`; otherwise a retry declares itself one, as
            OpenAI's client does.
        on_disconnect: what the server shall do when the client hangs up; None = the client stays.
        acknowledged: whether the client received the end of the answer.
        version: the version that the turn made; None if the turn made none or was not acknowledged.
        output: text of the answer.
    """

    number: int
    path: str
    body: Json
    has_key: bool
    on_disconnect: OnDisconnect | None = None
    acknowledged: bool = False
    version: int | None = None
    output: str | None = None

    def describe(self) -> str:
        """Describe the turn for a report."""
        fields = {name: value for name, value in self.body.items() if name not in ("prompt", "messages", "text")}
        how = "keyed" if self.has_key else "without a key"
        return f"turn {self.number} {self.path} {fields} {how}, version {self.version}"


@dataclass
class SessionHistory:
    """A client's record of one session.

    Attributes:
        lost_key: the last part of the name of the key that the store loses; a turn may be refused from then on.
        lost_at: number of turns that had begun when the key was surely gone.
    """

    name: str
    random: random.Random
    lost_key: str | None = None
    lost_at: int | None = None
    turns: list[Turn] = field(default_factory=list)
    known_versions: list[int] = field(default_factory=list)  # versions that the server acknowledged
    chat: list[Json] = field(default_factory=list)

    @property
    def is_unusable(self) -> bool:
        """Return whether every turn must be refused, because the session cannot be used without the lost key."""
        return self.lost_at is not None and str(self.lost_key).partition(":")[0] in UNUSABLE_WITHOUT

    @property
    def is_over(self) -> bool:
        """Return whether a new session is to follow."""
        last = TURNS_PER_SESSION if self.lost_at is None else self.lost_at + TURNS_AFTER_LOSS
        return len(self.turns) >= min(last, TURNS_PER_SESSION)

    def next_turn(self, model: str) -> Turn:
        """Draw the next turn. Its body is unlike any before: without a key, an equal body would pass for a retry."""
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
        """Record the acknowledgement of a turn. Raises ContractViolation if it contradicts an earlier one."""
        turn.acknowledged, turn.output = True, answer.get("output")
        before, after = answer["from"], answer["to"]
        if after != before:
            if self.known_versions and after <= self.known_versions[-1]:
                raise ContractViolation(f"version {after} after {self.known_versions[-1]}")
            turn.version = after
            self.known_versions.append(after)
        if "messages" in turn.body and turn.body["adapt"] != "observe" and turn.output:
            self.chat.append({"role": "assistant", "content": turn.output})

    def _words(self, low: int, high: int) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randint(low, high)))


class SessionClient:
    """A client that sends turn after turn of a session, each until it is acknowledged.

    A session that has had all its turns is followed by a new one.

    Args:
        name: prefix of the sessions' ids.
        urls: addresses of the replicas; each attempt goes to a random one.
        model: name of the served model.
        counts: counters to add to.
        timeout_s: seconds to wait for an answer before the next attempt.
    """

    def __init__(self, name: str, urls: list[str], model: str, counts: Counter[str], *, timeout_s: float) -> None:
        self.histories = [SessionHistory(f"{name}.0", random.Random(f"{name}.0"))]
        self._name = name
        self._urls = urls
        self._model = model
        self._counts = counts
        self._timeout_s = timeout_s
        self._http = httpx.AsyncClient(timeout=None)

    @property
    def history(self) -> SessionHistory:
        return self.histories[-1]

    async def run(self, finished: Callable[[], bool], pause_s: float) -> None:
        """Send turns until `finished`, with a mean pause of `pause_s` seconds. Raises ContractViolation."""
        async with self._http:
            while not finished():
                if self.history.is_over:
                    await self._repeat_last_answer()
                    name = f"{self._name}.{len(self.histories)}"
                    self.histories.append(SessionHistory(name, random.Random(name)))
                unusable, turn = self.history.is_unusable, self.history.next_turn(self._model)
                self._counts["turns"] += 1
                if turn.on_disconnect is None:
                    await self.send_until_acknowledged(turn)
                else:
                    await self._send_and_hang_up(turn)
                if unusable and turn.acknowledged:
                    raise ContractViolation(f"{turn.describe()}, without {self.history.lost_key}")
                await asyncio.sleep(self.history.random.expovariate(1 / pause_s))

    async def _repeat_last_answer(self) -> None:
        """Send the last turn with a key once more: it must get the answer that it got, unless that answer is lost."""
        keyed = [turn for turn in self.history.turns if turn.has_key and turn.version is not None]
        if not keyed:
            return
        repeated = replace(keyed[-1], acknowledged=False, version=None, output=None)
        await self.send_until_acknowledged(repeated, record=False)
        if repeated.acknowledged and (repeated.version, repeated.output) != (keyed[-1].version, keyed[-1].output):
            raise ContractViolation(f"{keyed[-1].describe()} was then answered {repeated.version} {repeated.output!r}")

    async def send_until_acknowledged(self, turn: Turn, *, record: bool = True) -> None:
        """Send a turn until it is acknowledged, or refused because the store has lost a key of the session.

        record: whether the answer becomes part of the session's history.
        """
        attempt, rng = 0, self.history.random
        while True:
            timeout_s = rng.uniform(0, 0.3) if rng.random() < EARLY_RETRY_PROBABILITY else self._timeout_s
            try:
                async with asyncio.timeout(timeout_s), self._post(turn, attempt) as response:
                    answer = await self._answer(turn, response)
                if answer is not None:
                    break
            except TimeoutError:
                self._counts["given up"] += 1
            except httpx.TransportError:
                self._counts["broken"] += 1
            except DamagedSession:
                self._counts["refused damaged"] += 1
                return
            attempt += 1
            self._counts["retries"] += 1
            await asyncio.sleep(rng.uniform(0.05, 0.5) * (1 if attempt < IMPATIENT_ATTEMPTS else 4))
        self._counts["replays"] += response.headers.get("Idempotent-Replayed") == "true"
        if record:
            self._counts["acknowledged"] += 1
            self.history.record_answer(turn, answer)
        else:
            turn.acknowledged, turn.version, turn.output = True, answer["to"], answer.get("output")

    async def _send_and_hang_up(self, turn: Turn) -> None:
        """Send a turn and disconnect at a random moment, mostly before its end."""
        self._counts["hang-ups"] += 1
        timeout_s = self.history.random.choice((0.0, 0.01, 0.03, 0.1, 0.3))
        try:
            async with asyncio.timeout(timeout_s), self._post(turn, 0) as response:
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
        """Return the acknowledgement, or None if the turn has to be sent again."""
        if response.status_code in RETRYABLE_STATUSES:
            self._counts[f"refused {response.status_code}"] += 1
            return None
        if response.status_code != 200:
            await response.aread()
            self._raise_if_damaged(response.json()["error"])
            raise ContractViolation(
                f"{turn.path} {json.dumps(turn.body)[:200]}: {response.status_code} {response.text[:300]}"
            )
        if turn.body.get("stream"):
            return await self._streamed(response)
        await response.aread()
        body = response.json()
        if "choices" not in body:
            return {"from": None, "to": body["version"]}  # such a turn always makes a version
        (choice,) = body["choices"]
        output = choice["text"] if "text" in choice else choice["message"]["content"]
        return version_range(body["adaptation"]) | {"output": output}

    def _raise_if_damaged(self, error: Json) -> None:
        """Raise DamagedSession if that is what an error says, and the store has lost a key of the session."""
        if error["code"] == "damaged_session" and self.history.lost_key is not None:
            raise DamagedSession

    async def _streamed(self, response: httpx.Response) -> Json | None:
        """Return the acknowledgement in the final chunk (with or without [DONE]), or None if the stream broke."""
        output, last = "", None
        async for chunk in events(response):
            if "error" in chunk:
                self._raise_if_damaged(chunk["error"])
                if chunk["error"]["type"] != "server_error" or chunk["error"]["code"] == "internal_error":
                    raise ContractViolation(f"in a stream: {chunk}")
                self._counts["broken streams"] += 1
                return None
            (choice,) = chunk["choices"]
            output += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            if choice["finish_reason"] is not None:
                last = chunk["adaptation"]
                break
        return None if last is None else version_range(last) | {"output": output}


def version_range(adaptation: Json) -> Json:
    """Return the versions before and after the turn, as its answer names them."""
    return {"from": adaptation["version_from"], "to": adaptation["version_to"]}


async def events(response: httpx.Response) -> AsyncIterator[Json]:
    """Yield the JSON of each server-sent event."""
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
