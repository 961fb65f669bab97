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

from benchmarks.peers import Imprint
from benchmarks.stage import Stage
from benchmarks.stream_timing import Arm, Heard, PeerError
from research.estimates import percentiles

CLIENTS = 5  # that walk through the sessions; as many sessions are the other arm
USERS = 16  # who send requests at a fixed rate
RUNNING = 4  # streams that are interrupted
CHOICES = 8  # of one request: they share a prompt, so a large batch is soon at work
POLL_S = 0.005
POLICIES = ("bandit", "choices")  # the shipped ones that see least and most
WARM_ACTS = 20

Result = dict[str, Any]


async def single(stage: Stage) -> Result:
    """One stream."""
    sizes = stage.sizes

    async def once(arm: Arm, number: int) -> dict[str, float]:
        heard = await arm.generate(stage.texts.cut(f"single/{number}", sizes.prompt), sizes.tokens)
        return {"s_per_token": heard.pace, "first_s": heard.first}

    arms = stage.arms("off", "predict", "both", peers=("llama.cpp", "transformers", "vllm"))
    await stage.warm(arms)
    title = f"One stream: {sizes.tokens} tokens after {sizes.prompt}"
    return {"title": title, "arms": await stage.rounds(arms, once)}


async def prefill(stage: Stage) -> Result:
    """How fast a prompt is read; "both" also learns it."""
    tokens = min(stage.sizes.prefill, stage.context - 1)

    async def once(arm: Arm, number: int) -> dict[str, float]:
        heard = await arm.generate(stage.texts.cut(f"prefill/{number}", tokens), 1)
        return {"tokens_per_s": tokens / heard.first}

    arms = stage.arms("off", "both", peers=("llama.cpp", "transformers", "vllm"))
    await stage.warm(arms)
    return {"title": f"Prefill: a prompt of {tokens} tokens to its first token", "arms": await stage.rounds(arms, once)}


def streams(count: int) -> Callable[[Stage], Awaitable[Result]]:
    """The scenario of so many streams at once, whose prompts are of mixed lengths."""

    async def scenario(stage: Stage) -> Result:
        sizes = stage.sizes

        async def once(arm: Arm, number: int) -> dict[str, float]:
            prompts = stage.texts.mixed(f"streams/{count}/{number}", sizes.lengths, count)
            asked = [arm.generate(prompt, sizes.stream_tokens, stream=i) for i, prompt in enumerate(prompts)]
            begun = time.perf_counter()
            heard = await asyncio.gather(*asked)
            took = max(one.done for one in heard) - begun
            read = sum(map(len, prompts))
            return {"tokens_per_s": count * sizes.stream_tokens / took, "with_prompts_per_s": read / took} | {
                "first_p50_s": percentiles([one.first for one in heard])["p50"]
            }

        arms = stage.arms("off", "predict", "both", peers=("llama.cpp", "vllm"), streams=count)
        await stage.warm(arms, count)
        lengths = f"{min(sizes.lengths)}–{max(sizes.lengths)}"
        title = f"{count} streams: {sizes.stream_tokens} tokens each after prompts of {lengths}, from first to last"
        return {"title": title, "arms": await stage.rounds(arms, once)}

    return scenario


