"""The command line `imprint`. All commands but `serve`, `eval` and `train` speak HTTP to a running server."""

import codecs
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from rich.table import Table

from service import tenants
from service.client import Client, ClientError, CommandError, Json
from service.settings import Settings, SettingsError

PIECE_CHARS = 200_000
READ_BYTES = 2**16
BORDERS = ("\n\n", "\n", " ")
# The model's text may hold anything: a terminal must not obey it.
CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A language model server that learns while it serves.",
)
sessions_app = typer.Typer(no_args_is_help=True, help="List, inspect and erase sessions.")
app.add_typer(sessions_app, name="sessions")
keys_app = typer.Typer(no_args_is_help=True, help="Make API keys.")
app.add_typer(keys_app, name="keys")

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Url = Annotated[str, typer.Option("--url", envvar="IMPRINT_URL", help="Where the server is.")]
SessionId = Annotated[str, typer.Argument(metavar="ID", help="The session's id.")]
Session = Annotated[str, typer.Option("--session", "-s", help="The session's id.")]
TextPaths = Annotated[
    list[Path], typer.Argument(exists=True, help="Text files, a stream each, or folders of them, a kind each.")
]
Window = Annotated[int, typer.Option(min=8, max=8191, help="Tokens of a request.")]
PerKind = Annotated[int, typer.Option("--streams", min=1, help="Streams of a kind, at most.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LOCAL = "http://127.0.0.1:8000"


class FileError(CommandError):
    """A file cannot be read as text. The message is one line that names the file."""


def main() -> None:
    """The console script: `app`, with every expected fault as one line on stderr and exit code 1."""
    try:
        app(prog_name="imprint")
    except (CommandError, SettingsError, tenants.KeysError, UnicodeError) as error:
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


@app.command("eval")
def evaluate(
    paths: TextPaths,
    out: Annotated[Path, typer.Option(help="Folder of the results; a run that was killed goes on from it.")] = Path(
        "imprint-eval"
    ),
    requests: Annotated[int, typer.Option(min=2, help="Requests of a stream, at most; half of them, at least.")] = 16,
    window: Window = 512,
    streams: PerKind = 2,
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
    from service.lab.bench import Options
    from service.lab.evaluate import evaluate_files

    extra = [] if probes == "none" else _names(probes)
    options = Options(requests, window, streams, _names(arms), _names(tune), extra, long, adapter, out)
    evaluate_files(Settings.load(), paths, options)


def _names(text: str) -> list[str]:
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
        with _scenarios():
            from service.lab.policies import train_policy
        train_policy(policy, out, work, rounds=steps, seed=seed)
        return
    assert paths is not None
    from service.lab.texts import Budget
    from service.lab.train import VALID_TOKENS, Options, train_files

    if requests[0] > requests[1]:
        raise typer.BadParameter(f"the shortest must not be above the longest, got {requests[0]} and {requests[1]}")
    budget = Budget(tokens, stream_tokens, valid, VALID_TOKENS, requests, seed)
    train_files(Settings.load(), Options(paths, out, work, budget, steps, batch, span, lr, adapter, rank))


@contextlib.contextmanager
def _scenarios() -> Iterator[None]:
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
    rivals: Annotated[bool, typer.Option(help="Train RL², a transformer and a dense memory, too.")] = True,
    policy: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Instead of the shipped one.")
    ] = None,
    change: Annotated[list[str] | None, typer.Option(help="An option of the scenario, as drift=0.")] = None,
) -> None:
    """What a policy is worth on its scenario, beside its rivals; needs no server. Writes JSON and learning curves."""
    with _scenarios():
        from service.lab.scenarios import measure_scenario
    options = dict(one.partition("=")[::2] for one in change or [])
    measure_scenario(name, out, seeds=seeds, rivals=rivals, checkpoint=policy, options=options)


@app.command()
def chat(
    session: Annotated[str | None, typer.Option("--session", "-s", help="Who learns; none = the frozen base.")] = None,
    once: Annotated[str | None, typer.Option(help="Say this, print the reply, leave.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 512,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 = always the likeliest token.")] = None,
    url: Url = LOCAL,
) -> None:
    """Talk with the model; it learns what you say.

    Ctrl-D leaves. Without a terminal, standard input is the one message.
    """
    options = {"session": session, "max_tokens": max_tokens, "temperature": temperature}
    given = {name: value for name, value in options.items() if value is not None}
    interactive = once is None and sys.stdin.isatty()
    with _connect(url) as client:
        body = {"model": client.model(), **given}
        conversation: list[dict[str, str]] = []
        for text in _typed() if interactive else [_piped() if once is None else once]:
            asked = [*conversation, {"role": "user", "content": text}]
            try:
                reply = _reply(client, {**body, "messages": asked})
            except ClientError as error:
                if not interactive:
                    raise
                err.print(escape(str(error)), style="red")
            else:
                conversation = [*asked, {"role": "assistant", "content": reply}]


def _typed() -> Iterator[str]:
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


def _piped() -> str:
    text = "".join(_pieces("-")).strip()
    if not text:
        raise FileError("standard input holds no message")
    return text


def _reply(client: Client, body: Json) -> str:
    """Print one reply as it streams, then what was learned; return the reply."""
    reply = ""
    adaptation: Json | None = None
    try:
        for chunk in client.chat(body):
            adaptation = chunk.get("adaptation") or adaptation
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content") or ""
                reply += piece
                out.file.write(piece.translate(CONTROLS) if out.is_terminal else piece)
                out.file.flush()
    finally:
        out.print()
    if adaptation is not None:
        loss = "" if adaptation["loss"] is None else f" · loss {adaptation['loss']:.3f}"
        versions = f"version {adaptation['version_from']} → {adaptation['version_to']}"
        _note(f"learned {adaptation['tokens_learned']:,} tokens{loss} · {versions}")
    return reply


@dataclass
class Tally:
    """What the pieces sent so far have taught."""

    tokens: int = 0
    rows: int = 0
    scored: int = 0
    nats: float = 0.0
    version: int | None = None

    def add(self, answer: Json) -> None:
        self.tokens += answer["tokens_learned"]
        self.rows += answer["rows_written"]
        self.version = answer["version"]
        if answer["loss"] is not None:
            self.scored += answer["tokens_learned"]
            self.nats += answer["loss"] * answer["tokens_learned"]

    def __str__(self) -> str:
        loss = f" · loss {self.nats / self.scored:.3f}" if self.scored else ""
        version = "" if self.version is None else f" · version {self.version}"
        return f"learned {self.tokens:,} tokens · {self.rows:,} rows{loss}{version}"


@app.command()
def observe(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="UTF-8 text; - is standard input.")],
    session: Session,
    url: Url = LOCAL,
) -> None:
    """Learn from files, in order, without generating anything."""
    # Every file is read once before the first piece is sent: a bad one should not leave the work half done.
    characters = [sum(map(len, _pieces(file))) for file in files if file != "-"]
    tally = Tally()
    with _connect(url) as client, _progress() as progress:
        task = progress.add_task("", total=None if "-" in files else sum(characters), tally=tally)
        for file in files:
            progress.update(task, description=escape(file))
            for piece in _pieces(file):
                try:
                    answer = client.observe(session, piece)
                except ClientError as error:
                    raise ClientError(f"{error} (before that: {tally})" if tally.tokens else str(error)) from None
                tally.add(answer)
                progress.update(task, advance=len(piece))
    out.print(str(tally))


