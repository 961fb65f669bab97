"""Meta-training of policies: many tasks at once, a teacher who knows their kind, gradients through the writes.

Acting: what the memory should say of each action is told by the scenario's teacher; where there is none, by the task
itself. Then a policy learns how likely each action is to be the best, given what it has seen (posterior sampling, as in
arXiv 2306.14892), and what each brings. Labelling: each example asks all earlier ones of its stream.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.memory import ops
from model.memory.config import RUNS
from model.memory.slow import MOST
from model.policy import Policy, freshness
from model.scenarios.core import Numbers, Tasks
from model.scenarios.streams import Streams

CLIP = 1.0
SAVED = 10  # rounds between two saves
STATE = "state.pt"
EXPLORE = 0.05  # share of actions that are taken at random while training


@dataclass(frozen=True)
class Lessons:
    """How a policy is trained: `rounds` of `batch` new tasks of `steps` steps; gradients pass `span` steps.

    keen: how sharply the best actions are told apart; imitate: whether there is a teacher; led: share
    of the tasks in which the teacher acts.
    """

    rounds: int
    batch: int = 256
    steps: int = 120
    span: int = 40
    lr: float = 3e-3
    keen: float = 20.0
    imitate: bool = True
    led: float = 0.0
    seed: int = 0


class Sheet:
    """The rows of a batch of tasks while training, where gradients reach them: [B, P, d_v]; each slot that is asked for
    gets one of the P places, for all tasks alike."""

    def __init__(self, batch: int, slots: int, width: int) -> None:
        self.rows = torch.zeros(batch, 0, width)
        self._places = torch.full((slots,), -1)

    def places(self, slots: Tensor) -> Tensor:
        """slots, any shape → places."""
        new = torch.unique(slots[self._places[slots] < 0])
        if len(new):
            batch, held, width = self.rows.shape
            self._places[new] = held + torch.arange(len(new))
            self.rows = torch.cat([self.rows, self.rows.new_zeros(batch, len(new), width)], dim=1)
        return self._places[slots]

    def read(self, places: Tensor) -> Tensor:
        """places [B, m] → rows [B, m, d_v]."""
        return self.rows.gather(1, places[:, :, None].expand(-1, -1, self.rows.shape[2]))

    def write(self, places: Tensor, rows: Tensor) -> None:
        """rows [B, k, d_v] at places [B, k]."""
        self.rows = self.rows.scatter(1, places[:, :, None].expand_as(rows), rows)


class ActingRound:
    """One round of an acting policy: `loss` of each span of steps, with the rows carried from one to the next."""

    def __init__(self, policy: Policy, tasks: Tasks, lessons: Lessons, rng: np.random.Generator) -> None:
        self.policy, self.tasks, self.lessons, self.rng = policy, tasks, lessons, rng
        site = policy.site.config
        self.sheet = Sheet(tasks.batch, site.slots, site.width)
        self.last = torch.full((tasks.batch,), -1)
        self.reward = torch.full((tasks.batch,), math.nan)

    def loss(self) -> Tensor:
        self.sheet.rows = self.sheet.rows.detach()
        said, told = zip(*(self._step() for _ in range(self.lessons.span)), strict=True)
        logits, expected = (torch.cat(parts) for parts in zip(*said, strict=True))
        wanted, means = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*told, strict=True))
        return F.cross_entropy(logits, wanted) + F.binary_cross_entropy(expected, means)

    def _step(self) -> tuple[tuple[Tensor, Tensor], tuple[Numbers, Numbers]]:
        """What the policy said of each action [B, A], and what it should have said."""
        policy, tasks = self.policy, self.tasks
        B, A = tasks.batch, tasks.actions
        inputs = policy.inputs(torch.from_numpy(tasks.observe()), self.last, self.reward)
        state = policy.state(inputs.flatten(0, 1))
        with torch.set_grad_enabled(policy.site.config.k > 1):  # the weight of a lone slot is 1, whatever its address
            slots, w = policy.site.address(state)
        places = self.sheet.places(slots).view(B, -1)
        rows = self.sheet.read(places).view(B * A, *slots.shape[1:], -1)
        recalled = policy.recall(state, rows, w)
        logits, expected = (part.view(B, A) for part in policy.judge(recalled))
        action = self._choose(logits.detach())
        told = self._told()
        taken = torch.arange(B) * A + torch.from_numpy(action)
        reward = torch.from_numpy(tasks.step(action))
        value, beta, _ = policy.lesson(recalled[taken], policy.scaled(reward), expected.flatten()[taken])
        self.sheet.write(self.sheet.places(slots[taken]), policy.write(rows[taken], w[taken], beta, value))
        self.last, self.reward = torch.from_numpy(action), reward
        return (logits, expected), told

    def _choose(self, logits: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
        chances = torch.softmax(logits, -1).double().numpy()
        drawn = (chances.cumsum(1) < self.rng.random((len(chances), 1))).sum(1).clip(0, chances.shape[1] - 1)
        best = logits.argmax(-1).numpy() if self.policy.config.greedy else drawn
        if self.lessons.imitate and self.lessons.led:
            leads = np.arange(len(best)) < self.lessons.led * len(best)
            best = np.where(leads, self.tasks.teacher().argmax(1), best)
        other = self.rng.integers(logits.shape[1], size=len(best))
        action: np.ndarray[Any, np.dtype[np.int64]] = np.where(self.rng.random(len(best)) < EXPLORE, other, best)
        return action

    def _told(self) -> tuple[Numbers, Numbers]:
        """How each action should be preferred and what it brings [B, A]: by the teacher, or in truth."""
        if self.lessons.imitate:
            told = self.tasks.teacher()
            preferred = np.exp(self.lessons.keen * (told - told.max(1, keepdims=True)))
            return preferred / preferred.sum(1, keepdims=True), told.clip(0, 1)
        means = self.tasks.means()
        best = (means == means.max(1, keepdims=True)).astype(np.float32)
        return best / best.sum(1, keepdims=True), means


class LabellingRound:
    """One round of a labelling policy: each example of each stream asks all earlier ones of it."""

    def __init__(self, policy: Policy, tasks: Tasks, lessons: Lessons, rng: np.random.Generator) -> None:
        assert isinstance(tasks, Streams)
        self.policy, self.lessons = policy, lessons
        seen = []
        for _ in range(lessons.steps):
            seen.append((tasks.observe(), tasks.answers()))
            tasks.step(np.zeros(tasks.batch, np.int64))
        self._features = torch.from_numpy(np.stack([features for features, _ in seen], 1))
        self._labels = torch.from_numpy(np.stack([labels for _, labels in seen], 1))

    def loss(self) -> Tensor:
        streams = zip(self._features, self._labels, strict=True)
        return torch.stack([self._stream(features, labels) for features, labels in streams]).mean()

    def _stream(self, features: Tensor, labels: Tensor) -> Tensor:
        policy, site, T = self.policy, self.policy.labels, len(labels)
        states = policy.embed(features)
        keys = site.keys(states)
        # Rows are stored in int8: training sees the same roundings.
        stored = keys + (ops.quantise(keys.detach()) / ops.KEY_STEPS - keys.detach())
        asked, earlier = slice(1, T), slice(0, T - 1)
        base, keys = policy.base(states[asked]), keys[asked]
        found = ops.weigh(
            labels[None, earlier],
            keys @ stored[earlier].T,
            torch.zeros(T - 1, T - 1, dtype=torch.long),
            freshness((torch.arange(T - 1)[:, None] - torch.arange(T - 1)).clamp_min(0)),
            torch.ones(T - 1, T - 1, dtype=torch.bool).triu(1),
            site.sharpness,
            site.prior,
            torch.zeros(len(site.sharpness), len(RUNS)),
        )
        logit, shares = site.gate(found, base.entropy, keys)
        gamma = torch.sigmoid(logit).clamp_max(MOST)
        in_memory = ops.memory_prob(labels[asked], found.tokens, shares)
        said = (1 - gamma) * base.log_prob(labels[asked]).exp() + gamma * in_memory
        return -said.clamp_min(ops.TINY).log().mean()


class PolicyTrainer:
    """Trains a policy round by round; `folder` keeps it, its optimiser and the losses, so that a stop costs no more
    than the rounds since the last save. Not trained: addresses of lone slots, the cells' centres, rates of trust."""

    def __init__(
        self,
        policy: Policy,
        make: Callable[[int, np.random.Generator], Tasks],
        lessons: Lessons,
        folder: Path,
    ) -> None:
        self.policy, self.lessons, self.folder = policy, lessons, folder
        self._make = make
        acting = policy.config.task == "act"
        fixed = ("centres", "trust") if not acting else ("address", "temperature") if policy.site.config.k == 1 else ()
        self._trained = [
            parameter.requires_grad_(True)
            for name, parameter in policy.named_parameters()
            if not any(word in name for word in fixed)
        ]
        self._optimiser = torch.optim.Adam(self._trained, lr=lessons.lr)
        self.seconds = 0.0
        self.losses: list[float] = []
        if (folder / STATE).exists():
            kept = torch.load(folder / STATE, weights_only=True)
            policy.load_state_dict(kept["policy"])
            self._optimiser.load_state_dict(kept["optimiser"])
            self.losses, self.seconds = kept["losses"], kept["seconds"]

    def run(self, tell: Callable[[int, float], None]) -> None:
        """Trains to the last round; tells after each how many are done and the round's loss (nats)."""
        began, before = time.process_time(), self.seconds
        while len(self.losses) < self.lessons.rounds:
            self.losses.append(self._round(len(self.losses)))
            self.seconds = before + time.process_time() - began
            done = len(self.losses)
            if done % SAVED == 0 or done == self.lessons.rounds:
                self._save()
            tell(done, self.losses[-1])
        self.policy.requires_grad_(False)

    def _round(self, number: int) -> float:
        lessons = self.lessons
        rng = np.random.default_rng([lessons.seed, number])
        tasks = self._make(lessons.batch, rng)
        kind = ActingRound if self.policy.config.task == "act" else LabellingRound
        one, spans = kind(self.policy, tasks, lessons, rng), lessons.steps // lessons.span
        rate = lessons.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * number / lessons.rounds)))
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        total = 0.0
        for _ in range(spans):
            loss = one.loss()
            self._optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self._trained, CLIP)
            self._optimiser.step()
            total += float(loss.detach())
        return total / spans

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {"policy": self.policy.state_dict(), "optimiser": self._optimiser.state_dict()}
        scratch = self.folder / f"{STATE}.part"
        torch.save(kept | {"losses": self.losses, "seconds": self.seconds}, scratch)
        os.replace(scratch, self.folder / STATE)
