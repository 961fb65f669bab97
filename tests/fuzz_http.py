"""The HTTP interface against its own description: Schemathesis sends what /openapi.json allows and forbids.

    .venv/bin/python -m tests.fuzz_http --cases 20000

Two tenants with quotas send to one server of a tiny base and two tiny policies at once: examples, bounds, random
requests and sequences of requests. Each answer must be one that the description knows, in time, and the server must take what the
description allows and refuse what the description forbids.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure
from schemathesis.core.parameters import ParameterLocation
from schemathesis.core.transport import Response
from schemathesis.engine import Status, events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder

from service.tenants import OPERATOR, new_key
from tests.conftest import Server
from tests.tiny import TEXT, build_tiny_base, build_tiny_policies

# The second tenant meets its limits again and again.
QUOTAS = {
    "acme": "sessions=500 bytes=50000000 tokens_per_minute=1000000 requests=8",
    "bo": "sessions=12 bytes=200000 tokens_per_minute=2000 requests=2",
}
TIMEOUT_S = 10.0
OBSERVATION = {"chooser": 8, "namer": 6}  # numbers that the tiny policies take

# Refusals of requests that the description allows, because no JSON Schema can state the rule.
UNSTATED = {
    "a limit of the served model": r"exceeds the context|token id of the vocabulary|\d+ tokens|at least one token",
    "two fields must be equal": r"'best_of' must equal|Give 'max_completion_tokens' or 'max_tokens'",
    "a field that needs a session in body, header or `user`": r"needs a session; name one|'user' must match",
    "learning needs a single completion": r"needs a single completion|so 'n' must be 1",
    "the task of the session's model": r"'model' is required to begin|'model' must be a policy"
    r"|'(reward|label)' must be in|must hold \d+ numbers",
    "the body is a file of another format": r"is no export of a session",
}


@dataclass
class Report:
    """The outcome of one tenant's requests.

    Attributes:
        statuses: number of requests by operation and status.
        refused: number of refusals by their reason in `UNSTATED`.
        faults: number of violations by their description.
        slowest_s: seconds of the slowest answer.
    """

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    @property
    def cases(self) -> int:
        return self.statuses.total()

    def add(self, other: Report) -> None:
        self.statuses += other.statuses
        self.refused += other.refused
        self.faults += other.faults
        self.slowest_s = max(self.slowest_s, other.slowest_s)


@contextmanager
def fuzzed_server(folder: Path) -> Iterator[tuple[Server, dict[str, str]]]:
    """Run a server with a key for each tenant of `QUOTAS` and for the operator; yield the server and the keys."""
    base = build_tiny_base(folder / "tiny")
    policies = ",".join(map(str, build_tiny_policies(folder / "policies")))
    keys = {name: new_key(name) for name in (*QUOTAS, OPERATOR)}
    file = folder / "keys"
    file.write_text("".join(f"{line} {QUOTAS.get(name, '')}\n" for name, (_, line) in keys.items()))
    server = Server(str(base), folder / "data", api_keys_file=file, policies=policies).start()
    try:
        yield server, {name: key for name, (key, _) in keys.items()}
    finally:
        assert server.stop() == 0, server.log.read_text()


def fuzz(url: str, keys: dict[str, str], tenant: str, seed: int, examples: int, phases: Sequence[str]) -> Report:
    """Send one round of requests as `tenant`.

    Args:
        url: the server.
        keys: the keys by tenant.
        tenant: the tenant whose key is sent.
        seed: equal seeds send equal requests.
        examples: number of random requests for each operation, and of sequences.
        phases: of Schemathesis's "examples", "coverage", "fuzzing" and "stateful".
    """
    schema = schemathesis.openapi.from_url(
        f"{url}/openapi.json", config=configuration(keys, tenant, seed, examples, phases)
    )
    exported = export_of(url, keys[tenant], f"{tenant}-text")
    report = Report()

    @schema.hook
    def map_case(context: Any, case: Any) -> Any:
        return sensible(case, tenant, exported)

    @schema.hook
    def filter_failure(context: Any, failure: Failure, case: Any, response: Response) -> bool:
        reason = unstated(failure, response)
        report.refused.update([reason] if reason else [])
        return reason is None

    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            count(report, event.recorder)
        elif isinstance(event, events.NonFatalError | events.FatalError):
            error = event.value if isinstance(event, events.NonFatalError) else event.exception
            report.faults[f"{getattr(event, 'label', '')}: {type(error).__name__}: {error}"] += 1
    return report


def configuration(
    keys: dict[str, str], tenant: str, seed: int, examples: int, phases: Sequence[str]
) -> SchemathesisConfig:
    """Return the settings of Schemathesis."""
    sessions = [f"{tenant}-{name}" for name in ("text", "kept", "act", "label", "a", "b")]
    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "continue-on-failure": True,
            "request-timeout": TIMEOUT_S,
            "auth": {"openapi": {"tenant": {"bearer": keys[tenant]}, "operator": {"bearer": keys[OPERATOR]}}},
            "generation": {"max-examples": examples, "database": "none", "no-shrink": True},
            "phases": {name: {"enabled": name in phases} for name in ("examples", "coverage", "fuzzing", "stateful")},
            "dictionaries": {"sessions": {"values": sessions}},
            "parameters": {"path.id": {"dictionary": "sessions", "probability": 0.7}},
            "checks": {
                # 412, 413, 422 and 507 depend on the state of the session and on the server's settings.
                "positive_data_acceptance": {
                    "expected-statuses": ["2xx", "401", "404", "409", "412", "413", "422", "429", "507"]
                },
                "negative_data_rejection": {"expected-statuses": ["4xx"]},
            },
        }
    )
    return config


def export_of(url: str, key: str, session: str) -> bytes:
    """Return an export of a session that has learned."""
    with httpx.Client(base_url=f"{url}/v1/sessions/", headers={"Authorization": f"Bearer {key}"}) as client:
        client.put(session, json={"keep_text": True})
        client.post(f"{session}/observe", json={"text": TEXT[:200]})
        return client.get(f"{session}/export").raise_for_status().content


def sensible(case: Any, tenant: str, exported: bytes) -> Any:
    """Return a case with what random values never hit: names of models, observations of their length, a file."""
    draw = zlib.crc32(repr((case.path_parameters, case.body)).encode())
    path, body = case.operation.path, case.body
    if draw % 4 and not case.meta.is_negative_at(ParameterLocation.HEADER):  # these make most requests a 412 or a 422
        case.headers.pop("If-Match", None)
        case.headers.pop("Idempotency-Key", None)
    if not case.meta.generation.mode.is_positive:
        return case
    if path.endswith("/import") and draw % 2:
        case.body = exported
    if not isinstance(body, dict) or draw % 8 == 0:
        return case
    if "completions" in path and isinstance(body.get("model"), str):
        case.body = body | {"model": "tiny"}
    for name in ("observation", "features"):
        numbers = body.get(name)
        if isinstance(numbers, list) and numbers and all(type(number) in (int, float) for number in numbers):
            policy, kind = ("chooser", "act") if name == "observation" else ("namer", "label")
            size = OBSERVATION[policy]
            case.body = body | {"model": policy, name: (numbers * size)[:size]}
            case.path_parameters = case.path_parameters | {"id": f"{tenant}-{kind}"}
    return case


def unstated(failure: Failure, response: Response) -> str | None:
    """Return the reason in `UNSTATED` for a refusal of what the description allows, or None."""
    if type(failure).__name__ != "RejectedPositiveData" or response.status_code != 400:
        return None
    message = str(response.json()["error"]["message"])
    return next((reason for reason, pattern in UNSTATED.items() if re.search(pattern, message)), None)


def count(report: Report, recorder: ScenarioRecorder) -> None:
    """Add the requests and the violations of one scenario to the report."""
    for case_id, interaction in recorder.interactions.items():
        operation = recorder.cases[case_id].value.operation.label if case_id in recorder.cases else recorder.label
        response = interaction.response
        report.statuses[operation, 0 if response is None else response.status_code] += 1
        if response is None:
            report.faults[f"{operation}: no answer within {TIMEOUT_S:g} s"] += 1
        else:
            report.slowest_s = max(report.slowest_s, response.elapsed)
        for check in recorder.checks.get(case_id, ()):
            if check.status is Status.FAILURE and check.failure_info is not None:
                failure = check.failure_info.failure
                got = "" if response is None else response.content[:400].decode(errors="replace")
                sent = check.failure_info.code_sample[:600]
                report.faults[f"{operation}: {failure.title}\n  {failure.message[:600]}\n  {sent}\n  {got}"] += 1


def fuzz_until(url: str, keys: dict[str, str], tenant: str, seed: int, cases: int) -> Report:
    """Send rounds of requests as `tenant` until there were `cases`; print the progress."""
    report, started = Report(), time.monotonic()
    while report.cases < cases:
        report.add(fuzz(url, keys, tenant, seed, 40, ("examples", "coverage", "fuzzing", "stateful")))
        seed += 1
        took = time.monotonic() - started
        print(f"{tenant}: {report.cases} cases, {len(report.faults)} faults, {took:.0f} s", file=sys.stderr, flush=True)
    return report


def fuzz_as_all(url: str, keys: dict[str, str], seed: int, cases: int) -> dict[str, Report]:
    """Send `cases` requests, the tenants at once, each from a process of its own."""
    with ProcessPoolExecutor(len(QUOTAS), multiprocessing.get_context("spawn")) as pool:
        runs = {tenant: pool.submit(fuzz_until, url, keys, tenant, seed, cases // len(QUOTAS)) for tenant in QUOTAS}
        return {tenant: run.result() for tenant, run in runs.items()}


def summary(reports: dict[str, Report]) -> str:
    """Return the figures as a table, and the violations below it."""
    rows = [
        "| tenant | cases | 2xx | 4xx | of them 429 | 5xx | slowest | faults |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    faults: Counter[str] = Counter()
    for tenant, report in reports.items():
        by_status: Counter[int] = Counter()
        for (_, status), number in report.statuses.items():
            by_status[status] += number
            by_status[status // 100] += number
        figures = [report.cases, by_status[2], by_status[4], by_status[429], by_status[5]]
        cells = [tenant, *(f"{figure:,}" for figure in figures), f"{report.slowest_s:.1f} s", len(report.faults)]
        rows.append(f"| {' | '.join(map(str, cells))} |")
        faults += report.faults
    return "\n".join([*rows, "", *(f"{number} × {fault}" for fault, number in faults.most_common())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, fuzzed_server(Path(folder)) as (server, keys):
        reports = fuzz_as_all(server.url, keys, options.seed, options.cases)
    print(summary(reports))
    return int(any(report.faults for report in reports.values()))


if __name__ == "__main__":
    sys.exit(main())
