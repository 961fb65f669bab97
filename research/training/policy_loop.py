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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.memory.config import RUNS
from model.memory.lexical import torch_backend
from model.policies.network import Policy, freshness
from research.scenarios.core import Indices, Numbers, Tasks, Taught
from research.scenarios.streams import Streams
from research.training.agents import Agent, MemoryAgent

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


class ActingRound:
    """One round of an agent: `loss` of each span of steps, with what it keeps carried from one to the next."""

    def __init__(self, agent: Agent, tasks: Tasks, lessons: Lessons, rng: np.random.Generator, greedy: bool) -> None:
        self.agent, self.tasks, self.lessons, self.rng, self.greedy = agent, tasks, lessons, rng, greedy
        agent.begin(tasks.batch)

    def loss(self) -> Tensor:
        self.agent.detach()
        said, told = zip(*(self._step() for _ in range(self.lessons.span)), strict=True)
        logits, expected = (torch.cat(parts) for parts in zip(*said, strict=True))
        wanted, means = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*told, strict=True))
        return F.cross_entropy(logits, wanted) + F.binary_cross_entropy(expected, means)

    def _step(self) -> tuple[tuple[Tensor, Tensor], tuple[Numbers, Numbers]]:
        """What the agent said of each action [B, A], and what it should have said."""
        said = self.agent.ask(torch.from_numpy(self.tasks.observe()))
        action, told = self._choose(said[0].detach()), self._told()
        reward = self.tasks.step(action)
        self.agent.tell(torch.from_numpy(action), torch.from_numpy(reward))
        return said, told

    def _choose(self, logits: Tensor) -> Indices:
        best = chosen(logits, self.rng, greedy=self.greedy)
        if self.lessons.imitate and self.lessons.led:
            leads = np.arange(len(best)) < self.lessons.led * len(best)
            best = np.where(leads, self._taught().teacher().argmax(1), best)
        other = self.rng.integers(logits.shape[1], size=len(best))
        action: Indices = np.where(self.rng.random(len(best)) < EXPLORE, other, best)
        return action

    def _taught(self) -> Taught:
        assert isinstance(self.tasks, Taught), "only tasks with a teacher can be imitated"
        return self.tasks

    def _told(self) -> tuple[Numbers, Numbers]:
        """How each action should be preferred and what it brings [B, A]: by the teacher, or in truth."""
        if self.lessons.imitate:
            told = self._taught().teacher()
            preferred = np.exp(self.lessons.keen * (told - told.max(1, keepdims=True)))
            return preferred / preferred.sum(1, keepdims=True), self._taught().expects().clip(0, 1)
        means = self.tasks.means()
        best = (means == means.max(1, keepdims=True)).astype(np.float32)
        return best / best.sum(1, keepdims=True), means


def chosen(logits: Tensor, rng: np.random.Generator, *, greedy: bool) -> Indices:
    """An action [B] for logits [B, A]: the best one, or one as likely as the logits say."""
    if greedy:
        best: Indices = logits.argmax(-1).numpy()
        return best
    chances = torch.softmax(logits.double(), -1).numpy()
    drawn: Indices = (chances.cumsum(1) < rng.random((len(chances), 1))).sum(1)
    return drawn.clip(0, chances.shape[1] - 1)


class LabellingRound:
    """One round of a labelling policy: each example of each stream asks all earlier ones of it."""

    def __init__(self, policy: Policy, tasks: Tasks, steps: int) -> None:
        assert isinstance(tasks, Streams)
        self.policy = policy
        self._features, self._labels, self._began = map(torch.from_numpy, tasks.read(steps))

    def loss(self) -> Tensor:
        streams = zip(self._features, self._labels, self._began, strict=True)
        loss = torch.stack([self._stream(*stream) for stream in streams]).mean()
        if self.policy.doubt is None:
            return loss
        changed = (self._began.diff(dim=1) != 0).float()
        return loss + F.binary_cross_entropy_with_logits(self.policy.doubt.expand_as(changed), changed)

    def _stream(self, features: Tensor, labels: Tensor, began: Tensor) -> Tensor:
        policy, site, T = self.policy, self.policy.labels, len(labels)
        states = policy.embed(features)
        keys = site.keys(states)
        # Rows are stored in int8: training sees the same roundings.
        stored = keys + (torch_backend.quantise(keys.detach()) / torch_backend.KEY_STEPS - keys.detach())
        asked, earlier = slice(1, T), slice(0, T - 1)
        base, keys = policy.base(states[asked]), keys[asked]
        hidden = torch.ones(T - 1, T - 1, dtype=torch.bool).triu(1)
        if policy.doubt is not None:  # a teacher says what guesses will have to: since when examples count
            hidden |= torch.arange(T - 1) < began[asked, None]
        found = torch_backend.weigh(
            labels[None, earlier],
            keys @ stored[earlier].T,
            torch.zeros(T - 1, T - 1, dtype=torch.long),
            freshness((torch.arange(T - 1)[:, None] - torch.arange(T - 1)).clamp_min(0)),
            hidden,
            site.sharpness,
            site.prior,
            torch.zeros(len(site.sharpness), len(RUNS)),
        )
        logit, shares = site.gate(found, base.entropy, keys)
        gamma = torch.sigmoid(logit).clamp_max(torch_backend.MOST)
        in_memory = torch_backend.memory_prob(labels[asked], found.tokens, shares)
        said = (1 - gamma) * base.log_prob(labels[asked]).exp() + gamma * in_memory
        return -said.clamp_min(torch_backend.TINY).log().mean()


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
        acting = policy.config.task == "act"
        fixed = ("centres", "trust") if not acting else ("address", "temperature") if policy.site.config.k == 1 else ()
        self.policy, self.lessons, self.folder = policy, lessons, folder
        self._make = make
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
        one: ActingRound | LabellingRound
        if self.policy.config.task == "act":
            one = ActingRound(MemoryAgent(self.policy), tasks, lessons, rng, self.policy.config.greedy)
        else:
            one = LabellingRound(self.policy, tasks, lessons.steps)
        return _learn(one, lessons, self._optimiser, number / lessons.rounds)

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {"policy": self.policy.state_dict(), "optimiser": self._optimiser.state_dict()}
        scratch = self.folder / f"{STATE}.part"
        torch.save(kept | {"losses": self.losses, "seconds": self.seconds}, scratch)
        os.replace(scratch, self.folder / STATE)


def train_agent(
    agent: Agent, make: Callable[[int, np.random.Generator], Tasks], lessons: Lessons, *, greedy: bool, seconds: float
) -> list[float]:
    """Trains a rival on the same lessons for so many seconds of one core; returns the loss (nats) of each round."""
    began, losses = time.process_time(), list[float]()
    optimiser = torch.optim.Adam(agent.network.parameters(), lr=lessons.lr)
    while (spent := (time.process_time() - began) / seconds) < 1.0:
        rng = np.random.default_rng([lessons.seed, len(losses)])
        one = ActingRound(agent, make(lessons.batch, rng), lessons, rng, greedy)
        losses.append(_learn(one, lessons, optimiser, spent))
    return losses


def _learn(one: ActingRound | LabellingRound, lessons: Lessons, optimiser: torch.optim.Optimizer, done: float) -> float:
    """The steps of one round, a span each, at the learning rate of this share of the training; their mean loss."""
    spans, total = lessons.steps // lessons.span, 0.0
    for group in optimiser.param_groups:
        group["lr"] = lessons.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
    for _ in range(spans):
        loss = one.loss()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], CLIP)
        optimiser.step()
        total += float(loss.detach())
    return total / spans
