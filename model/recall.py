"""The recall of a reply: which part of the prompt asks, and where in the prompt the session's episodes are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.episodes import RecallRequest
from model.reading_prefix import ReadingPrefix
from model.text.tokenizer import Tokenizer

NEWEST_TOKENS = 512  # of episodes, most that the scores of a text read
TEXT_QUERY_TOKENS = 64  # of a plain text, the tokens at its end that ask
BLANK_LINE = "\n\n"
UNTOLD = "I have not told you this."  # is read where the speaker asks about themselves, and no episode was found
SHARE = (
    1 / 512
)  # of the weights that is levelled at each token: the past may begin or cease to help about once in a request


@dataclass(frozen=True)
class RecallPlan:
    """The tokens between which the served model reads episodes, and how many of them.

    Attributes:
        max_tokens: most tokens of episodes that a reply reads; 0 = sessions keep no episodes.
        chat_header: the tokens of a chat before its first message of the user. Keys and values of an episode that are
            made after it fit a chat; made after BOS alone, they answer less than half of the questions.
        text_header: the token before a text.
        separator: the tokens after each episode.
        prefix: number of tokens of the reading prefix, which replies to chats read after the episodes.
        untold: the tokens of `UNTOLD`; none without a reading prefix that knows what to reply.
    """

    max_tokens: int
    chat_header: tuple[int, ...]
    text_header: tuple[int, ...]
    separator: tuple[int, ...]
    prefix: int = 0
    untold: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, max_tokens: int, prefix: ReadingPrefix | None = None) -> RecallPlan:
        """Return the plan for a model's tokenizer and reading prefix."""
        start = (tokenizer.start_token_id,)
        chat_header: tuple[int, ...] = ()
        if tokenizer.has_chat_template:
            chat = tokenizer.encode_chat([{"role": "user", "content": BLANK_LINE.join("ab")}])
            chat_header = tuple(chat.token_ids[: chat.spans[0][0]])
        separator = [token for token in tokenizer.encode(BLANK_LINE) if token != tokenizer.bos_token_id]
        knows_untold = prefix is not None and prefix.untold_keys is not None
        untold = tuple(tokenizer.encode_inside(UNTOLD)) if knows_untold else ()
        num_tokens = 0 if prefix is None else prefix.num_tokens
        return cls(max_tokens, chat_header or start, start, tuple(separator), num_tokens, untold)

    def request(
        self, token_ids: Sequence[int], question: tuple[int, int] | None, *, chat: bool
    ) -> RecallRequest | None:
        """Return what the reply to a prompt may recall; None for a prompt that asks nothing.

        question: the tokens [start, stop) of a chat's last message of the user, or those before the gap of a text. The
        episodes stand at its beginning, or after the first token of a text.
        """
        if not chat:
            start, stop = question or (0, len(token_ids))
            query = (max(start, stop - TEXT_QUERY_TOKENS), stop)
            return RecallRequest(1, query, self.max_tokens, self.text_header, self.separator) if stop > 1 else None
        if question is None:
            return None
        at = max(1, question[0])
        return RecallRequest(at, question, self.max_tokens, self.chat_header, self.separator, self.prefix, self.untold)

    def newest(self) -> RecallRequest:
        """Return what the scores of a text recall: the newest episodes, which no token of the text chooses."""
        return RecallRequest(1, None, NEWEST_TOKENS, self.text_header)


@dataclass
class ReadingWeight:
    """The weight of the probabilities that read episodes against those that do not, in the scores of one text.

    It follows Bayes' rule over the tokens so far, with a fixed share (Herbster and Warmuth 1998): episodes about
    something else cost at most log 2 nats in all and log(1 / (1 - SHARE / 2)) a token, however badly they predict.
    """

    value: float = 0.5

    def mix(self, reading: Tensor, plain: Tensor) -> Tensor:
        """Return the log-probabilities [n] of the mixture of two, [n] each, for n tokens in a row.

        A token counts in the weight of the tokens after it only.
        """
        mixed = list[float]()
        for first, second in zip(reading.tolist(), plain.tolist(), strict=True):
            log_reading, log_plain = math.log(self.value) + first, math.log1p(-self.value) + second
            high, low = max(log_reading, log_plain), min(log_reading, log_plain)
            mixed.append(high + math.log1p(math.exp(low - high)))
            self.value = SHARE / 2 + (1 - SHARE) * math.exp(log_reading - mixed[-1])
        return torch.tensor(mixed, dtype=plain.dtype, device=plain.device)
