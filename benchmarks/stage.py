"""What every scenario stands on: the arms, their texts and sessions, and rounds in which the arms take turns."""

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
MAX_BUDGET_OVERRUN = 2.0  # times its budget that a scenario may take for the sake of its rounds
FORK_CONCURRENCY = 8  # sessions that are made at the same time

Values = dict[str, dict[str, list[float]]]  # by arm and by what was measured, one value a round
MeasureOnce = Callable[[Any, int], Awaitable[dict[str, float]]]


class Progress(Protocol):
    """Told how far a scenario is, as a share of its time."""

    def __call__(self, share: float) -> None: ...


@dataclass(frozen=True)
class Sizes:
    """How much each scenario does; tokens unless said otherwise.

    prompt, tokens: of the single stream. prefill: of the prompt whose reading is timed. streams: how many at once.
    lengths: of their prompts, in turn. batches: sequences in one decoding step. sessions: in all, against 5, each
    client's session_turns a round. history: rows of sessions. states: parts of a full session. rate: requests a second,
    for rate_s seconds. long_prompt: that comes in when streams, of `running` at most, have run for quiet_s seconds.
    acts: of one session in a row. learned: by each session that is read. rounds: at least and at most.
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
class Stage:
    """imprint: our server. peers: those that are there, by name; missing: why the others are not. threads: of every
    arm. model, vocab_size, config: of the base and its memory."""

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
        """Ours, memory "off", "predict" or "both", then the peers that are there, each fit for so many streams."""
        ours: list[Arm] = [ImprintArm(name, self.imprint, None if name == "off" else name) for name in adapt]
        others = [self.peers[name] for name in peers if name in self.peers]
        return ours + [arm.for_streams(streams) if isinstance(arm, PeerArm) else arm for arm in others]

    async def rounds(self, arms: Sequence[Arm], measure_once: MeasureOnce, *, budget_s: float | None = None) -> Values:
        """Measures the arms in turns, each round in the other direction, for as long as there is time.

        On a machine that is far too slow for it there are fewer rounds than the sizes ask for. A peer that fails is
        left out from then on. Raises PeerError where one of ours fails.
        """
        budget = self.budget_s if budget_s is None else budget_s
        least, most = self.sizes.rounds
        values: Values = {arm.name: {} for arm in arms}
        left, begun = list(arms), time.monotonic()
        for number in range(most):
            spent = time.monotonic() - begun
            late = number >= least and spent * (number + 1) / number > budget
            if late or (number and spent > MAX_BUDGET_OVERRUN * budget):
                break
            for arm in left if number % 2 == 0 else left[::-1]:
                try:
                    found = await measure_once(arm, number)
                except PeerError as error:
                    if isinstance(arm, ImprintArm):
                        raise
                    self.missing[arm.name] = str(error)
                    self.peers.pop(arm.name, None)
                    del values[arm.name]
                    left = [other for other in left if other is not arm]
                else:
                    for what, value in found.items():
                        values[arm.name].setdefault(what, []).append(value)
                self.progress(min(1.0, (time.monotonic() - begun) / budget))
        return values

    # --- sessions --------------------------------------------------------------------------------------------------

    async def create_template_session(self) -> None:
        """The session that all others are forks of: it has really learned."""
        text = self.texts.cut("teacher", self.sizes.learned)
        step = self.context // 2
        for start in range(0, len(text), step):
            body = {"prompt": text[start : start + step], "session": TEMPLATE_SESSION, "adapt": "observe"}
            await self._post("/v1/completions", {"model": self.imprint.model, **body})
        self.known_sessions.add(TEMPLATE_SESSION)

    async def fork_sessions(self, group: str, count: int) -> None:
        """Sessions `<group>-0`, `<group>-1`, … that have learned what the teacher has, as far as they are not there."""
        if TEMPLATE_SESSION not in self.known_sessions:
            await self.create_template_session()
        new = [name for name in (f"{group}-{i}" for i in range(count)) if name not in self.known_sessions]

        async def fork(names: Sequence[str]) -> None:
            for name in names:
                await self._post(f"/v1/sessions/{TEMPLATE_SESSION}/fork", {"id": name})

        await asyncio.gather(*(fork(new[start::FORK_CONCURRENCY]) for start in range(FORK_CONCURRENCY)))
        self.known_sessions.update(new)

    async def create_session(self, name: str, rows: int) -> int:
        """A session with so many rows at each site, or as many as there is room for; returns how many those are."""
        if TEMPLATE_SESSION not in self.known_sessions:
            await self.create_template_session()
        model = (await self.imprint.http.get(f"/v1/sessions/{TEMPLATE_SESSION}")).json()["model"]
        made = random_session(self.config, name, model, rows, self.vocab_size)
        answer = await self.imprint.http.put(f"/v1/sessions/{name}/import", content=pack_session(made, ""))
        if not answer.is_success:
            raise PeerError(f"imprint refused a session of {rows} rows: {answer.text[:200]}")
        self.known_sessions.add(name)
        return int(answer.json()["rows"])

    async def warm_up(self, arms: Iterable[Arm], streams: int = 1) -> None:
        """Each arm once, unmeasured, with as many users as it will have; their sessions are made before."""
        for arm in arms:
            if isinstance(arm, ImprintArm) and arm.adapt is not None:
                await self.fork_sessions(arm.group or arm.name, streams)
            prompt = self.texts.cut("warm", 16)
            try:
                await asyncio.gather(*(arm.generate(prompt, 2, stream=stream) for stream in range(streams)))
            except PeerError:
                if isinstance(arm, ImprintArm):
                    raise  # a peer's fault is told by its first round

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        answer = await self.imprint.http.post(path, json=body)
        if not answer.is_success:
            raise PeerError(f"imprint refused {path}: {answer.text[:200]}")
