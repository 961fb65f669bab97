"""The scenarios of `imprint bench`: each measures the arms of a testbed and returns plain numbers.

Every result has `title` and `arms` (by arm and quantity, one value for each round); some have further entries.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

from benchmarks.peers import ImprintArm
from benchmarks.stream_timing import Arm, PeerError, StreamTiming
from benchmarks.testbed import Testbed
from research.estimates import percentiles

CLIENTS = 5  # concurrent clients of the sessions scenario, and sessions of its other arm
USERS = 16  # users of the rate scenario
NUM_RUNNING_STREAMS = 4  # streams of the interruption scenario
CHOICES_PER_REQUEST = 8  # choices share a prompt, so a large batch starts soon
POLL_S = 0.005
POLICIES = ("bandit-10", "choices")  # policies of fixed shapes with the smallest and the largest observation
COLUMNS = 20  # of the rows that learners of tables get
WARMUP_ACTS = 20

Result = dict[str, Any]


async def single(testbed: Testbed) -> Result:
    """Measure one stream."""
    sizes = testbed.sizes

    async def measure_once(arm: Arm, number: int) -> dict[str, float]:
        timing = await arm.generate(testbed.texts.cut(f"single/{number}", sizes.prompt), sizes.tokens)
        return {"s_per_token": timing.tpot_s, "first_s": timing.ttft_s}

    arms = testbed.arms("off", "predict", "both", peers=("llama.cpp", "transformers", "vllm"))
    await testbed.warm_up(arms)
    title = f"One stream: {sizes.tokens} tokens after {sizes.prompt}"
    return {"title": title, "arms": await testbed.rounds(arms, measure_once)}


async def prefill(testbed: Testbed) -> Result:
    """Measure the prefill of a long prompt, which the arm "both" also learns."""
    tokens = min(testbed.sizes.prefill, testbed.context - 1)

    async def measure_once(arm: Arm, number: int) -> dict[str, float]:
        timing = await arm.generate(testbed.texts.cut(f"prefill/{number}", tokens), 1)
        return {"tokens_per_s": tokens / timing.ttft_s}

    arms = testbed.arms("off", "both", peers=("llama.cpp", "transformers", "vllm"))
    await testbed.warm_up(arms)
    return {
        "title": f"Prefill: a prompt of {tokens} tokens to its first token",
        "arms": await testbed.rounds(arms, measure_once),
    }


def streams(count: int) -> Callable[[Testbed], Awaitable[Result]]:
    """Return the scenario of `count` concurrent streams with prompts of mixed lengths."""

    async def scenario(testbed: Testbed) -> Result:
        sizes = testbed.sizes

        async def measure_once(arm: Arm, number: int) -> dict[str, float]:
            prompts = testbed.texts.mixed_lengths(f"streams/{count}/{number}", sizes.lengths, count)
            requests = [arm.generate(prompt, sizes.stream_tokens, stream=i) for i, prompt in enumerate(prompts)]
            started = time.perf_counter()
            timings = await asyncio.gather(*requests)
            elapsed = max(timing.done_at for timing in timings) - started
            return {
                "tokens_per_s": count * sizes.stream_tokens / elapsed,
                "with_prompts_per_s": sum(map(len, prompts)) / elapsed,
                "first_p50_s": percentiles([timing.ttft_s for timing in timings])["p50"],
            }

        arms = testbed.arms("off", "predict", "both", peers=("llama.cpp", "vllm"), streams=count)
        await testbed.warm_up(arms, count)
        lengths = f"{min(sizes.lengths)}–{max(sizes.lengths)}"
        title = f"{count} streams: {sizes.stream_tokens} tokens each after prompts of {lengths}, from first to last"
        return {"title": title, "arms": await testbed.rounds(arms, measure_once)}

    return scenario


def batch(count: int) -> Callable[[Testbed], Awaitable[Result]]:
    """Return the scenario of decoding alone, with `count` sequences in a step.

    The sessions are full of random rows, which change no prediction. The texts, and the accepted draft tokens, are
    therefore the same with and without memory.
    """

    async def scenario(testbed: Testbed) -> Result:
        sizes, num_requests = testbed.sizes, -(-count // CHOICES_PER_REQUEST)
        choices, tokens = count // num_requests, sizes.tokens if count == 1 else sizes.batch_tokens
        for name in {f"full-{i}" for i in range(num_requests)} - testbed.known_sessions:
            await testbed.create_session(name, max(sizes.history))

        async def measure_once(arm: Arm, number: int) -> dict[str, float]:
            prompts = [testbed.texts.cut(f"batch/{number}/{i}", 16) for i in range(num_requests)]
            requests = [arm.generate(prompt, tokens, stream=i, n=choices) for i, prompt in enumerate(prompts)]
            return {"s_per_step": step_time(await asyncio.gather(*requests), choices)}

        arms = [*testbed.arms("off"), ImprintArm("predict", testbed.imprint, "predict", "full")]
        await testbed.warm_up(arms, num_requests)
        title = f"Decoding at batch {count}: {num_requests} full sessions, {choices} choices each"
        return {"title": title, "arms": await testbed.rounds(arms, measure_once)}

    return scenario


def step_time(timings: list[StreamTiming], choices: int) -> float:
    """Return the seconds of a decoding step while all streams generate: from the last start to the first end."""
    start = max(timing.token_times[0] for timing in timings)
    end = min(timing.token_times[-1] for timing in timings)
    pieces = sum(start < time <= end for timing in timings for time in timing.token_times)
    if not pieces:  # the streams were too short to overlap
        return max(timing.tpot_s for timing in timings) * choices
    # A character may take two tokens, so there are fewer pieces of text than tokens.
    pieces_per_token = sum(len(timing.token_times) for timing in timings) / sum(timing.tokens for timing in timings)
    return (end - start) * len(timings) * choices * pieces_per_token / pieces


async def sessions(testbed: Testbed) -> Result:
    """Measure requests to many more sessions than the device holds, against requests to 5 sessions.

    The work is the same, but the rows of most sessions come from the store instead of the device.
    """
    num_sessions, next_turn = testbed.sizes.sessions, {"5": 0, "many": 0}
    await testbed.fork_sessions("many", num_sessions)
    await testbed.fork_sessions("few", CLIENTS)
    groups = {"5": "few", "many": "many"}
    arms: list[Arm] = [ImprintArm(name, testbed.imprint, "both", group) for name, group in groups.items()]

    async def measure_once(arm: Arm, number: int) -> dict[str, float]:
        size = CLIENTS if arm.name == "5" else num_sessions
        first, count = next_turn[arm.name], testbed.sizes.session_turns * CLIENTS
        next_turn[arm.name] += count

        async def client(number: int) -> None:
            for turn in range(first + number, first + count, CLIENTS):
                await arm.generate(testbed.texts.cut(f"sessions/{turn}", 64), 16, stream=turn % size)

        started = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(CLIENTS)))
        return {"requests_per_s": count / (time.perf_counter() - started)}

    prompt, filled = testbed.texts.cut("warm", 2), 0
    while filled < num_sessions and not await _metric(testbed, "session_evictions_total"):
        # Fill the device, so that each load has to evict another session.
        batch = range(filled, min(filled + CLIENTS, num_sessions))
        await asyncio.gather(*(arms[1].generate(prompt, 1, stream=stream) for stream in batch))
        filled += CLIENTS
    next_turn["many"] = filled
    values = await testbed.rounds(arms, measure_once)
    title = f"{num_sessions} sessions in turn, each loaded from the store, against {CLIENTS} that stay on the device"
    spent = {name: await _mean(testbed, name) for name in ("load_seconds", "commit_seconds")}
    return {"title": f"{title}: {CLIENTS} clients, requests of 64 + 16 tokens, learned", "arms": values} | spent


async def history(testbed: Testbed) -> Result:
    """Measure the duration of a request by the number of tokens that the session has learned."""
    rows = {}
    for tokens in testbed.sizes.history:
        rows[f"{tokens:,}"] = await testbed.create_session(f"learned-{tokens}-0", tokens)
    arms: list[Arm] = [
        ImprintArm(f"{tokens:,}", testbed.imprint, "both", f"learned-{tokens}") for tokens in testbed.sizes.history
    ]

    async def measure_once(arm: Arm, number: int) -> dict[str, float]:
        timing = await arm.generate(testbed.texts.cut(f"history/{number}", 64), 16)
        return {"request_s": timing.done_at - timing.sent_at}

    for arm in arms:
        await arm.generate(testbed.texts.cut("warm", 16), 2)
    values = await testbed.rounds(arms, measure_once)
    title = "A request of 64 + 16 tokens, learned, by tokens learned before (rows made, not learned)"
    return {"title": title, "arms": values, "rows": rows}


async def rate(testbed: Testbed) -> Result:
    """Measure requests that arrive at a fixed rate, whether or not earlier requests have finished."""
    sizes = testbed.sizes
    samples: dict[str, dict[str, list[float]]] = {}
    users = min(USERS, max(sizes.streams))

    async def measure_once(arm: Arm, number: int) -> dict[str, float]:
        rng = random.Random(f"rate/{number}")
        arrivals, arrival = list[float](), 0.0
        while (arrival := arrival + rng.expovariate(sizes.rate)) < sizes.rate_s:
            arrivals.append(arrival)
        prompts = testbed.texts.mixed_lengths(f"rate/{number}", sizes.lengths, len(arrivals))

        async def request(number: int, delay: float) -> StreamTiming:
            await asyncio.sleep(delay)
            return await arm.generate(prompts[number], sizes.stream_tokens, stream=number % users)

        timings = await asyncio.gather(*(request(i, delay) for i, delay in enumerate(arrivals)))
        arm_samples = samples.setdefault(arm.name, {"first_s": [], "gap_s": []})
        arm_samples["first_s"] += [timing.ttft_s for timing in timings]
        arm_samples["gap_s"] += [latency for timing in timings for latency in timing.inter_token_latencies]
        return {"requests": float(len(timings))}

    arms = testbed.arms("off", "both", peers=("llama.cpp", "vllm"), streams=users)
    await testbed.warm_up(arms, users)
    values = await testbed.rounds(arms, measure_once)
    found = {
        arm: {name: percentiles(times) for name, times in by_name.items() if times} for arm, by_name in samples.items()
    }
    title = f"{sizes.rate:g} requests a second, Poisson, {sizes.rate_s:g} s a round, {sizes.stream_tokens} tokens each"
    return {"title": title, "arms": values, "percentiles": found, "samples": samples}


async def acts(testbed: Testbed) -> Result:
    """Measure one session of each policy and of each learner of tables, with one request after the other."""
    models = (await testbed.imprint.http.get("/v1/policies")).json()["data"]
    chosen = {model["id"]: model for model in models if model["learner"] or model["id"] in POLICIES}
    arms: list[Arm] = [ImprintArm(name, testbed.imprint, None) for name in chosen]

    async def measure_once(arm: Arm, number: int) -> dict[str, float]:
        url, session = str(testbed.imprint.http.base_url), f"{arm.name}-{number}"
        elapsed = await asyncio.to_thread(_time_acts, url, chosen[arm.name], session, testbed.sizes.acts)
        return {f"{share}_s": percentiles(elapsed[WARMUP_ACTS:])[share] for share in ("p50", "p99")}

    title = f"One session of a policy: {testbed.sizes.acts} acts or examples, one after the other, each with its commit"
    return {"title": title, "arms": await testbed.rounds(arms, measure_once)}


def _time_acts(url: str, model: Result, session: str, count: int) -> list[float]:
    """Return the seconds of each request that acts or learns, to the whole answer, warm-up first.

    The connection is the standard library's, because a richer client takes as long as the server.
    """
    rng, elapsed = random.Random(session), list[float]()
    with closing(HTTPConnection(urlsplit(url).netloc)) as connection:
        for number in range(WARMUP_ACTS + count):
            path, body = _policy_request(model, rng, number)
            content, started = json.dumps(body), time.perf_counter()
            connection.request("POST", f"/v1/sessions/{session}/{path}", content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content_read = answer.read()
            elapsed.append(time.perf_counter() - started)
            if answer.status != 200:
                raise PeerError(f"imprint refused a request of {model['id']}: {content_read.decode()[:200]}")
    return elapsed


def _policy_request(model: Result, rng: random.Random, number: int) -> tuple[str, Result]:
    """Return the route and the body of a request: an act with the reward of the last one, or an example to learn."""
    body: Result = {"model": model["id"]}
    reward = {"reward": float(number % 3 == 0)} if number else {}
    if not model["learner"]:
        return "act", body | {"observation": [rng.gauss() for _ in range(model["policy"]["observation"])]} | reward
    row, kind = {f"column {i}": rng.gauss() for i in range(COLUMNS)}, number % 3
    if model["learner"]["task"] == "bandit":
        return "act", body | {"context": row, "actions": ["a", "b", "c"]} | reward
    truth = {"label": "abc"[kind]} if model["learner"]["task"] == "labels" else {"target": float(kind)}
    return "observe", body | {"features": row} | truth


async def interruption(testbed: Testbed) -> Result:
    """Measure the inter-token latencies of running streams while a long prompt arrives."""
    sizes = testbed.sizes
    long_prompt = min(sizes.long_prompt, testbed.context - 1)
    samples: dict[str, dict[str, list[float]]] = {}

    async def measure_once(arm: Arm, number: int) -> dict[str, float]:
        running, prompt = await _interrupt(testbed, arm, number, long_prompt)
        first_times = [timing.token_times[0] for timing in running if timing.token_times]
        start = max(first_times, default=prompt.sent_at - sizes.quiet_s)
        quiet = gaps_between(running, start, prompt.sent_at)
        busy = gaps_between(running, prompt.sent_at, prompt.sent_at + prompt.ttft_s)
        arm_samples = samples.setdefault(arm.name, {"quiet": [], "busy": []})
        arm_samples["quiet"] += quiet
        arm_samples["busy"] += busy
        return {
            "p99_s": percentiles(busy)["p99"],
            "p50_s": percentiles(busy)["p50"],
            "first_s": prompt.ttft_s,
            "quiet_p50_s": percentiles(quiet)["p50"],
        }

    arms = testbed.arms("off", "both", peers=("llama.cpp", "vllm"))
    await testbed.warm_up(arms, NUM_RUNNING_STREAMS + 1)
    values = await testbed.rounds(arms, measure_once)
    found = {arm: {name: percentiles(times) for name, times in by_name.items()} for arm, by_name in samples.items()}
    title = (
        f"{NUM_RUNNING_STREAMS} running streams while a prompt of {long_prompt} tokens comes in:"
        " from one token to the next"
    )
    return {"title": title, "arms": values, "percentiles": found, "samples": samples}


async def _interrupt(
    testbed: Testbed, arm: Arm, number: int, long_prompt: int
) -> tuple[list[StreamTiming], StreamTiming]:
    """Send a long prompt while streams run, and return the timings of the streams and of the prompt."""
    sizes, texts = testbed.sizes, testbed.texts
    tokens = min(sizes.running, testbed.context - 32)
    running = [StreamTiming() for _ in range(NUM_RUNNING_STREAMS)]
    tasks = [
        asyncio.create_task(arm.generate(texts.cut(f"run/{number}/{i}", 16), tokens, stream=i, timing=timing))
        for i, timing in enumerate(running)
    ]
    try:
        await _all_streaming(running, tasks)
        await asyncio.sleep(sizes.quiet_s)
        prompt = await arm.generate(texts.cut(f"long/{number}", long_prompt), 1, stream=NUM_RUNNING_STREAMS)
        await asyncio.sleep(sizes.quiet_s / 2)  # the gaps that the prompt causes end after the prompt
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, Exception):
            raise outcome
    return running, prompt


def gaps_between(timings: list[StreamTiming], start: float, end: float) -> list[float]:
    """Return the inter-token latencies, in seconds, that overlap [start, end]. The list is never empty.

    A stream without such a latency counts with the whole interval.
    """
    gaps = []
    for timing in timings:
        pairs = zip(timing.token_times, timing.token_times[1:], strict=False)
        overlapping = [later - earlier for earlier, later in pairs if later > start and earlier < end]
        gaps += overlapping or [end - start]
    return gaps


async def _all_streaming(running: list[StreamTiming], tasks: list[asyncio.Task[StreamTiming]]) -> None:
    """Wait until each stream has a token, or one stream has ended. Raises the error of an ended stream."""
    while not all(timing.token_times for timing in running) and not any(task.done() for task in tasks):
        await asyncio.sleep(POLL_S)
    for task in tasks:
        if task.done():
            with suppress(asyncio.CancelledError):
                task.result()


async def _metric(testbed: Testbed, name: str) -> float:
    """Return the value of a metric of this server, or 0."""
    lines = (await testbed.imprint.http.get("/metrics")).text.splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith(f"imprint_{name} ")), 0.0)


async def _mean(testbed: Testbed, name: str) -> float:
    """Return the mean of a histogram since the start of the server."""
    return await _metric(testbed, f"{name}_sum") / max(1.0, await _metric(testbed, f"{name}_count"))
