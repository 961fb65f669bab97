"""Sampling a token from next-token scores, with OpenAI's parameters and one random stream per sequence."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.device import upload

TOP_P_WINDOW = 256  # of 49,152 tokens, finding the 1,024 likeliest takes six times as long as finding 256
GREEDY_BELOW = 1e-5  # scores divided by a lower temperature could leave the range of fp32


@dataclass(frozen=True)
class SamplingParams:
    """OpenAI's sampling parameters.

    temperature: 0 is greedy. seed: None draws a random seed. logit_bias: from token ids to −100..100.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)


class Sampler:
    """Draws the tokens of one sequence. The tokens depend on the sequence's scores and seed only, not on a batch."""

    def __init__(self, sampling: SamplingParams, *, choice: int = 0) -> None:
        """choice: number of the sequence among those of one request, which all have the same seed."""
        self._sampling = sampling
        seed = sampling.seed if sampling.seed is not None else random.SystemRandom().getrandbits(63)
        self._random = random.Random(f"{seed}/{choice}")
        self._counts: Counter[int] = Counter()
        self._predrawn: int | None = None

    def draw(self, scores: Tensor) -> int:
        """Draw a token id from scores `[V]`: logits, or log-probabilities up to a constant."""
        token = self._draw(scores) if self._predrawn is None else self._predrawn
        self._predrawn = None
        self._counts[token] += 1
        return token

    def _draw(self, scores: Tensor) -> int:
        options = self._sampling
        scores = self._adjust(scores)
        if options.temperature < GREEDY_BELOW:
            return int(scores.argmax())
        probs = torch.softmax(scores / options.temperature, dim=-1)
        return _nucleus(probs, options.top_p, self._random.random())

    def _adjust(self, scores: Tensor) -> Tensor:
        """Add biases and penalties as OpenAI defines them, with the counts of the tokens drawn so far."""
        options = self._sampling
        changes = Counter(options.logit_bias)
        if options.presence_penalty or options.frequency_penalty:
            for token, count in self._counts.items():
                changes[token] -= options.presence_penalty + options.frequency_penalty * count  # type: ignore[assignment]
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
    greedy = [option.temperature < GREEDY_BELOW for option in options]
    scores = torch.stack([sampler._adjust(row) for sampler, row in zip(samplers, rows, strict=True)])
    temperatures = [1.0 if is_greedy else option.temperature for option, is_greedy in zip(options, greedy, strict=True)]
    top_ps = [option.top_p for option in options]
    us = [0.0 if is_greedy else sampler._random.random() for sampler, is_greedy in zip(samplers, greedy, strict=True)]
    draw_params = torch.tensor([temperatures, top_ps, us], dtype=torch.double)
    temperature, top_p, u = upload(draw_params, scores.device)[:, :, None]
    probs = torch.softmax(scores / temperature.float(), dim=-1)
    # All kinds of draws for all rows: nothing waits for the device before the results are read.
    window = min(TOP_P_WINDOW, probs.shape[1])
    values, indices = probs.topk(window)
    window_cumulative, cumulative = values.double().cumsum(-1), probs.double().cumsum(-1)
    last = torch.searchsorted(window_cumulative, top_p).clamp_max(window - 1)
    u_nucleus = u * window_cumulative.gather(1, last)
    position = torch.searchsorted(window_cumulative, u_nucleus, right=True).minimum(last)
    unrestricted = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).clamp_max(probs.shape[1] - 1)
    columns = [
        scores.argmax(-1),
        indices.gather(1, position)[:, 0],
        unrestricted[:, 0],
        (values.sum(-1) < top_p[:, 0]).long(),
    ]
    tokens = []
    for b, (likeliest, in_nucleus, any_token, exceeds) in enumerate(torch.stack(columns, dim=1).tolist()):
        if greedy[b]:
            tokens.append(likeliest)
        elif top_ps[b] >= 1.0:
            tokens.append(any_token)
        elif exceeds and window < probs.shape[1]:  # the nucleus exceeds the window
            tokens.append(_nucleus(probs[b], top_ps[b], us[b]))
        else:
            tokens.append(in_nucleus)
    return tokens


def _nucleus(probs: Tensor, top_p: float, u: float) -> int:
    """Return the token at quantile `u` in [0, 1) of the nucleus: the fewest most probable tokens whose mass reaches
    `top_p` (Holtzman et al. 2019, arXiv 1904.09751)."""
    if top_p >= 1.0:
        cumulative = probs.double().cumsum(-1)
        return min(int(torch.searchsorted(cumulative, u * cumulative[-1], right=True)), len(probs) - 1)
    window = min(TOP_P_WINDOW, len(probs))
    values, indices = probs.topk(window)
    while window < len(probs) and float(values.sum()) < top_p:
        window = min(8 * window, len(probs))
        values, indices = probs.topk(window)
    cumulative = values.double().cumsum(-1)
    size = min(int(torch.searchsorted(cumulative, top_p)) + 1, len(cumulative))
    position = int(torch.searchsorted(cumulative[:size], u * cumulative[size - 1], right=True))
    return int(indices[min(position, size - 1)])
