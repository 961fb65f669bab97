"""The scenarios: each takes the stage and returns plain numbers, by arm and by round.

Every result has `title`, `arms` (by arm and by what was measured, a value a round) and whatever else it is told by.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from functools import partial
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

from benchmarks.peers import ImprintArm
from benchmarks.stage import Stage
from benchmarks.stream_timing import Arm, PeerError, StreamTiming
from research.estimates import percentiles

CLIENTS = 5  # that walk through the sessions; as many sessions are the other arm
USERS = 16  # who send requests at a fixed rate
NUM_RUNNING_STREAMS = 4  # streams that are interrupted
CHOICES_PER_REQUEST = 8  # of one request: they share a prompt, so a large batch is soon at work
POLL_S = 0.005
POLICIES = ("bandit", "choices")  # the shipped ones that see least and most
WARMUP_ACTS = 20

Result = dict[str, Any]


async def single(stage: Stage) -> Result:
    """One stream."""
    sizes = stage.sizes

    async def measure_once(arm: Arm, number: int) -> dict[str, float]:
        timing = await arm.generate(stage.texts.cut(f"single/{number}", sizes.prompt), sizes.tokens)
        return {"s_per_token": timing.tpot_s, "first_s": timing.first}

    arms = stage.arms("off", "predict", "both", peers=("llama.cpp", "transformers", "vllm"))
    await stage.warm_up(arms)
    title = f"One stream: {sizes.tokens} tokens after {sizes.prompt}"
    return {"title": title, "arms": await stage.rounds(arms, measure_once)}


async def prefill(stage: Stage) -> Result:
    """How fast a prompt is read; "both" also learns it."""
    tokens = min(stage.sizes.prefill, stage.context - 1)

    async def measure_once(arm: Arm, number: int) -> dict[str, float]:
        timing = await arm.generate(stage.texts.cut(f"prefill/{number}", tokens), 1)
        return {"tokens_per_s": tokens / timing.first}

    arms = stage.arms("off", "both", peers=("llama.cpp", "transformers", "vllm"))
    await stage.warm_up(arms)
    return {
        "title": f"Prefill: a prompt of {tokens} tokens to its first token",
        "arms": await stage.rounds(arms, measure_once),
    }


def streams(count: int) -> Callable[[Stage], Awaitable[Result]]:
    """The scenario of so many streams at once, whose prompts are of mixed lengths."""

    async def scenario(stage: Stage) -> Result:
        sizes = stage.sizes

        async def measure_once(arm: Arm, number: int) -> dict[str, float]:
            prompts = stage.texts.mixed_lengths(f"streams/{count}/{number}", sizes.lengths, count)
            asked = [arm.generate(prompt, sizes.stream_tokens, stream=i) for i, prompt in enumerate(prompts)]
            begun = time.perf_counter()
            timing = await asyncio.gather(*asked)
            elapsed = max(one.done for one in timing) - begun
            read = sum(map(len, prompts))
            return {"tokens_per_s": count * sizes.stream_tokens / elapsed, "with_prompts_per_s": read / elapsed} | {
                "first_p50_s": percentiles([one.first for one in timing])["p50"]
            }

        arms = stage.arms("off", "predict", "both", peers=("llama.cpp", "vllm"), streams=count)
        await stage.warm_up(arms, count)
        lengths = f"{min(sizes.lengths)}–{max(sizes.lengths)}"
        title = f"{count} streams: {sizes.stream_tokens} tokens each after prompts of {lengths}, from first to last"
        return {"title": title, "arms": await stage.rounds(arms, measure_once)}

    return scenario


def batch(count: int) -> Callable[[Stage], Awaitable[Result]]:
    """The scenario of decoding alone, so many sequences at once.

    The sessions are full of rows that say nothing, so with and without them the texts, and the tokens that are guessed
    of them, are the same."""

    async def scenario(stage: Stage) -> Result:
        sizes, requests = stage.sizes, -(-count // CHOICES_PER_REQUEST)
        choices, tokens = count // requests, sizes.tokens if count == 1 else sizes.batch_tokens
        for name in {f"full-{i}" for i in range(requests)} - stage.known_sessions:
            await stage.create_session(name, max(sizes.history))

        async def measure_once(arm: Arm, number: int) -> dict[str, float]:
            prompts = [stage.texts.cut(f"batch/{number}/{i}", 16) for i in range(requests)]
            asked = [arm.generate(p, tokens, stream=i, n=choices) for i, p in enumerate(prompts)]
            return {"s_per_step": step_time(await asyncio.gather(*asked), choices)}

        arms = [*stage.arms("off"), ImprintArm("predict", stage.imprint, "predict", "full")]
        await stage.warm_up(arms, requests)
        title = f"Decoding at batch {count}: {requests} full sessions, {choices} choices each"
        return {"title": title, "arms": await stage.rounds(arms, measure_once)}

    return scenario


def step_time(timing: list[StreamTiming], choices: int) -> float:
    """Seconds of a decoding step, between the moment when all streams have begun and the first one's end."""
    begun, ended = max(one.times[0] for one in timing), min(one.times[-1] for one in timing)
    pieces = sum(begun < at <= ended for one in timing for at in one.times)
    if not pieces:  # the streams were too short to be at work together
        return max(one.tpot_s for one in timing) * choices
    shown = sum(len(one.times) for one in timing) / sum(one.tokens for one in timing)  # a character may take two tokens
    return (ended - begun) * len(timing) * choices * shown / pieces


