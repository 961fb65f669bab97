"""`imprint eval`."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli.options import split_commas
from service.errors import CommandError
from service.settings import Settings


def evaluate(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(exists=True, help="Text files, a stream each, or folders of them, a kind each."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results; a run that was killed goes on from it.")] = Path(
        "imprint-eval"
    ),
    requests: Annotated[int, typer.Option(min=2, help="Requests of a stream, at most; half of them, at least.")] = 16,
    window: Annotated[int, typer.Option(min=8, max=8191, help="Tokens of a request.")] = 512,
    streams: Annotated[int, typer.Option(min=1, help="Streams of a kind, at most.")] = 2,
    arms: Annotated[str, typer.Option(help="What to compare, separated by commas; all = the costly ones too.")] = "",
    tune: Annotated[str, typer.Option(help="Kinds to tune on, separated by commas; the others are held out.")] = "",
    probes: Annotated[
        str,
        typer.Option(help="What else to measure, separated by commas, or none; code: what editors suggest, alone."),
    ] = ("facts,keystrokes,cost,poison"),
    long: Annotated[int, typer.Option(min=0, help="Tokens of one long session over all texts; 0 = none.")] = 0,
    adapter: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A plain adapter to compare with.")
    ] = None,
    recall: Annotated[
        str, typer.Option(help="Recall probes to run instead, separated by commas, or all; the texts are other text.")
    ] = "",
    recall_after: Annotated[
        str, typer.Option(help="Tokens of other text between statements and questions, separated by commas.")
    ] = "1000",
    recall_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the past put in a prompt, at most.")] = 256,
    recall_size: Annotated[int, typer.Option(min=1, help="People, numbers and so on of a recall probe.")] = 100,
    recall_questions: Annotated[int, typer.Option(min=1, help="Questions of a recall probe, at most.")] = 1000,
    recall_split: Annotated[str, typer.Option(help="Wordings and names: train, dev or review.")] = "dev",
    recall_locomo: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="LoCoMo's conversations, for the probe locomo.")
    ] = None,
    recall_seed: Annotated[int, typer.Option(help="Seed of the recall probes.")] = 0,
) -> None:
    """Measure what the memory is worth on texts, compared with every alternative; needs no server.

    Writes results.json, table.md, plots and arrays. The same command continues a run that was killed. With --recall,
    questions about what was said before are measured instead: recall.json, recall.md and a plot.
    """
    from research.evaluation.command import evaluate_files
    from research.evaluation.trial import Options

    if recall:
        from research.evaluation.recall.command import RecallOptions, evaluate_recall
        from research.evaluation.recall.probes import ProbeOptions

        data = ProbeOptions(recall_split, recall_seed, recall_size, recall_questions, recall_locomo)
        distances = _numbers(recall_after, "recall-after")
        names, chosen = split_commas(recall), split_commas(arms)
        evaluate_recall(Settings.load(), paths or [], RecallOptions(names, chosen, distances, recall_tokens, data, out))
        return
    if not paths:
        raise CommandError("texts are needed: files or folders")
    extra = [] if probes == "none" else split_commas(probes)
    if extra == ["code"]:
        from research.evaluation.code import evaluate_code

        evaluate_code(Settings.load(), paths, out)
        return
    options = Options(requests, window, streams, split_commas(arms), split_commas(tune), extra, long, adapter, out)
    evaluate_files(Settings.load(), paths, options)


def _numbers(text: str, option: str) -> list[int]:
    """Return the numbers in a comma-separated list. Raises CommandError."""
    values = split_commas(text)
    if not values or not all(value.isdecimal() for value in values):
        raise CommandError(f"{option} must be whole numbers, separated by commas, got {text!r}")
    return [int(value) for value in values]
