"""`imprint evaluate-log`."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.markup import escape
from rich.table import Table

from service.cli.console import connect, out
from service.cli.options import AsJson, Url, split_commas
from service.client import Client
from service.client.transport import DEFAULT_URL
from service.errors import CommandError, NotFound


def evaluate_log(
    log: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="JSON lines with `context`, `action`, `reward` and `propensity`; `actions` and `target` if known.",
        ),
    ],
    policy: Annotated[
        str,
        typer.Option(help="Policies, separated by commas: uniform, always:ACTION, target (the lines' probabilities)."),
    ] = "",
    session: Annotated[
        str | None,
        typer.Option("--session", "-s", help="A new session that decides each line and then learns it."),
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Estimate from a log what other policies would have earned, before one of them goes live.

    IPS, self-normalised IPS and doubly robust, each with its 95% interval. Needs no server without --session.
    """
    from research.off_policy import LogError, evaluate, named_policies, read_log, summarise

    try:
        summary = summarise(read_log(log))
        policies = named_policies(split_commas(policy), summary)
        if session is None:
            found = evaluate(read_log(log), summary, policies)
        else:
            with connect(url) as client, _deciding(client, session) as decide:
                policies[f"session {session}"] = lambda line, actions: decide(vars(line), actions)
                found = evaluate(read_log(log), summary, policies)
    except LogError as error:
        raise CommandError(str(error)) from None
    results = {name: evaluation.as_json() for name, evaluation in found.items()}
    if as_json:
        print(json.dumps({"logged": vars(summary.rewards), "policies": results}))
    else:
        out.print(_table(results, vars(summary.rewards), sum(summary.counts.values()), log.name))


@contextmanager
def _deciding(client: Client, session: str) -> Iterator[Callable[[Mapping[str, Any], Sequence[str]], dict[str, float]]]:
    """Yield the policy of a new session: its probabilities for a line, of which it then learns action and reward."""
    with suppress(NotFound):
        client.get(session)
        raise CommandError(f"the session {session!r} exists: it may have learned this log; name a new one")
    last: dict[str, Any] = {}

    def decide(line: Mapping[str, Any], actions: Sequence[str]) -> dict[str, float]:
        acted = client.act(
            session,
            actions=actions,
            context=line["context"] or None,
            forced=line["action"],
            propensity=line["propensity"],
            model="bandit",
            **last,
        )
        last.update(action_id=acted.action_id, reward=line["reward"])
        return cast(dict[str, float], acted.probabilities)

    yield decide
    if last:
        client.feedback(session, **last)


def _table(results: Mapping[str, Any], logged: Mapping[str, float], decisions: int, name: str) -> Table:
    table = Table("policy", "IPS", "self-normalised", "doubly robust", "effective size")
    table.title = f"{decisions:,} decisions of {escape(name)}: mean reward, 95% intervals"
    table.add_row("as logged", _cell(logged), "", "", f"{decisions:,}")
    for policy, result in results.items():
        estimates = (_cell(result[kind]) for kind in ("ips", "snips", "dr"))
        table.add_row(escape(policy), *estimates, f"{result['effective_size']:,.0f}")
    return table


def _cell(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "takes no logged action"
    return f"{estimate['mean']:.4g} ({estimate['low']:.4g} to {estimate['high']:.4g})"