def _progress() -> Progress:
    columns = (
        "{task.description}",
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        "{task.fields[tally]}",
    )
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


@app.command()
def score(
    file: Annotated[str, typer.Argument(help="UTF-8 text; - is standard input.")],
    session: Session,
    learn: Annotated[bool, typer.Option("--learn", help="Learn the text as well, each piece after its score.")] = False,
    as_json: AsJson = False,
    url: Url = LOCAL,
) -> None:
    """How well a session predicts a text, against the frozen base."""
    tokens, nats, frozen_nats = 0, 0.0, 0.0
    with _connect(url) as client:
        for piece in _pieces(file):
            answer = client.score(session, piece, learn=learn)
            tokens += len(answer["logprobs"])
            nats -= sum(answer["logprobs"])
            frozen_nats -= sum(answer["frozen_logprobs"])
    if not tokens:
        raise FileError(f"{_name(file)} holds nothing to score")
    result = {
        "session": session,
        "tokens": tokens,
        "loss": nats / tokens,
        "frozen_loss": frozen_nats / tokens,
        "gain": (frozen_nats - nats) / tokens,
        "perplexity": math.exp(nats / tokens),
        "frozen_perplexity": math.exp(frozen_nats / tokens),
        "perplexity_ratio": math.exp((nats - frozen_nats) / tokens),
        "version": answer["version"],
    }
    if as_json:
        print(json.dumps(result))
        return
    table = Table("", "perplexity", "nats/token", title=f"{tokens:,} tokens of {escape(_name(file))}")
    table.add_row("frozen base", f"{result['frozen_perplexity']:.3f}", f"{result['frozen_loss']:.4f}")
    table.add_row(f"session {escape(session)}", f"{result['perplexity']:.3f}", f"{result['loss']:.4f}")
    table.add_row("ratio, gain", f"{result['perplexity_ratio']:.3f}", f"{result['gain']:+.4f}")
    out.print(table)


