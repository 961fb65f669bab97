"""Sampling a token from next-token scores, with the parameters of OpenAI, vLLM and llama.cpp and one random stream per
sequence. `model/text/sampling_reference.py` defines what is drawn.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.device import upload
from model.text.grammar import Grammar

TOP_P_WINDOW = 256  # of 49,152 tokens, finding the 1,024 likeliest takes six times as long as finding 256
GREEDY_BELOW = 1e-5  # scores divided by a lower temperature could leave the range of fp32


@dataclass(frozen=True)
class SamplingParams:
    """The parameters of sampling, by the names of OpenAI, vLLM and llama.cpp.

    Attributes:
        temperature: 0 is greedy.
        top_k: the likeliest tokens that may be drawn; 0 = all.
        typical_p: share of the probability that the tokens of typical surprise must reach; 1 = all tokens.
        top_p: share of the probability that the likeliest tokens must reach; 1 = all tokens.
        min_p: a token that is less than this times as likely as the likeliest one is not drawn.
        seed: None draws a random seed.
        presence_penalty, frequency_penalty: subtracted from the scores of the tokens drawn before.
        repetition_penalty: divides the positive scores of the tokens of the prompt and of those drawn before, and
            multiplies the others.
        repetition_window: the last tokens that this penalty looks at; None = all.
        logit_bias: from token ids to −100..100.
        min_tokens: tokens before which no end is drawn.
        ignore_eos: whether no end of text is ever drawn.
        stop_token_ids: tokens that end the text, as the ends of text of the model do.
        grammar: the grammar that the text must follow.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    repetition_window: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def truncates(self) -> bool:
        """Return whether some tokens cannot be drawn, however the scores are."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0 or self.typical_p < 1.0


class Sampler:
    """Draws the tokens of one sequence. The tokens depend on the sequence's scores and seed only, not on a batch.

    Attributes:
        ends: the tokens that end the sequence.
        forced: for each token drawn, whether the grammar allowed no other text.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        choice: int = 0,
        prompt: Sequence[int] = (),
        eos: frozenset[int] = frozenset(),
    ) -> None:
        """choice: number of the sequence among those of one request, which all have the same seed. prompt: the tokens
        before the sequence. eos: the ends of text of the model."""
        self.ends = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else eos)
        self.forced: list[bool] = []
        self._sampling = sampling
        self._grammar = None if sampling.grammar is None else sampling.grammar.start()
        seed = sampling.seed if sampling.seed is not None else random.SystemRandom().getrandbits(63)
        self._random = random.Random(f"{seed}/{choice}")
        self._counts: Counter[int] = Counter()
        self._predrawn: int | None = None
        self._never = sorted(eos) if sampling.ignore_eos else []
        self._not_yet = sorted(self.ends) if sampling.min_tokens else []
        # The tokens that the repetition penalty looks at.
        self._recent = deque(prompt, sampling.repetition_window if sampling.repetition_penalty != 1.0 else 0)

    @property
    def failed(self) -> bool:
        """Return whether the text had to end before its grammar was complete."""
        return self._grammar is not None and self._grammar.failed

    def draw(self, scores: Tensor) -> int:
        """Draw a token id from scores `[V]`: logits, or log-probabilities up to a constant."""
        token = self._draw(scores) if self._predrawn is None else self._predrawn
        self._predrawn = None
        self._counts[token] += 1
        self._recent.append(token)
        self.forced.append(self._grammar is not None and self._grammar.advance(token))
        return token

    def log_probs(self, scores: Tensor) -> Tensor:
        """Return the log-probabilities with which the next token is drawn; those of no chance are finite too."""
        options, scores = self._sampling, self._adjust(scores)
        if options.is_greedy:
            values, indices = torch.ones(1, device=scores.device), scores.argmax(keepdim=True)
        else:
            probs = torch.softmax(scores.float() / options.temperature, dim=-1)
            values, indices = drawable(probs, options) if options.truncates else probs.topk(len(probs))
        chances = torch.zeros(len(scores), device=scores.device).index_put((indices,), values / values.sum())
        return chances.clamp_min(torch.finfo(chances.dtype).tiny).log()

    def _draw(self, scores: Tensor) -> int:
        options = self._sampling
        scores = self._adjust(scores)
        if options.is_greedy:
            return int(scores.argmax())
        probs = torch.softmax(scores / options.temperature, dim=-1)
        return draw_token(probs, options, self._random.random())

    def _adjust(self, scores: Tensor) -> Tensor:
        """Return the scores with penalties and biases, and −∞ for the tokens that must not be drawn."""
        options = self._sampling
        if self._grammar is not None:
            scores = scores.masked_fill(~self._grammar.allowed().to(scores.device), -torch.inf)
        if self._recent:
            recent = torch.tensor(list(set(self._recent)), device=scores.device)
            at, penalty = scores[recent], options.repetition_penalty
            scores = scores.index_put((recent,), torch.where(at > 0, at / penalty, at * penalty))
        changes = Counter(options.logit_bias)
        if options.presence_penalty or options.frequency_penalty:
            for token, count in self._counts.items():
                changes[token] -= options.presence_penalty + options.frequency_penalty * count  # type: ignore[assignment]
        forbidden = self._never + (self._not_yet if len(self.forced) < options.min_tokens else [])
        for token in forbidden:
            changes[token] = -torch.inf  # type: ignore[assignment]
        if not changes:
            return scores
        tokens = torch.tensor(list(changes), device=scores.device)
        amounts = torch.tensor(list(changes.values()), dtype=scores.dtype, device=scores.device)
        return scores.index_add(0, tokens, amounts)


