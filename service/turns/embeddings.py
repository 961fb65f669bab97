"""Embeddings: vectors of the meaning of texts, by the server's sentence encoder. No session has a part in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from model.text.sentence_encoder import MAX_TOKENS as MAX_WINDOW_TOKENS
from model.text.sentence_encoder import SentenceEncoder
from service.concurrency import run_off_loop
from service.errors import BadRequest
from service.turns.loaded_model import LoadedModel
from service.turns.sessions import Sessions

MAX_TEXT_TOKENS = 8192  # of the encoder, in one text; this and the next limit are OpenAI's
MAX_TEXT_CHARS = 32 * MAX_TEXT_TOKENS  # a longer text is not even cut into tokens
MAX_TOKENS = 300_000  # of the encoder, in one request
WINDOW_COST = 32  # the work on a window, in tokens, that comes on top of the work on its tokens


@dataclass(frozen=True)
class Embeddings:
    """The vectors [size] of texts, each of length 1, and the number of tokens that the encoder has read."""

    vectors: list[NDArray[np.float32]]
    tokens: int


def require_encoder(model: LoadedModel) -> SentenceEncoder:
    """Return the sentence encoder of the server. Raises BadRequest if the server has none."""
    if model.encoder is None:
        raise BadRequest(
            "The server has no sentence encoder: IMPRINT_RECALL_ENCODER is 'none', or IMPRINT_RECALL_TOKENS is 0.",
            code="no_encoder",
        )
    return model.encoder


def require_dimensions(dimensions: int | None, model: LoadedModel) -> None:
    """Raise BadRequest if vectors of another number of dimensions than the encoder's are asked for."""
    size = require_encoder(model).size
    if dimensions not in (None, size):
        raise BadRequest(f"'dimensions' must be {size}, got {dimensions}.", param="dimensions")


async def embed(sessions: Sessions, texts: Sequence[str], param: str) -> Embeddings:
    """Return the vectors of texts, which depend on each text alone. The request has a place in the bounded queue.

    param: the field of the request that has the texts.

    Raises:
        BadRequest: the server has no encoder, or the texts have too many tokens.
        Overloaded: the queue is full.
    """
    encoder = require_encoder(sessions.loaded_model)
    async with sessions.gate.admit():
        windows = await run_off_loop(sum(map(len, texts)), _windows, encoder, texts, param)
        sums = list[NDArray[np.float32]]()
        for group in _groups(chain.from_iterable(windows)):
            sums += await sessions.loaded_model.engine.run(partial(_sums, encoder, group))
    waiting = iter(sums)
    vectors = [_unit_vector(list(islice(waiting, len(each))), encoder.size) for each in windows]
    return Embeddings(vectors, sum(len(window) for each in windows for window in each))


def _windows(encoder: SentenceEncoder, texts: Sequence[str], param: str) -> list[list[list[int]]]:
    """Return the windows of each text. Raises BadRequest for too many tokens."""
    found, total = list[list[list[int]]](), 0
    for index, text in enumerate(texts):
        where = f"{param}.{index}" if len(texts) > 1 else param
        _require_at_most(MAX_TEXT_CHARS, len(text), "characters", where)
        found.append(encoder.windows(text))
        tokens = sum(map(len, found[-1]))
        total += tokens
        _require_at_most(MAX_TEXT_TOKENS, tokens, "tokens", where)
        _require_at_most(MAX_TOKENS, total, "tokens", param)
    return found


def _require_at_most(limit: int, number: int, unit: str, param: str) -> None:
    if number > limit:
        message = f"'{param}' may have {limit} {unit}, got {number}."
        raise BadRequest(message, param=param, code="context_length_exceeded")


def _groups(windows: Iterable[list[int]]) -> Iterator[list[list[int]]]:
    """Yield the windows in groups, each of which takes about as long as one whole window."""
    group, cost = list[list[int]](), 0
    for window in windows:
        if group and cost + len(window) + WINDOW_COST > MAX_WINDOW_TOKENS:
            yield group
            group, cost = [], 0
        group.append(window)
        cost += len(window) + WINDOW_COST
    if group:
        yield group


def _sums(encoder: SentenceEncoder, group: Sequence[list[int]]) -> list[NDArray[np.float32]]:
    return [encoder.sum_of_states(window) for window in group]


def _unit_vector(sums: Sequence[NDArray[np.float32]], size: int) -> NDArray[np.float32]:
    """Return the vector [size] of a text from the sums of its windows; zeros for a text without tokens."""
    vector = np.zeros(size, np.float32)
    for each in sums:
        vector += each
    length = float(np.linalg.norm(vector))
    return vector / np.float32(length) if length else vector
