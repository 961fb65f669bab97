"""The HTTP interface against its own description: Schemathesis sends what /openapi.json allows and forbids.

    .venv/bin/python -m tests.fuzz_http --cases 20000

Two tenants with quotas send to one server of a tiny base and two tiny policies at once: examples, bounds, random
requests and sequences of requests. Each answer must be one that the description knows, and in time; the server must
take what the description allows and refuse what the description forbids.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response
from schemathesis.engine import Status, events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder
from schemathesis.generation.meta import negated_parameters

from model.base.config import tiny_config
from service.tenants import OPERATOR, new_key
from tests.conftest import Server
from tests.model.tiny_encoder import save_encoder
from tests.tiny import TEXT, build_tiny_base, build_tiny_policies

# The second tenant meets its limits again and again.
QUOTAS = {
    "acme": "sessions=500 bytes=50000000 tokens_per_minute=1000000 requests=8",
    "bo": "sessions=12 bytes=200000 tokens_per_minute=2000 requests=2",
}
TIMEOUT_S = 30.0  # what takes 1 s at most on a quiet machine
EXAMPLES = 20  # random requests for each operation in a round
PHASES = ("examples", "coverage", "fuzzing", "stateful")
OBSERVATION = {"chooser": 8, "namer": 6}  # numbers that the tiny policies take
LEARNERS = ("labels", "regression", "bandit")

# Refusals of requests that the description allows, because no JSON Schema can state the rule.
UNSTATED = {
    "a limit of the served model": r"exceeds the context|token id of the vocabulary|\d+ tokens|at least one token",
    "two fields must agree": r"'best_of' must|Give 'max_completion_tokens' or 'max_tokens'|'min_tokens' may be",
    "the vectors of the server's encoder": r"'dimensions' must be",
    "a grammar that is valid": r"is no grammar|has no form that|not two of them|does not go with",
    "tools that can be called, and their results": r"'tool_choice' (must|needs)|goes with 'tools'|must be the id of"
    r"|one tool of a name|characters as JSON|'tool_choice.name' is|only messages of the|must be the result of a call",
    "a response that is kept": r"Previous response with id|no response that is kept has",
    "a name that looks like a misspelt field": r"did you mean",
    "a gap that the base can fill": r"'suffix' needs|not allowed with 'suffix'",
    "a last message that can be continued": r"'continue_final_message' (needs|is only)|cannot be continued",
    "a field that needs a session in body, header or the model's name": r"needs a session; name one",
    "learning needs a single completion": r"needs a single completion|so '(n|best_of)' must be 1",
    "the past of the session": r"is of an action never taken",
    "the task of the session's model": r"'model' is required to begin|'model' must be a policy"
    r"|'(reward|label)' must be in|must hold \d+ numbers|is one of '\w+', which takes",
    "what fits a session's schema": r"a name of 1 to 64 bytes|is a numeric column|would be (column|one more)"
    r"|is not for '(labels|regression)'|is an option of sessions of 'bandit'|takes 'actions'|is required for '"
    r"|has fixed sizes|must be distinct, got|must name (actions|an allowed)",
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


@dataclass(frozen=True)
class Target:
    """A running server.

    Attributes:
        url: its address.
        keys: the keys by tenant.
        exported: an export of a session.
    """

    url: str
    keys: dict[str, str]
    exported: bytes


@contextmanager
def fuzzed_server(folder: Path) -> Iterator[Target]:
    """Run a server with a key for each tenant of `QUOTAS` and for the operator."""
    base = build_tiny_base(folder / "tiny", tiny_config(max_context=128))
    policies = ",".join(map(str, build_tiny_policies(folder / "policies")))
    keys = {name: new_key(name) for name in (*QUOTAS, OPERATOR)}
    file = folder / "keys"
    file.write_text("".join(f"{line} {QUOTAS.get(name, '')}\n" for name, (_, line) in keys.items()))
    encoder = save_encoder(folder / "encoder", sorted(set(TEXT.split())))
    settings = {"api_keys_file": file, "policies": policies, "recall_encoder": encoder}
    server = Server(str(base), folder / "data", **settings).start()
    try:
        yield Target(server.url, {name: key for name, (key, _) in keys.items()}, export_of(server.url, keys["acme"][0]))
    finally:
        assert server.stop() == 0, server.log.read_text()


def fuzz(target: Target, tenant: str, seed: int, examples: int, phases: Sequence[str]) -> Report:
    """Send one round of requests as `tenant`.

    Args:
        target: the server.
        tenant: the tenant whose key is sent.
        seed: equal seeds send equal requests.
        examples: number of random requests for each operation, and of sequences.
        phases: of `PHASES`.
    """
    schema = schemathesis.openapi.from_url(
        f"{target.url}/openapi.json", config=configuration(target.keys, tenant, seed, examples, phases)
    )
    report, known = Report(), Known(tenant, target.exported, Random(seed))
    with hooks(known, report):
        for event in from_schema(schema).execute():
            if isinstance(event, events.ScenarioFinished):
                count(report, event.recorder)
            elif isinstance(event, events.NonFatalError | events.FatalError):
                error = event.value if isinstance(event, events.NonFatalError) else event.exception
                report.faults[f"{getattr(event, 'label', '')}: {type(error).__name__}: {error}"] += 1
    return report


@contextmanager
def hooks(known: Known, report: Report) -> Iterator[None]:
    """Let `known` change requests, and the report count the refusals that are not faults."""

    def before_call(context: Any, case: Any, kwargs: Any) -> None:
        known.improve(case)

    def after_call(context: Any, case: Any, response: Response) -> None:
        known.learn(case, response)

    def filter_failure(context: Any, failure: Failure, case: Any, response: Response) -> bool:
        reason = unstated(failure, response)
        report.refused.update([reason] if reason else [])
        return reason is None

    registered = (before_call, after_call, filter_failure)
    for hook in registered:
        schemathesis.hook(hook)  # Schemathesis has these for all schemas of a process only
    try:
        yield
    finally:
        for hook in registered:
            schemathesis.hooks.unregister(hook)


def configuration(
    keys: dict[str, str], tenant: str, seed: int, examples: int, phases: Sequence[str]
) -> SchemathesisConfig:
    """Return the settings of Schemathesis."""
    sessions = [f"{tenant}-{name}" for name in ("text", "kept", "a", "b", "chooser", "namer", *LEARNERS)]
    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "continue-on-failure": True,
            "request-timeout": TIMEOUT_S,
            "auth": {
                "openapi": {
                    "tenant": {"bearer": keys[tenant]},
                    "x-api-key": {"api_key": keys[tenant]},
                    "operator": {"bearer": keys[OPERATOR]},
                }
            },
            "generation": {"max-examples": examples, "database": "none", "no-shrink": True},
            "phases": {name: {"enabled": name in phases} for name in PHASES},
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


def export_of(url: str, key: str) -> bytes:
    """Return an export of a session that has learned."""
    with httpx.Client(base_url=f"{url}/v1/sessions/", headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        client.post("exported/observe", json={"text": TEXT[:200]})
        return client.get("exported/export").raise_for_status().content


class Known:
    """Values that random requests never hit: names of models, a file, and names that earlier answers gave.

    Args:
        tenant: the sender.
        exported: an export of a session.
        random: decides which requests are changed.
    """

    def __init__(self, tenant: str, exported: bytes, random: Random) -> None:
        self._tenant = tenant
        self._exported = exported
        self._random = random
        self._versions: dict[str, int] = {}
        self._actions: list[tuple[str, str]] = []
        self._completions: list[tuple[str, str]] = []

    def learn(self, case: Any, response: Response) -> None:
        """Take the version of a session, the name of an action or the name of a completion from an answer."""
        if response.status_code not in (200, 201):
            return
        if etag := response.headers.get("etag"):
            self._versions[case.path_parameters["id"]] = int(etag[0].strip('"v'))
        if case.operation.path.endswith("/act"):
            actions = response.json().get("data", [response.json()])
            self._actions += [(case.path_parameters["id"], each["action_id"]) for each in actions if each["action_id"]]
        if "completions" in case.operation.path and isinstance(case.body, dict) and case.body.get("session"):
            found = re.search(r'"id":"([a-z]+-[0-9a-f]{32})"', response.text)
            self._completions += [(case.body["session"], found[1])] if found else []

    def improve(self, case: Any) -> None:
        """Change a request so that the server has work with it; leave some, and all that are to be refused."""
        negated = {name for name, _ in negated_parameters(case.meta)}
        for header in ("If-Match", "Idempotency-Key"):
            if header not in negated and self._random.random() < 0.8:  # most requests would be a 412 or a 422
                case.headers.pop(header, None)
        if not case.meta.generation.mode.is_positive:
            return
        prompt = case.body.get("prompt") if isinstance(case.body, dict) else None
        if isinstance(prompt, list) and len(prompt) > 8:  # 8 completions of each of 128 prompts take 2.5 s of CPU time
            case.body = {name: value for name, value in case.body.items() if name not in ("n", "best_of")}
        if self._random.random() < 0.8:
            self._improve_body(case, case.operation.path.rpartition("/")[2])

    def _improve_body(self, case: Any, route: str) -> None:
        random, session = self._random, case.path_parameters.get("id")
        match route:
            case "import":
                case.body = self._exported
            case "completions" | "chat" | "generate" | "messages":
                case.body |= {"model": "tiny"} | ({"session": f"{self._tenant}-kept"} if random.random() < 0.3 else {})
            case "embeddings" | "count_tokens" | "show":
                case.body |= {"model": "tiny"}
            case "act" if case.body.get("observation"):
                self._give_policy(case, "chooser", "observation")
            case "act":
                self._give_learner(case, "bandit")
            case "predict":
                self._give_learner(case, random.choice(LEARNERS[:2]))
            case "observe" if case.body.get("features") is not None or case.body.get("examples"):
                first = (case.body.get("examples") or [case.body])[0]
                self._give_learner(case, "regression" if first.get("label") is None else "labels")
            case "rollback" | "unlearn" if session in self._versions:
                case.body = {"version": random.randint(0, self._versions[session])}
            case "diff" if session in self._versions:
                ends = sorted(random.randint(0, self._versions[session]) for _ in range(2))
                case.query = dict(zip(("from", "to"), ends, strict=True))
            case "fork":
                case.body = {"id": f"{self._tenant}-fork-{random.randrange(50)}"}
            case "feedback" if self._actions and "reward" in case.body:
                case.path_parameters["id"], name = random.choice(self._actions)
                case.body = {"action_id": name, "reward": random.random()}
            case "feedback" if self._completions and "text" in case.body:
                case.path_parameters["id"], name = random.choice(self._completions)
                case.body |= {"completion_id": name}

    def _give_learner(self, case: Any, learner: str) -> None:
        case.body |= {"model": learner}
        case.path_parameters["id"] = f"{self._tenant}-{learner}-{self._random.randrange(20)}"

    def _give_policy(self, case: Any, policy: str, name: str) -> None:
        size = OBSERVATION[policy]
        case.body |= {"model": policy, name: (case.body[name] * size)[:size]}
        case.path_parameters["id"] = f"{self._tenant}-{policy}"


def unstated(failure: Failure, response: Response) -> str | None:
    """Return the reason in `UNSTATED` for a refusal of what the description allows, or None."""
    if type(failure).__name__ != "RejectedPositiveData" or response.status_code != 400:
        return None
    error = response.json()["error"]
    message = str(error if isinstance(error, str) else error["message"])
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


def fuzz_until(target: Target, tenant: str, seed: int, cases: int) -> Report:
    """Send rounds of requests as `tenant` until there were `cases`; print the progress."""
    report, started = Report(), time.monotonic()
    while report.cases < cases:
        phases = PHASES if not report.cases else PHASES[2:]  # the others send the same requests in each round
        report.add(fuzz(target, tenant, seed, EXAMPLES, phases))
        seed += 1
        print(f"{time.monotonic() - started:.0f} s", summary({tenant: report}), sep="\n", file=sys.stderr, flush=True)
    return report


def fuzz_as_all(target: Target, seed: int, cases: int) -> dict[str, Report]:
    """Send `cases` requests, the tenants at once, each from a process of its own."""
    share = cases // len(QUOTAS)
    with ProcessPoolExecutor(len(QUOTAS), multiprocessing.get_context("spawn")) as pool:
        runs = {tenant: pool.submit(fuzz_until, target, tenant, seed, share) for tenant in QUOTAS}
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
    with tempfile.TemporaryDirectory() as folder, fuzzed_server(Path(folder)) as target:
        reports = fuzz_as_all(target, options.seed, options.cases)
    print(summary(reports))
    return int(any(report.faults for report in reports.values()))


if __name__ == "__main__":
    sys.exit(main())
