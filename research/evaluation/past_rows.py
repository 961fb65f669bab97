"""Arms with the memory whose scores also read keys and values of the past at every layer, before the request.

A request is run twice, as a server does: its scores read the past, and each block is then learned without it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from model.adaptive_lm import AdaptiveLM
from model.base.kv_cache import KVCache
from model.episodes import Episodes
from model.memory import Draft
from model.memory.episodic.lexicon import shipped_lexicon
from model.memory.episodic.word_tables import build_tables
from model.recall import NEWEST_TOKENS, ReadingWeight, RecallPlan
from model.text.tokenizer import Tokenizer
from research.evaluation.arms import Outcome, SessionArm, Setting, Subject, state_bytes
from research.evaluation.prequential import Clock, Progress

HOT_BYTES = 64 * 2**20


class _PastRows(SessionArm):
    """The common part of both arms. At most `NEWEST_TOKENS` tokens of the past are read."""

    own_base = True

    @torch.inference_mode()
    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        session, found, clock = self.pool.open(), list[Tensor](), Clock()
        history: list[int] = []
        for request in subject.stream.requests:
            found += self._score(session, [self.bos, *request], history)
            history += request
            progress(1)
        seconds, size = clock.seconds, state_bytes(self.pool.dump(session))
        self.pool.close(session)
        return Outcome({"log_probs": torch.cat(found)}, seconds, size)

    def _score(self, session: int, ids: list[int], history: list[int]) -> Iterator[Tensor]:
        """Yield log p of each block's targets, then learn the block. BOS reads nothing."""
        draft, block, decode_state = self.pool.draft(session), self.lm.memory.config.block, None
        reading, plain = self.lm.new_cache(len(ids) + NEWEST_TOKENS), self.lm.new_cache(len(ids))
        read_state, _ = self.lm.block(ids[:1], reading, self.pool, draft.index, decode_state=None)
        self._read_past(reading, draft, history)
        weight, all_scored = ReadingWeight(), [True] * block
        for start in range(0, len(ids), block):
            part, asked = ids[start : start + block], ids[max(1, start) : start + block]
            read_state, scores = self.lm.block(
                asked, reading, self.pool, draft.index, decode_state=read_state, score=all_scored[: len(asked)]
            )
            decode_state, plain_scores = self.lm.block(
                part,
                plain,
                self.pool,
                draft.index,
                decode_state=decode_state,
                score=all_scored[: len(part)],
                learn=all_scored[: len(part)],
                draft=draft,
            )
            assert scores is not None and plain_scores is not None
            yield weight.mix(scores.adapted, plain_scores.adapted)
        self._keep(draft, ids)
        draft.commit()

    @abstractmethod
    def _read_past(self, cache: KVCache, draft: Draft, history: list[int]) -> None:
        """Add keys and values of the past to a cache."""

    def _keep(self, draft: Draft, ids: list[int]) -> None:
        """Keep a request for later ones."""


class NewestEpisodes(_PastRows):
    """The newest episodes, which the base has read apart from one another."""

    name, title = "episodes", "memory and the newest episodes"

    def __init__(self, lm: AdaptiveLM, bos: int, tokenizer: Tokenizer) -> None:
        tables = build_tables([tokenizer.text_bytes(token) for token in range(lm.backbone.config.vocab_size)])
        self._episodes = Episodes(lm.backbone, tables, shipped_lexicon(), tokenizer.decode, None, hot_bytes=HOT_BYTES)
        super().__init__(AdaptiveLM(lm.backbone, lm.memory, decoder=lm.decoder, episodes=self._episodes), bos)
        self._request = RecallPlan.of(tokenizer, NEWEST_TOKENS).newest()

    def _read_past(self, cache: KVCache, draft: Draft, history: list[int]) -> None:
        found = self._episodes.find(self.pool, draft.index, [], self._request)
        self._episodes.append(cache, None, found, self._request)

    def _keep(self, draft: Draft, ids: list[int]) -> None:
        self._episodes.write(draft, self._episodes.cut(ids, [False] + [True] * (len(ids) - 1)), version=1)


class LastTokensMemory(_PastRows):
    """As many of the last tokens, which the base reads anew before each request."""

    name, title = "memory+last-tokens", "memory and the last tokens in context, equal tokens"

    def _read_past(self, cache: KVCache, draft: Draft, history: list[int]) -> None:
        if history:
            self.lm.backbone(torch.tensor([history[-NEWEST_TOKENS:]]), [cache])
