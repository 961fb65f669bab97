"""`imprint score`."""

import json
import math
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from service.cli.console import connect, out, text_source
from service.cli.options import AsJson, SessionOption, Url
from service.client.text_files import display_name, pieces
from service.client.transport import DEFAULT_URL
from service.errors import CommandError


def score(
    file: Annotated[str, typer.Argument(help="UTF-8 text; - is standard input.")],
    session: SessionOption,
    learn: Annotated[bool, typer.Option("--learn", help="Learn the text as well, each piece after its score.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Measure how well a session predicts a text, against the frozen base."""
    tokens, nats, frozen_nats = 0, 0.0, 0.0
    with connect(url) as client:
        for piece in pieces(text_source(file)):
            answer = client.score(session, piece, learn=learn)
            tokens += len(answer.logprobs)
            nats -= sum(answer.logprobs)
            frozen_nats -= sum(answer.frozen_logprobs)
    if not tokens:
        raise CommandError(f"{display_name(text_source(file))} holds nothing to score")
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
    else:
        out.print(_table(result, display_name(text_source(file))))


def _table(result: dict[str, Any], name: str) -> Table:
    table = Table("", "perplexity", "nats/token", title=f"{result['tokens']:,} tokens of {escape(name)}")
    table.add_row("frozen base", f"{result['frozen_perplexity']:.3f}", f"{result['frozen_loss']:.4f}")
    table.add_row(f"session {escape(result['session'])}", f"{result['perplexity']:.3f}", f"{result['loss']:.4f}")
    table.add_row("ratio, gain", f"{result['perplexity_ratio']:.3f}", f"{result['gain']:+.4f}")
    return table