@sessions_app.command("ls")
def list_sessions(as_json: AsJson = False, url: Url = LOCAL) -> None:
    """All sessions."""
    with _connect(url) as client:
        sessions = list(client.sessions())
    if as_json:
        print(json.dumps(sessions))
        return
    columns = ("id", "version", "tokens_learned", "rows", "bytes", "gain", "updated")
    table = Table(*map(_label, columns))
    table.columns[0].overflow = "fold"
    for session in sessions:
        table.add_row(*(_cell(column, session[column]) for column in columns))
    out.print(table)


@sessions_app.command("show")
def show_session(session: SessionId, as_json: AsJson = False, url: Url = LOCAL) -> None:
    """One session, with everything the server tells about it."""
    with _connect(url) as client:
        answer = client.session(session)
    if as_json:
        print(json.dumps(answer))
        return
    table = Table(show_header=False)
    for field, value in answer.items():
        table.add_row(_label(field), _cell(field, value))
    out.print(table)


@sessions_app.command("rm")
def remove_sessions(
    sessions: Annotated[list[str], typer.Argument(metavar="ID...", help="The sessions' ids.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = LOCAL,
) -> None:
    """Erase sessions and all they learned."""
    with _connect(url) as client:
        for session in sessions:
            if yes or typer.confirm(f"Erase session {session} and all it learned?", err=True):
                client.delete(session)
                out.print(f"erased {escape(session)}")


@keys_app.command("new")
def new_key(
    tenant: Annotated[str, typer.Argument(help="Whose key it is; `metrics` for one that opens /metrics alone.")],
) -> None:
    """Make a key: `imprint keys new acme >> FILE` shows it once and adds its hash to the server's file."""
    key, line = tenants.new_key(tenant)
    print(line)
    err.print(f"the key, shown this once: {key}")


def _label(field: str) -> str:
    return "gain, nats/token" if field == "gain" else field.replace("_", " ")


def _cell(field: str, value: Any) -> str:
    """One value of a session, for people."""
    if value is None:
        return "–"
    if field in ("created", "updated"):
        return f"{datetime.fromtimestamp(value):%Y-%m-%d %H:%M}"
    if field == "bytes":
        return decimal(value)
    if field == "gain":
        return f"{value:+.4f}"
    if isinstance(value, dict):
        return escape(", ".join(f"{name} = {option}" for name, option in value.items()))
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def _connect(url: str) -> Client:
    # From the environment alone: other users of a machine can read a command's options.
    return Client(url, key=os.environ.get("IMPRINT_API_KEY", "").strip(), on_wait=_note)


def _note(line: str) -> None:
    """Say something beside the result: on stderr, so that pipes get the result alone."""
    err.print(escape(line), style="dim")


def _name(file: str) -> str:
    return "standard input" if file == "-" else file


def _pieces(file: str) -> Iterator[str]:
    """The text of a UTF-8 file, in pieces of at most `PIECE_CHARS` characters that joined give the whole."""
    text = ""
    for part in _decoded(file):
        text += part
        while len(text) > PIECE_CHARS:
            cut = _border(text)
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def _border(text: str) -> int:
    """Where to cut: behind the last blank line of the piece's second half, else newline, else space."""
    for border in BORDERS:
        if (found := text.rfind(border, PIECE_CHARS // 2, PIECE_CHARS)) >= 0:
            return found + len(border)
    return PIECE_CHARS


def _decoded(file: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if file == "-" else open(file, "rb") as stream:
            while data := stream.read(READ_BYTES):
                offset += len(data)
                yield decoder.decode(data)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # The decoder counts from what it was given, a character that the last read cut in two included.
        at = offset - len(error.object) + error.start
        raise FileError(f"{_name(file)} is not UTF-8 text: {error.reason} at byte {at}") from None
    except OSError as error:
        raise FileError(f"cannot read {_name(file)}: {error.strerror}") from None


if __name__ == "__main__":
    main()
