"""The outcome of a run, and the table of several outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Result:
    """The outcome of the faults in one deployment.

    Attributes:
        deployment: name of the deployment.
        injected: number of injected faults, by kind.
        counts: counters of the clients.
        lost: number of acknowledged turns that are missing in their session.
        doubled: number of turns that are more than once in their session.
        wrong: number of other contradictions: answers, rows, versions, counters, a session that cannot be used.
        findings: one sentence for each of these.
        sessions: number of sessions compared.
        versions: number of versions of these sessions.
        seconds: duration of the faults, and of the comparison.
    """

    deployment: str
    injected: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    findings: list[str] = field(default_factory=list)
    sessions: int = 0
    versions: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def passed(self) -> bool:
        return not (self.lost or self.doubled or self.wrong)

    def add_lost(self, finding: str) -> None:
        self.lost += 1
        self.findings.append(f"{self.deployment}: lost: {finding}")

    def add_doubled(self, finding: str) -> None:
        self.doubled += 1
        self.findings.append(f"{self.deployment}: doubled: {finding}")

    def add_wrong(self, finding: str) -> None:
        self.wrong += 1
        self.findings.append(f"{self.deployment}: wrong: {finding}")


COLUMNS = (
    "deployment",
    "faults",
    "turns acknowledged",
    "sent again",
    "replays",
    "hang-ups (committed)",
    "refused: damaged",
    "commits compared",
    "lost",
    "doubled",
    "wrong",
    "minutes",
)


def markdown(results: Sequence[Result]) -> str:
    """Return a table with a row for each deployment and a last row for all of them."""
    rows = [_cells(result) for result in results]
    total = Result("all")
    for result in results:
        total.injected += result.injected
        total.counts += result.counts
        total.lost, total.doubled = total.lost + result.lost, total.doubled + result.doubled
        total.wrong, total.versions = total.wrong + result.wrong, total.versions + result.versions
        total.sessions += result.sessions
        total.seconds = (total.seconds[0] + result.seconds[0], total.seconds[1] + result.seconds[1])
    summary = _cells(total)
    summary[1] = f"{total.injected.total():,}"
    table = [list(COLUMNS), ["---"] * len(COLUMNS), *rows, summary]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def _cells(result: Result) -> list[str]:
    counts = result.counts
    return [
        result.deployment,
        ", ".join(f"{count} × {kind}" for kind, count in result.injected.items()),
        f"{counts['acknowledged']:,}",
        f"{counts['retries']:,}",
        f"{counts['replays']:,}",
        f"{counts['hang-ups']:,} ({counts['hang-ups that landed']:,})",
        f"{counts['refused damaged']:,}",
        f"{result.versions:,} in {result.sessions:,} sessions",
        *(f"**{count}**" for count in (result.lost, result.doubled, result.wrong)),
        f"{result.seconds[0] / 60:.1f}, and {result.seconds[1] / 60:.1f} to compare",
    ]
