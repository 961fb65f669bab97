"""The policy network: a small network around a session's memory, computed with torch's operators.

The module is the reference for every faster implementation of a policy (`model.policies.numba_step`), and the policy
itself on a GPU and in training. What a session learns are rows of `model.memory`, in the same pools and drafts as the
rows of text. A policy that acts has a delta site (its rows predict rewards) and a journal (actions whose reward may
arrive). A policy that labels has a lexical site whose tokens are the labels, and optionally a change-point site.

Shapes: n sessions or examples, A actions, F inputs of an action or an example, D state size, W units of a hidden layer,
L labels (= A), k slots of an address, d_v width of a delta row, K candidate rows, J change-point hypotheses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from model import weights
from model.memory import DeltaSite, Draft, LexicalSite, Memory, Pool
from model.memory.config import BALANCE, GATE_CLOSED
from model.memory.delta import torch_ops
from model.memory.guard import GUARD_LIMIT_NATS, guard_step
from model.memory.lexical import ops
from model.memory.lexical.site import FoundCandidates, LexicalReadout
from model.memory.lexical.types import NGRAM_SIZES, LexicalRows
from model.memory.numerics import TINY, rowwise_matmul
from model.memory.prediction import Prediction, base_prediction
from model.policies.change_point import NAME as CHANGE_POINT_SITE
from model.policies.change_point import ChangePointHypotheses
from model.policies.config import NUM_OUTCOME_INPUTS, PolicyConfig, PolicyError

FORMAT = "1"
MAX_LOSS_NATS = 8.0  # of a reward, as the write gate sees the loss


class RewardUpdate(NamedTuple):
    """The writes of n rewards, not yet applied.

    slots [n, k] long; rows [n, k, d_v], the new rows of these slots; loss [n] (nats), of the reward that the policy
    expected; frozen_loss [n] (nats), of the reward that the network expects without memory.
    """

    slots: Tensor
    rows: Tensor
    loss: Tensor
    frozen_loss: Tensor


class LabelUpdate(NamedTuple):
    """The write of one label, not yet applied.

    predicted: the label that the policy would have answered; loss (nats), of the correct label; frozen_loss (nats), the
    same without memory; apply: writes the label into a draft of the session, raises PoolFullError.
    """

    predicted: int
    loss: float
    frozen_loss: float
    apply: Callable[[Draft], None]


class Policy(nn.Module):
    """The network and its memory sites.

    The parameters are slow weights: all sessions share them, and serving only reads them.

    An empty session decides bit for bit as the network without memory. Every row of a batch is rounded as if the row
    were alone, so a decision does not depend on the other sessions of the batch.

    `Policy` satisfies `model.policies.backend.PolicyBackend`, whose docstrings are the contract of the serving steps.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.memory = Memory(config.memory)
        D, W = config.state_size, config.width
        self.trunk = nn.Linear(config.input_size, W)
        self.inner = nn.Linear(W, W) if config.task == "label" else None
        self.size = nn.Parameter(torch.zeros(D))
        self.product = nn.Parameter(torch.zeros(self.site.config.width, D)) if config.product else None
        self.join = nn.Linear(D, W)
        self.head = nn.Linear(W, 2 if config.task == "act" else config.actions)
        self.event = nn.Linear(D + NUM_OUTCOME_INPUTS, D)
        self.doubt = nn.Parameter(torch.zeros(())) if config.detects_changes else None  # logit of the hazard
        self.requires_grad_(False)

    def prepare(self, pool: Pool) -> None:
        """Do nothing: torch's operators need no preparation."""

    def fingerprint(self) -> str:
        """Return sha256 over the configuration and every tensor: the identity that a stored state is bound to."""
        return weights.fingerprint(self.config.to_dict(), self)

    # --- acting ----------------------------------------------------------------------------------------------------

    @property
    def site(self) -> DeltaSite:
        """Return the memory site of a policy that acts."""
        return self.memory.delta[-1]

    def inputs(self, observation: Tensor, last: Tensor, reward: Tensor) -> Tensor:
        """Return the inputs [n, A, F] of all actions: context, features, identity, then the history of the action.

        observation [n, context + A·features]; last [n] long, the last action (−1: none); reward [n], its reward
        (NaN: not known).
        """
        c, n = self.config, len(observation)
        context, features = observation.split([c.context, c.actions * c.features], dim=1)
        was_last = F.one_hot(last.clamp_min(0), c.actions) * (last >= 0)[:, None]
        has_reward = (~reward.isnan())[:, None] * was_last
        parts = [context[:, None].expand(-1, c.actions, -1), features.view(n, c.actions, c.features)]
        if c.identity:
            parts.append(torch.eye(c.actions, device=context.device).expand(n, -1, -1))
        history = [was_last, has_reward * self.scaled(reward.nan_to_num(c.lowest))[:, None], has_reward]
        return torch.cat([*parts, torch.stack(history, dim=-1).to(context.dtype)], dim=-1)

    def state(self, inputs: Tensor) -> Tensor:
        """Return the states [n, D] of inputs [n, F]: the address inputs, then relu(trunk(inputs))."""
        c = self.config
        address_inputs, start = [inputs[:, : c.cue]], c.context + c.features
        if c.by_features:
            address_inputs.append(inputs[:, c.context : start])
        if c.by_action:
            address_inputs.append(inputs[:, start : start + c.actions])
        return torch.cat([*address_inputs, torch.relu(_apply(self.trunk, inputs))], dim=1)

    def recall(self, state: Tensor, rows: Tensor, w: Tensor) -> Tensor:
        """Return the states [n, D] with the memory read into them.

        rows [n, k, d_v], w [n, k]: the addressed rows and their weights. With o = norm(Σ w_i M_i) and the gate g of
        `DeltaSite`: h + g·W_out o (+ h ⊙ W_product o) (+ log(1 + rms(Σ w_i M_i))·size).
        """
        recalled = self.site.join(state, rows, w)
        if self.product is not None:
            recalled = recalled + state * rowwise_matmul(torch_ops.read_delta(rows, w), self.product)
        if self.site.config.decay == 1.0:  # a write replaces the row, so the magnitude carries no count
            return recalled
        return recalled + torch_ops.delta_read_magnitude(rows, w)[:, None] * self.size

    def logit_and_value(self, recalled: Tensor) -> tuple[Tensor, Tensor]:
        """Return an action's logit [n] and expected reward [n], scaled to 0…1, for recalled states [n, D]."""
        out = _apply(self.head, torch.relu(_apply(self.join, recalled)))
        return out[:, 0], torch.sigmoid(out[:, 1])

    def reward_update(self, recalled: Tensor, reward: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what rewards write: value v [n, d_v] and write gate β [n] of the delta rule, and the loss [n] (nats).

        recalled [n, D]; reward [n] and expected [n], both scaled to 0…1. The loss is the binary cross-entropy of the
        expected reward.
        """
        above, below = (reward - expected).clamp_min(0), (expected - reward).clamp_min(0)
        outcome = torch.stack([torch.ones_like(reward), reward, above, below], dim=1)
        following = torch.tanh(_apply(self.event, torch.cat([recalled, outcome], dim=1)))
        loss = -(reward * expected.clamp_min(TINY).log() + (1 - reward) * (1 - expected).clamp_min(TINY).log())
        error = F.pad(outcome, (0, self.config.state_size - NUM_OUTCOME_INPUTS))
        return self.site.value(following, error), self.site.beta(loss.clamp_max(MAX_LOSS_NATS)), loss

    def scaled(self, reward: Tensor) -> Tensor:
        """Return rewards [n], scaled from the policy's range to 0…1."""
        return (reward - self.config.lowest) / (self.config.highest - self.config.lowest)

    def decide(self, inputs: Tensor, pool: Pool, session: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [n, A] and the expected rewards [n, A], scaled to 0…1; see `PolicyBackend.decide`."""
        state, session = self.state(inputs.flatten(0, 1)), session.repeat_interleave(self.config.actions)
        closed = pool.sites[self.site.config.name].session_scalars[session, GATE_CLOSED, 0] != 0
        recalled = self._read(state, pool, session)[0]
        logits, expected = self.logit_and_value(torch.where(closed[:, None], state, recalled))
        return logits.view(len(inputs), -1), expected.view(len(inputs), -1)

    def reward(self, inputs: Tensor, reward: Tensor, pool: Pool, session: Tensor) -> RewardUpdate:
        """Return the writes of rewards [n] of actions with inputs [n, F]; see `PolicyBackend.reward`."""
        state, reward = self.state(inputs), self.scaled(reward)
        recalled, slots, w, rows = self._read(state, pool, session)
        value, beta, loss = self.reward_update(recalled, reward, self.logit_and_value(recalled)[1])
        frozen_loss = self.reward_update(state, reward, self.logit_and_value(state)[1])[2]
        return RewardUpdate(slots, self.write(rows, w, beta, value), loss, frozen_loss)

    def guard_step(self, draft: Draft, gain: float) -> bool:
        """Count a reward's gain (nats) in the guard of the draft's session; see `PolicyBackend.guard_step`."""
        session_scalars = draft.pool.sites[self.site.config.name].session_scalars[draft.index]
        balance, closed = session_scalars[BALANCE, 0].clone(), session_scalars[GATE_CLOSED, 0].clone()
        session_scalars[BALANCE, 0], session_scalars[GATE_CLOSED, 0] = update_guard(
            balance, closed, session_scalars.new_tensor(gain)
        )
        return not closed

    def write(self, rows: Tensor, w: Tensor, beta: Tensor, value: Tensor) -> Tensor:
        """Return rows [n, k, d_v] after one delta-rule write each; w [n, k], beta [n], value [n, d_v]."""
        n, k, _ = rows.shape
        at = torch.arange(n * k, device=rows.device).view(n, k)
        config = self.site.config
        new = torch_ops.write_delta(rows.flatten(0, 1), at, w, beta, value, decay=config.decay, cap=config.cap)
        return new.view_as(rows)

    def _read(self, state: Tensor, pool: Pool, session: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return recalled states [n, D], and the slots [n, k], their weights w [n, k] and rows [n, k, d_v]."""
        slots, w = self.site.address(state)
        (rows,) = pool.sites[self.site.config.name].read(session, slots)
        return self.recall(state, rows, w), slots, w, rows

    # --- labelling -------------------------------------------------------------------------------------------------

    @property
    def labels(self) -> LexicalSite:
        """Return the memory site of a policy that labels; the site's tokens are the labels."""
        assert self.memory.lexical is not None
        return self.memory.lexical

    def embed(self, features: Tensor) -> Tensor:
        """Return the states [n, D] of examples [n, F]."""
        assert self.inner is not None
        hidden = torch.relu(_apply(self.trunk, features))
        return hidden + torch.relu(_apply(self.inner, hidden))

    def base(self, states: Tensor) -> Prediction:
        """Return the network's prediction of the labels [n, L] without memory, for states [n, D]."""
        return base_prediction(_apply(self.head, torch.relu(_apply(self.join, states))))

    def label(self, features: Tensor, pool: Pool, session: Tensor) -> Tensor:
        """Return log p [n, L] of the labels of examples [n, F]; see `PolicyBackend.label`."""
        base, readout, _ = self._read_labels(features, pool, session)
        return ops.mix(base, readout.tokens, readout.shares, readout.gamma).log_softmax(-1)

    def label_updates(self, features: Tensor, labels: Tensor, pool: Pool, session: Tensor) -> list[LabelUpdate]:
        """Return the writes of labels [n] long of examples [n, F]; see `PolicyBackend.label_updates`."""
        base, readout, by_hypothesis = self._read_labels(features, pool, session)
        frozen = base.log_prob(labels)
        mixture = ops.mix(base, readout.tokens, readout.shares, readout.gamma)
        memory_probs = ops.memory_prob(labels, readout.tokens, readout.shares)
        loss = -ops.target_log_prob(frozen, memory_probs, readout.gamma)
        known = self._has_row(labels, pool, session)
        hypotheses = (
            None if by_hypothesis is None else self._update_hypotheses(by_hypothesis, labels, frozen, pool, session)
        )

        def writer(i: int) -> Callable[[Draft], None]:
            one = torch.tensor([i], device=labels.device)

            def apply(draft: Draft) -> None:
                self.labels.learn(draft, readout.select(one), labels[one], frozen[one], is_evidence=known[one])
                if hypotheses is not None:
                    draft.put(CHANGE_POINT_SITE, torch.zeros_like(one), [hypotheses[one]])

            return apply

        outcomes = zip(mixture.argmax(-1).tolist(), loss.tolist(), (-frozen).tolist(), strict=True)
        return [LabelUpdate(*outcome, writer(i)) for i, outcome in enumerate(outcomes)]

    def _read_labels(
        self, features: Tensor, pool: Pool, session: Tensor
    ) -> tuple[Prediction, LexicalReadout, LexicalReadout | None]:
        """Return the network's prediction, the memory's readout, and the readout [n·J] under each hypothesis.

        Under hypothesis j only the rows that were written after starts[j] labels count.
        """
        states, site = self.embed(features), self.labels
        base, keys = self.base(states), site.keys(states)
        cells = site.address(keys)
        rows = LexicalRows(*pool.sites[site.config.name].read(session, cells))
        similarity = ops.similarity(rows, keys)
        recency = recency_log_prior(rows.ages.amax(-1, keepdim=True) - rows.ages).flatten(1)

        def read_masked(missing: Tensor, each: Tensor) -> LexicalReadout:
            """Read contexts `each` [m] long without the rows that `missing` [m, K] masks."""
            no_matches, no_bonus = torch.zeros_like(missing, dtype=torch.long), torch.zeros_like(site.bonus)
            tokens = rows.tokens.flatten(1).long()[each]
            candidates = ops.score_candidates(
                tokens, similarity[each], no_matches, recency[each], missing, site.sharpness, site.prior, no_bonus
            )
            ngram_hashes = torch.zeros(len(each), len(NGRAM_SIZES), dtype=torch.int16, device=each.device)
            found = FoundCandidates(keys[each], cells[each], (rows.ages == 0).sum(-1)[each], candidates)
            trust = site.initial_trust().expand(len(each), -1)
            return site.gate_mixture(pool, session[each], ngram_hashes, base.select(each), trust, found)

        ages, each = rows.ages.flatten(1), torch.arange(len(session), device=session.device)
        if self.doubt is None:
            return base, read_masked(ages == 0, each), None
        starts, probs = self._hypotheses(pool, session)
        outdated = (ages[:, None] <= starts[:, :, None]).flatten(0, 1)
        by_hypothesis = read_masked(outdated, each.repeat_interleave(starts.shape[1]))
        return base, _average_over_hypotheses(by_hypothesis, probs), by_hypothesis

    def _has_row(self, labels: Tensor, pool: Pool, session: Tensor) -> Tensor:
        """Return whether each session [n] has a row of its label [n]: no memory can expect a label without one, so such
        a label is no evidence for the guard."""
        site_pool = pool.sites[self.labels.config.name]
        ages, tokens = (field[site_pool.tables[session]].flatten(1) for field in site_pool.fields[:2])
        return ((tokens == labels[:, None]) & (ages > 0)).any(1)

    def _hypotheses(self, pool: Pool, session: Tensor) -> ChangePointHypotheses:
        return ChangePointHypotheses.of(
            pool.sites[CHANGE_POINT_SITE].read(session, torch.zeros_like(session)[:, None])[0][:, 0]
        )

    def _update_hypotheses(
        self, by_hypothesis: LexicalReadout, labels: Tensor, frozen: Tensor, pool: Pool, session: Tensor
    ) -> Tensor:
        """Return the change-point rows [n, 2·J] of the sessions after labels [n]; frozen [n]: their base log p."""
        assert self.doubt is not None
        hypotheses = self._hypotheses(pool, session)
        num_hypotheses = hypotheses.starts.shape[1]
        memory_probs = ops.memory_prob(
            labels.repeat_interleave(num_hypotheses), by_hypothesis.tokens, by_hypothesis.shares
        )
        likelihoods = ops.target_log_prob(
            frozen.repeat_interleave(num_hypotheses), memory_probs, by_hypothesis.unguarded_gamma
        ).exp()
        label_pool = pool.sites[self.labels.config.name]
        # The site has one cell, so the highest age counts all labels of the session.
        num_labels = label_pool.fields[0][label_pool.tables[session, 0]].amax(1) + 1
        return hypotheses.update(likelihoods.view(-1, num_hypotheses), torch.sigmoid(self.doubt), num_labels)


def _average_over_hypotheses(by_hypothesis: LexicalReadout, probs: Tensor) -> LexicalReadout:
    """Return the readout [n] in expectation over the hypotheses; by_hypothesis [n·J], probs [n, J]."""
    n, num_hypotheses = probs.shape

    def mean(gamma: Tensor) -> Tensor:
        return (probs * gamma.view(n, num_hypotheses)).sum(1)

    first = by_hypothesis.select(torch.arange(n, device=probs.device) * num_hypotheses)
    unguarded_gamma = mean(by_hypothesis.unguarded_gamma)
    weight = (probs * by_hypothesis.unguarded_gamma.view(n, num_hypotheses) / unguarded_gamma.clamp_min(TINY)[:, None])[
        :, :, None
    ]
    shares = (weight * by_hypothesis.shares.view(n, num_hypotheses, -1)).sum(1)
    return first._replace(shares=shares, gamma=mean(by_hypothesis.gamma), unguarded_gamma=unguarded_gamma)


def update_guard(balance: Tensor, closed: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Return the guard's balance [n] and state [n] (1: closed) after one reward each; gain [n] (nats).

    The gain is clipped to ±GUARD_LIMIT_NATS, so that no single reward closes a guard in good standing. See
    `guard_step`.
    """
    return guard_step(
        balance,
        closed,
        gain.clamp(-GUARD_LIMIT_NATS, GUARD_LIMIT_NATS),
        torch.ones_like(gain),
    )


def recency_log_prior(writes: Tensor) -> Tensor:
    """Return the log prior −log(1 + writes) of rows that `writes` later examples follow, any shape.

    The prior stands where text memory has the base's log-probability, and is scaled by the site's `prior` likewise.
    """
    return -writes.float().log1p()


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    return rowwise_matmul(x, layer.weight.T) + layer.bias


def new_policy(config: PolicyConfig, *, seed: int) -> Policy:
    """Build an untrained policy; each slot of the memory has a random address."""
    generator = torch.Generator().manual_seed(seed)

    def init_normal(weight: Tensor, inputs: int, gain: float = 1.0) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * gain / math.sqrt(inputs))

    policy = Policy(config)
    layers = [policy.trunk, policy.join, policy.event] + ([] if policy.inner is None else [policy.inner])
    with torch.no_grad():
        for layer in [*layers, policy.head]:
            init_normal(layer.weight, layer.in_features, 0.1 if layer is policy.head else math.sqrt(2))
            layer.bias.zero_()
        if config.task == "act":
            site = policy.site
            site.address_weight[: config.num_address_inputs].copy_(
                torch.randn(config.num_address_inputs, site.address_weight.shape[1], generator=generator)
            )
            site.address_bias.copy_(torch.randn(site.address_bias.shape, generator=generator) * 0.1)
            site.temperature.fill_(4.0)
            site.write_gate.copy_(torch.tensor([-1.0, 0.0]))  # a row that changes slowly lets gradients pass
            products = [] if policy.product is None else [policy.product]
            for weight in (site.value_hidden, site.value_error, site.out, *products):
                init_normal(weight, len(weight))
        else:
            labels = policy.labels
            for weight in (labels.key_weight, labels.gate_in, labels.centres):
                init_normal(weight, len(weight))
            # Without biases all examples of one direction would have the same key.
            policy.trunk.bias.copy_(torch.randn(policy.trunk.bias.shape, generator=generator))
            labels.sharpness.copy_(torch.tensor([20.0, 7.0]))
            labels.prior.fill_(0.2)
            labels.gate_out_bias[0] = 2.0
            labels.trust_rate.fill_(0.02)
            if policy.doubt is not None:
                policy.doubt.fill_(-5.0)
    return policy


def save_policy(policy: Policy, path: Path) -> None:
    """Write the slow weights as safetensors, with the configuration in the file's metadata."""
    weights.write(policy, path, {"format": FORMAT, "policy": json.dumps(policy.config.to_dict())})


def load_policy(path: Path) -> Policy:
    """Read a file of `save_policy`. Raises PolicyError."""
    try:
        metadata, tensors = weights.read(path)
    except (OSError, SafetensorError) as error:
        raise PolicyError(f"cannot read the policy {path.name}: {error}") from error
    if metadata.get("format") != FORMAT or "policy" not in metadata:
        raise PolicyError(f"{path.name}: format must be {FORMAT}, got {metadata.get('format')!r}")
    try:
        config = PolicyConfig.from_dict(json.loads(metadata["policy"]))
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{path.name}: not a policy's configuration: {error}") from error
    policy = Policy(config)
    try:
        policy.load_state_dict(tensors)
    except RuntimeError as error:
        raise PolicyError(f"{path.name} does not fit its own configuration: {error}") from error
    return policy
