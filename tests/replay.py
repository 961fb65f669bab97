"""A reference that applies a session's turns to the model alone: no server, no store, no scheduler, no neighbours.

The result is what the session must be, bit for bit, if each of the turns was learned exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from model.adaptive_lm import AdaptiveLM, DecodeState, Scores
from model.base.checkpoint import load_backbone
from model.decode.backend import choose_decode_step
from model.episodes import Episodes
from model.memory import Draft, SiteRows
from model.memory.episodic.borrowed import LEARNED, REPLY
from model.memory.episodic.lexicon import shipped_lexicon
from model.memory.episodic.whole_words import WholeWords
from model.memory.episodic.word_tables import build_tables
from model.memory.initial import default_config, random_memory
from model.recall import RecallPlan
from model.text.sampling import Sampler, SamplingParams
from model.text.tokenizer import Tokenizer
from service.engine.text_sequence import TextStream
from service.settings import Settings
from service.turns import prompts
from service.turns.prompts import ChatPrompt, EncodedPrompt, Prompt, TextPrompt

Json = dict[str, Any]
Rows = dict[str, dict[int, bytes]]
ROWS = 300_000  # room in the reference's memory pool


@dataclass(frozen=True)
class Counters:
    """The counters of a session, under the names of its stored metadata."""

    tokens_learned: int = 0
    rows: int = 0
    bytes: int = 0
    proof_tokens: int = 0
    loss_sum: float = 0.0
    frozen_loss_sum: float = 0.0
    requests: int = 0
    digests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Version:
    """The state of a session at one version: all rows and scalars by site and slot, and the counters."""

    rows: Rows = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)

    def diff(self, rows: Rows, meta: Any) -> list[str]:
        """Return descriptions of the differences to a stored session: its rows by site and slot, and its metadata."""
        expected, actual = (
            {site: by_slot for site, by_slot in sites.items() if by_slot} for sites in (self.rows, rows)
        )
        different_rows = [
            f"{site} slot {slot}"
            for site in expected.keys() | actual.keys()
            for slot in expected.get(site, {}).keys() | actual.get(site, {}).keys()
            if expected.get(site, {}).get(slot) != actual.get(site, {}).get(slot)
        ]
        return different_rows + [
            f"{counter.name} {getattr(meta, counter.name)}, alone {getattr(self.counters, counter.name)}"
            for counter in fields(Counters)
            if getattr(meta, counter.name) != getattr(self.counters, counter.name)
        ]


@dataclass
class _LearnedCounts:
    """The amounts that a turn adds to the counters."""

    tokens: int = 0
    segments: int = 0
    proof_tokens: int = 0
    loss: float = 0.0
    frozen_loss: float = 0.0

    def add(self, scores: Scores | None) -> None:
        if scores is None:
            return
        learned = scores.learned
        self.tokens += int(learned.sum())
        if scores.frozen is not None:
            self.proof_tokens += int(learned.sum())
            self.loss += -float(scores.adapted[learned].double().sum())
            self.frozen_loss -= float(scores.frozen[learned].double().sum())


class ReferenceModel:
    """The model that a server makes from a base for which no memory is shipped."""

    def __init__(self, folder: Path) -> None:
        backbone = load_backbone(folder)
        hidden_size = backbone.config.hidden_size
        memory = random_memory(default_config(hidden_size), seed=0)
        self.tokenizer = Tokenizer.load(folder)
        tables = build_tables([self.tokenizer.text_bytes(token) for token in range(backbone.config.vocab_size)])
        self.episodes = Episodes(backbone, tables, shipped_lexicon(), self.tokenizer.decode, None, hot_bytes=0)
        self.recall = RecallPlan.of(self.tokenizer, Settings.model_fields["recall_tokens"].default)
        decoder = backbone.fp16_decoder(choose_decode_step(backbone))
        self.lm = AdaptiveLM(backbone, memory, decoder=decoder, episodes=self.episodes)
        self.context = backbone.config.max_context
        self.block = self.lm.memory.config.block
        self.pool = self.lm.new_pool(rows=ROWS, sessions=4)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block on one thread, as test servers do: sums that are split otherwise differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


class Replay:
    """The reference of one session; `versions[v]` is its state at version v.

    Use it within `one_thread`, and call `end` afterwards.
    """

    def __init__(self, model: ReferenceModel) -> None:
        self.versions = [Version()]
        self._model = model
        self._index = model.pool.open()

    def end(self) -> None:
        self._model.pool.close(self._index)

    def rollback(self, version: int) -> None:
        self._model.pool.close(self._index)
        self.versions.append(self.versions[version])
        stored = {site: _pack_rows(by_slot) for site, by_slot in self.versions[-1].rows.items() if by_slot}
        self._index = self._model.pool.open(stored)

    def observe(self, prompt: Prompt) -> None:
        """Learn a text, or the new part of a chat."""
        model, counters = self._model, self.versions[-1].counters
        start = model.tokenizer.start_token_id
        encoded = prompts.encode(prompt, model.tokenizer, counters.digests, reply=False)
        encoded = prompts.without_bos(encoded, start)
        learned, draft = _LearnedCounts(), model.pool.draft(self._index)
        for segment in prompts.segments(encoded, model.context, start, learn=True, score=False):
            self._prefill(segment.token_ids, segment.learn, 0, draft, learned)
        self._commit(draft, learned, encoded.digests)

    def complete(self, body: Json) -> str | None:
        """Apply a completion request. Return the answer if the session learns or remembers it, else None."""
        prompt: Prompt = ChatPrompt(body["messages"]) if "messages" in body else TextPrompt(body["prompt"])
        known = self.versions[-1].counters.digests
        encoded = prompts.encode(prompt, self._model.tokenizer, known, reply=True)
        adapt, learn = body["adapt"], body["learn"]
        learns_prompt, learns_reply = learn in ("prompt", "all"), adapt == "both" and learn in ("completion", "all")
        is_chat = adapt == "both" and isinstance(prompt, ChatPrompt)
        learned, draft = _LearnedCounts(), self._model.pool.draft(self._index)
        extra_tokens = body["max_tokens"] if adapt == "both" else 0
        cache, decode_state = self._prefill(
            encoded.token_ids, encoded.learn if learns_prompt else None, extra_tokens, draft, learned
        )
        output = None
        if learns_reply or is_chat:
            reading = self._with_episodes(encoded, extra_tokens, isinstance(prompt, ChatPrompt), draft, decode_state)
            output = self._generate(
                body,
                encoded,
                cache,
                decode_state,
                draft,
                learned if learns_reply else None,
                scores_frozen=learns_prompt,
                reading=reading,
            )
        digests = list(encoded.digests) if learns_prompt else []
        if is_chat and output is not None:
            digests += prompts.reply_digests(body["messages"], [output])
        self._commit(draft, learned, digests)
        return output

    def _prefill(
        self,
        tokens: Sequence[int],
        learn: Sequence[int] | None,
        extra_tokens: int,
        draft: Draft,
        learned: _LearnedCounts,
    ) -> tuple[Any, DecodeState]:
        """Read a request's tokens block by block. The cache has room for `extra_tokens` more."""
        model, decode_state = self._model, None
        cache = model.lm.backbone.new_cache(len(tokens) + extra_tokens)
        without_rows = model.episodes.without_rows(tokens, learn or bytearray(len(tokens)))
        for start in range(0, len(tokens), model.block):
            part = slice(start, start + model.block)
            mask = None if learn is None else learn[part]
            decode_state, scores = model.lm.block(
                tokens[part],
                cache,
                model.pool,
                draft.index,
                decode_state=decode_state,
                learn=mask,
                without_rows=without_rows[part],
                draft=draft,
                score_frozen=True,
            )
            learned.add(scores)
        if learn is not None and any(learn):
            learned.segments += 1
            self._keep_episodes(tokens, learn, draft)
        assert decode_state is not None
        return cache, decode_state

    def _keep_episodes(self, tokens: Sequence[int], learn: Sequence[int], draft: Draft, offset: int = 0) -> None:
        if self._model.recall.max_tokens:
            spans = self._model.episodes.cut(tokens, learn, offset)
            self._model.episodes.write(draft, spans, version=len(self.versions))

    def _with_episodes(
        self, encoded: EncodedPrompt, extra_tokens: int, is_chat: bool, draft: Draft, after_prompt: DecodeState
    ) -> tuple[Any, DecodeState, WholeWords] | None:
        """Return a cache and the state after a prompt that reads episodes, and the names and numbers that the reply
        copies whole; None if it finds none."""
        model, tokens = self._model, encoded.token_ids
        request = model.recall.request(encoded.token_ids, encoded.question, chat=is_chat)
        if request is None:
            return None
        room = model.lm.backbone.config.max_context - len(tokens) - extra_tokens
        found = model.episodes.find(model.pool, self._index, tokens, request, room)
        if not found:
            return None
        cache, state = model.lm.backbone.new_cache(model.lm.backbone.config.max_context), None
        first = request.at // model.block * model.block
        cuts = sorted({*range(0, first + 1, model.block), request.at, *range(request.at, len(tokens), model.block)})
        for start, stop in pairwise([*cuts, len(tokens)]):
            if start == request.at:
                model.episodes.append(cache, None, found, request)
            part = tokens[start:stop]
            state, _ = model.lm.block(part, cache, model.pool, draft.index, decode_state=state)
        assert state is not None
        return cache, replace(state, trust=after_prompt.trust), model.episodes.whole_words(found)

    def _generate(
        self,
        body: Json,
        encoded: EncodedPrompt,
        cache: Any,
        decode_state: DecodeState,
        draft: Draft,
        learned: _LearnedCounts | None,
        *,
        scores_frozen: bool,
        reading: tuple[Any, DecodeState, WholeWords] | None,
    ) -> str:
        """Generate a reply token by token, from `reading` if the prompt reads episodes.

        With `learned`, each block is learned as soon as its text can no longer become a stop string.
        """
        model, text = self._model, TextStream(self._model.tokenizer.stream(), tuple(body.get("stop", ())))
        sampler = Sampler(SamplingParams(temperature=body["temperature"], seed=body["seed"]))
        output, num_learned, finished, learned_state = list[int](), 0, False, decode_state
        learned_cache = cache
        cache, decode_state, whole_words = reading or (cache, decode_state, None)
        while not finished:
            row = model.lm.predict([decode_state], model.pool, [draft.index])[0]
            token = sampler.draw(row if whole_words is None else whole_words.adjust(row, output))
            if token in model.tokenizer.eos_token_ids:
                text.finish()
                finished = True
            else:
                output.append(token)
                finished = text.push(token)
                if not finished and len(output) == body["max_tokens"]:
                    text.finish()
                    finished = True
            pending = not finished
            while learned is not None and (count := min(model.block, text.num_released_tokens - num_learned)) > 0:
                if count < model.block and not finished:
                    break
                length = learned_cache.length
                learned_cache.truncate(len(encoded.token_ids) + num_learned)
                part = output[num_learned : num_learned + count]
                marks = [REPLY if "messages" in body else LEARNED] * (num_learned + count)
                before = encoded.learn if scores_frozen else bytearray(len(encoded.token_ids))
                without_rows = model.episodes.without_rows(
                    [*encoded.token_ids, *output[: len(marks)]], [*before, *marks]
                )
                learned_state, scores = model.lm.block(
                    part,
                    learned_cache,
                    model.pool,
                    draft.index,
                    decode_state=learned_state,
                    learn=marks[-count:],
                    without_rows=without_rows[-count:],
                    draft=draft,
                    score_frozen=scores_frozen,
                )
                learned.add(scores)
                num_learned += count
                learned_cache.length = max(learned_cache.length, length)
                if learned_cache is cache and num_learned == len(output):
                    decode_state, pending = learned_state, False
            if pending:
                decode_state = model.lm.decode([output[-1]], [cache], [decode_state], model.pool, [draft.index])[0]
        if num_learned:
            self._keep_episodes(output[:num_learned], [True] * num_learned, draft, len(encoded.token_ids))
        return text.text

    def _commit(self, draft: Draft, learned: _LearnedCounts, new_digests: Sequence[str]) -> None:
        """Commit the draft as a new version, or drop the draft if nothing changed."""
        pool, before = self._model.pool, self.versions[-1]
        touched, num_rows = draft.touched(), pool.num_rows(draft.index)
        counters = before.counters
        digests = prompts.merge_digests(counters.digests, new_digests)
        changed = bool(touched or learned.tokens or not set(digests) <= set(counters.digests))
        if not changed:
            draft.rollback()
            return
        draft.commit()
        size = sum(count * pool.sites[site].config.row_bytes for site, count in num_rows.items())
        self.versions.append(
            Version(
                _overlay(before.rows, touched),
                Counters(
                    counters.tokens_learned + learned.tokens,
                    sum(num_rows.values()) if touched else counters.rows,
                    size if touched else counters.bytes,
                    counters.proof_tokens + learned.proof_tokens,
                    counters.loss_sum + learned.loss,
                    counters.frozen_loss_sum + learned.frozen_loss,
                    counters.requests + learned.segments,
                    digests,
                ),
            )
        )


def _overlay(rows: Rows, touched: Mapping[str, SiteRows]) -> Rows:
    merged = dict(rows)
    for site, batch in touched.items():
        written = zip(batch.slots.tolist(), batch.data.numpy(), strict=True)
        merged[site] = merged.get(site, {}) | {slot: row.tobytes() for slot, row in written}
    return merged


def _pack_rows(by_slot: Mapping[int, bytes]) -> SiteRows:
    slots = sorted(by_slot)
    data = torch.frombuffer(bytearray(b"".join(by_slot[slot] for slot in slots)), dtype=torch.uint8)
    return SiteRows(torch.tensor(slots, dtype=torch.int32), data.view(len(slots), -1))
