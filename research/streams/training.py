"""Training of the mixers on the prior: the readers run over random streams, then the mixer fits what they said.

The readers have no weights, so their distributions are recorded once; the mixer is then trained on them by gradient, on
its log loss (labels) or its absolute error (numbers). Some steps of each stream are kept, the first ones above all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.tabular import label_readers, labels, number_readers, numbers
from model.tabular.config import MAX_EXAMPLES
from model.tabular.memory import StreamMemory, empty_memory
from model.tabular.mixer import Mixer, MixerWeights
from research.streams.prior import Task, label_task, number_task

FIRST_STEPS, KEPT_STEPS = 60, 160  # steps of a stream that are kept: the first ones, and so many of the others
BATCH, RATE, WEIGHT_DECAY = 512, 3e-3, 1e-3
MOST_LABELS = 20  # of a task of the prior
Progress = Callable[[int], None]
Array = NDArray[Any]


class Records(NamedTuple):
    """Steps of streams: what the readers said [N, E, L] or [N, E], the mixer's inputs [N, E, F], the outcomes [N], the
    number of labels [N], and for labels the inputs of the chance of a new label and whether it was one [M, 5]."""

    readouts: Tensor
    inputs: Tensor
    outcomes: Tensor
    sizes: Tensor
    novelty: Tensor


def windows(memory: StreamMemory, task: Task, i: int, extra: Array) -> None:
    """Give the memory the examples before step i of a task."""
    first = max(0, i - MAX_EXAMPLES)
    memory.x, memory.values = task.x[first:i], task.y[first:i].astype(np.float32)
    memory.extra, memory.ordinals = extra[first:i], np.arange(first + 1, i + 1)


def record_labels(tasks: int, seed: int, progress: Progress) -> Records:
    """Run the readers of labels over tasks of the prior."""
    readouts: list[Array] = []
    inputs: list[Array] = []
    outcomes: list[tuple[int, int]] = []
    novelty: list[Array] = []
    for number in range(tasks):
        rng = np.random.default_rng([seed, number])
        task = label_task(rng)
        memory, keep = empty_memory(label_readers.E), _kept(rng, len(task.y))
        extra = np.zeros((len(task.y), 2), np.float32)
        for i, label in enumerate(task.y.tolist()):
            reading = None
            if i:
                windows(memory, task, i, extra)
                reading = labels.read_query(memory, task.x[i])
                L = memory.num_labels
                if keep[i]:
                    novelty.append(np.append(reading.novelty_inputs, np.float32(label == L)))
                if keep[i] and label < L:
                    padded = np.zeros((label_readers.E, MOST_LABELS), np.float16)
                    padded[:, :L] = reading.readout.probs
                    readouts.append(padded)
                    inputs.append(reading.inputs)
                    outcomes.append((label, L))
            labels.learn_label(memory, reading, label, None)
        progress(number + 1)
    columns = np.array(outcomes)
    return Records(*map(torch.from_numpy, (np.stack(readouts), np.stack(inputs), *columns.T.copy(), np.stack(novelty))))


def record_numbers(tasks: int, seed: int, progress: Progress) -> Records:
    """Run the readers of numbers over tasks of the prior."""
    readouts: list[Array] = []
    inputs: list[Array] = []
    outcomes: list[float] = []
    for number in range(tasks):
        rng = np.random.default_rng([seed, number])
        task = number_task(rng)
        memory, keep = empty_memory(number_readers.E), _kept(rng, len(task.y))
        extra = np.zeros((len(task.y), 2), np.float32)
        for i, target in enumerate(task.y.tolist()):
            reading, mean = None, 0.0
            if i:
                windows(memory, task, i, extra)
                reading = numbers.read_query(memory, task.x[i])
                centre, scale = reading.scaled.centre, reading.scaled.scale
                mean = centre + scale * float(np.median(reading.readout.means))
                if keep[i]:
                    readouts.append(reading.readout.means)
                    inputs.append(reading.inputs)
                    outcomes.append(min(max((target - centre) / scale, -20.0), 20.0))
            numbers.learn_number(memory, reading, mean, target)
        progress(number + 1)
    none = torch.zeros(0)
    return Records(
        torch.from_numpy(np.stack(readouts)), torch.from_numpy(np.stack(inputs)), torch.tensor(outcomes), none, none
    )


def _kept(rng: np.random.Generator, n: int) -> Array:
    return rng.random(n) < np.where(np.arange(n) < FIRST_STEPS, 1.0, min(1.0, KEPT_STEPS / n))


def fit(records: Records, steps: int, seed: int, progress: Progress) -> tuple[Mixer, list[float]]:
    """Train a mixer on records; return it, and its losses in the order of the steps."""
    mixer, generator = Mixer(records.readouts.shape[1]), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(mixer.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    losses = []
    for step in range(steps):
        rate = RATE * min(1.0, (step + 1) / 50) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        batch = torch.randint(len(records.readouts), (BATCH,), generator=generator)
        loss = mixer_loss(mixer, records, batch)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        progress(step + 1)
    if len(records.novelty):
        _fit_novelty(mixer, records.novelty.float())
    return mixer, losses


def mixer_loss(mixer: Mixer, records: Records, batch: Tensor) -> Tensor:
    """Return the mean loss of a mixer on some records: log loss of labels, absolute error of numbers."""
    readouts, inputs, outcomes = records.readouts[batch].float(), records.inputs[batch], records.outcomes[batch]
    if readouts.dim() == 3:
        present = torch.arange(readouts.shape[2]) < records.sizes[batch][:, None]
        return F.nll_loss(mixer(readouts, inputs, present), outcomes)
    return (mixer.mean(readouts, inputs) - outcomes).abs().mean()


def _fit_novelty(mixer: Mixer, novelty: Tensor) -> None:
    optimiser = torch.optim.LBFGS(mixer.novelty.parameters(), max_iter=100)

    def closure() -> Tensor:
        optimiser.zero_grad()
        chance = mixer.novelty(novelty[:, :-1])[:, 0]
        loss: Tensor = F.binary_cross_entropy_with_logits(chance, novelty[:, -1])
        loss = loss + 1e-4 * mixer.novelty.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)


def untrained(readers: int) -> MixerWeights:
    """Return the weights of a mixer before training."""
    return MixerWeights.of(Mixer(readers))
