"""A decoding step of the engine: the next tokens of the sequences of all jobs together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from model.adaptive_lm import AdaptiveLM, DecodeState
from model.base.kv_cache import KVCache
from model.memory import Pool
from model.text.sampling import predraw
from service.engine.text_job import TextJob
from service.engine.text_sequence import TextSequence
from service.engine.types import Event

SPECULATIVE_ROWS = 4  # rows of a decoding step that sequences may fill with drafted tokens


class _DecodeInput(NamedTuple):
    """A sequence of a decoding step, and the step's input tokens for the sequence: the pending token, then drafts."""

    job: TextJob
    sequence: TextSequence
    tokens: list[int]


def decode_step(
    lm: AdaptiveLM, pool: Pool, batch: Sequence[tuple[TextJob, TextSequence]]
) -> Iterator[tuple[TextJob, TextSequence, int, Iterator[Event]]]:
    """Decode a token of every sequence, and more where a drafted token is right.

    Yields, for each sequence of the batch, its job, the sequence, the number of drafted tokens, and the events; the
    tokens are drawn while the caller reads the events.
    """
    # Small batches are limited by reading the weights, so a few more rows are nearly free.
    max_rows = SPECULATIVE_ROWS // len(batch)
    inputs = [_DecodeInput(job, sequence, sequence.input_tokens(max_rows)) for job, sequence in batch]
    decode_states = _decode_rows(lm, pool, inputs)
    scores = _scores_by_sequence(lm, pool, inputs, decode_states)
    for (job, sequence, tokens), states, rows in zip(inputs, decode_states, scores, strict=True):
        yield job, sequence, len(states) - 1, job.draw_tokens(sequence, tokens[1:], states, rows)


def _decode_rows(lm: AdaptiveLM, pool: Pool, inputs: Sequence[_DecodeInput]) -> list[list[DecodeState]]:
    """Decode one row per input token; return the state after each token of each sequence.

    A sequence without input tokens keeps its state.
    """
    tokens: list[int] = []
    caches: list[KVCache] = []
    states: list[DecodeState] = []
    index: list[int] = []
    for job, sequence, row_tokens in inputs:
        for offset, token in enumerate(row_tokens):
            tokens.append(token)
            caches.append(sequence.cache.advanced(offset) if offset else sequence.cache)
            states.append(sequence.decode_state.advanced(row_tokens[:offset]) if offset else sequence.decode_state)
            index.append(job.index)
    decoded = iter(lm.decode(tokens, caches, states, pool, index) if tokens else [])
    return [list(islice(decoded, len(row_tokens))) or [sequence.decode_state] for _, sequence, row_tokens in inputs]


def _scores_by_sequence(
    lm: AdaptiveLM, pool: Pool, inputs: Sequence[_DecodeInput], decode_states: Sequence[Sequence[DecodeState]]
) -> list[list[Tensor]]:
    """Return the next token's scores [V] for each state of each sequence."""
    states = [state for states in decode_states for state in states]
    index = [job.index for (job, _, _), states in zip(inputs, decode_states, strict=True) for _ in states]
    predictions = iter(lm.predict(states, pool, index))
    rows = [
        [sequence.whole_word_scores(row, tokens[1 : 1 + n]) for n, row in enumerate(islice(predictions, len(states)))]
        for (_, sequence, tokens), states in zip(inputs, decode_states, strict=True)
    ]
    if len(states) == len(inputs):
        predraw([sequence.sampler for _, sequence, _ in inputs], [row for (row,) in rows])
    return rows
