"""From next-token scores to a token: OpenAI's sampling parameters, one random stream a sequence."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.device import upload

TOP_P_WINDOW = 256  # of a vocabulary of 49,152, the 1,024 likeliest take six times as long to find as these
GREEDY_BELOW = 1e-5  # scores divided by less could leave the range of fp32


@dataclass(frozen=True)
class SamplingParams:
    """OpenAI's parameters. temperature 0 is greedy; seed None draws one; logit_bias maps token ids to −100..100."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)


class Sampler:
    """Draws the tokens of one sequence. What it draws depends on its own scores and seed only, never on a batch."""

    def __init__(self, sampling: SamplingParams, *, choice: int = 0) -> None:
        self._sampling = sampling
        seed = sampling.seed if sampling.seed is not None else random.SystemRandom().getrandbits(63)
        self._random = random.Random(f"{seed}/{choice}")
        self._counts: Counter[int] = Counter()
        self._predrawn: int | None = None

    def draw(self, scores: Tensor) -> int:
        """scores [V]: logits, or log-probabilities up to a constant → a token id."""
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
        """Biases and penalties as OpenAI defines them; the counts are those of tokens drawn before."""
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


def predraw(samplers: Sequence[Sampler], scores: Tensor) -> None:
    """Draws now what the next `draw` of each sampler gives, from its row of scores [B, V]: on a GPU all rows at once,
    and the host waits for it once. Elsewhere nothing: a row at a time is faster there."""
    if scores.device.type == "cuda":
        for sampler, token in zip(samplers, _draw_batch(samplers, scores), strict=True):
            sampler._predrawn = token


def _draw_batch(samplers: Sequence[Sampler], scores: Tensor) -> list[int]:
    """What `draw` gives for each row of scores [B, V]."""
    options = [sampler._sampling for sampler in samplers]
    greedy = [one.temperature < GREEDY_BELOW for one in options]
    scores = torch.stack([sampler._adjust(row) for sampler, row in zip(samplers, scores, strict=True)])
    draw_params = [
        [1.0 if first else one.temperature for one, first in zip(options, greedy, strict=True)],
        [one.top_p for one in options],
        [0.0 if first else sampler._random.random() for sampler, first in zip(samplers, greedy, strict=True)],
    ]
    temperature, top_p, u = upload(torch.tensor(draw_params, dtype=torch.double), scores.device)[:, :, None]
    probs = torch.softmax(scores / temperature.float(), dim=-1)
    window = min(TOP_P_WINDOW, probs.shape[1])
    values, indices = probs.topk(window)
    some, every = values.double().cumsum(-1), probs.double().cumsum(-1)
    last = torch.searchsorted(some, top_p).clamp_max(window - 1)
    position = torch.searchsorted(some, u * some.gather(1, last), right=True).minimum(last)
    unrestricted = torch.searchsorted(every, u * every[:, -1:], right=True).clamp_max(probs.shape[1] - 1)
    found = [
        scores.argmax(-1),
        indices.gather(1, position)[:, 0],
        unrestricted[:, 0],
        (values.sum(-1) < top_p[:, 0]).long(),
    ]
    tokens = []
    for b, (likeliest, likely, other, short) in enumerate(torch.stack(found, dim=1).tolist()):
        if greedy[b]:
            tokens.append(likeliest)
        elif options[b].top_p >= 1.0:
            tokens.append(other)
        elif short and window < probs.shape[1]:
            tokens.append(_nucleus(probs[b], options[b].top_p, draw_params[2][b]))
        else:
            tokens.append(likely)
    return tokens


def _nucleus(probs: Tensor, top_p: float, u: float) -> int:
    """Inverse-CDF draw at u in [0, 1) from the fewest most probable tokens whose mass reaches top_p (Holtzman et al.
    2019, arXiv 1904.09751)."""
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
