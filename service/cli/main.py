"""The command line `imprint`. All commands but `serve`, `doctor`, `eval`, `bench` and `train` speak HTTP."""

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from rich.table import Table

from service import tenants
from service.cli.console import DEFAULT_URL, AsJson, Url, connect, err, out, print_note
from service.cli.sessions import sessions_app
from service.client import ChatOptions, Client, ObserveProgress
from service.client.text_files import File, display_name, pieces
from service.errors import CommandError, ImprintError
from service.settings import Settings, SettingsError

# The model's text may hold anything: a terminal must not obey it.
CONTROL_CHARACTERS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A language model server that learns while it serves.",
)
app.add_typer(sessions_app, name="sessions")
keys_app = typer.Typer(no_args_is_help=True, help="Make API keys.")
app.add_typer(keys_app, name="keys")

Session = Annotated[str, typer.Option("--session", "-s", help="The session's id.")]
TextPaths = Annotated[
    list[Path], typer.Argument(exists=True, help="Text files, a stream each, or folders of them, a kind each.")
]
Window = Annotated[int, typer.Option(min=8, max=8191, help="Tokens of a request.")]
StreamsPerKind = Annotated[int, typer.Option("--streams", min=1, help="Streams of a kind, at most.")]
STATUS_SYMBOLS = {"ok": "[green]✓[/green]", "warn": "[yellow]![/yellow]", "fail": "[red]✗[/red]"}


