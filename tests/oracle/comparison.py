"""The comparison of what the servers have in the end with what the acknowledged turns make of the model alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from service.store.redis.codec import decode
from service.turns.prompts import TextPrompt
from tests.clients import SessionHistory, Turn
from tests.live import rows_of
from tests.oracle.result import Result
from tests.replay import ReferenceModel, Replay, Rows, one_thread

Json = dict[str, Any]


@dataclass
class Evidence:
    """The records of a run: the clients' histories, and each session's log (oldest first) and stored bytes."""

    histories: list[SessionHistory]
    logs: dict[str, list[Json]]
    content: dict[str, dict[str, dict[bytes, bytes]]]


def verify(evidence: Evidence, model: ReferenceModel, result: Result, step: Callable[[], None] = lambda: None) -> None:
    """Compare every session with the reference, and record the differences in `result`; call `step` after each."""
    with one_thread():
        for history in evidence.histories:
            turns = _turns(history, evidence.logs[history.name], result)
            result.sessions += 1
            result.versions += len(turns)
            differences = _differences(history, turns, evidence.content[history.name], model)
            for difference in differences:
                result.add_wrong(f"{history.name}: {difference}")
            step()


def _turns(history: SessionHistory, log: list[Json], result: Result) -> list[Turn]:
    """Return the turns that the session's log names, and count those that are lost or doubled."""
    logged = [history.turns[int(entry["request_id"].split("/")[1])] for entry in log]
    times = Counter(turn.number for turn in logged)
    for number in (number for number, count in times.items() if count > 1):
        named = [(entry["version"], entry["request_id"]) for entry in log if f"/{number}/" in entry["request_id"]]
        result.add_doubled(f"{history.turns[number].describe()}, in the log as {named}")
    if [entry["version"] for entry in log] != list(range(1, len(log) + 1)):
        result.add_wrong(f"{history.name}: the log has other versions than 1..{len(log)}")
    for turn in history.turns:
        if turn.version is not None:
            if turn.version > len(logged) or logged[turn.version - 1] is not turn:
                result.add_lost(f"{history.name}: {turn.describe()}, not in the log at its version")
        elif turn.acknowledged and times[turn.number]:
            result.add_wrong(
                f"{history.name}: turn {turn.number} was acknowledged without a change, but made a version"
            )
        elif not turn.acknowledged:
            result.counts["hang-ups that landed"] += bool(times[turn.number])
    return logged


def _differences(
    history: SessionHistory, turns: list[Turn], content: dict[str, dict[bytes, bytes]], model: ReferenceModel
) -> Iterator[str]:
    """Yield the differences between a stored session and what the model alone makes of its turns."""
    replay = Replay(model)
    for turn in turns:
        output = _replay_turn(replay, turn)
        if output is not None and turn.acknowledged and output != turn.output:
            yield f"turn {turn.number} was answered {turn.output!r}, alone {output!r}"
    version = len(replay.versions) - 1
    if content:
        meta = decode(history.name, content["meta"])
        if meta.version != version:
            yield f"version {meta.version}, alone {version}"
        yield from replay.versions[-1].diff(_rows(content), meta)[:3]
    elif version:
        yield f"not there, alone at version {version}"
    replay.end()


def _replay_turn(replay: Replay, turn: Turn) -> str | None:
    if turn.path.endswith("/rollback"):
        replay.rollback(turn.body["version"])
    elif turn.path.endswith("/observe"):
        replay.observe(TextPrompt(turn.body["text"]))
    else:
        return replay.complete(turn.body)
    return None


def _rows(content: dict[str, dict[bytes, bytes]]) -> Rows:
    return {key.removeprefix("rows:"): rows_of(pages) for key, pages in content.items() if key.startswith("rows:")}
