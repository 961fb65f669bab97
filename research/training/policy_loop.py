"""Meta-training of policies: many tasks at once, gradients through the writes of the memory.

Acting: a task's memory is unrolled over `span` steps. For each action the network learns a preference and the expected
reward. The targets come from the scenario's teacher; in a scenario without a teacher, from the true means of the task,
so that the policy learns the posterior probability that an action is the best (posterior sampling, as in the decision
pretrained transformer, arXiv 2306.14892). Labelling: each example of a stream attends to all earlier ones.

Shapes: B tasks, A actions, T steps, F inputs of an example, L labels.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.memory.lexical import ops
from model.memory.lexical.types import KEY_SCALE, MAX_GAMMA, NGRAM_SIZES
from model.memory.numerics import TINY
from model.policies.network import Policy, recency_log_prior
from research.scenarios.core import FloatArray, IntArray, LabellingTasks, Tasks, TeacherTasks
from research.scenarios.scenario import PolicyTrainConfig
from research.training.agents import Agent, MemoryAgent

CLIP = 1.0
SAVE_EVERY = 10  # rounds between two saves
STATE_FILE = "state.pt"
EXPLORATION_RATE = 0.05  # share of random actions in training


class ActingRound:
    """One round of an agent on new tasks; each call of `loss` plays the next span of steps with the same memory."""

    def __init__(
        self, agent: Agent, tasks: Tasks, train_config: PolicyTrainConfig, rng: np.random.Generator, greedy: bool
    ) -> None:
        self.agent, self.tasks, self.train_config, self.rng, self.greedy = agent, tasks, train_config, rng, greedy
        agent.reset(tasks.batch)

    def loss(self) -> Tensor:
        """Play a span of steps; return the cross-entropy (nats) of preferences plus that of expected rewards."""
        self.agent.detach()
        outputs, targets = zip(*(self._step() for _ in range(self.train_config.span)), strict=True)
        logits, expected = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        action_targets, means = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*targets, strict=True))
        return F.cross_entropy(logits, action_targets) + F.binary_cross_entropy(expected, means)

    def _step(self) -> tuple[tuple[Tensor, Tensor], tuple[FloatArray, FloatArray]]:
        """Play a step; return the agent's logits and expected rewards [B, A], and their targets."""
        outputs = self.agent.ask(torch.from_numpy(self.tasks.observe()))
        actions, targets = self._choose(outputs[0].detach()), self._targets()
        rewards = self.tasks.step(actions)
        self.agent.tell(torch.from_numpy(actions), torch.from_numpy(rewards))
        return outputs, targets

    def _choose(self, logits: Tensor) -> IntArray:
        best = sample_actions(logits, self.rng, greedy=self.greedy)
        if self.train_config.imitate and self.train_config.led:
            teacher_leads = np.arange(len(best)) < self.train_config.led * len(best)
            best = np.where(teacher_leads, self._teacher_tasks().teacher_scores().argmax(1), best)
        random = self.rng.integers(logits.shape[1], size=len(best))
        actions: IntArray = np.where(self.rng.random(len(best)) < EXPLORATION_RATE, random, best)
        return actions

    def _teacher_tasks(self) -> TeacherTasks:
        assert isinstance(self.tasks, TeacherTasks), "only tasks with a teacher can be imitated"
        return self.tasks

    def _targets(self) -> tuple[FloatArray, FloatArray]:
        """Return the targets [B, A] by the teacher or in truth: preferences, which sum to 1, and expected rewards."""
        if self.train_config.imitate:
            scores = self._teacher_tasks().teacher_scores()
            preferred = np.exp(self.train_config.keen * (scores - scores.max(1, keepdims=True)))
            return preferred / preferred.sum(1, keepdims=True), self._teacher_tasks().expected_rewards().clip(0, 1)
        means = self.tasks.means()
        best = (means == means.max(1, keepdims=True)).astype(np.float32)
        return best / best.sum(1, keepdims=True), means


def sample_actions(logits: Tensor, rng: np.random.Generator, *, greedy: bool) -> IntArray:
    """Return an action [B] for logits [B, A]: the best one if greedy, or a draw from softmax(logits)."""
    if greedy:
        best: IntArray = logits.argmax(-1).numpy()
        return best
    probs = torch.softmax(logits.double(), -1).numpy()
    drawn: IntArray = (probs.cumsum(1) < rng.random((len(probs), 1))).sum(1)
    return drawn.clip(0, probs.shape[1] - 1)


