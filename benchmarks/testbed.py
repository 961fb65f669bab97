"""The testbed of the scenarios: the arms, their prompts and sessions, and rounds in which the arms take turns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.peers import ImprintArm, PeerArm
from benchmarks.stream_timing import Arm, CompletionsEndpoint, PeerError
from benchmarks.texts import PromptSource, random_session
from model.memory import MemoryConfig
from service.versions.export_file import pack_session

TEMPLATE_SESSION = "teacher"
MAX_BUDGET_OVERRUN = 2.0  # factor by which a scenario may exceed its budget to finish the minimum of rounds
FORK_CONCURRENCY = 8  # sessions that are forked at the same time

Values = dict[str, dict[str, list[float]]]  # by arm and quantity, with one value for each round
MeasureOnce = Callable[[Any, int], Awaitable[dict[str, float]]]


class Progress(Protocol):
    """A callback with the finished share of a scenario's time."""

    def __call__(self, share: float) -> None: ...


@dataclass(frozen=True)
class Sizes:
    """The sizes of the scenarios, in tokens where no other unit is given.

    prompt, tokens: prompt and completion of the single stream
    prefill: prompt of the prefill scenario
    streams: numbers of concurrent streams
    lengths, stream_tokens: prompts and completion of concurrent streams
    batches, batch_tokens: numbers of sequences in one decoding step, and completion of each
    sessions, session_turns: number of sessions of the arm "many", and turns of each client in a round
    history: numbers of learned tokens of the sessions in the history scenario
    states: sizes of states as shares of a full session
    rate, rate_s: requests per second, and seconds of a round
    long_prompt, running, quiet_s: long prompt, completion of the running streams at most, and seconds before the prompt
    acts: number of acts of one session
    learned: tokens that the template session learns
    rounds: minimum and maximum number of rounds
    """

    prompt: int = 128
    tokens: int = 64
    prefill: int = 1024
    streams: tuple[int, ...] = (16, 64)
    lengths: tuple[int, ...] = (16, 32, 64, 128, 192)
    stream_tokens: int = 24
    batches: tuple[int, ...] = (1, 16, 64)
    batch_tokens: int = 24
    sessions: int = 2000
    session_turns: int = 4
    history: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    states: tuple[float, ...] = (1 / 64, 1 / 16, 1 / 4, 1.0)
    rate: float = 1.0
    rate_s: float = 20.0
    long_prompt: int = 4096
    running: int = 1024
    quiet_s: float = 1.0
    acts: int = 400
    learned: int = 2048
    rounds: tuple[int, int] = (3, 12)


QUICK = Sizes(
    tokens=16,
    prefill=256,
    streams=(16,),
    lengths=(8, 16, 32, 64),
    stream_tokens=8,
    batches=(1, 16),
    batch_tokens=8,
    sessions=100,
    session_turns=2,
    history=(1_000, 1_000_000),
    states=(1 / 16, 1.0),
    rate=2.0,
    rate_s=2.0,
    long_prompt=256,
    quiet_s=0.3,
    acts=50,
    learned=256,
    rounds=(3, 6),
)


