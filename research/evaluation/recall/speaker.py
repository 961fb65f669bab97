"""Greedy answers of the base, with the memory of a session or without."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.adaptive_lm import AdaptiveLM
from model.base.kv_cache import KVCache
from model.memory import Pool
from model.text.tokenizer import Tokenizer
from research.evaluation.recall.scenes import Message


class Speaker:
    """Decodes greedily. The keys and values of the last prompt without memory are used again where prompts agree."""

    def __init__(self, lm: AdaptiveLM, tokenizer: Tokenizer) -> None:
        self.lm, self.tokenizer = lm, tokenizer
        self.max_context = lm.backbone.config.max_context
        self._end = tokenizer.eos_token_ids
        self._cache: KVCache | None = None
        self._cached: list[int] = []

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text without BOS."""
        ids = self.tokenizer.encode(text)
        return ids[1:] if self.tokenizer.add_bos else ids

    def chat_ids(self, messages: Sequence[Message], *, reply: bool = True) -> list[int]:
        """Return the token ids of a chat, ready for the reply unless `reply` is false.

        A base without a chat template gets its messages as lines.
        """
        if self.tokenizer.has_chat_template:
            return self.tokenizer.encode_chat(messages, add_generation_prompt=reply).token_ids
        lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
        return self.text_ids("\n".join([*lines, *(["Assistant:"] if reply else [])]))

    def text_ids(self, text: str) -> list[int]:
        """Return the token ids of a text after BOS."""
        return [self.tokenizer.start_token_id, *self.encode(text)]

    def answer(self, messages: Sequence[Message], max_tokens: int) -> str:
        """Return the reply of the base without memory."""
        return self._text(self._continue(self.chat_ids(messages), max_tokens)).strip()

    def complete(self, text: str, max_tokens: int) -> str:
        """Return the continuation of a text by the base without memory, up to the end of the sentence or line."""
        return self._sentence(self._continue(self.text_ids(text), max_tokens))

    def recall(self, ids: Sequence[int], max_tokens: int, pool: Pool, session: int) -> str:
        """Return the continuation of a request by the base with the memory of a session. Nothing is learned."""
        return self._text(self._decode_with_memory(list(ids), max_tokens, pool, session)).strip()

    def recall_sentence(self, text: str, max_tokens: int, pool: Pool, session: int) -> str:
        """Return the same as `complete`, with the memory of a session."""
        return self._sentence(self._decode_with_memory(self.text_ids(text), max_tokens, pool, session))

    @torch.inference_mode()
    def _continue(self, ids: list[int], max_tokens: int) -> list[int]:
        cache = self._cache_for(ids, max_tokens)
        start = cache.length
        hidden = self.lm.backbone(torch.tensor([ids[start:]]), [cache])[0, -1]
        found: list[int] = []
        while len(found) < max_tokens:
            token = int(self.lm.decoder.logits(hidden[None])[0].argmax())
            if token in self._end:
                break
            found.append(token)
            hidden = self.lm.decoder(torch.tensor([[token]]), [cache])[0, -1]
        cache.truncate(len(ids))
        self._cached = ids
        return found

    def _cache_for(self, ids: list[int], max_tokens: int) -> KVCache:
        """Return a cache that holds the longest common beginning with the last prompt, less than the whole prompt."""
        needed = len(ids) + max_tokens + 1
        if needed > self.max_context:
            raise ValueError(f"the prompt and the answer must have at most {self.max_context} tokens, got {needed}")
        if self._cache is None:
            self._cache = self.lm.backbone.new_cache(self.max_context)
        common = 0
        for old, new in zip(self._cached, ids[:-1], strict=False):
            if old != new:
                break
            common += 1
        self._cache.truncate(min(common, self._cache.length))
        return self._cache

    @torch.inference_mode()
    def _decode_with_memory(self, ids: list[int], max_tokens: int, pool: Pool, session: int) -> list[int]:
        lm, block, state = self.lm, self.lm.memory.config.block, None
        cache = lm.backbone.new_cache(len(ids) + max_tokens)
        for start in range(0, len(ids), block):
            state, _ = lm.block(ids[start : start + block], cache, pool, session, decode_state=state)
        assert state is not None
        found: list[int] = []
        while len(found) < max_tokens:
            token = int(lm.predict([state], pool, [session])[0].argmax())
            if token in self._end:
                break
            found.append(token)
            (state,) = lm.decode([token], [cache], [state], pool, [session])
        return found

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def _sentence(self, ids: Sequence[int]) -> str:
        text = self._text(ids).split("\n")[0]
        return text.split(". ")[0].strip()
