"""Filling in the middle: the prompt of a request for the text between two texts."""

from __future__ import annotations

from collections.abc import Sequence

from model.text.infill import Cut, Snippet, infill_tokens
from service.concurrency import run_off_loop
from service.errors import BadRequest
from service.turns.loaded_model import LoadedModel
from service.turns.prompts import EncodedPrompt


async def fill_in(
    prefix: str, suffix: str, extra: Sequence[Snippet], model: LoadedModel, max_tokens: int | None
) -> tuple[EncodedPrompt, Cut, frozenset[int]]:
    """Return the prompt, what of it was cut, and the tokens that end its text besides the base's own.

    The prompt leaves room for `max_tokens`, or for half of the context if they are more or None. Of its tokens only the
    texts around the gap may be learned.

    Raises BadRequest if the base was not trained for filling in the middle.
    """
    tokenizer, tokens = model.tokenizer, infill_tokens(model.tokenizer)
    if tokens is None:
        raise BadRequest(
            "'suffix' needs a base that was trained to fill in the middle, and the tokenizer of this server's base has "
            "no tokens for that (such as <|fim_prefix|>); Qwen2.5-Coder has them.",
            param="suffix",
            code="infill_not_supported",
        )
    half = model.context // 2
    room = model.context - min(half, half if max_tokens is None else max_tokens)
    size = len(prefix) + len(suffix) + sum(len(snippet.text) for snippet in extra)
    filled = await run_off_loop(size, tokens.prompt, tokenizer, prefix, suffix, extra, room)
    learn = bytearray(len(filled.token_ids))
    for start, stop in (filled.prefix, filled.suffix):
        learn[start:stop] = b"\1" * (stop - start)
    return EncodedPrompt(filled.token_ids, learn, question=filled.prefix), filled.cut, tokens.ends
