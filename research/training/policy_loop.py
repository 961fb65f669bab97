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

from model.memory.config import NGRAM_SIZES
from model.memory.lexical import torch_backend
from model.memory.lexical.types import KEY_SCALE, MAX_GAMMA
from model.memory.numerics import TINY
from model.policies.network import Policy, recency_log_prior
from research.scenarios.core import FloatArray, IntArray, Tasks, TeacherTasks
from research.scenarios.streams import LabellingTasks
from research.training.agents import Agent, MemoryAgent

CLIP = 1.0
SAVE_EVERY = 10  # rounds between two saves
STATE_FILE = "state.pt"
EXPLORATION_RATE = 0.05  # share of actions that are taken at random while training


@dataclass(frozen=True)
class PolicyTrainConfig:
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

    def __init__(
        self, agent: Agent, tasks: Tasks, train_config: PolicyTrainConfig, rng: np.random.Generator, greedy: bool
    ) -> None:
        self.agent, self.tasks, self.train_config, self.rng, self.greedy = agent, tasks, train_config, rng, greedy
        agent.reset(tasks.batch)

    def loss(self) -> Tensor:
        self.agent.detach()
        outputs, targets = zip(*(self._step() for _ in range(self.train_config.span)), strict=True)
        logits, expected = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        action_targets, means = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*targets, strict=True))
        return F.cross_entropy(logits, action_targets) + F.binary_cross_entropy(expected, means)

    def _step(self) -> tuple[tuple[Tensor, Tensor], tuple[FloatArray, FloatArray]]:
        """What the agent said of each action [B, A], and what it should have said."""
        outputs = self.agent.ask(torch.from_numpy(self.tasks.observe()))
        action, targets = self._choose(outputs[0].detach()), self._targets()
        reward = self.tasks.step(action)
        self.agent.tell(torch.from_numpy(action), torch.from_numpy(reward))
        return outputs, targets

    def _choose(self, logits: Tensor) -> IntArray:
        best = sample_actions(logits, self.rng, greedy=self.greedy)
        if self.train_config.imitate and self.train_config.led:
            teacher_leads = np.arange(len(best)) < self.train_config.led * len(best)
            best = np.where(teacher_leads, self._teacher_tasks().teacher_scores().argmax(1), best)
        other = self.rng.integers(logits.shape[1], size=len(best))
        action: IntArray = np.where(self.rng.random(len(best)) < EXPLORATION_RATE, other, best)
        return action

    def _teacher_tasks(self) -> TeacherTasks:
        assert isinstance(self.tasks, TeacherTasks), "only tasks with a teacher can be imitated"
        return self.tasks

    def _targets(self) -> tuple[FloatArray, FloatArray]:
        """How each action should be preferred and what it brings [B, A]: by the teacher, or in truth."""
        if self.train_config.imitate:
            targets = self._teacher_tasks().teacher_scores()
            preferred = np.exp(self.train_config.keen * (targets - targets.max(1, keepdims=True)))
            return preferred / preferred.sum(1, keepdims=True), self._teacher_tasks().expected_rewards().clip(0, 1)
        means = self.tasks.means()
        best = (means == means.max(1, keepdims=True)).astype(np.float32)
        return best / best.sum(1, keepdims=True), means


def sample_actions(logits: Tensor, rng: np.random.Generator, *, greedy: bool) -> IntArray:
    """An action [B] for logits [B, A]: the best one, or one as likely as the logits say."""
    if greedy:
        best: IntArray = logits.argmax(-1).numpy()
        return best
    chances = torch.softmax(logits.double(), -1).numpy()
    drawn: IntArray = (chances.cumsum(1) < rng.random((len(chances), 1))).sum(1)
    return drawn.clip(0, chances.shape[1] - 1)


class LabellingRound:
    """One round of a labelling policy: each example of each stream asks all earlier ones of it."""

    def __init__(self, policy: Policy, tasks: Tasks, steps: int) -> None:
        assert isinstance(tasks, LabellingTasks)
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
        stored = keys + (torch_backend.quantise_keys(keys.detach()) / KEY_SCALE - keys.detach())
        queries, earlier = slice(1, T), slice(0, T - 1)
        base, keys = policy.base(states[queries]), keys[queries]
        hidden = torch.ones(T - 1, T - 1, dtype=torch.bool).triu(1)
        if policy.doubt is not None:  # a teacher says what guesses will have to: since when examples count
            hidden |= torch.arange(T - 1) < began[queries, None]
        found = torch_backend.score_candidates(
            labels[None, earlier],
            keys @ stored[earlier].T,
            torch.zeros(T - 1, T - 1, dtype=torch.long),
            recency_log_prior((torch.arange(T - 1)[:, None] - torch.arange(T - 1)).clamp_min(0)),
            hidden,
            site.sharpness,
            site.prior,
            torch.zeros(len(site.sharpness), len(NGRAM_SIZES)),
        )
        logit, shares = site.gate(found, base.entropy, keys)
        gamma = torch.sigmoid(logit).clamp_max(MAX_GAMMA)
        memory_probs = torch_backend.memory_prob(labels[queries], found.tokens, shares)
        outputs = (1 - gamma) * base.log_prob(labels[queries]).exp() + gamma * memory_probs
        return -outputs.clamp_min(TINY).log().mean()


