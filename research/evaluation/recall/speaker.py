"""Greedy answers of the base to several requests at once, with the memory of a session or without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set

import torch

from model.adaptive_lm import EMPTY_SESSION, NUM_LAST_TOKENS, AdaptiveLM, DecodeState
from model.base.kv_cache import KVCache
from model.memory import Pool
from model.memory.episodic.whole_words import WholeWords
from model.reading_prefix import ReadingPrefix
from model.text.sentence_encoder import SentenceEncoder
from model.text.tokenizer import Tokenizer
from research.evaluation.recall.scenes import Message

BATCH_TOKENS = 8192  # of requests that are decoded together, with their answers
MIN_REUSED = 256  # tokens at the beginning of two prompts, whose keys and values are worth a copy

Prefilled = tuple[KVCache, DecodeState]
Prefill = Callable[[list[int], int], Prefilled]  # from a prompt and the capacity of its cache


class Speaker:
    """Decodes greedily. The answers to requests are independent of one another, and nothing is learned.

    encoder: of texts, for the arms that search by meaning
    prefix: the reading prefix of the base, for the arm that reads episodes
    """

    def __init__(
        self,
        lm: AdaptiveLM,
        tokenizer: Tokenizer,
        encoder: SentenceEncoder | None = None,
        prefix: ReadingPrefix | None = None,
    ) -> None:
        self.lm, self.tokenizer, self.encoder, self.prefix = lm, tokenizer, encoder, prefix
        self.max_context = lm.backbone.config.max_context
        self._pool = lm.new_pool(rows=1, sessions=1)
        self._last: tuple[list[int], KVCache] | None = None

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text without BOS."""
        return self.tokenizer.encode_inside(text)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a chat, ready for the reply. A base without a chat template gets lines of text."""
        if self.tokenizer.has_chat_template:
            return list(self.tokenizer.encode_chat(messages).token_ids)
        lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
        return self.text_ids("\n".join([*lines, "Assistant:"]))

    def text_ids(self, text: str) -> list[int]:
        """Return the token ids of a text after BOS."""
        return [self.tokenizer.start_token_id, *self.encode(text)]

    def answers(self, chats: Sequence[Sequence[Message]], max_tokens: int) -> list[str]:
        """Return the replies of the base without memory."""
        prompts = [self.chat_ids(messages) for messages in chats]
        return [text.strip() for text in self._without_memory(prompts, max_tokens)]

    def sentences(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        """Return the continuations of texts by the base without memory, to the end of the sentence or line."""
        prompts = [self.text_ids(text) for text in texts]
        return [first_sentence(text) for text in self._without_memory(prompts, max_tokens)]

    def recalled_answers(
        self, chats: Sequence[Sequence[Message]], max_tokens: int, pool: Pool, session: int
    ) -> list[str]:
        """Return the replies of the base with the memory of a session."""
        prompts = [self.chat_ids(messages) for messages in chats]
        return [text.strip() for text in self._with_memory(prompts, max_tokens, pool, session)]

    def recalled_sentences(self, texts: Sequence[str], max_tokens: int, pool: Pool, session: int) -> list[str]:
        """Return the same as `sentences`, with the memory of a session."""
        prompts = [self.text_ids(text) for text in texts]
        return [first_sentence(text) for text in self._with_memory(prompts, max_tokens, pool, session)]

    @torch.inference_mode()
    def likeliest(self, before: Sequence[int], ids: Sequence[int]) -> list[int]:
        """Return the base's likeliest token at each position of `ids`, which follow the tokens `before`."""
        states = self.lm.backbone(torch.tensor([[*before, *ids[:-1]]]))[0, len(before) - 1 :]
        return [int(token) for token in self.lm.backbone.logits(states).argmax(-1)]

    def _without_memory(self, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
        return self.prefilled_texts(prompts, max_tokens, self._prefill, self._pool, EMPTY_SESSION)

    def _with_memory(self, prompts: Sequence[list[int]], max_tokens: int, pool: Pool, session: int) -> list[str]:
        def prefill(ids: list[int], capacity: int) -> Prefilled:
            return self.read(ids, capacity, pool, session)

        return self.prefilled_texts(prompts, max_tokens, prefill, pool, session)

    @torch.inference_mode()
    def read(self, ids: Sequence[int], capacity: int, pool: Pool, session: int) -> Prefilled:
        """Read a prompt with the memory of a session, block by block as a server does."""
        cache, state, block = self.lm.new_cache(capacity), None, self.lm.memory.config.block
        for start in range(0, len(ids), block):
            state, _ = self.lm.block(ids[start : start + block], cache, pool, session, decode_state=state)
        assert state is not None
        return cache, state

    def _prefill(self, ids: list[int], capacity: int) -> Prefilled:
        """Run the base over a prompt; what it has in common with the last prompt is copied if it is long."""
        cache = self._copy_of_common(ids, capacity) or self.lm.new_cache(capacity)
        hidden = self.lm.backbone(torch.tensor([ids[cache.length :]]), [cache])[0, -1]
        self._last = ids, cache
        return cache, DecodeState(hidden, torch.full((NUM_LAST_TOKENS,), -1), torch.zeros(1))

    def _copy_of_common(self, ids: list[int], capacity: int) -> KVCache | None:
        if self._last is None:
            return None
        last_ids, last = self._last
        common = 0
        for old, new in zip(last_ids, ids[:-1], strict=False):
            if old != new:
                break
            common += 1
        if common < MIN_REUSED:
            return None
        cache = last.fork(max(capacity, last.length))
        cache.truncate(common)
        return cache

    @torch.inference_mode()
    def prefilled_texts(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        prefill: Prefill,
        pool: Pool,
        session: int,
        whole_words: Sequence[WholeWords] = (),
        ends: Set[int] = frozenset(),
    ) -> list[str]:
        """Return the greedy continuations of prompts that `prefill` reads, with the memory of a session.

        Raises ValueError if one does not fit the context.

        whole_words: of the episodes that each prompt reads; none: the prompts read no episodes
        ends: tokens that end a text besides the base's own
        """
        found = list[str]()
        for part in _batches(prompts, max_tokens):
            if (longest := max(map(len, part)) + max_tokens) > self.max_context:
                raise ValueError(f"a prompt and its answer must have at most {self.max_context} tokens, got {longest}")
            rows = [prefill(ids, len(ids) + max_tokens) for ids in part]
            copies = whole_words[len(found) : len(found) + len(part)]
            texts = self._greedy(rows, max_tokens, pool, session, copies, ends | self.tokenizer.eos_token_ids)
            found += [self.tokenizer.decode(ids) for ids in texts]
        return found

    def _greedy(
        self,
        rows: Sequence[Prefilled],
        max_tokens: int,
        pool: Pool,
        session: int,
        whole_words: Sequence[WholeWords],
        ends: Set[int],
    ) -> list[list[int]]:
        """Decode all rows together; a row leaves when its answer ends."""
        lm, running = self.lm, dict(enumerate(rows))
        found: list[list[int]] = [[] for _ in rows]
        for _ in range(max_tokens):
            states = [state for _, state in running.values()]
            scores = lm.predict(states, pool, [session] * len(states))
            if whole_words:
                scores = torch.stack([whole_words[row].adjust(scores[i], found[row]) for i, row in enumerate(running)])
            tokens = dict(zip(running, scores.argmax(-1).tolist(), strict=True))
            running = {row: running[row] for row, token in tokens.items() if token not in ends}
            if not running:
                break
            for row in running:
                found[row].append(tokens[row])
            caches = [cache for cache, _ in running.values()]
            states = [state for _, state in running.values()]
            states = lm.decode([tokens[row] for row in running], caches, states, pool, [session] * len(states))
            running = {row: (cache, state) for row, cache, state in zip(running, caches, states, strict=True)}
        return found


def _batches(prompts: Sequence[list[int]], max_tokens: int) -> Iterator[list[list[int]]]:
    """Yield the prompts in order, as many together as have at most BATCH_TOKENS tokens with their answers."""
    batch: list[list[int]] = []
    for ids in prompts:
        if batch and sum(map(len, [*batch, ids])) + (len(batch) + 1) * max_tokens > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


def first_sentence(text: str) -> str:
    return text.split("\n")[0].split(". ")[0].strip()
