"""The episodic memory on a base: which episodes a request reads, and their keys and values at every layer.

Rows (`model.memory.episodic`) are durable token ids. The keys and values of an episode are its fast weights at each
layer. The frozen base makes them from the episode alone, after a fixed header, so that they depend on nothing else.
They are kept in int8 while the episode is hot, and made again with the same bits when it is not.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.base.backbone import Backbone
from model.base.kv_cache import DenseCache, KVCache
from model.memory import Draft, Pool, SiteConfig
from model.memory.episodic.borrowed import REPLY, without_rows
from model.memory.episodic.changes import tells_change
from model.memory.episodic.choice import Matches, choose
from model.memory.episodic.layout import HEADER, LENGTH, OFFSET, ORDINAL, VERSION
from model.memory.episodic.lexicon import Lexicon
from model.memory.episodic.search import Floats, Ints, cosines, match_words, query_words
from model.memory.episodic.speaker import names_owner, speaks_of_speaker
from model.memory.episodic.statements import asks_for_fact, asks_for_help, is_statement, names_of
from model.memory.episodic.whole_words import WholeWords
from model.memory.episodic.word_tables import WordTables, cut_spans, is_question, sentences, words_of
from model.reading_prefix import ReadingPrefix
from model.text.sentence_encoder import SentenceEncoder

SITE, MEANINGS = "episodes", "meanings"
SLOTS = 20_480  # a million tokens: spans end with sentences and have 53 tokens on average
SPAN_TOKENS = 64
MEANING_NUMBERS = 384
MAX_EPISODES = 4  # that a request reads
RUN_EPISODES = 4  # whose keys and values are made together when the newest are read
READINGS = 2  # times that each one found stands in a request: read twice, a small base uses what it reads more often
FIRST_ALONE, NEIGHBOUR_SHARE = 2, 0.25
MAX_NEARER = 64  # older episodes that are nearer to a change than the one it may replace, and are looked at
MAX_SENTENCES = 8  # of a query, from its end, that are searched with


@dataclass(frozen=True)
class RecallRequest:
    """The bounds of what a segment may recall: at most `max_tokens` tokens of episodes, which stand before token `at`.

    query: the tokens [start, stop) of the segment that ask; None: the newest episodes are read, whatever the segment
    says. header: the tokens before an episode when its keys and values are made. separator: the tokens after each
    episode. prefix: number of tokens of the reading prefix, which stands after the episodes. untold: the tokens that
    are read in the place of an episode where a chat begins with a question of the speaker and nothing was found.
    """

    at: int
    query: tuple[int, int] | None
    max_tokens: int
    header: tuple[int, ...]
    separator: tuple[int, ...] = ()
    prefix: int = 0
    untold: tuple[int, ...] = ()

    def num_tokens(self, episodes: Sequence[Episode]) -> int:
        """Return the number of tokens of episodes."""
        return sum(len(episode.token_ids) + len(self.separator) for episode in episodes)

    def cached_tokens(self, episodes: Sequence[Episode]) -> int:
        """Return the number of tokens that episodes take in a cache, with the reading prefix."""
        return self.readings * self.num_tokens(episodes) + self.prefix if episodes else 0

    @property
    def max_cached_tokens(self) -> int:
        """Return the number of tokens that episodes take in a cache at most, with the reading prefix."""
        return self.readings * self.max_tokens + self.prefix

    @property
    def readings(self) -> int:
        """Return how many times each episode stands in a cache."""
        return 1 if self.query is None else READINGS

    def parts(self, start: int, length: int, block: int) -> list[tuple[int, int]]:
        """Return the parts [start, stop) of a prompt of `length` tokens, from token `start` on, that are run one after
        the other: blocks, of which one begins at `at`. Those of a text that is scored end where its blocks end."""
        if self.query is None:
            return list(pairwise(sorted({self.at, *range(start, length, block), length})))
        return list(pairwise([*range(start, self.at, block), *range(self.at, length, block), length]))


class Episode(NamedTuple):
    """An episode that was found. `offset` counts tokens from the start of the request that taught it.

    That nothing was told has the ordinal 0, and no version.
    """

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


class Span(NamedTuple):
    """A learned span, which becomes an episode. `offset` counts tokens from the start of the request."""

    token_ids: tuple[int, ...]
    offset: int


class _Rows(NamedTuple):
    """The n episodes of a session: header [n, HEADER], tokens [n, SPAN_TOKENS] and vectors of their meaning [n, d].

    A vector is 0 where another encoder, or none, has learned; without an encoder there are none.
    """

    header: Ints
    tokens: Ints
    meanings: NDArray[np.int8] | None

    def text(self, row: int) -> tuple[int, ...]:
        return tuple(self.tokens[row, : self.header[row, LENGTH]].tolist())

    def episode(self, row: int, score: float) -> Episode:
        ordinal, version, offset = self.header[row, [ORDINAL, VERSION, OFFSET]].tolist()
        return Episode(self.text(row), ordinal, version, offset, score)


def episodic_sites() -> tuple[SiteConfig, SiteConfig]:
    """Return the configurations of the sites that every memory of text has besides its trained sites.

    The episodes are one, and the vectors of their meaning, in the same slots, are the other: a session that has learned
    without an encoder lacks the latter's rows.
    """
    return (
        SiteConfig(SITE, "episodic", slots=SLOTS, k=1, width=SPAN_TOKENS),
        SiteConfig(MEANINGS, "meaning", slots=SLOTS, k=1, width=MEANING_NUMBERS),
    )


class Episodes:
    """Writes, finds and reads the episodes of sessions. Only the engine's thread uses it, except for `only_asks`.

    tables: of the tokenizer's vocabulary. lexicon: frequencies of words. decode: returns the text of token ids.
    encoder: of texts, as vectors of `MEANING_NUMBERS`; None: episodes are found by their words alone. prefix: what
    replies to chats read after the episodes. hot_bytes: most bytes of keys and values that are kept.
    """

    def __init__(
        self,
        backbone: Backbone,
        tables: WordTables,
        lexicon: Lexicon,
        decode: Callable[[Sequence[int]], str],
        encoder: SentenceEncoder | None,
        *,
        hot_bytes: int,
        prefix: ReadingPrefix | None = None,
    ) -> None:
        self._backbone, self.prefix = backbone, prefix
        self._tables, self._lexicon, self._decode, self.encoder = tables, lexicon, decode, encoder
        self._hot_bytes = hot_bytes
        self._hot: OrderedDict[tuple[Hashable, tuple[int, ...], tuple[int, ...]], _KeysAndValues] = OrderedDict()
        self._bytes_held = 0
        self._header: tuple[tuple[int, ...], DenseCache] | None = None

    def prepare(self) -> None:
        """Run the search once if there are tables: its kernels are compiled at their first calls."""
        if len(self._tables.is_word):
            tokens, lengths = np.zeros((1, SPAN_TOKENS), np.int32), np.ones(1, np.int32)
            match_words(tokens, lengths, np.zeros(1, np.uint32), np.zeros(1), self._tables)
            cosines(np.zeros((1, MEANING_NUMBERS), np.int8), np.zeros(MEANING_NUMBERS, np.int8))

    # --- write -----------------------------------------------------------------------------------------------------

    def cut(self, token_ids: Sequence[int], learn: Sequence[int], offset: int = 0) -> list[Span]:
        """Return the spans into which the learned runs of a token sequence are cut; those without words are left out.

        offset: of the first token, from the start of the request.
        """
        return [
            Span(tuple(token_ids[start:stop]), offset + start)
            for first, last in _runs(learn)
            for start, stop in cut_spans(token_ids, first, last, self._tables, SPAN_TOKENS)
            if self._tables.is_word[np.asarray(token_ids[start:stop])].any()
        ][-SLOTS:]

    def write(self, draft: Draft, spans: Sequence[Span], *, version: int) -> None:
        """Write spans as the newest episodes, in order. Raises PoolFullError: roll the draft back."""
        if not spans:
            return
        first = self._last_ordinal(draft.pool, draft.index) + 1
        ordinals = np.arange(first, first + len(spans))
        header = np.zeros((len(spans), HEADER), np.int32)
        tokens = np.zeros((len(spans), SPAN_TOKENS), np.int32)
        header[:, ORDINAL], header[:, VERSION] = ordinals, version
        for row, span in enumerate(spans):
            header[row, LENGTH], header[row, OFFSET] = len(span.token_ids), span.offset
            tokens[row, : len(span.token_ids)] = span.token_ids
        slots = torch.from_numpy((ordinals - 1) % SLOTS)
        draft.put(SITE, slots, [torch.from_numpy(header), torch.from_numpy(tokens)])
        if self.encoder is not None:
            made_by = np.stack([ordinals, np.full(len(spans), self.encoder.id)], 1).astype(np.int32)
            vectors = np.stack([self.encoder(self._decode(span.token_ids)) for span in spans])
            draft.put(MEANINGS, slots, [torch.from_numpy(made_by), torch.from_numpy(vectors)])

    def without_rows(self, token_ids: Sequence[int], learn: Sequence[int]) -> Sequence[int]:
        """Return which tokens of a request are learned without a row: the words that a reply in it has borrowed."""
        if REPLY not in learn or not len(self._tables.is_word):
            return bytearray(len(token_ids))
        return without_rows(token_ids, learn, self._tables, self._lexicon)

    def only_asks(self, token_ids: Sequence[int]) -> bool:
        """Return whether an episode only asks, so that no reply reads it. Any thread may call this."""
        return len(self._tables.asks) > 0 and is_question(token_ids, self._tables)

    # --- find ------------------------------------------------------------------------------------------------------

    def find(
        self, pool: Pool, index: int, token_ids: Sequence[int], request: RecallRequest, room: int = sys.maxsize
    ) -> list[Episode]:
        """Return the episodes of a session that a segment reads, the oldest first.

        What the segment has already, and what only asks, is not read. room: tokens that the segment's cache can still
        take. Nothing is found in an empty session.
        """
        max_tokens = min(request.max_tokens, (room - request.prefix) // request.readings)
        if request.query is None:
            return self._newest(self._rows(pool, index), max_tokens)
        rows, present = self._rows(pool, index), _text(token_ids)
        found, scores = list[Episode](), dict[int, float]()

        def may_read(row: int, names: frozenset[int] | None, of_speaker: bool) -> bool:
            text = rows.text(row)
            if _text(text) in present or is_question(text, self._tables):
                return False
            if of_speaker and not speaks_of_speaker(text, self._tables) and names_owner(self._decode(text)):
                return False
            return names is None or not names.isdisjoint(words_at(row))

        def words_at(row: int) -> list[int]:
            return words_of(rows.text(row), self._tables)

        for sentence, matches in self._matches(rows, token_ids[slice(*request.query)]):
            names, of_speaker = self._names_stated(sentence), self._asks_of_speaker(sentence)
            readable = partial(may_read, names=names, of_speaker=of_speaker)
            changes = partial(self._changes, rows, sentence)
            for row, score in choose(matches, words_at, readable, changes, MAX_EPISODES):
                scores[row] = max(score, scores.get(row, 0.0))
        for row, score in sorted(scores.items(), key=lambda item: -item[1]):
            episode = rows.episode(row, score)
            if len(found) < MAX_EPISODES and request.num_tokens([*found, episode]) <= max_tokens:
                found.append(episode)
        if not found and len(rows.header) and self._asks_untold(token_ids, request):
            untold = Episode(request.untold, 0, 0, 0, 0.0)
            return [untold] if request.num_tokens([untold]) <= max_tokens else []
        return sorted(found, key=lambda episode: episode.ordinal)

    def _asks_untold(self, token_ids: Sequence[int], request: RecallRequest) -> bool:
        """Return whether a chat is one question of the speaker, for what the speaker may have told before."""
        question = token_ids[slice(*request.query)] if request.query is not None else ()
        asks = is_question(question, self._tables) and asks_for_fact(question, self._tables)
        return bool(request.untold) and request.at == len(request.header) and asks and self._asks_of_speaker(question)

    def _names_stated(self, sentence: Sequence[int]) -> frozenset[int] | None:
        """Return the names of a sentence that states something, of which what it reads must have one; None: it asks.

        A sentence that asks for help alone has no names, so that it reads nothing.
        """
        if asks_for_help(sentence, self._tables):
            return frozenset()
        if not is_statement(sentence, self._tables):
            return None
        return names_of(sentence, self._tables, self._lexicon)

    def _asks_of_speaker(self, sentence: Sequence[int]) -> bool:
        """Return whether a sentence asks about the speaker and nobody else: what belongs to others is no answer."""
        names = names_of(sentence, self._tables, self._lexicon)
        return not names and speaks_of_speaker(sentence, self._tables)

    def _changes(self, rows: _Rows, sentence: Sequence[int], new: int, old: int) -> bool:
        """Return whether an episode tells a change of what an older one says, which a sentence has found.

        Of the episodes before the change, none that speaks of the same person is nearer to it in meaning.
        """
        text = rows.text(new)
        if not tells_change(text, sentence, self._tables, self._lexicon):
            return False
        if rows.meanings is None:
            return True
        near = cosines(rows.meanings, rows.meanings[new])
        nearer = np.flatnonzero((rows.header[:, ORDINAL] < rows.header[new, ORDINAL]) & (near > near[old]))
        if len(nearer) > MAX_NEARER:
            return False
        others = [other for row in nearer.tolist() if not is_question(other := rows.text(row), self._tables)]
        of_speaker = speaks_of_speaker(text, self._tables)
        return all(speaks_of_speaker(other, self._tables) != of_speaker for other in others)

    def _newest(self, rows: _Rows, max_tokens: int) -> list[Episode]:
        """Return the newest episodes of a session in runs of `RUN_EPISODES`, each as one episode, the oldest first.

        A run keeps its bounds while newer episodes come, so that its keys and values are made once.
        """
        found, num_tokens = list[Episode](), 0
        order = np.argsort(-rows.header[:, ORDINAL])
        for _, run in groupby(order.tolist(), lambda row: (rows.header[row, ORDINAL] - 1) // RUN_EPISODES):
            parts = [rows.episode(row, 0.0) for row in reversed(list(run))]
            token_ids = tuple(token for part in parts for token in part.token_ids)
            num_tokens += len(token_ids)
            if num_tokens > max_tokens:
                break
            found.append(parts[0]._replace(token_ids=token_ids))
        return found[::-1]

    def rank(self, pool: Pool, index: int, query: Sequence[int], limit: int) -> list[Episode]:
        """Return the episodes of a session that fit a sentence of a query best, the best first, read or not.

        After the `FIRST_ALONE` best, a part of what an episode's neighbours are worth counts as well: an answer often
        stands beside what the question repeats.
        """
        rows = self._rows(pool, index)
        fits = [matches.relevance(np.ones(len(matches.query), np.bool_)) for _, matches in self._matches(rows, query)]
        if not fits:
            return []
        relevance = np.max(fits, axis=0)
        by_age = np.argsort(rows.header[:, ORDINAL])
        beside = np.convolve(relevance[by_age], (NEIGHBOUR_SHARE, 1, NEIGHBOUR_SHARE))[1:-1]
        first = np.argsort(-relevance, kind="stable")[:FIRST_ALONE].tolist()
        order = dict.fromkeys([*first, *by_age[np.argsort(-beside, kind="stable")].tolist()])
        return [rows.episode(row, float(relevance[row])) for row in [*order][:limit]]

    def _matches(self, rows: _Rows, query: Sequence[int]) -> Iterator[tuple[Sequence[int], Matches]]:
        """Yield each of the last sentences of a query, and how the episodes match it."""
        words = query_words(query, self._tables)
        if not len(rows.header) or not len(words):
            return
        frequency = self._lexicon.frequencies(words)
        parts, weight = match_words(rows.tokens, rows.header[:, LENGTH], words, frequency, self._tables)
        for sentence in sentences(query, self._tables)[-MAX_SENTENCES:]:
            here = np.isin(words, query_words(sentence, self._tables))
            if here.any():
                cosine = self._cosines(rows, sentence)
                yield sentence, Matches(words[here], weight[here], parts[:, here], cosine, rows.header[:, ORDINAL])

    def _cosines(self, rows: _Rows, sentence: Sequence[int]) -> Floats:
        """Return the cosine [n] of each episode's vector and that of a sentence; 0 without an encoder."""
        if self.encoder is None or rows.meanings is None:
            return np.zeros(len(rows.header))
        return cosines(rows.meanings, self.encoder(self._decode(sentence)))

    def _rows(self, pool: Pool, index: int) -> _Rows:
        """Return the rows of a session."""
        slots = self._slots(pool, index)
        cells = _cells(pool, SITE, index, slots)
        header, tokens = (field.numpy()[cells] for field in pool.sites[SITE].fields)
        if self.encoder is None:
            return _Rows(header, tokens, None)
        cells = _cells(pool, MEANINGS, index, slots)
        made_by, meanings = (field.numpy()[cells] for field in pool.sites[MEANINGS].fields)
        meanings[(made_by[:, 0] != header[:, ORDINAL]) | (made_by[:, 1] != self.encoder.id)] = 0
        return _Rows(header, tokens, meanings)

    def _last_ordinal(self, pool: Pool, index: int) -> int:
        cells = _cells(pool, SITE, index, self._slots(pool, index))
        return int(pool.sites[SITE].fields[0].numpy()[cells, ORDINAL].max(initial=0))

    def _slots(self, pool: Pool, index: int) -> Ints:
        """Return the slots [n] in which a session has episodes."""
        return np.flatnonzero(pool.sites[SITE].physical_cells[index]).astype(np.int32)

    # --- read ------------------------------------------------------------------------------------------------------

    def append(self, cache: KVCache, owner: Hashable, episodes: Sequence[Episode], request: RecallRequest) -> None:
        """Add the keys and values of episodes to a cache, in line, at the positions after its last token, all of
        them as often as the request says, and then the reading prefix if the request wants it.

        owner: the session, which `forget` names.
        """
        for episode in [*episodes] * request.readings:
            rows = self._hot_rows(owner, request.header, (*episode.token_ids, *request.separator))
            keys = _dequantise(rows.keys, rows.key_scales, self._backbone.embedding.dtype)
            values = _dequantise(rows.values, rows.value_scales, self._backbone.embedding.dtype)
            cache.append(self._backbone.moved_keys(keys, cache.length - len(request.header)), values)
        if self.prefix is not None and request.prefix:
            keys, values = self.prefix.rows(untold=not any(episode.ordinal for episode in episodes))
            cache.append(self._backbone.moved_keys(keys, cache.length - self.prefix.start), values)

    def whole_words(self, episodes: Sequence[Episode]) -> WholeWords:
        """Return the names and numbers that a reply copies whole from the episodes it reads."""
        return WholeWords([episode.token_ids for episode in episodes], self._tables, self._lexicon)

    def forget(self, owner: Hashable) -> None:
        """Drop all keys and values of a session."""
        for key in [key for key in self._hot if key[0] == owner]:
            self._bytes_held -= self._hot.pop(key).nbytes

    def _hot_rows(self, owner: Hashable, header: tuple[int, ...], token_ids: tuple[int, ...]) -> _KeysAndValues:
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
            cache = self._backbone.new_cache(start)
            self._forward(header, cache)
            self._header = header, cache
        cache = self._header[1].fork(start + len(token_ids))
        self._forward(token_ids, cache)
        keys, values = (field[:, :, start : cache.length] for field in (cache.keys, cache.values))
        return _KeysAndValues(*_quantise(keys), *_quantise(values))

    def _forward(self, token_ids: Sequence[int], cache: KVCache) -> None:
        self._backbone(torch.tensor([list(token_ids)], device=self._backbone.embedding.device), [cache])


def _cells(pool: Pool, site: str, index: int, slots: Ints) -> Ints:
    """Return the cells [n] of a session's slots [n] in a site's fields; 0, the empty cell, for a slot without a row."""
    cells: Ints = pool.sites[site].physical_cells[index][slots]
    return cells


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
