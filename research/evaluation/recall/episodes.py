"""The arm with the episodic memory: replies read the keys and values of the episodes that their question names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.adaptive_lm import AdaptiveLM
from model.episodes import Episode, Episodes, RecallRequest
from model.memory.episodic.lexicon import shipped_lexicon
from model.recall import RecallPlan
from research.evaluation.prequential import new_pool
from research.evaluation.recall.arms import Answer
from research.evaluation.recall.memory import MemoryArm
from research.evaluation.recall.prompt import with_texts
from research.evaluation.recall.speaker import Prefilled, Speaker, first_sentence

HOT_BYTES = 256 * 2**20


class EpisodesArm(MemoryArm):
    """The base with the session memory, its episodes included. Nothing is put in the prompt."""

    name, title = "episodes", "the memory with episodes"

    def __init__(self, speaker: Speaker, tokens: int) -> None:
        super().__init__(speaker)
        tokenizer, lm = speaker.tokenizer, speaker.lm
        decode, encoder, prefix = tokenizer.decode, speaker.encoder, speaker.prefix
        self._episodes = Episodes(
            lm.backbone, self._tables, shipped_lexicon(), decode, encoder, hot_bytes=HOT_BYTES, prefix=prefix
        )
        self._lm = AdaptiveLM(lm.backbone, lm.memory, decoder=lm.decoder, episodes=self._episodes)
        self._plan = RecallPlan.of(tokenizer, tokens, prefix)
        self.identity = (self.identity, tokens, None if prefix is None else float(prefix.values.sum()))
        self.pool = new_pool(self._lm)
        self.session, self._version = self.pool.open(), 0

    def forget(self) -> None:
        super().forget()
        self._version = 0
        self._episodes.forget(None)

    def ask_all(self, questions: Sequence[str], max_tokens: int) -> list[Answer]:
        return [Answer(text.strip(), spans) for text, spans in self._replies(questions, max_tokens, chat=True)]

    def complete_all(self, cues: Sequence[str], max_tokens: int) -> list[Answer]:
        return [Answer(first_sentence(text), spans) for text, spans in self._replies(cues, max_tokens, chat=False)]

    def find(self, query: str, limit: int) -> list[str]:
        """Return the learned texts that fit a question best, the best first."""
        found = self._episodes.rank(self.pool, self.session, self._speaker.encode(query), limit)
        return [self._speaker.tokenizer.decode(episode.token_ids) for episode in found]

    def _prompt(self, text: str, *, chat: bool) -> tuple[list[int], RecallRequest | None]:
        """Return the tokens of a request and what its reply may recall."""
        tokenizer = self._speaker.tokenizer
        if not chat or not tokenizer.has_chat_template:
            ids = self._speaker.chat_ids(with_texts((), text)) if chat else self._speaker.text_ids(text)
            return ids, self._plan.request(ids, None, chat=False)
        encoded = tokenizer.encode_chat(with_texts((), text))
        ids = list(encoded.token_ids)
        return ids, self._plan.request(ids, encoded.spans[-1], chat=True)

    def _find(self, ids: Sequence[int], request: RecallRequest | None) -> list[Episode]:
        return [] if request is None else self._episodes.find(self.pool, self.session, ids, request)

    def _replies(self, texts: Sequence[str], max_tokens: int, *, chat: bool) -> list[tuple[str, tuple[str, ...]]]:
        """Return the reply to each text, and the episodes that it read."""
        prompts = [self._prompt(text, chat=chat) for text in texts]
        found = [self._find(*prompt) for prompt in prompts]
        queue = list(zip(prompts, found, strict=True))

        def prefill(ids: list[int], capacity: int) -> Prefilled:
            (_, request), episodes = queue.pop(0)
            return self._prefill(ids, capacity, request, episodes)

        only_ids = [ids for ids, _ in prompts]
        copies = [self._episodes.whole_words(episodes) for episodes in found]
        replies = self._speaker.prefilled_texts(only_ids, max_tokens, prefill, self.pool, self.session, copies)
        decode = self._speaker.tokenizer.decode
        spans = [tuple(decode(each.token_ids) for each in episodes if each.ordinal) for episodes in found]
        return list(zip(replies, spans, strict=True))

    def _prefill(
        self, ids: list[int], capacity: int, request: RecallRequest | None, episodes: Sequence[Episode]
    ) -> Prefilled:
        """Run a prompt block by block, with the episodes in their place, as a server does."""
        state = None
        if request is None or not episodes:
            request = RecallRequest(len(ids), query=(0, 0), max_tokens=0, header=())  # reads nothing, at the end
        cache = self._lm.new_cache(capacity + request.cached_tokens(episodes))
        for start, stop in request.parts(0, len(ids), self._lm.memory.config.block):
            if start == request.at:
                self._episodes.append(cache, None, episodes, request)
            state, _ = self._lm.block(ids[start:stop], cache, self.pool, self.session, decode_state=state)
        assert state is not None
        return cache, state

    @torch.inference_mode()
    def _learn(self, ids: Sequence[int], learn: Sequence[int]) -> None:
        super()._learn(ids, learn)
        self._version += 1
        draft = self.pool.draft(self.session)
        self._episodes.write(draft, self._episodes.cut(ids, learn), version=self._version)
        draft.commit()