class LabellingRound:
    """One round of a policy that labels, on B streams of T examples; each example reads all earlier ones."""

    def __init__(self, policy: Policy, tasks: Tasks, steps: int) -> None:
        assert isinstance(tasks, LabellingTasks)
        self.policy = policy
        self._features, self._labels, self._regime_start = map(torch.from_numpy, tasks.read(steps))

    def loss(self) -> Tensor:
        """Return the mean loss of the labels (nats), plus that of the hazard if the policy detects changes."""
        streams = zip(self._features, self._labels, self._regime_start, strict=True)
        loss = torch.stack([self._stream(*stream) for stream in streams]).mean()
        if self.policy.doubt is None:
            return loss
        changed = (self._regime_start.diff(dim=1) != 0).float()
        return loss + F.binary_cross_entropy_with_logits(self.policy.doubt.expand_as(changed), changed)

    def _stream(self, features: Tensor, labels: Tensor, regime_start: Tensor) -> Tensor:
        """Return the mean loss of a stream: features [T, F], labels [T], regime_start [T]."""
        policy, site, T = self.policy, self.policy.labels, len(labels)
        states = policy.embed(features)
        keys = site.keys(states)
        # Rows store keys in int8. Training sees the rounded keys, and gradients pass as if there were no rounding.
        stored = keys + (ops.quantise_keys(keys.detach()) / KEY_SCALE - keys.detach())
        queries, earlier = slice(1, T), slice(0, T - 1)
        base, keys = policy.base(states[queries]), keys[queries]
        missing = torch.ones(T - 1, T - 1, dtype=torch.bool).triu(1)
        if policy.doubt is not None:  # training knows the true change points, which hypotheses stand for in serving
            missing |= torch.arange(T - 1) < regime_start[queries, None]
        found = ops.score_candidates(
            labels[None, earlier],
            keys @ stored[earlier].T,
            torch.zeros(T - 1, T - 1, dtype=torch.long),
            recency_log_prior((torch.arange(T - 1)[:, None] - torch.arange(T - 1)).clamp_min(0)),
            missing,
            site.sharpness,
            site.prior,
            torch.zeros(len(site.sharpness), len(NGRAM_SIZES)),
        )
        logit, shares = site.gate(found, base.entropy, keys)
        gamma = torch.sigmoid(logit).clamp_max(MAX_GAMMA)
        memory_probs = ops.memory_prob(labels[queries], found.tokens, shares)
        probs = (1 - gamma) * base.log_prob(labels[queries]).exp() + gamma * memory_probs
        return -probs.clamp_min(TINY).log().mean()


class PolicyTrainer:
    """Trains a policy round by round, and resumes from `folder`.

    The folder holds the policy, the optimiser and the losses of the last save; a stop loses the rounds since then. The
    addresses of a site with k = 1 are not trained, nor are the cells' centres and the trust rate of a lexical site.

    losses: of each round (nats). seconds: of one core, over all runs.
    """

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

    def run(self, on_round: Callable[[int, float], None]) -> None:
        """Train to the last round; after each, call `on_round` with the rounds so far and the round's loss (nats)."""
        started, before = time.process_time(), self.seconds
        while len(self.losses) < self.train_config.rounds:
            self.losses.append(self._round(len(self.losses)))
            self.seconds = before + time.process_time() - started
            done = len(self.losses)
            if done % SAVE_EVERY == 0 or done == self.train_config.rounds:
                self._save()
            on_round(done, self.losses[-1])
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
    """Train an agent on the same tasks for `seconds` of one core; return the loss (nats) of each round."""
    started, losses = time.process_time(), list[float]()
    optimiser = torch.optim.Adam(agent.network.parameters(), lr=train_config.lr)
    while (progress := (time.process_time() - started) / seconds) < 1.0:
        rng = np.random.default_rng([train_config.seed, len(losses)])
        training_round = ActingRound(agent, make(train_config.batch, rng), train_config, rng, greedy)
        losses.append(_train_round(training_round, train_config, optimiser, progress))
    return losses


def _train_round(
    training_round: ActingRound | LabellingRound,
    train_config: PolicyTrainConfig,
    optimiser: torch.optim.Optimizer,
    progress: float,
) -> float:
    """Take one optimiser step for each span of a round and return the mean loss.

    progress: share of the training that is done; the learning rate follows half a cosine down to 1% of its peak.
    """
    spans, total = train_config.steps // train_config.span, 0.0
    for group in optimiser.param_groups:
        group["lr"] = train_config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
    for _ in range(spans):
        loss = training_round.loss()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], CLIP)
        optimiser.step()
        total += float(loss.detach())
    return total / spans
