"""One run: the clients teach while the faults of a deployment are injected, then every session is compared."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from tests.clients import ContractViolation
from tests.live import Client, assert_success, connect_redis, stored, wait_until
from tests.oracle.comparison import Evidence, Json, verify
from tests.oracle.deployment import Deployment, Fault, Run
from tests.oracle.deployments import DEPLOYMENTS
from tests.oracle.eviction import check_losses, log_of, lost_content
from tests.oracle.result import Result
from tests.replay import ReferenceModel

PAUSE_S = 1.0  # mean pause of a client between two turns
LAST_TURN_TIMEOUT_S = 240.0


def run_deployment(name: str, faults: Counter[str], base: Path, seed: int) -> Result:
    """Set up a deployment in a new folder beside the base, and run its faults."""
    folder = base.parent / name
    folder.mkdir()
    with DEPLOYMENTS[name](folder, str(base)) as deployment:
        return run_faults(deployment, faults, base, seed=seed)


def run_faults(deployment: Deployment, faults: Counter[str], base: Path, *, seed: int) -> Result:
    """Inject so many faults of each kind while clients teach, then compare every session with the reference."""
    result, began = Result(deployment.name), time.monotonic()
    evidence = collect_evidence(deployment, faults, base.name, result, seed=seed)
    ended = time.monotonic()
    step = progress(f"{deployment.name}: sessions compared", len(evidence.histories))
    verify(evidence, ReferenceModel(base), result, step)
    result.seconds = (ended - began, time.monotonic() - ended)
    for finding in result.findings:
        print(finding, file=sys.stderr, flush=True)
    return result


def collect_evidence(
    deployment: Deployment, faults: Counter[str], model: str, result: Result, *, seed: int
) -> Evidence:
    """Run the clients while faults are injected, and read what the servers then have."""
    run = Run(deployment, model, result, random.Random(f"{seed}/{deployment.name}"))
    asyncio.run(_run_clients(run, faults, seed))
    for url in deployment.urls:
        with Client(url) as client:
            wait_until(client.idle)
    check_losses(run)
    histories = [history for client in run.session_clients for history in client.histories] + run.histories
    evidence = Evidence(histories, {}, {})
    with Client(deployment.urls[0]) as client:
        for history in histories:
            store = deployment.store_of(history.name)
            with connect_redis(store) as redis:
                whole = history.lost_key is None
                evidence.logs[history.name] = _log(client, history.name) if whole else log_of(redis, history)
                evidence.content[history.name] = stored(store, history.name) | lost_content(redis, history)
    return evidence


async def _run_clients(run: Run, faults: Counter[str], seed: int) -> None:
    """Run the clients until all faults are injected and every turn is acknowledged."""
    finished = asyncio.Event()
    run.session_clients = [run.new_client(f"s{seed}-{number}") for number in range(run.deployment.num_clients)]
    tasks = [asyncio.create_task(client.run(finished.is_set, PAUSE_S)) for client in run.session_clients]
    step = progress(f"{run.deployment.name}: faults", faults.total())
    await asyncio.gather(*(_inject(run, lane, faults, step) for lane in run.deployment.lanes))
    finished.set()
    for client, task in zip(run.session_clients, tasks, strict=True):
        try:
            await asyncio.wait_for(task, LAST_TURN_TIMEOUT_S)
        except (ContractViolation, TimeoutError) as error:
            run.result.add_wrong(f"{client.history.name}: {error!r}")


async def _inject(run: Run, lane: Sequence[Fault], faults: Counter[str], step: Callable[[], None]) -> None:
    """Inject the faults of a lane one after the other, in random order."""
    order = [fault for fault in lane for _ in range(faults[fault.kind])]
    random.Random(f"{run.deployment.name}/{len(order)}").shuffle(order)
    for fault in order:
        try:
            await fault.inject(run)
        except (AssertionError, OSError, TimeoutError) as error:  # a ContractViolation is an AssertionError
            run.result.add_wrong(f"{fault.kind}: {error!r}")
        run.result.injected[fault.kind] += 1
        step()
    for fault in lane:
        await fault.settle(run)


def progress(label: str, steps: int) -> Callable[[], None]:
    """Return a function to call after each step; it tells now and then how far the work is."""
    done, began = count(1), time.monotonic()

    def step() -> None:
        number = next(done)
        if number == steps or number % max(1, steps // 20) == 0:
            print(f"{label} {number} of {steps} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    return step


def _log(client: Client, session: str) -> list[Json]:
    """Return the whole log of a session, oldest first."""
    entries: list[Json] = []
    before: int | None = None
    while True:
        params = {"limit": 100} | ({} if before is None else {"before": before})
        response = client.http.get(f"/v1/sessions/{session}/log", params=params)
        if response.status_code == 404:
            return []
        page = assert_success(response)
        entries += page["data"]
        before = page["next"]
        if before is None:
            return entries[::-1]