def batch(count: int) -> Callable[[Stage], Awaitable[Result]]:
    """The scenario of decoding alone, so many sequences at once.

    The sessions are full of rows that say nothing, so with and without them the texts, and the tokens that are guessed
    of them, are the same."""

    async def scenario(stage: Stage) -> Result:
        sizes, requests = stage.sizes, -(-count // CHOICES)
        choices, tokens = count // requests, sizes.tokens if count == 1 else sizes.batch_tokens
        for name in {f"full-{i}" for i in range(requests)} - stage.known:
            await stage.make(name, max(sizes.history))

        async def once(arm: Arm, number: int) -> dict[str, float]:
            prompts = [stage.texts.cut(f"batch/{number}/{i}", 16) for i in range(requests)]
            asked = [arm.generate(p, tokens, stream=i, n=choices) for i, p in enumerate(prompts)]
            return {"s_per_step": step_time(await asyncio.gather(*asked), choices)}

        arms = [*stage.arms("off"), Imprint("predict", stage.imprint, "predict", "full")]
        await stage.warm(arms, requests)
        title = f"Decoding at batch {count}: {requests} full sessions, {choices} choices each"
        return {"title": title, "arms": await stage.rounds(arms, once)}

    return scenario


def step_time(heard: list[Heard], choices: int) -> float:
    """Seconds of a decoding step, between the moment when all streams have begun and the first one's end."""
    begun, ended = max(one.times[0] for one in heard), min(one.times[-1] for one in heard)
    pieces = sum(begun < at <= ended for one in heard for at in one.times)
    if not pieces:  # the streams were too short to be at work together
        return max(one.pace for one in heard) * choices
    shown = sum(len(one.times) for one in heard) / sum(one.tokens for one in heard)  # a character may take two tokens
    return (ended - begun) * len(heard) * choices * shown / pieces


async def sessions(stage: Stage) -> Result:
    """Many more sessions than the device holds, one after the other, against 5: the same work but for where the rows
    are."""
    many, asked = stage.sizes.sessions, {"5": 0, "many": 0}
    await stage.people("many", many)
    await stage.people("few", CLIENTS)
    arms: list[Arm] = [Imprint("5", stage.imprint, "both", "few"), Imprint("many", stage.imprint, "both", "many")]

    async def once(arm: Arm, number: int) -> dict[str, float]:
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
    values = await stage.rounds(arms, once)
    title = f"{many} sessions in turn, each loaded from the store, against {CLIENTS} that stay on the device"
    spent = {name: await _mean(stage, name) for name in ("load_seconds", "commit_seconds")}
    return {"title": f"{title}: {CLIENTS} clients, requests of 64 + 16 tokens, learned", "arms": values} | spent


async def history(stage: Stage) -> Result:
    """What a request costs after so many learned tokens."""
    rows = {}
    for tokens in stage.sizes.history:
        rows[f"{tokens:,}"] = await stage.make(f"learned-{tokens}-0", tokens)
    arms: list[Arm] = [
        Imprint(f"{tokens:,}", stage.imprint, "both", f"learned-{tokens}") for tokens in stage.sizes.history
    ]

    async def once(arm: Arm, number: int) -> dict[str, float]:
        heard = await arm.generate(stage.texts.cut(f"history/{number}", 64), 16)
        return {"request_s": heard.done - heard.sent}

    for arm in arms:
        await arm.generate(stage.texts.cut("warm", 16), 2)
    values = await stage.rounds(arms, once)
    title = "A request of 64 + 16 tokens, learned, by tokens learned before (rows made, not learned)"
    return {"title": title, "arms": values, "rows": rows}


async def rate(stage: Stage) -> Result:
    """Requests at a fixed rate, whether or not the ones before are done."""
    sizes = stage.sizes
    pooled: dict[str, dict[str, list[float]]] = {}
    users = min(USERS, max(sizes.streams))

    async def once(arm: Arm, number: int) -> dict[str, float]:
        chance = random.Random(f"rate/{number}")
        arrivals, at = list[float](), 0.0
        while (at := at + chance.expovariate(sizes.rate)) < sizes.rate_s:
            arrivals.append(at)
        prompts = stage.texts.mixed(f"rate/{number}", sizes.lengths, len(arrivals))

        async def one(number: int, after: float) -> Heard:
            await asyncio.sleep(after)
            return await arm.generate(prompts[number], sizes.stream_tokens, stream=number % users)

        heard = await asyncio.gather(*(one(i, after) for i, after in enumerate(arrivals)))
        told = pooled.setdefault(arm.name, {"first_s": [], "gap_s": []})
        told["first_s"] += [one.first for one in heard]
        told["gap_s"] += [gap for one in heard for gap in one.gaps]
        return {"requests": float(len(heard))}

    arms = stage.arms("off", "both", peers=("llama.cpp", "vllm"), streams=users)
    await stage.warm(arms, users)
    values = await stage.rounds(arms, once)
    found = {arm: {what: percentiles(times) for what, times in told.items() if times} for arm, told in pooled.items()}
    title = f"{sizes.rate:g} requests a second, Poisson, {sizes.rate_s:g} s a round, {sizes.stream_tokens} tokens each"
    return {"title": title, "arms": values, "percentiles": found, "samples": pooled}


async def acts(stage: Stage) -> Result:
    """One session of a policy that acts, one act after the other."""
    models = (await stage.imprint.http.get("/v1/models")).json()["data"]
    widths = {one["id"]: one["policy"]["observation"] for one in models if one["id"] in POLICIES}
    arms: list[Arm] = [Imprint(name, stage.imprint, None) for name in widths]

    async def once(arm: Arm, number: int) -> dict[str, float]:
        walk = partial(_walk, str(stage.imprint.http.base_url), arm.name, widths[arm.name], f"{arm.name}-{number}")
        took = percentiles((await asyncio.to_thread(walk, stage.sizes.acts))[WARM_ACTS:])
        return {"p50_s": took["p50"], "p99_s": took["p99"]}

    title = f"One session of a policy: {stage.sizes.acts} acts one after the other, each with a reward and its commit"
    return {"title": title, "arms": await stage.rounds(arms, once)}


def _walk(url: str, policy: str, width: int, session: str, count: int) -> list[float]:
    """Seconds of each act, from the request to the whole answer; on one connection of the standard library, for a
    richer client takes as long as the server."""
    chance, took = random.Random(session), list[float]()
    with closing(HTTPConnection(urlsplit(url).netloc)) as connection:
        for number in range(WARM_ACTS + count):
            body: dict[str, Any] = {"model": policy, "observation": [chance.gauss() for _ in range(width)]}
            if number:
                body["reward"] = float(number % 3 == 0)
            content, begun = json.dumps(body), time.perf_counter()
            connection.request("POST", f"/v1/sessions/{session}/act", content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            said = answer.read()
            took.append(time.perf_counter() - begun)
            if answer.status != 200:
                raise PeerError(f"imprint refused an act of {policy}: {said.decode()[:200]}")
    return took


async def interruption(stage: Stage) -> Result:
    """Streams that run while a long prompt comes in."""
    sizes = stage.sizes
    long = min(sizes.long_prompt, stage.context - 1)
    room = min(sizes.running, stage.context - 32)
    samples: dict[str, dict[str, list[float]]] = {}

    async def once(arm: Arm, number: int) -> dict[str, float]:
        running = [Heard() for _ in range(RUNNING)]
        tasks = [
            asyncio.create_task(arm.generate(stage.texts.cut(f"run/{number}/{i}", 16), room, stream=i, heard=heard))
            for i, heard in enumerate(running)
        ]
        try:
            await _all_begun(running, tasks)
            await asyncio.sleep(sizes.quiet_s)
            prompt = await arm.generate(stage.texts.cut(f"long/{number}", long), 1, stream=RUNNING)
            await asyncio.sleep(sizes.quiet_s / 2)  # the gaps that the prompt made end after it
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for one in ended:
            if isinstance(one, Exception):
                raise one
        begun = max((heard.times[0] for heard in running if heard.times), default=prompt.sent - sizes.quiet_s)
        quiet = gaps_between(running, begun, prompt.sent)
        busy = gaps_between(running, prompt.sent, prompt.sent + prompt.first)
        told = samples.setdefault(arm.name, {"quiet": [], "busy": []})
        told["quiet"] += quiet
        told["busy"] += busy
        return {"p99_s": percentiles(busy)["p99"], "p50_s": percentiles(busy)["p50"], "first_s": prompt.first} | {
            "quiet_p50_s": percentiles(quiet)["p50"]
        }

    arms = stage.arms("off", "both", peers=("llama.cpp", "vllm"))
    await stage.warm(arms, RUNNING + 1)
    values = await stage.rounds(arms, once)
    found = {arm: {what: percentiles(times) for what, times in told.items()} for arm, told in samples.items()}
    title = f"{RUNNING} running streams while a prompt of {long} tokens comes in: from one token to the next"
    return {"title": title, "arms": values, "percentiles": found, "samples": samples}


def gaps_between(heard: list[Heard], start: float, end: float) -> list[float]:
    """Seconds from one piece of a stream to the next, of all that overlap this time; a stream that then said nothing
    more counts with all of it. Never empty."""
    gaps = []
    for one in heard:
        pairs = zip(one.times, one.times[1:], strict=False)
        gaps += [later - earlier for earlier, later in pairs if later > start and earlier < end] or [end - start]
    return gaps


async def _all_begun(running: list[Heard], tasks: list[asyncio.Task[Heard]]) -> None:
    """Waits until each stream has said something, or one has ended."""
    while not all(heard.times for heard in running) and not any(task.done() for task in tasks):
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