async def sessions(stage: Stage) -> Result:
    """Many more sessions than the device holds, one after the other, against 5: the same work but for where the rows
    are."""
    many, asked = stage.sizes.sessions, {"5": 0, "many": 0}
    await stage.fork_sessions("many", many)
    await stage.fork_sessions("few", CLIENTS)
    arms: list[Arm] = [ImprintArm("5", stage.imprint, "both", "few"), ImprintArm("many", stage.imprint, "both", "many")]

    async def measure_once(arm: Arm, number: int) -> dict[str, float]:
        size = CLIENTS if arm.name == "5" else many
        first, count = asked[arm.name], stage.sizes.session_turns * CLIENTS
        asked[arm.name] += count

        async def client(at: int) -> None:
            for turn in range(first + at, first + count, CLIENTS):
                await arm.generate(stage.texts.cut(f"sessions/{turn}", 64), 16, stream=turn % size)

        begun = time.perf_counter()
        await asyncio.gather(*(client(at) for at in range(CLIENTS)))
        return {"requests_per_s": count / (time.perf_counter() - begun)}

    prompt, filled = stage.texts.cut("warm", 2), 0
    while filled < many and not await _metric(stage, "session_evictions_total"):
        # The device fills up, so that each load has to put another session out.
        some = range(filled, min(filled + CLIENTS, many))
        await asyncio.gather(*(arms[1].generate(prompt, 1, stream=stream) for stream in some))
        filled += CLIENTS
    asked["many"] = filled
    values = await stage.rounds(arms, measure_once)
    title = f"{many} sessions in turn, each loaded from the store, against {CLIENTS} that stay on the device"
    spent = {name: await _mean(stage, name) for name in ("load_seconds", "commit_seconds")}
    return {"title": f"{title}: {CLIENTS} clients, requests of 64 + 16 tokens, learned", "arms": values} | spent


async def history(stage: Stage) -> Result:
    """What a request costs after so many learned tokens."""
    rows = {}
    for tokens in stage.sizes.history:
        rows[f"{tokens:,}"] = await stage.create_session(f"learned-{tokens}-0", tokens)
    arms: list[Arm] = [
        ImprintArm(f"{tokens:,}", stage.imprint, "both", f"learned-{tokens}") for tokens in stage.sizes.history
    ]

    async def measure_once(arm: Arm, number: int) -> dict[str, float]:
        timing = await arm.generate(stage.texts.cut(f"history/{number}", 64), 16)
        return {"request_s": timing.done - timing.sent_at}

    for arm in arms:
        await arm.generate(stage.texts.cut("warm", 16), 2)
    values = await stage.rounds(arms, measure_once)
    title = "A request of 64 + 16 tokens, learned, by tokens learned before (rows made, not learned)"
    return {"title": title, "arms": values, "rows": rows}


async def rate(stage: Stage) -> Result:
    """Requests at a fixed rate, whether or not the ones before are done."""
    sizes = stage.sizes
    pooled: dict[str, dict[str, list[float]]] = {}
    users = min(USERS, max(sizes.streams))

    async def measure_once(arm: Arm, number: int) -> dict[str, float]:
        rng = random.Random(f"rate/{number}")
        arrivals, at = list[float](), 0.0
        while (at := at + rng.expovariate(sizes.rate)) < sizes.rate_s:
            arrivals.append(at)
        prompts = stage.texts.mixed_lengths(f"rate/{number}", sizes.lengths, len(arrivals))

        async def one(number: int, after: float) -> StreamTiming:
            await asyncio.sleep(after)
            return await arm.generate(prompts[number], sizes.stream_tokens, stream=number % users)

        timing = await asyncio.gather(*(one(i, after) for i, after in enumerate(arrivals)))
        told = pooled.setdefault(arm.name, {"first_s": [], "gap_s": []})
        told["first_s"] += [one.first for one in timing]
        told["gap_s"] += [gap for one in timing for gap in one.inter_token_latencies]
        return {"requests": float(len(timing))}

    arms = stage.arms("off", "both", peers=("llama.cpp", "vllm"), streams=users)
    await stage.warm_up(arms, users)
    values = await stage.rounds(arms, measure_once)
    found = {arm: {what: percentiles(times) for what, times in told.items() if times} for arm, told in pooled.items()}
    title = f"{sizes.rate:g} requests a second, Poisson, {sizes.rate_s:g} s a round, {sizes.stream_tokens} tokens each"
    return {"title": title, "arms": values, "percentiles": found, "samples": pooled}


