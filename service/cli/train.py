"""`imprint train`."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli.scenario import require_scenarios_extra
from service.settings import Settings


def train(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text files, a stream each; folders of them, a kind each; hf:owner/name[:config][:split][:column]."
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="The checkpoint to write; losses, plot and manifest go to its folder.")],
    work: Annotated[Path, typer.Option(help="Folder of features and unfinished runs; can be used again.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on, shared evenly by all kinds.")] = 4_000_000,
    stream_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a stream, at most.")] = 65_536,
    requests: Annotated[
        tuple[int, int], typer.Option("--request-tokens", min=1, help="Shortest and longest request of a stream.")
    ] = (128, 1024),
    valid: Annotated[int, typer.Option(min=1, help="Files of each kind held out to validate on.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; default: one pass over the texts.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Streams trained on at a time, for each process.")] = 4,
    span: Annotated[int, typer.Option(min=1, help="Requests that gradients flow through.")] = 8,
    lr: Annotated[float, typer.Option(min=1e-7, max=1.0, help="The peak learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed for the choice and order of texts and for the first weights.")] = 0,
    adapter: Annotated[bool, typer.Option("--adapter", help="Train a plain adapter instead, to compare with.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="The adapter's rank; default: the memory's size.")] = None,
    policy: Annotated[str | None, typer.Option(help="Train this policy instead (docs/scenarios.md).")] = None,
    lexicon: Annotated[bool, typer.Option("--lexicon", help="Count words instead (docs/recall.md).")] = False,
    reading: Annotated[bool, typer.Option("--reading", help="Train a reading prefix (docs/recall.md).")] = False,
    untold: Annotated[
        Path | None, typer.Option(help="Train what this reading prefix replies to what was never told.", exists=True)
    ] = None,
) -> None:
    """Train a memory on texts, or a policy on a scenario; needs no server. The same command resumes a stopped run.

    On several devices: torchrun --nproc-per-node N -m service train …
    """
    if bool(paths) + (policy is not None) + reading != 1:
        raise typer.BadParameter("give texts to train a memory on, or --policy, or --reading, and only one of them")
    if untold is not None and not reading:
        raise typer.BadParameter("--untold names a reading prefix, and needs --reading")
    if reading:
        from research.training.reading import STEPS, train_prefix

        train_prefix(Settings.load(), out, work, steps=steps or STEPS, seed=seed, untold_of=untold)
        return
    if policy is not None:
        with require_scenarios_extra():
            from research.training.policy_command import train_policy
        train_policy(policy, out, work, rounds=steps, seed=seed)
        return
    assert paths is not None
    if lexicon:
        from research.training.lexicon import train_lexicon

        train_lexicon([Path(path) for path in paths], out, seed)
        return
    from research.training.command import VALID_TOKENS, Options, train_files
    from research.training.texts import Budget

    if requests[0] > requests[1]:
        raise typer.BadParameter(f"the shortest must not be above the longest, got {requests[0]} and {requests[1]}")
    budget = Budget(tokens, stream_tokens, valid, VALID_TOKENS, requests, seed)
    train_files(Settings.load(), Options(paths, out, work, budget, steps, batch, span, lr, adapter, rank))
