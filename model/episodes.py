"""The episodic memory on a base: which episodes a request reads, and their keys and values at every layer.

Rows (`model.memory.episodic`) are durable token ids. The keys and values of an episode are its fast weights at each
layer. The frozen base makes them from the episode alone, after a fixed header, so that they depend on nothing else.
They are kept in int8 while the episode is hot, and made again with the same bits when it is not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.base.backbone import Backbone
from model.base.kv_cache import DenseCache, KVCache
from model.base.rotary import apply_rotary
from model.memory import Draft, Pool, SiteConfig
from model.memory.episodic.layout import HEADER, LENGTH, OFFSET, ORDINAL, VERSION
from model.memory.episodic.search import Floats, Ints, count_words, query_words, score_episodes
from model.memory.episodic.word_tables import WordTables, cut_spans, is_question, words_of

SITE = "episodes"
SLOTS = 16_384  # a million tokens in full spans
SPAN_TOKENS = 64
MAX_EPISODES = 4  # that a request reads
MIN_COVER = 0.2  # share of the query's weight that an episode's words must have
MIN_RELATIVE = 0.6  # of the best episode's score
SAME_CUE = 0.5  # episodes that share so much of their words say the same of the same: the newest counts


@dataclass(frozen=True)
class RecallRequest:
    """The bounds of what a segment may recall: at most `max_tokens` tokens of episodes, which stand before token `at`.

    query: the tokens [start, stop) of the segment that ask. header: the tokens before an episode when its keys and
    values are made. separator: the tokens after each episode.
    """

    at: int
    query: tuple[int, int]
    max_tokens: int
    header: tuple[int, ...]
    separator: tuple[int, ...] = ()

    def num_tokens(self, episodes: Sequence[Episode]) -> int:
        """Return the number of tokens that episodes take in a cache."""
        return sum(len(episode.token_ids) + len(self.separator) for episode in episodes)

    def parts(self, start: int, length: int, block: int) -> list[tuple[int, int]]:
        """Return the parts [start, stop) of a prompt of `length` tokens, from token `start` on, that are run one after
        the other: blocks, of which one begins at `at`."""
        return list(pairwise([*range(start, self.at, block), *range(self.at, length, block), length]))


class Episode(NamedTuple):
    """An episode that was found. `offset` counts tokens from the start of the request that taught it."""

    token_ids: tuple[int, ...]
    ordinal: int
    version: int
    offset: int
    score: float


class _KeysAndValues(NamedTuple):
    """Keys and values of T tokens in int8, [L, H_kv, T, hd] each, with scales [L, H_kv, T, 1]."""

    keys: Tensor
    key_scales: Tensor
    values: Tensor
    value_scales: Tensor

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self)


def episodic_site() -> SiteConfig:
    """Return the configuration of the episodic site, which every memory of text has besides its trained sites."""
    return SiteConfig(SITE, "episodic", slots=SLOTS, k=1, width=SPAN_TOKENS)


class Episodes:
    """Writes, finds and reads the episodes of sessions. Only the engine's thread uses it.

    tables: of the tokenizer's vocabulary. hot_bytes: most bytes of keys and values that are kept.
    """

    def __init__(self, backbone: Backbone, tables: WordTables, *, hot_bytes: int) -> None:
        self._backbone = backbone
        self._tables = tables
        self._hot_bytes = hot_bytes
        self._hot: OrderedDict[tuple[object, tuple[int, ...], tuple[int, ...]], _KeysAndValues] = OrderedDict()
        self._bytes_held = 0
        self._header: tuple[tuple[int, ...], DenseCache] | None = None

    def prepare(self) -> None:
        """Run the search once if there are tables: its kernel is compiled at its first call."""
        if len(self._tables.is_word):
            count_words(
                np.zeros((1, SPAN_TOKENS), np.int32), np.ones(1, np.int32), np.zeros(1, np.uint32), self._tables
            )

    # --- write -----------------------------------------------------------------------------------------------------

    def learn(
        self, draft: Draft, token_ids: Sequence[int], learn: Sequence[int], *, version: int, offset: int = 0
    ) -> None:
        """Write the learned runs of a token sequence as episodes. Raises PoolFullError: roll the draft back.

        offset: of the first token, from the start of the request.
        """
        spans = [
            span
            for start, stop in _runs(learn)
            for span in cut_spans(token_ids, start, stop, self._tables, SPAN_TOKENS)
            if self._tables.is_word[np.asarray(token_ids[slice(*span)])].any()
        ][-SLOTS:]
        if not spans:
            return
        first = self._last_ordinal(draft.pool, draft.index) + 1
        ordinals = np.arange(first, first + len(spans))
        header = np.zeros((len(spans), HEADER), np.int32)
        tokens = np.zeros((len(spans), SPAN_TOKENS), np.int32)
        header[:, ORDINAL], header[:, VERSION] = ordinals, version
        for row, (start, stop) in enumerate(spans):
            header[row, LENGTH], header[row, OFFSET] = stop - start, offset + start
            tokens[row, : stop - start] = token_ids[start:stop]
        slots = torch.from_numpy((ordinals - 1) % SLOTS)
        draft.put(SITE, slots, [torch.from_numpy(header), torch.from_numpy(tokens)])

    # --- find ------------------------------------------------------------------------------------------------------

    def find(self, pool: Pool, index: int, token_ids: Sequence[int], request: RecallRequest) -> list[Episode]:
        """Return the episodes of a session that a segment reads, the oldest first.

        An episode whose words the segment has already, and an episode that only asks, is not read. Of episodes under
        the same cue, the newest is read.
        """
        header, tokens = self._rows(pool, index)
        query, prior = query_words(token_ids[slice(*request.query)], self._tables)
        if not len(header) or not len(query):
            return []
        scores, cover = score_episodes(tokens, header[:, LENGTH], query, prior, self._tables)
        present, found = _text(token_ids), list[Episode]()
        for row in _best_rows(np.where(cover >= MIN_COVER, scores, 0.0), header[:, ORDINAL]):
            ids = tuple(tokens[row, : header[row, LENGTH]].tolist())
            ordinal, version, offset = header[row, [ORDINAL, VERSION, OFFSET]].tolist()
            episode = Episode(ids, ordinal, version, offset, float(scores[row]))
            if _text(ids) in present or is_question(ids, self._tables):
                continue
            rival = next((other for other in found if self._same_cue(other.token_ids, ids)), None)
            if rival is not None and rival.ordinal > episode.ordinal:
                continue
            chosen = [*(other for other in found if other is not rival), episode]
            if request.num_tokens(chosen) <= request.max_tokens:
                found = chosen
            if len(found) == MAX_EPISODES:
                break
        return sorted(found, key=lambda episode: episode.ordinal)

    def _same_cue(self, one: Sequence[int], other: Sequence[int]) -> bool:
        a, b = ({word for word, _ in words_of(ids, self._tables)} for ids in (one, other))
        return len(a & b) >= SAME_CUE * len(a | b)

    def _rows(self, pool: Pool, index: int) -> tuple[Ints, Ints]:
        """Return the headers [n, 4] and the tokens [n, W] of a session's episodes."""
        header, tokens = (field.numpy()[self._cells(pool, index)] for field in pool.sites[SITE].fields)
        return header, tokens

    def _last_ordinal(self, pool: Pool, index: int) -> int:
        header = pool.sites[SITE].fields[0].numpy()[self._cells(pool, index), ORDINAL]
        return int(header.max(initial=0))

    def _cells(self, pool: Pool, index: int) -> Ints:
        cells: Ints = pool.sites[SITE].physical_cells[index]
        return cells[cells > 0]

    # --- read ------------------------------------------------------------------------------------------------------

    def append(self, cache: KVCache, owner: object, episodes: Sequence[Episode], request: RecallRequest) -> None:
        """Add the keys and values of episodes to a cache, in line, at the positions after its last token.

        owner: the session, which `forget` names.
        """
        for episode in episodes:
            rows = self._hot_rows(owner, request.header, (*episode.token_ids, *request.separator))
            keys = _dequantise(rows.keys, rows.key_scales, self._backbone.embedding.dtype)
            values = _dequantise(rows.values, rows.value_scales, self._backbone.embedding.dtype)
            shift = cache.length - len(request.header)
            cos, sin = self._backbone.cos[abs(shift)], self._backbone.sin[abs(shift)]
            sin = sin if shift >= 0 else -sin
            cache.append(apply_rotary(keys, cos, sin), values)

    def forget(self, owner: object) -> None:
        """Drop all keys and values of a session."""
        for key in [key for key in self._hot if key[0] == owner]:
            self._bytes_held -= self._hot.pop(key).nbytes

    def _hot_rows(self, owner: object, header: tuple[int, ...], token_ids: tuple[int, ...]) -> _KeysAndValues:
        key = (owner, header, token_ids)
        rows = self._hot.get(key)
        if rows is None:
            rows = self._make(header, token_ids)
            self._hot[key] = rows
            self._bytes_held += rows.nbytes
            while self._bytes_held > self._hot_bytes and len(self._hot) > 1:
                self._bytes_held -= self._hot.popitem(last=False)[1].nbytes
        self._hot.move_to_end(key)
        return rows

    def _make(self, header: tuple[int, ...], token_ids: tuple[int, ...]) -> _KeysAndValues:
        """Run the base over an episode after its header; return the keys and values of the episode's tokens."""
        start = len(header)
        if self._header is None or self._header[0] != header:
            cache = self._new_cache(start)
            self._forward(header, cache)
            self._header = header, cache
        cache = self._header[1].fork(start + len(token_ids))
        self._forward(token_ids, cache)
        keys, values = (field[:, :, start : cache.length] for field in (cache.keys, cache.values))
        return _KeysAndValues(*_quantise(keys), *_quantise(values))

    def _new_cache(self, capacity: int) -> DenseCache:
        embedding = self._backbone.embedding
        return DenseCache(self._backbone.config, capacity, device=embedding.device, dtype=embedding.dtype)

    def _forward(self, token_ids: Sequence[int], cache: KVCache) -> None:
        self._backbone(torch.tensor([list(token_ids)], device=self._backbone.embedding.device), [cache])


def _best_rows(scores: Floats, ordinals: Ints) -> list[int]:
    """Return the rows whose score is near the best, the best first; of equal scores the newest row first."""
    rows = np.flatnonzero((scores > 0) & (scores >= MIN_RELATIVE * scores.max()))
    return sorted(rows.tolist(), key=lambda row: (-scores[row], -ordinals[row]))


def _runs(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Return the ranges [start, stop) in which a mask is not 0."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask).astype(np.bool_).astype(np.int8), [0]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _text(token_ids: Sequence[int]) -> bytes:
    """Return token ids as text in which another such text can be found."""
    return b"," + b"".join(b"%d," % token for token in token_ids)


def _quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return values [..., hd] in int8, and their scales [..., 1]."""
    scales = (values.float().abs().amax(-1, keepdim=True) / 127.0).clamp_min(1e-12)
    return (values.float() / scales).round().to(torch.int8), scales


def _dequantise(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (values.float() * scales).to(dtype)
