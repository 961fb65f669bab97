"""The arm that ships today: the memory of the in-process model, written and read as a server does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.memory.episodic.borrowed import LEARNED, REPLY, without_rows
from model.memory.episodic.lexicon import shipped_lexicon
from model.memory.episodic.word_tables import build_tables
from research.evaluation.keystrokes import greedy_predictions
from research.evaluation.prequential import new_pool
from research.evaluation.recall.arms import Answer, OneByOne
from research.evaluation.recall.prompt import with_texts
from research.evaluation.recall.scenes import Message
from research.evaluation.recall.speaker import Speaker


class MemoryArm(OneByOne):
    """The base with the session memory. Nothing is put in the prompt."""

    name, title = "memory", "today's memory (lexical site)"

    def __init__(self, speaker: Speaker) -> None:
        self._speaker, self._lm = speaker, speaker.lm
        self.identity: object = self._lm.memory.fingerprint()
        tokenizer, vocabulary = speaker.tokenizer, range(self._lm.backbone.config.vocab_size)
        self._tables = build_tables([tokenizer.text_bytes(token) for token in vocabulary])
        self.pool = new_pool(self._lm)
        self.session = self.pool.open()

    def forget(self) -> None:
        self.pool.close(self.session)
        self.session = self.pool.open()

    def teach(self, messages: Sequence[Message]) -> None:
        """Learn the contents of the messages of one chat request, as a server does."""
        tokenizer = self._speaker.tokenizer
        if not tokenizer.has_chat_template:
            self.teach_text("\n".join(message["content"] for message in messages))
            return
        chat = tokenizer.encode_chat(messages, add_generation_prompt=True)
        learn = [0] * len(chat.token_ids)
        for message, (start, end) in zip(messages, chat.spans, strict=True):
            mark = REPLY if message["role"] == "assistant" else LEARNED
            learn[start:end] = [mark] * (end - start)
        self._learn(chat.token_ids, learn)

    def teach_text(self, text: str) -> None:
        """Learn a document, in requests as long as the context allows."""
        ids, step = self._speaker.encode(text), self._speaker.max_context - 1
        for start in range(0, len(ids), step):
            part = [self._speaker.tokenizer.start_token_id, *ids[start : start + step]]
            self._learn(part, [0] + [LEARNED] * (len(part) - 1))

    def ask_all(self, questions: Sequence[str], max_tokens: int) -> list[Answer]:
        chats = [with_texts((), question) for question in questions]
        return [Answer(text) for text in self._speaker.recalled_answers(chats, max_tokens, self.pool, self.session)]

    def complete_all(self, cues: Sequence[str], max_tokens: int) -> list[Answer]:
        return [Answer(text) for text in self._speaker.recalled_sentences(cues, max_tokens, self.pool, self.session)]

    def guess(self, token_ids: Sequence[int]) -> list[int]:
        bos = self._speaker.tokenizer.start_token_id
        return greedy_predictions(self._lm, self.pool, self.session, token_ids, bos)

    @torch.inference_mode()
    def _learn(self, ids: Sequence[int], learn: Sequence[int]) -> None:
        """Run one request block by block, learn the chosen tokens, and commit."""
        draft, state, block = self.pool.draft(self.session), None, self._lm.memory.config.block
        cache = self._lm.backbone.new_cache(len(ids))
        borrowed = without_rows(ids, learn, self._tables, shipped_lexicon())
        for start in range(0, len(ids), block):
            part = slice(start, start + block)
            state, _ = self._lm.block(
                ids[part],
                cache,
                self.pool,
                draft.index,
                decode_state=state,
                learn=learn[part],
                without_rows=borrowed[part],
                draft=draft,
            )
        draft.commit()