class PolicyTrainer:
    """Trains a policy round by round; `folder` keeps it, its optimiser and the losses, so that a stop costs no more
    than the rounds since the last save. Not trained: addresses of lone slots, the cells' centres, rates of trust."""

    def __init__(
        self,
        policy: Policy,
        make: Callable[[int, np.random.Generator], Tasks],
        train_config: PolicyTrainConfig,
        folder: Path,
    ) -> None:
        acting = policy.config.task == "act"
        fixed = ("centres", "trust") if not acting else ("address", "temperature") if policy.site.config.k == 1 else ()
        self.policy, self.train_config, self.folder = policy, train_config, folder
        self._make = make
        self._trained = [
            parameter.requires_grad_(True)
            for name, parameter in policy.named_parameters()
            if not any(word in name for word in fixed)
        ]
        self._optimiser = torch.optim.Adam(self._trained, lr=train_config.lr)
        self.seconds = 0.0
        self.losses: list[float] = []
        if (folder / STATE_FILE).exists():
            checkpoint = torch.load(folder / STATE_FILE, weights_only=True)
            policy.load_state_dict(checkpoint["policy"])
            self._optimiser.load_state_dict(checkpoint["optimiser"])
            self.losses, self.seconds = checkpoint["losses"], checkpoint["seconds"]

    def run(self, tell: Callable[[int, float], None]) -> None:
        """Trains to the last round; tells after each how many are done and the round's loss (nats)."""
        began, before = time.process_time(), self.seconds
        while len(self.losses) < self.train_config.rounds:
            self.losses.append(self._round(len(self.losses)))
            self.seconds = before + time.process_time() - began
            done = len(self.losses)
            if done % SAVE_EVERY == 0 or done == self.train_config.rounds:
                self._save()
            tell(done, self.losses[-1])
        self.policy.requires_grad_(False)

    def _round(self, number: int) -> float:
        train_config = self.train_config
        rng = np.random.default_rng([train_config.seed, number])
        tasks = self._make(train_config.batch, rng)
        training_round: ActingRound | LabellingRound
        if self.policy.config.task == "act":
            training_round = ActingRound(MemoryAgent(self.policy), tasks, train_config, rng, self.policy.config.greedy)
        else:
            training_round = LabellingRound(self.policy, tasks, train_config.steps)
        return _train_round(training_round, train_config, self._optimiser, number / train_config.rounds)

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint = {"policy": self.policy.state_dict(), "optimiser": self._optimiser.state_dict()}
        scratch = self.folder / f"{STATE_FILE}.part"
        torch.save(checkpoint | {"losses": self.losses, "seconds": self.seconds}, scratch)
        os.replace(scratch, self.folder / STATE_FILE)


def train_agent(
    agent: Agent,
    make: Callable[[int, np.random.Generator], Tasks],
    train_config: PolicyTrainConfig,
    *,
    greedy: bool,
    seconds: float,
) -> list[float]:
    """Trains a rival on the same lessons for so many seconds of one core; returns the loss (nats) of each round."""
    began, losses = time.process_time(), list[float]()
    optimiser = torch.optim.Adam(agent.network.parameters(), lr=train_config.lr)
    while (spent := (time.process_time() - began) / seconds) < 1.0:
        rng = np.random.default_rng([train_config.seed, len(losses)])
        training_round = ActingRound(agent, make(train_config.batch, rng), train_config, rng, greedy)
        losses.append(_train_round(training_round, train_config, optimiser, spent))
    return losses


def _train_round(
    training_round: ActingRound | LabellingRound,
    train_config: PolicyTrainConfig,
    optimiser: torch.optim.Optimizer,
    done: float,
) -> float:
    """The steps of one round, a span each, at the learning rate of this share of the training; their mean loss."""
    spans, total = train_config.steps // train_config.span, 0.0
    for group in optimiser.param_groups:
        group["lr"] = train_config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
    for _ in range(spans):
        loss = training_round.loss()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], CLIP)
        optimiser.step()
        total += float(loss.detach())
    return total / spans