async def acts(stage: Stage) -> Result:
    """One session of a policy that acts, one act after the other."""
    models = (await stage.imprint.http.get("/v1/models")).json()["data"]
    widths = {one["id"]: one["policy"]["observation"] for one in models if one["id"] in POLICIES}
    arms: list[Arm] = [ImprintArm(name, stage.imprint, None) for name in widths]

    async def measure_once(arm: Arm, number: int) -> dict[str, float]:
        time_acts = partial(
            _time_acts, str(stage.imprint.http.base_url), arm.name, widths[arm.name], f"{arm.name}-{number}"
        )
        elapsed = percentiles((await asyncio.to_thread(time_acts, stage.sizes.acts))[WARMUP_ACTS:])
        return {"p50_s": elapsed["p50"], "p99_s": elapsed["p99"]}

    title = f"One session of a policy: {stage.sizes.acts} acts one after the other, each with a reward and its commit"
    return {"title": title, "arms": await stage.rounds(arms, measure_once)}


def _time_acts(url: str, policy: str, width: int, session: str, count: int) -> list[float]:
    """Seconds of each act, from the request to the whole answer; on one connection of the standard library, for a
    richer client takes as long as the server."""
    rng, elapsed = random.Random(session), list[float]()
    with closing(HTTPConnection(urlsplit(url).netloc)) as connection:
        for number in range(WARMUP_ACTS + count):
            body: dict[str, Any] = {"model": policy, "observation": [rng.gauss() for _ in range(width)]}
            if number:
                body["reward"] = float(number % 3 == 0)
            content, begun = json.dumps(body), time.perf_counter()
            connection.request("POST", f"/v1/sessions/{session}/act", content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            said = answer.read()
            elapsed.append(time.perf_counter() - begun)
            if answer.status != 200:
                raise PeerError(f"imprint refused an act of {policy}: {said.decode()[:200]}")
    return elapsed


async def interruption(stage: Stage) -> Result:
    """Streams that run while a long prompt comes in."""
    sizes = stage.sizes
    long = min(sizes.long_prompt, stage.context - 1)
    room = min(sizes.running, stage.context - 32)
    samples: dict[str, dict[str, list[float]]] = {}

    async def measure_once(arm: Arm, number: int) -> dict[str, float]:
        running = [StreamTiming() for _ in range(NUM_RUNNING_STREAMS)]
        tasks = [
            asyncio.create_task(arm.generate(stage.texts.cut(f"run/{number}/{i}", 16), room, stream=i, timing=timing))
            for i, timing in enumerate(running)
        ]
        try:
            await _all_streaming(running, tasks)
            await asyncio.sleep(sizes.quiet_s)
            prompt = await arm.generate(stage.texts.cut(f"long/{number}", long), 1, stream=NUM_RUNNING_STREAMS)
            await asyncio.sleep(sizes.quiet_s / 2)  # the gaps that the prompt made end after it
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for one in ended:
            if isinstance(one, Exception):
                raise one
        begun = max((timing.times[0] for timing in running if timing.times), default=prompt.sent_at - sizes.quiet_s)
        quiet = gaps_between(running, begun, prompt.sent_at)
        busy = gaps_between(running, prompt.sent_at, prompt.sent_at + prompt.first)
        told = samples.setdefault(arm.name, {"quiet": [], "busy": []})
        told["quiet"] += quiet
        told["busy"] += busy
        return {"p99_s": percentiles(busy)["p99"], "p50_s": percentiles(busy)["p50"], "first_s": prompt.first} | {
            "quiet_p50_s": percentiles(quiet)["p50"]
        }

    arms = stage.arms("off", "both", peers=("llama.cpp", "vllm"))
    await stage.warm_up(arms, NUM_RUNNING_STREAMS + 1)
    values = await stage.rounds(arms, measure_once)
    found = {arm: {what: percentiles(times) for what, times in told.items()} for arm, told in samples.items()}
    title = (
        f"{NUM_RUNNING_STREAMS} running streams while a prompt of {long} tokens comes in: from one token to the next"
    )
    return {"title": title, "arms": values, "percentiles": found, "samples": samples}


def gaps_between(timing: list[StreamTiming], start: float, end: float) -> list[float]:
    """Seconds from one piece of a stream to the next, of all that overlap this time; a stream that then said nothing
    more counts with all of it. Never empty."""
    inter_token_latencies = []
    for one in timing:
        pairs = zip(one.times, one.times[1:], strict=False)
        inter_token_latencies += [later - earlier for earlier, later in pairs if later > start and earlier < end] or [
            end - start
        ]
    return inter_token_latencies


async def _all_streaming(running: list[StreamTiming], tasks: list[asyncio.Task[StreamTiming]]) -> None:
    """Waits until each stream has said something, or one has ended."""
    while not all(timing.times for timing in running) and not any(task.done() for task in tasks):
        await asyncio.sleep(POLL_S)
    for task in tasks:
        if task.done():
            with suppress(asyncio.CancelledError):
                task.result()


async def _metric(stage: Stage, name: str) -> float:
    lines = (await stage.imprint.http.get("/metrics")).text.splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith(f"imprint_{name} ")), 0.0)


async def _mean(stage: Stage, name: str) -> float:
    """The mean of a histogram since the server began."""
    return await _metric(stage, f"{name}_sum") / max(1.0, await _metric(stage, f"{name}_count"))
