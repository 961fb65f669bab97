"""The tokens that `Sampler` draws, in plain loops: the definition that the fast paths are tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence

from model.text.sampling import SamplingParams


def adjusted_scores(
    scores: Sequence[float],
    options: SamplingParams,
    prompt: Sequence[int] = (),
    drawn: Sequence[int] = (),
    eos: frozenset[int] = frozenset(),
) -> list[float]:
    """Return the scores with penalties and biases, after the tokens of `prompt` and `drawn`."""
    past = [*prompt, *drawn]
    window = len(past) if options.repetition_window is None else options.repetition_window
    recent = set(past[len(past) - min(window, len(past)) :])
    adjusted = []
    for token, score in enumerate(scores):
        if token in recent:
            score = score / options.repetition_penalty if score > 0 else score * options.repetition_penalty
        score += options.logit_bias.get(token, 0.0)
        if token in drawn:
            score -= options.presence_penalty + options.frequency_penalty * list(drawn).count(token)
        ends = token in options.stop_token_ids or (token in eos and not options.ignore_eos)
        if (token in eos and options.ignore_eos) or (ends and len(drawn) < options.min_tokens):
            score = -math.inf
        adjusted.append(score)
    return adjusted


def drawable_tokens(scores: Sequence[float], options: SamplingParams) -> list[tuple[int, float]]:
    """Return the tokens that may be drawn at a temperature above 0 and their probabilities, the likeliest first."""
    highest = max(scores)
    weights = [math.exp((score - highest) / options.temperature) for score in scores]
    kept = _normalised(sorted(enumerate(weights), key=lambda pair: -pair[1]))
    if options.top_k > 0:
        kept = _normalised(kept[: options.top_k])
    if options.typical_p < 1:
        entropy = -sum(p * math.log(p) for _, p in kept if p > 0)
        nearest = sorted(kept, key=lambda pair: abs(-math.log(pair[1]) - entropy) if pair[1] > 0 else math.inf)
        typical = _until(nearest, options.typical_p)
        kept = _normalised([pair for pair in kept if pair in typical])
    if options.top_p < 1:
        kept = _normalised(_until(kept, options.top_p))
    return _normalised([pair for pair in kept if pair[1] >= options.min_p * kept[0][1]])


def draw(scores: Sequence[float], options: SamplingParams, u: float) -> int:
    """Return the token that the random number `u` in [0, 1) draws from adjusted scores: in the order of the ids where
    every token may be drawn, else the likeliest first."""
    if options.is_greedy:
        return scores.index(max(scores))
    kept = drawable_tokens(scores, options)
    total = 0.0
    for token, probability in kept if options.truncates else sorted(kept):
        total += probability
        if u < total:
            return token
    return kept[-1][0]


def _normalised(pairs: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    total = sum(weight for _, weight in pairs)
    return [(token, weight / total) for token, weight in pairs]


def _until(pairs: Sequence[tuple[int, float]], mass: float) -> list[tuple[int, float]]:
    """Return the first pairs whose probabilities reach `mass` together; at least one."""
    total, kept = 0.0, []
    for token, probability in pairs:
        kept.append((token, probability))
        total += probability
        if total >= mass:
            break
    return kept