def predraw(samplers: Sequence[Sampler], scores: Sequence[Tensor]) -> None:
    """Draw the next token of each sampler from its scores `[V]`; the sampler's next `draw` returns the token.

    On a GPU all rows are drawn at once and the host waits once. On other devices nothing happens: drawing row by row
    is faster there.
    """
    if scores[0].device.type == "cuda":
        for sampler, token in zip(samplers, _draw_batch(samplers, scores), strict=True):
            sampler._predrawn = token


def _draw_batch(samplers: Sequence[Sampler], rows: Sequence[Tensor]) -> list[int]:
    """Return the tokens that `draw` gives for each row of scores `[V]`."""
    options = [sampler._sampling for sampler in samplers]
    scores = torch.stack([sampler._adjust(row) for sampler, row in zip(samplers, rows, strict=True)])
    vocab_size = scores.shape[1]
    window = min(TOP_P_WINDOW, vocab_size)
    us = [0.0 if each.is_greedy else sampler._random.random() for sampler, each in zip(samplers, options, strict=True)]
    temperatures = [1.0 if each.is_greedy else each.temperature for each in options]
    top_ps = [each.top_p if each.top_p < 1.0 else 2.0 for each in options]  # no mass reaches 2
    min_ps = [each.min_p for each in options]
    sizes = [float(min(each.top_k or window, window)) for each in options]
    masses = [float(each.top_k > 0) for each in options]  # whether the mass is that of the top k, and not 1
    draw_params = torch.tensor([temperatures, top_ps, us, min_ps, sizes, masses], dtype=torch.double)
    temperature, top_p, u, min_p, size, has_top_k = upload(draw_params, scores.device)[:, :, None]
    probs = torch.softmax(scores / temperature.float(), dim=-1)
    # All kinds of draws for all rows: nothing waits for the device before the results are read.
    values, indices = probs.topk(window)
    window_cumulative, cumulative = values.double().cumsum(-1), probs.double().cumsum(-1)
    limit = size.long() - 1
    mass = torch.where(has_top_k > 0, window_cumulative.gather(1, limit), 1.0)
    likely = (values >= min_p * values[:, :1]).sum(-1, keepdim=True)
    last = torch.searchsorted(window_cumulative, top_p * mass).minimum(limit).minimum(likely - 1)
    u_kept = u * window_cumulative.gather(1, last)
    position = torch.searchsorted(window_cumulative, u_kept, right=True).minimum(last)
    unrestricted = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).clamp_max(vocab_size - 1)
    columns = [scores.argmax(-1), indices.gather(1, position)[:, 0], unrestricted[:, 0], last[:, 0]]
    tokens = []
    for b, (likeliest, kept, any_token, last_kept) in enumerate(torch.stack(columns, dim=1).tolist()):
        top_k = options[b].top_k
        exceeds = window < vocab_size and (top_k > window or (not top_k and last_kept == window - 1))
        if options[b].is_greedy:
            tokens.append(likeliest)
        elif not options[b].truncates:
            tokens.append(any_token)
        elif exceeds or options[b].typical_p < 1.0:  # the window does not say what may be drawn
            tokens.append(draw_token(probs[b], options[b], us[b]))
        else:
            tokens.append(kept)
    return tokens


def draw_token(probs: Tensor, options: SamplingParams, u: float) -> int:
    """Return the token at quantile `u` in [0, 1) of those that may be drawn of all, whose probabilities are `probs`."""
    if not options.truncates:
        cumulative = probs.double().cumsum(-1)
        return min(int(torch.searchsorted(cumulative, u * cumulative[-1], right=True)), len(probs) - 1)
    values, indices = drawable(probs, options)
    cumulative = values.double().cumsum(-1)
    position = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    return int(indices[min(position, len(indices) - 1)])


def drawable(probs: Tensor, options: SamplingParams) -> tuple[Tensor, Tensor]:
    """Return the probabilities and the ids of the tokens that may be drawn, the likeliest first.

    The tokens are cut by `top_k`, `typical_p`, `top_p` and `min_p`, in this order; each looks at what the one before
    has left, with a sum of 1.
    """
    limit = min(options.top_k or len(probs), len(probs))
    if options.typical_p < 1.0:
        values, indices = _typical(*probs.topk(limit), options.typical_p)
        size = _prefix_size(values, float(values.double().sum()), options)
        return values[:size], indices[:size]
    window = limit if options.top_k else min(TOP_P_WINDOW, limit)
    while True:
        values, indices = probs.topk(window)
        size = _prefix_size(values, float(values.double().sum()) if options.top_k else 1.0, options)
        if size < window or window == limit:
            return values[:size], indices[:size]
        window = min(8 * window, limit)


def _prefix_size(values: Tensor, mass: float, options: SamplingParams) -> int:
    """Return how many of the likeliest tokens `top_p` (Holtzman et al. 2019, arXiv 1904.09751) and `min_p` leave.

    values: probabilities, the largest first, of all tokens or of the first ones. mass: sum over all tokens.
    """
    size = len(values)
    if options.top_p < 1.0:
        size = min(size, int(torch.searchsorted(values.double().cumsum(-1), options.top_p * mass)) + 1)
    return min(size, int((values >= options.min_p * values[0]).sum()))


def _typical(values: Tensor, indices: Tensor, typical_p: float) -> tuple[Tensor, Tensor]:
    """Return the tokens whose surprise is nearest to the entropy and whose mass reaches `typical_p`, in their order
    (Meister et al. 2022, arXiv 2202.00666)."""
    probs = values.double() / values.double().sum()
    deviations = (-probs.log() - torch.special.entr(probs).sum()).abs()
    nearest = deviations.sort(stable=True).indices
    size = int(torch.searchsorted(probs[nearest].cumsum(-1), typical_p)) + 1
    kept = nearest[:size].sort().values
    return values[kept], indices[kept]