@dataclass
class Testbed:
    """The measured servers with their prompts and sessions.

    imprint: endpoint of this server
    peers: available peers by name
    missing: reasons why the other peers are not measured, by name
    config, vocab_size, context: of the memory and the base
    progress, budget_s: callback and time budget of the current scenario
    known_sessions: names of the sessions that exist
    """

    imprint: CompletionsEndpoint
    peers: dict[str, Arm]
    missing: dict[str, str]
    texts: PromptSource
    sizes: Sizes
    config: MemoryConfig
    vocab_size: int
    context: int
    progress: Progress = lambda share: None
    budget_s: float = 60.0
    known_sessions: set[str] = field(default_factory=set)

    def arms(self, *adapt: str, peers: Iterable[str] = (), streams: int = 1) -> list[Arm]:
        """Return arms of this server with memory "off", "predict" or "both", and the available peers for `streams`."""
        imprint_arms: list[Arm] = [ImprintArm(name, self.imprint, None if name == "off" else name) for name in adapt]
        available = [self.peers[name] for name in peers if name in self.peers]
        return imprint_arms + [arm.for_streams(streams) if isinstance(arm, PeerArm) else arm for arm in available]

    async def rounds(self, arms: Sequence[Arm], measure_once: MeasureOnce, *, budget_s: float | None = None) -> Values:
        """Measure the arms in turns, in alternating direction, as long as the time budget allows.

        A machine that is far too slow runs fewer rounds than the minimum. A peer that fails is left out from then on.
        Raises PeerError if an arm of this server fails.
        """
        budget = self.budget_s if budget_s is None else budget_s
        min_rounds, max_rounds = self.sizes.rounds
        values: Values = {arm.name: {} for arm in arms}
        remaining, started = list(arms), time.monotonic()
        for number in range(max_rounds):
            spent = time.monotonic() - started
            late = number >= min_rounds and spent * (number + 1) / number > budget
            if late or (number and spent > MAX_BUDGET_OVERRUN * budget):
                break
            for arm in remaining if number % 2 == 0 else remaining[::-1]:
                try:
                    found = await measure_once(arm, number)
                except PeerError as error:
                    if isinstance(arm, ImprintArm):
                        raise
                    self.missing[arm.name] = str(error)
                    self.peers.pop(arm.name, None)
                    del values[arm.name]
                    remaining = [other for other in remaining if other is not arm]
                else:
                    for quantity, value in found.items():
                        values[arm.name].setdefault(quantity, []).append(value)
                self.progress(min(1.0, (time.monotonic() - started) / budget))
        return values

    # --- sessions --------------------------------------------------------------------------------------------------

    async def create_template_session(self) -> None:
        """Create the session that the others are forked from, which learns a text."""
        text = self.texts.cut("teacher", self.sizes.learned)
        step = self.context // 2
        for start in range(0, len(text), step):
            body = {"prompt": text[start : start + step], "session": TEMPLATE_SESSION, "adapt": "observe"}
            await self._post("/v1/completions", {"model": self.imprint.model, **body})
        self.known_sessions.add(TEMPLATE_SESSION)

    async def fork_sessions(self, group: str, count: int) -> None:
        """Fork the missing sessions of `<group>-0`, `<group>-1`, … from the template session."""
        if TEMPLATE_SESSION not in self.known_sessions:
            await self.create_template_session()
        new = [name for name in (f"{group}-{i}" for i in range(count)) if name not in self.known_sessions]

        async def fork(names: Sequence[str]) -> None:
            for name in names:
                await self._post(f"/v1/sessions/{TEMPLATE_SESSION}/fork", {"id": name})

        await asyncio.gather(*(fork(new[start::FORK_CONCURRENCY]) for start in range(FORK_CONCURRENCY)))
        self.known_sessions.update(new)

    async def create_session(self, name: str, rows: int) -> int:
        """Create a session with `rows` random rows at each site, or as many as fit, and return the number of rows."""
        if TEMPLATE_SESSION not in self.known_sessions:
            await self.create_template_session()
        model = (await self.imprint.http.get(f"/v1/sessions/{TEMPLATE_SESSION}")).json()["model"]
        session = random_session(self.config, name, model, rows, self.vocab_size)
        answer = await self.imprint.http.put(f"/v1/sessions/{name}/import", content=pack_session(session, ""))
        if not answer.is_success:
            raise PeerError(f"imprint refused a session of {rows} rows: {answer.text[:200]}")
        self.known_sessions.add(name)
        return int(answer.json()["rows"])

    async def warm_up(self, arms: Iterable[Arm], streams: int = 1) -> None:
        """Run each arm once without measuring, with `streams` users, and fork the sessions of the users before."""
        for arm in arms:
            if isinstance(arm, ImprintArm) and arm.adapt is not None:
                await self.fork_sessions(arm.group or arm.name, streams)
            prompt = self.texts.cut("warm", 16)
            try:
                await asyncio.gather(*(arm.generate(prompt, 2, stream=stream) for stream in range(streams)))
            except PeerError:
                if isinstance(arm, ImprintArm):
                    raise  # the first round reports the fault of a peer

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        answer = await self.imprint.http.post(path, json=body)
        if not answer.is_success:
            raise PeerError(f"imprint refused {path}: {answer.text[:200]}")