def main() -> None:
    """The console script: `app`, with every expected fault as one line on stderr and exit code 1."""
    # Torch's threads wait for their next piece of work in a loop, by default for milliseconds, in which the core is
    # another's: the event loop's, the store's, our own kernels'. It counts only before torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        app(prog_name="imprint")
    except (CommandError, ImprintError, SettingsError, tenants.ApiKeysError, UnicodeError) as error:
        err.print(f"imprint: {escape(str(error))}", style="red")
        sys.exit(1)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port to listen on.")] = None,
    model: Annotated[str | None, typer.Option(help="The base: a name, a folder, a .gguf file, or owner/name.")] = None,
    memory: Annotated[str | None, typer.Option(help="The memory checkpoint.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the sessions.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve until told to stop. Options go before the IMPRINT_* environment variables (docs/settings.md)."""
    settings = Settings.load(
        host=host,
        port=port,
        model=model,
        memory=memory,
        data_dir=data_dir,
        device=device,
        log_level=log_level,
    )
    from service.app import run  # the commands that only speak HTTP need no torch

    raise typer.Exit(run(settings))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look for what keeps a server from starting here, and say what to do. Exits with 1 if there is something."""
    from service.cli.doctor import Finding, run_checks

    logging.disable()  # what it would warn of is told in order
    try:
        findings = list(run_checks(Settings.load()))
    except SettingsError as error:
        findings = [Finding("settings", "fail", str(error), "docs/settings.md lists them all")]
    healthy = all(finding.status != "fail" for finding in findings)
    if as_json:
        print(json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in findings]}))
        raise typer.Exit(not healthy)
    for finding in findings:
        out.print(f"{STATUS_SYMBOLS[finding.status]} [bold]{finding.name:<7}[/bold] {escape(finding.found)}")
        if finding.do:
            out.print(f"          → {escape(finding.do)}")
    raise typer.Exit(not healthy)


@app.command("eval")
def evaluate(
    paths: TextPaths,
    out: Annotated[Path, typer.Option(help="Folder of the results; a run that was killed goes on from it.")] = Path(
        "imprint-eval"
    ),
    requests: Annotated[int, typer.Option(min=2, help="Requests of a stream, at most; half of them, at least.")] = 16,
    window: Window = 512,
    streams: StreamsPerKind = 2,
    arms: Annotated[str, typer.Option(help="What to compare, commas between; all = the costly ones too.")] = "",
    tune: Annotated[str, typer.Option(help="Kinds to tune on, commas between; the others are held out.")] = "",
    probes: Annotated[str, typer.Option(help="What else to measure, commas between, or none.")] = (
        "facts,keystrokes,cost,poison"
    ),
    long: Annotated[int, typer.Option(min=0, help="Tokens of one long session over all texts; 0 = none.")] = 0,
    adapter: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A plain adapter, too.")] = None,
) -> None:
    """What the memory is worth on texts, beside every alternative; needs no server.

    Writes results.json, table.md, plots and arrays. The same command goes on where a killed one was.
    """
    from research.evaluation.command import evaluate_files
    from research.evaluation.trial import Options

    extra = [] if probes == "none" else _split_commas(probes)
    options = Options(requests, window, streams, _split_commas(arms), _split_commas(tune), extra, long, adapter, out)
    evaluate_files(Settings.load(), paths, options)


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("imprint-bench"),
    quick: Annotated[bool, typer.Option("--quick", help="A first look, within two minutes.")] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0.05, max=600, help="For all scenarios together; default 12, or 1 with --quick.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads of every arm; 0 = one a core.")] = 0,
    scenarios: Annotated[str, typer.Option(help="Which to run, commas between; default: all.")] = "",
    peers: Annotated[str, typer.Option(help="Which to measure beside it, commas between, or none.")] = (
        "transformers,llama.cpp,vllm"
    ),
    llama_server: Annotated[
        Path | None, typer.Option(help="llama.cpp's server; default: the one on PATH, or of the extra `peers`.")
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="For llama.cpp; default: what the base came from.")
    ] = None,
    vllm: Annotated[str | None, typer.Option(metavar="URL", help="A vLLM server of the same base.")] = None,
    page: Annotated[
        Path | None, typer.Option(help="A Markdown page; what stands between its marks is replaced by the results.")
    ] = None,
) -> None:
    """How fast the server is, beside the peers that are installed; needs no running server.

    Writes results.json, table.md and plots. The arms take turns, so a busy machine slows all of them.
    """
    from benchmarks.peers import PeerSelection
    from benchmarks.run import Options, run, sizes_for

    settings = Settings.load()
    peer_selection = PeerSelection([] if peers == "none" else _split_commas(peers), llama_server, gguf, vllm)
    limit = (1.0 if quick else 12.0) if minutes is None else minutes
    sizes = sizes_for(settings, quick=quick)
    run(settings, Options(out, sizes, limit, threads, _split_commas(scenarios), peer_selection, page))


def _split_commas(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@app.command()
def train(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text files, a stream each; folders of them, a kind each; hf:owner/name[:config][:split][:column]."
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="The checkpoint to write; losses, plot and manifest go beside it.")],
    work: Annotated[Path, typer.Option(help="Folder of features and unfinished runs; can be used again.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on, all kinds alike.")] = 4_000_000,
    stream_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a stream, at most.")] = 65_536,
    requests: Annotated[
        tuple[int, int], typer.Option("--request-tokens", min=1, help="Shortest and longest request of a stream.")
    ] = (128, 1024),
    valid: Annotated[int, typer.Option(min=1, help="Files of each kind held out to validate on.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the optimiser; as many as a pass takes.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Streams in flight, for each process.")] = 4,
    span: Annotated[int, typer.Option(min=1, help="Requests that gradients pass.")] = 8,
    lr: Annotated[float, typer.Option(min=1e-7, max=1.0, help="The peak learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the choice of texts, of their order and of the first weights.")] = 0,
    adapter: Annotated[bool, typer.Option("--adapter", help="Train a plain adapter instead, to compare with.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="The adapter's; by default it is as large.")] = None,
    policy: Annotated[str | None, typer.Option(help="Train this policy instead (docs/scenarios.md).")] = None,
) -> None:
    """Train a memory on texts, or a policy on a scenario; needs no server. The same command goes on after any stop.

    On several devices: torchrun --nproc-per-node N -m service train …
    """
    if (policy is None) == (not paths):
        raise typer.BadParameter("give texts to train a memory on, or --policy, and not both")
    if policy is not None:
        with _require_scenarios_extra():
            from research.training.policy_command import train_policy
        train_policy(policy, out, work, rounds=steps, seed=seed)
        return
    assert paths is not None
    from research.training.command import VALID_TOKENS, Options, train_files
    from research.training.texts import Budget

    if requests[0] > requests[1]:
        raise typer.BadParameter(f"the shortest must not be above the longest, got {requests[0]} and {requests[1]}")
    budget = Budget(tokens, stream_tokens, valid, VALID_TOKENS, requests, seed)
    train_files(Settings.load(), Options(paths, out, work, budget, steps, batch, span, lr, adapter, rank))


@contextlib.contextmanager
def _require_scenarios_extra() -> Iterator[None]:
    """Tells what to install where the scenarios' own packages are missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is missing: pip install 'imprint[scenarios]'") from error


@app.command()
def scenario(
    name: Annotated[str, typer.Argument(help="Of the policy; `imprint train --policy ?` lists them.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("imprint-scenarios"),
    seeds: Annotated[int, typer.Option(min=1, help="Each of new tasks.")] = 5,
    rivals: Annotated[str, typer.Option(help="Which to train as well; or none.")] = "gru,lstm,transformer,dense",
    seconds: Annotated[float | None, typer.Option(min=1, help="For each of them; default: as the policy was.")] = None,
    rates: Annotated[str, typer.Option(help="Learning rates of rivals; the best one on practice tasks is shown.")] = (
        "6e-4,2e-3,6e-3"
    ),
    trainings: Annotated[
        int, typer.Option(min=1, help="Of the policy, and of each rival at its best rate, from a seed each.")
    ] = 1,
    practice: Annotated[bool, typer.Option(help="On other tasks than the tables', to choose settings by.")] = False,
    policy: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Instead of the shipped one.")
    ] = None,
    change: Annotated[list[str] | None, typer.Option(help="An option of the scenario, as drift=0.")] = None,
) -> None:
    """What a policy is worth on its scenario, beside its rivals; needs no server. Writes JSON and learning curves."""
    with _require_scenarios_extra():
        from research.scenarios.command import measure_scenario
        from research.scenarios.meta_baselines import BaselineTrainConfig
    try:
        baseline_config = BaselineTrainConfig([float(rate) for rate in _split_commas(rates)], trainings, seconds)
    except ValueError:
        raise typer.BadParameter(f"--rates must be numbers, commas between, got {rates!r}") from None
    if not baseline_config.rates or min(baseline_config.rates) <= 0:
        raise typer.BadParameter(f"--rates must be above 0, and one at least, got {rates!r}")
    options = dict(one.partition("=")[::2] for one in change or [])
    baselines = [] if rivals == "none" else rivals.split(",")
    measure_scenario(
        name,
        out,
        seeds=seeds,
        baselines=baselines,
        baseline_config=baseline_config,
        checkpoint=policy,
        practice=practice,
        options=options,
    )


@app.command()
def chat(
    session: Annotated[str | None, typer.Option("--session", "-s", help="Who learns; none = the frozen base.")] = None,
    once: Annotated[str | None, typer.Option(help="Say this, print the reply, leave.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 512,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 = always the likeliest token.")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Talk with the model; it learns what you say.

    Ctrl-D leaves. Without a terminal, standard input is the one message.
    """
    options: ChatOptions = {"session": session, "max_tokens": max_tokens, "temperature": temperature}
    interactive = once is None and sys.stdin.isatty()
    with connect(url) as client:
        conversation: list[dict[str, str]] = []
        for text in _read_interactive() if interactive else [_read_stdin() if once is None else once]:
            pending_messages = [*conversation, {"role": "user", "content": text}]
            try:
                reply = _stream_reply(client, pending_messages, options)
            except ImprintError as error:
                if not interactive:
                    raise
                err.print(escape(str(error)), style="red")
            else:
                conversation = [*pending_messages, {"role": "assistant", "content": reply}]


def _read_interactive() -> Iterator[str]:
    """What a person types, line by line, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() editing and a history)
    while True:
        try:
            text = input("› ").strip()
        except EOFError:
            out.print()
            return
        if text:
            yield text


def _read_stdin() -> str:
    text = "".join(pieces(sys.stdin.buffer)).strip()
    if not text:
        raise CommandError("standard input holds no message")
    return text


def _stream_reply(client: Client, messages: list[dict[str, str]], options: ChatOptions) -> str:
    """Print one reply as it streams, then what was learned; return the reply."""
    stream = client.stream_chat(messages, **options)
    try:
        for chunk in stream:
            out.file.write(chunk.text.translate(CONTROL_CHARACTERS) if out.is_terminal else chunk.text)
            out.file.flush()
    finally:
        out.print()
    if (done := stream.adaptation) is not None:
        loss = "" if done.loss is None else f" · loss {done.loss:.3f}"
        print_note(f"learned {done.tokens_learned:,} tokens{loss} · version {done.version_from} → {done.version_to}")
    return stream.text


@app.command()
def observe(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="UTF-8 text; - is standard input.")],
    session: Session,
    url: Url = DEFAULT_URL,
) -> None:
    """Learn from files, in order, without generating anything."""
    learned: ObserveProgress | None = None
    with connect(url) as client, _progress() as bar:
        task = bar.add_task("", total=None, learned="")

        def on_progress(observe_progress: ObserveProgress) -> None:
            nonlocal learned
            learned = observe_progress
            done, total = observe_progress.characters, observe_progress.total
            bar.update(
                task,
                description=escape(observe_progress.file),
                completed=done,
                total=total,
                learned=str(observe_progress),
            )

        try:
            learned = client.observe_files(session, map(_file, files), progress=on_progress)
        except ImprintError as error:
            raise CommandError(f"{error} (before that: {learned})" if learned else str(error)) from None
    out.print(str(learned))


def _file(name: str) -> File:
    return sys.stdin.buffer if name == "-" else name


def _progress() -> Progress:
    columns = (
        "{task.description}",
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        "{task.fields[learned]}",
    )
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


@app.command()
def score(
    file: Annotated[str, typer.Argument(help="UTF-8 text; - is standard input.")],
    session: Session,
    learn: Annotated[bool, typer.Option("--learn", help="Learn the text as well, each piece after its score.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """How well a session predicts a text, against the frozen base."""
    tokens, nats, frozen_nats = 0, 0.0, 0.0
    with connect(url) as client:
        for piece in pieces(_file(file)):
            answer = client.score(session, piece, learn=learn)
            tokens += len(answer.logprobs)
            nats -= sum(answer.logprobs)
            frozen_nats -= sum(answer.frozen_logprobs)
    if not tokens:
        raise CommandError(f"{display_name(_file(file))} holds nothing to score")
    result = {
        "session": session,
        "tokens": tokens,
        "loss": nats / tokens,
        "frozen_loss": frozen_nats / tokens,
        "gain": (frozen_nats - nats) / tokens,
        "perplexity": math.exp(nats / tokens),
        "frozen_perplexity": math.exp(frozen_nats / tokens),
        "perplexity_ratio": math.exp((nats - frozen_nats) / tokens),
        "version": answer.version,
    }
    if as_json:
        print(json.dumps(result))
        return
    table = Table("", "perplexity", "nats/token", title=f"{tokens:,} tokens of {escape(display_name(_file(file)))}")
    table.add_row("frozen base", f"{result['frozen_perplexity']:.3f}", f"{result['frozen_loss']:.4f}")
    table.add_row(f"session {escape(session)}", f"{result['perplexity']:.3f}", f"{result['loss']:.4f}")
    table.add_row("ratio, gain", f"{result['perplexity_ratio']:.3f}", f"{result['gain']:+.4f}")
    out.print(table)


@keys_app.command("new")
def new_key(
    tenant: Annotated[str, typer.Argument(help="Whose key it is; `metrics` for one that opens /metrics alone.")],
) -> None:
    """Make a key: `imprint keys new acme >> FILE` shows it once and adds its hash to the server's file."""
    key, line = tenants.new_key(tenant)
    print(line)
    err.print(f"the key, shown this once: {key}")


if __name__ == "__main__":
    main()
