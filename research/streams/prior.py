"""The prior: random streams on which the mixer is trained, of many kinds and of no data set.

A task draws columns (normal, uniform, heavy-tailed, clustered, from a random network, rounded, categorical), a concept
that scores the labels (linear, network, tree, prototypes, rules, clusters' labels, patterns of bits), and what happens
to the stream: noise, imbalance, irrelevant columns, missing values, and drift (sudden, gradual, incremental,
recurring). For numbers to predict, the concept has one score, which is the target.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.tabular.columns import MISSING

Array = NDArray[Any]
Rng = np.random.Generator
Concept = Callable[[Array], Array]  # latent [n, D] → scores [n, L]


class Task(NamedTuple):
    """A stream: x [n, C] with MISSING where a value is missing, and y [n], labels in order of appearance or numbers."""

    x: Array
    y: Array


def label_task(rng: Rng, longest: int = 1500) -> Task:
    """Draw a stream with labels."""
    n = int(math.exp(rng.uniform(math.log(30), math.log(longest))))
    L = int(rng.choice([2, 2, 2, 3, 4, 5, 7, 10, 15, 20]))
    latent, concepts = _latent_and_concepts(rng, n, L)
    scores = _drift(rng, latent, concepts)
    if rng.random() < 0.3:  # labels first, and columns by label, as in most measured data
        y = rng.integers(0, L, n)
        return Task(_columns(rng, _by_label(rng, y, L)), _by_appearance(y))
    if rng.random() < 0.5:
        scores = scores - np.quantile(scores, rng.uniform(0.2, 0.8), axis=0)
    if rng.random() < 0.3:
        scores = scores + rng.normal(size=L) * rng.exponential(1.0) * scores.std()
    temperature = rng.choice([0.0, 0.0, 0.0, 0.1, 0.3]) * scores.std()
    y = (scores + temperature * rng.gumbel(size=scores.shape)).argmax(1)
    flip = rng.random(n) < rng.choice([0.0, 0.0, 0.0, 0.0, 0.0, 0.05, 0.1, 0.3])
    y = np.where(flip, rng.integers(0, L, n), y)
    if rng.random() < 0.05:
        y = _sticky(rng, y)
    return Task(_columns(rng, latent), _by_appearance(y))


def _by_label(rng: Rng, y: Array, L: int) -> Array:
    """Return numbers [n, D] of examples with labels y, around one or a few centres of each label."""
    D, modes = int(math.exp(rng.uniform(math.log(2), math.log(32)))), int(rng.choice([1, 1, 2, 3]))
    spread, few = rng.uniform(0.3, 2.0), rng.random(D) < rng.uniform(0.2, 1.0)
    centres = rng.normal(size=(L, modes, D)) * few * rng.uniform(1.0, 3.0)
    noise = rng.normal(size=(len(y), D)) @ _mixing(rng, D) * np.exp(rng.normal(size=(L, D)) * 0.3)[y]
    drawn: Array = centres[y, rng.integers(0, modes, len(y))] + noise * spread
    return drawn


def number_task(rng: Rng, longest: int = 1500) -> Task:
    """Draw a stream with numbers to predict."""
    n = int(math.exp(rng.uniform(math.log(30), math.log(longest))))
    latent, concepts = _latent_and_concepts(rng, n, 1)
    target = _drift(rng, latent, concepts)[:, 0]
    target = (target - target.mean()) / (target.std() + 1e-9)
    kind = rng.random()
    if kind < 0.15:
        target = np.exp(target)
    elif kind < 0.25:
        target = np.sinh(1.5 * target)
    noise = rng.choice([0.0, 0.05, 0.2, 0.5, 1.0]) * target.std()
    target = target + noise * (rng.standard_t(2.5, n) if rng.random() < 0.3 else rng.normal(size=n))
    if rng.random() < 0.15:  # a series in time
        walk = np.cumsum(rng.normal(size=n))
        target = target + rng.choice([0.3, 1.0, 3.0]) * walk / (walk.std() + 1e-9)
    scale = math.exp(rng.normal() * 3)
    return Task(_columns(rng, latent), (scale * (target + rng.normal() * 3)).astype(np.float32))


def _latent_and_concepts(rng: Rng, n: int, L: int) -> tuple[Array, list[Concept]]:
    D = int(math.exp(rng.uniform(math.log(1.6), math.log(24))))
    latent: Array
    kind = rng.choice(["normal", "uniform", "heavy", "clusters", "network", "bits", "mixed"])
    centres = rng.normal(size=(int(rng.integers(L, 4 * L + 4)), D)) * rng.uniform(0.8, 3)
    if kind == "normal":
        latent = rng.normal(size=(n, D)) @ _mixing(rng, D)
    elif kind == "uniform":
        latent = rng.uniform(-1.7, 1.7, size=(n, D))
    elif kind == "heavy":
        latent = rng.standard_t(2.0, size=(n, D)) if rng.random() < 0.5 else np.exp(rng.normal(size=(n, D)))
    elif kind == "clusters":
        latent = centres[rng.integers(0, len(centres), n)] + rng.normal(size=(n, D)) * rng.uniform(0.2, 1.0)
    elif kind == "network":
        latent = _network(rng, D, D)(rng.normal(size=(n, D)))
        latent = latent / (latent.std(0) + 1e-6)
    elif kind == "bits":
        latent = (rng.random((n, D)) < rng.uniform(0.2, 0.8, D)) * 2.0 - 1
    else:
        latent = np.where(rng.random(D) < 0.5, rng.normal(size=(n, D)), np.round(rng.normal(size=(n, D))))
    makers: list[Callable[[], Concept]] = [
        lambda: _linear(rng, D, L),
        lambda: _network(rng, D, L),
        lambda: _tree(rng, latent, L),
        lambda: _tree(rng, latent, L),
        lambda: _rules(rng, latent, L),
        lambda: _prototypes(rng, latent, L, centres if kind == "clusters" else None),
        lambda: _prototypes(rng, latent, L, centres if kind == "clusters" else None),
        lambda: _additive(rng, D, L),
    ]
    make = makers[int(rng.integers(len(makers)))]
    return latent, [make() for _ in range(4)]


def _mixing(rng: Rng, D: int) -> Array:
    mixing: Array = np.eye(D) + rng.normal(size=(D, D)) * rng.choice([0.0, 0.3, 1.0])
    return mixing


def _sparse(rng: Rng, D: int, L: int) -> Array:
    weights = rng.normal(size=(D, L)) * (rng.random((D, 1)) < rng.uniform(0.3, 1.0))
    weights[rng.integers(D)] += rng.normal(size=L)
    return weights


def _linear(rng: Rng, D: int, L: int) -> Concept:
    weights, bias = _sparse(rng, D, L), rng.normal(size=L) * 0.5
    return lambda x: np.clip(x, -8, 8) @ weights + bias


def _additive(rng: Rng, D: int, L: int) -> Concept:
    weights, frequency, phase = _sparse(rng, D, L), rng.uniform(0.5, 2.5, D), rng.uniform(0, 6.3, D)
    power = rng.random(D) < 0.4
    return lambda x: np.where(power, np.clip(x, -4, 4) ** 2 - 1, np.sin(frequency * x + phase)) @ weights


def _network(rng: Rng, D: int, L: int) -> Concept:
    widths = [D, *[int(rng.integers(4, 24)) for _ in range(int(rng.integers(1, 3)))], L]
    layers = [(rng.normal(size=(a, b)) * 1.7 / math.sqrt(a), rng.normal(size=b)) for a, b in itertools.pairwise(widths)]
    activations: list[Callable[[Array], Array]] = [np.tanh, lambda h: np.maximum(h, 0), np.sin, np.sign]
    activation = activations[int(rng.integers(4))]

    def concept(x: Array) -> Array:
        h = np.clip(x, -6, 6)
        for weights, bias in layers[:-1]:
            h = activation(h @ weights + bias)
        scores: Array = h @ layers[-1][0] + layers[-1][1] * 0.3
        return scores

    return concept


def _tree(rng: Rng, latent: Array, L: int) -> Concept:
    depth, D = int(rng.integers(1, 7)), latent.shape[1]
    columns = rng.integers(0, D, (depth, 2**depth))
    cuts = latent[rng.integers(0, len(latent), (depth, 2**depth)), columns]
    leaves = rng.normal(size=(2**depth, L))

    def concept(x: Array) -> Array:
        node = np.zeros(len(x), np.int64)
        for level in range(depth):
            node = 2 * node + (x[np.arange(len(x)), columns[level, node]] > cuts[level, node])
        scores: Array = leaves[node]
        return scores

    return concept


def _rules(rng: Rng, latent: Array, L: int) -> Concept:
    D = latent.shape[1]
    rules = []
    for _ in range(int(rng.integers(1, 3 * L))):
        columns = rng.integers(0, D, int(rng.integers(1, 4)))
        low, high = np.sort(latent[rng.integers(0, len(latent), 2)][:, columns], axis=0)
        rules.append((columns, low, high, rng.normal(size=L)))

    def concept(x: Array) -> Array:
        scores = np.zeros((len(x), L)) + 0.3 * np.linspace(0, 1, L)
        for columns, low, high, gain in rules:
            scores += (((x[:, columns] >= low) & (x[:, columns] <= high)).all(1))[:, None] * gain
        return scores

    return concept


def _prototypes(rng: Rng, latent: Array, L: int, centres: Array | None) -> Concept:
    if centres is None:
        centres = latent[rng.integers(0, len(latent), int(rng.integers(L, 4 * L + 4)))]
    gains = rng.normal(size=(len(centres), L))
    gains[np.arange(len(centres)), rng.integers(0, L, len(centres))] += 3
    sharpness = rng.uniform(1.0, 6.0)

    def concept(x: Array) -> Array:
        distance = ((x[:, None] - centres[None]) ** 2).mean(-1)
        near = np.exp(-sharpness * (distance - distance.min(1, keepdims=True)))
        scores: Array = near / near.sum(1, keepdims=True) @ gains
        return scores

    return concept


def _drift(rng: Rng, latent: Array, concepts: list[Concept]) -> Array:
    """Return scores [n, L] of a stream whose concept may change in time."""
    n, kind = len(latent), rng.random()
    scores = [concepts[0](latent)]
    if kind < 0.55:
        return scores[0]
    scores += [concept(latent) for concept in concepts[1:]]
    scores = [each / (each.std() + 1e-9) for each in scores]
    changes = int(rng.integers(1, 4))
    at = np.sort(rng.integers(n // 8, n, changes))
    phase = (np.arange(n)[:, None] >= at).sum(1)
    if kind < 0.75:  # sudden
        which = phase
    elif kind < 0.85:  # gradual
        which = (np.arange(n)[:, None] + rng.normal(size=(n, 1)) * rng.uniform(0.01, 0.1) * n >= at).sum(1)
    elif kind < 0.93:  # recurring
        which = phase % 2
    else:  # incremental
        share = np.linspace(0, 1, n)[:, None] ** rng.uniform(0.5, 2)
        return (1 - share) * scores[0] + share * scores[1]
    stacked: Array = np.stack(scores)[which, np.arange(n)]
    return stacked


def _columns(rng: Rng, latent: Array) -> Array:
    """Return what a stream shows of its latent numbers."""
    n, D = latent.shape
    x = latent + rng.normal(size=(n, D)) * rng.choice([0.0, 0.0, 0.1, 0.5])
    if rng.random() < 0.2:
        x = x @ np.linalg.qr(rng.normal(size=(D, D)))[0]
    if rng.random() < 0.2:
        hidden = int(rng.integers(D, 3 * D + 1))
        x = np.tanh(x @ rng.normal(size=(D, hidden)) / math.sqrt(D)) + rng.normal(size=(n, hidden)) * 0.1
    columns = [_shown(rng, column) for column in x.T]
    for _ in range(int(rng.choice([0, 0, 0, 2, 5, 15]))):
        columns.append(_shown(rng, np.asarray(rng.normal(size=n))))
    shown = np.concatenate(columns, axis=1)[:, :60]
    shown = shown[:, rng.permutation(shown.shape[1])].astype(np.float32)
    if rng.random() < 0.25:
        shown[rng.random(shown.shape) < rng.uniform(0, 0.4, shown.shape[1])] = MISSING
    return shown


def _shown(rng: Rng, column: Array) -> Array:
    """Return one latent number as it is shown [n, 1 or more]."""
    kind = rng.random()
    if kind < 0.1:
        column = np.round(column * rng.uniform(0.5, 3))
    elif kind < 0.18:
        column = np.exp(np.clip(column, -8, 8))
    elif kind < 0.25:  # a category
        cuts = np.sort(column[rng.integers(0, len(column), int(rng.integers(1, 6)))])
        ones: Array = (np.searchsorted(cuts, column)[:, None] == rng.permutation(len(cuts) + 1)).astype(np.float64)
        return ones
    elif kind < 0.32:
        column = (column > np.median(column)).astype(np.float64)
    scaled: Array = column * math.exp(rng.normal() * 2) + rng.normal() * 5
    return scaled[:, None]


def _sticky(rng: Rng, y: Array) -> Array:
    """Return labels that often repeat the one before."""
    stays, last = rng.uniform(0.3, 0.8), y.copy()
    for i in range(1, len(y)):
        if rng.random() < stays:
            last[i] = last[i - 1]
    return last


def _by_appearance(y: Array) -> Array:
    """Return labels numbered in the order in which they first appear."""
    _, first, inverse = np.unique(y, return_index=True, return_inverse=True)
    ranks = np.empty(len(first), np.int64)
    ranks[np.argsort(first)] = np.arange(len(first))
    renumbered: Array = ranks[inverse]
    return renumbered
