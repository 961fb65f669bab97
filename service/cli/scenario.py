"""`imprint scenario`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from service.cli.options import split_commas
from service.errors import CommandError


def scenario(
    name: Annotated[str, typer.Argument(help="The policy's name; `imprint train --policy ?` lists them.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("imprint-scenarios"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, each with new tasks.")] = 5,
    rivals: Annotated[str, typer.Option(help="Baselines to train as well, separated by commas, or none.")] = (
        "gru,lstm,transformer,dense"
    ),
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Training time of each baseline; default: the policy's own.")
    ] = None,
    rates: Annotated[
        str, typer.Option(help="Learning rates of the baselines; the best on practice tasks is reported.")
    ] = "6e-4,2e-3,6e-3",
    trainings: Annotated[
        int, typer.Option(min=1, help="Trainings of the policy, and of each baseline at its best rate, a seed each.")
    ] = 1,
    practice: Annotated[bool, typer.Option(help="Use tasks other than the tables', to choose settings by.")] = False,
    policy: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A checkpoint in place of the shipped one.")
    ] = None,
    change: Annotated[list[str] | None, typer.Option(help="An option of the scenario, such as drift=0.")] = None,
) -> None:
    """Measure a policy on its scenario, compared with baselines; needs no server. Writes JSON and learning curves."""
    with require_scenarios_extra():
        from research.scenarios.command import measure_scenario
        from research.scenarios.meta_baselines import BaselineTrainConfig
    try:
        baseline_config = BaselineTrainConfig([float(rate) for rate in split_commas(rates)], trainings, seconds)
    except ValueError:
        raise typer.BadParameter(f"--rates must be numbers, commas between, got {rates!r}") from None
    if not baseline_config.rates or min(baseline_config.rates) <= 0:
        raise typer.BadParameter(f"--rates must be above 0, and one at least, got {rates!r}")
    measure_scenario(
        name,
        out,
        seeds=seeds,
        baselines=[] if rivals == "none" else rivals.split(","),
        baseline_config=baseline_config,
        checkpoint=policy,
        practice=practice,
        options=dict(option.partition("=")[::2] for option in change or []),
    )


@contextlib.contextmanager
def require_scenarios_extra() -> Iterator[None]:
    """Turn a missing package of the extra `scenarios` into a CommandError that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is missing: pip install 'imprint[scenarios]'") from error
