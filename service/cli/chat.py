"""`imprint chat`."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.markup import escape

from service.cli.console import connect, err, out, print_note
from service.cli.options import Url
from service.client import ChatOptions, Client
from service.client.text_files import pieces
from service.client.transport import DEFAULT_URL
from service.errors import CommandError, ImprintError

# The model's text may hold anything; a terminal must not interpret any of it as a command.
CONTROL_CHARACTERS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def chat(
    session: Annotated[
        str | None, typer.Option("--session", "-s", help="The session that learns; none = the frozen base.")
    ] = None,
    once: Annotated[str | None, typer.Option(help="Send this message, print the reply, and exit.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, max=2, help="0 = always the likeliest token; default: as the server suggests."),
    ] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Talk with the model; it learns what you say.

    Ctrl-D ends the chat. Without a terminal, standard input is the one message.
    """
    interactive = once is None and sys.stdin.isatty()
    with connect(url) as client:
        options: ChatOptions = {"session": session, "max_tokens": max_tokens, **_sampling(client, temperature)}
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


def _sampling(client: Client, temperature: float | None) -> ChatOptions:
    """Return the options of sampling that the server suggests, with the given temperature."""
    suggested = client.model().sampling
    options: ChatOptions = {}
    if suggested is not None:
        options = {
            "temperature": suggested.temperature,
            "top_p": suggested.top_p,
            "frequency_penalty": suggested.frequency_penalty,
        }
    return options if temperature is None else options | {"temperature": temperature}


def _read_interactive() -> Iterator[str]:
    """Yield the lines that a person types, until Ctrl-D."""
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
