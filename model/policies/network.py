"""A network that decides: each action asks the same memory what became of it, and each reward or label is a write.

What it learns in a session are rows of `model.memory`, in the same pools and drafts as those of text. A policy that
acts has a hidden site (what the rewards of such a situation say) and a journal (which actions wait for theirs); one
that labels has a lexical site whose tokens are the labels.

Letters: n sessions or examples, A actions, F numbers of an action's input, D those of its state, L labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from model import weights
from model.memory import DeltaSite, Draft, LexicalSite, Memory, MemoryConfig, MemoryConfigError, Pool
from model.memory.config import BALANCE, GATE_CLOSED, NGRAM_SIZES
from model.memory.lexical import torch_backend
from model.memory.sites import FoundCandidates, LexicalReadout
from model.policies.change_point import NAME as CHANGE_POINT_SITE
from model.policies.change_point import ChangePointHypotheses

FORMAT = "1"
NUM_HISTORY_INPUTS = (
    3  # numbers of an action's input about the last action: whether it was this one, its reward, whether it has one
)
NUM_OUTCOME_INPUTS = (
    4  # numbers of what a reward says: 1, the reward, how far above and how far below what was expected
)


class PolicyError(ValueError):
    """A policy that cannot be built or read; the message names the field, the limit and the value."""


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy decides about.

    name: what clients call it. task: "act" (choose one of `actions`, learn from its reward) or "label" (say which of
    `actions` labels an example bears, learn from the right one).
    context: numbers of an observation that all actions share; features: numbers of each action's own.
    identity: whether actions differ otherwise than by their features. cue: how many of the context's first numbers say
    which place of the memory is asked; by_features, by_action: whether an action is asked about in a place that its
    features, or which one it is, say.
    product: whether what is recalled also multiplies the state, number by number.
    width: units of a layer.
    lowest, highest: of a reward. greedy: whether it takes the best action unless told otherwise.
    """

    name: str
    task: Literal["act", "label"]
    context: int
    actions: int
    memory: MemoryConfig
    features: int = 0
    identity: bool = True
    cue: int = 0
    by_features: bool = False
    by_action: bool = False
    product: bool = False
    width: int = 64
    lowest: float = 0.0
    highest: float = 1.0
    greedy: bool = True

    def __post_init__(self) -> None:
        if self.task not in ("act", "label"):
            raise PolicyError(f"task must be 'act' or 'label', got {self.task!r}")
        if self.actions < 2:
            raise PolicyError(f"actions must be at least 2, got {self.actions}")
        if not 0 <= self.cue <= self.context:
            raise PolicyError(f"cue must be in 0..{self.context} (context), got {self.cue}")
        if self.observation < 1 and self.task == "label":
            raise PolicyError(f"context must be at least 1, got {self.context}")
        if not self.lowest < self.highest:
            raise PolicyError(f"lowest must be below highest ({self.highest}), got {self.lowest}")
        if self.hypotheses and any(site.kind == "lexical" and site.cells > 1 for site in self.memory.sites):
            raise PolicyError(
                f"cells must be 1 beside the site {CHANGE_POINT_SITE!r}: ages say there which label came first"
            )
        if self.memory.hidden_size != self.state:
            raise PolicyError(f"memory.hidden_size must be {self.state}, got {self.memory.hidden_size}")

    @property
    def observation(self) -> int:
        """Numbers of an observation: the context's, then each action's features."""
        return self.context + self.actions * self.features

    @property
    def input_size(self) -> int:
        """F."""
        if self.task == "label":
            return self.context
        return self.context + self.features + self.identity * self.actions + NUM_HISTORY_INPUTS

    @property
    def num_address_inputs(self) -> int:
        """Numbers that say which place of the memory is asked."""
        return self.cue + self.by_features * self.features + self.by_action * self.actions

    @property
    def state(self) -> int:
        """D: what the memory sees of an action, its place and a layer of the network."""
        return self.num_address_inputs + self.width

    @property
    def hypotheses(self) -> bool:
        """Whether its sessions guess since when what they have seen holds."""
        return self.task == "label" and any(site.name == CHANGE_POINT_SITE for site in self.memory.sites)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PolicyConfig:
        """Raises PolicyError on an unknown or a missing key."""
        try:
            return cls(**{**data, "memory": MemoryConfig.from_dict(data["memory"])})
        except (TypeError, KeyError, MemoryConfigError) as error:
            raise PolicyError(f"not a policy's configuration: {error}") from error


class Policy(nn.Module):
    """The network around the memory; its parameters are slow weights, shared and read-only when serving.

    An empty session decides as the network alone does, bit for bit; every row of a batch is rounded as if it were
    alone, so nothing depends on who else is served.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.memory = Memory(config.memory)
        D, W = config.state, config.width
        self.trunk = nn.Linear(config.input_size, W)
        self.inner = nn.Linear(W, W) if config.task == "label" else None
        self.size = nn.Parameter(torch.zeros(D))
        self.product = nn.Parameter(torch.zeros(self.site.config.width, D)) if config.product else None
        self.join = nn.Linear(D, W)
        self.head = nn.Linear(W, 2 if config.task == "act" else config.actions)
        self.event = nn.Linear(D + NUM_OUTCOME_INPUTS, D)
        self.doubt = nn.Parameter(torch.zeros(())) if config.hypotheses else None
        self.requires_grad_(False)

    # --- acting ----------------------------------------------------------------------------------------------------

    @property
    def site(self) -> DeltaSite:
        """What an acting policy remembers in."""
        return self.memory.delta[-1]

    def inputs(self, observation: Tensor, last: Tensor, reward: Tensor) -> Tensor:
        """What each action asks with [n, A, F]: observation [n, …], the last action [n] long (−1: none) and its
        reward [n] (NaN: none yet)."""
        c, n = self.config, len(observation)
        context, features = observation.split([c.context, c.actions * c.features], dim=1)
        was = F.one_hot(last.clamp_min(0), c.actions) * (last >= 0)[:, None]
        told = (~reward.isnan())[:, None] * was
        parts = [context[:, None].expand(-1, c.actions, -1), features.view(n, c.actions, c.features)]
        if c.identity:
            parts.append(torch.eye(c.actions, device=context.device).expand(n, -1, -1))
        history = [was, told * self.scaled(reward.nan_to_num(c.lowest))[:, None], told]
        return torch.cat([*parts, torch.stack(history, dim=-1).to(context.dtype)], dim=-1)

    def state(self, inputs: Tensor) -> Tensor:
        """What the memory sees [n, D] of inputs [n, F]."""
        c = self.config
        address_inputs, start = [inputs[:, : c.cue]], c.context + c.features
        if c.by_features:
            address_inputs.append(inputs[:, c.context : start])
        if c.by_action:
            address_inputs.append(inputs[:, start : start + c.actions])
        return torch.cat([*address_inputs, torch.relu(_apply(self.trunk, inputs))], dim=1)

    def recall(self, state: Tensor, rows: Tensor, w: Tensor) -> Tensor:
        """The states [n, D] with what the rows [n, k, d_v] of their slots say, and how much there is of it."""
        recalled = self.site.join(state, rows, w)
        if self.product is not None:
            recalled = recalled + state * torch_backend.rowwise_matmul(torch_backend.read_delta(rows, w), self.product)
        if self.site.config.decay == 1.0:  # what replaces what was there is as large as that
            return recalled
        return recalled + torch_backend.delta_read_magnitude(rows, w)[:, None] * self.size

    def logit_and_value(self, recalled: Tensor) -> tuple[Tensor, Tensor]:
        """Recalled states [n, D] → how good it is to act so [n], and the reward [n] that is expected, scaled to 0…1."""
        out = _apply(self.head, torch.relu(_apply(self.join, recalled)))
        return out[:, 0], torch.sigmoid(out[:, 1])

    def reward_update(self, recalled: Tensor, reward: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a reward [n], scaled to 0…1 as is what was expected [n], writes: the row's new part [n, d_v], β [n] and
        the loss [n] (nats) of what was expected."""
        above, below = (reward - expected).clamp_min(0), (expected - reward).clamp_min(0)
        outcome = torch.stack([torch.ones_like(reward), reward, above, below], dim=1)
        following = torch.tanh(_apply(self.event, torch.cat([recalled, outcome], dim=1)))
        loss = -(
            reward * expected.clamp_min(torch_backend.TINY).log()
            + (1 - reward) * (1 - expected).clamp_min(torch_backend.TINY).log()
        )
        error = F.pad(outcome, (0, self.config.state - NUM_OUTCOME_INPUTS))
        return self.site.value(following, error), self.site.beta(loss.clamp_max(8.0)), loss

    def scaled(self, reward: Tensor) -> Tensor:
        """A reward as a share of its range."""
        return (reward - self.config.lowest) / (self.config.highest - self.config.lowest)

    def decide(self, inputs: Tensor, pool: Pool, session: Tensor) -> tuple[Tensor, Tensor]:
        """How good each action is [n, A] and what it is expected to bring [n, A], scaled; inputs [n, A, F] of sessions
        [n] long. A session whose guard is shut decides as the network alone."""
        state, session = self.state(inputs.flatten(0, 1)), session.repeat_interleave(self.config.actions)
        shut = pool.sites[self.site.config.name].session_scalars[session, GATE_CLOSED, 0] != 0
        recalled = self._read(state, pool, session)[0]
        logits, expected = self.logit_and_value(torch.where(shut[:, None], state, recalled))
        return logits.view(len(inputs), -1), expected.view(len(inputs), -1)

    def reward(
        self, inputs: Tensor, reward: Tensor, pool: Pool, session: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the rewards [n] of actions that asked with inputs [n, F] write in sessions [n] long: the slots [n, k]
        and their new rows [n, k, d_v]; and the loss [n] (nats) of what memory expected, and of what is without it."""
        state, reward = self.state(inputs), self.scaled(reward)
        recalled, slots, w, rows = self._read(state, pool, session)
        value, beta, loss = self.reward_update(recalled, reward, self.logit_and_value(recalled)[1])
        frozen = self.reward_update(state, reward, self.logit_and_value(state)[1])[2]
        return slots, self.write(rows, w, beta, value), loss, frozen

    def guard_step(self, draft: Draft, gain: float) -> bool:
        """Counts what memory gained (nats) on a reward, as if the guard were open; returns whether it was."""
        session_scalars = draft.pool.sites[self.site.config.name].session_scalars[draft.index]
        balance, shut = session_scalars[BALANCE, 0].clone(), session_scalars[GATE_CLOSED, 0].clone()
        session_scalars[BALANCE, 0], session_scalars[GATE_CLOSED, 0] = update_guard(
            balance, shut, session_scalars.new_tensor(gain)
        )
        return not shut

    def write(self, rows: Tensor, w: Tensor, beta: Tensor, value: Tensor) -> Tensor:
        """The rows [n, k, d_v] of n sessions' slots after one write each."""
        n, k, _ = rows.shape
        at = torch.arange(n * k, device=rows.device).view(n, k)
        config = self.site.config
        new = torch_backend.write_delta(rows.flatten(0, 1), at, w, beta, value, decay=config.decay, cap=config.cap)
        return new.view_as(rows)

    def _read(self, state: Tensor, pool: Pool, session: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Recalled states [n, D], and the slots [n, k], their w [n, k] and rows [n, k, d_v]."""
        slots, w = self.site.address(state)
        (rows,) = pool.sites[self.site.config.name].read(session, slots)
        return self.recall(state, rows, w), slots, w, rows

    # --- labelling -------------------------------------------------------------------------------------------------

    @property
    def labels(self) -> LexicalSite:
        """What a labelling policy remembers in."""
        assert self.memory.lexical is not None
        return self.memory.lexical

    def embed(self, features: Tensor) -> Tensor:
        """Examples [n, F] → states [n, D]."""
        assert self.inner is not None
        hidden = torch.relu(_apply(self.trunk, features))
        return hidden + torch.relu(_apply(self.inner, hidden))

    def base(self, states: Tensor) -> torch_backend.Prediction:
        """What the network says of the labels without memory."""
        return torch_backend.predict(_apply(self.head, torch.relu(_apply(self.join, states))))

    def label(self, features: Tensor, pool: Pool, session: Tensor) -> Tensor:
        """log p [n, L] of the labels of examples [n, F] in sessions [n] long."""
        base, readout, _ = self._read_labels(features, pool, session)
        return torch_backend.mix(base, readout.tokens, readout.shares, readout.gamma).log_softmax(-1)

    def label_updates(
        self, features: Tensor, labels: Tensor, pool: Pool, session: Tensor
    ) -> list[tuple[int, float, float, Callable[[Draft], None]]]:
        """What the labels [n] long of examples [n, F] teach sessions [n] long: for each, the label that would have been
        said, the loss (nats) of the right one, that without memory, and how to write it (raises PoolFullError)."""
        base, readout, by_hypothesis = self._read_labels(features, pool, session)
        frozen = base.log_prob(labels)
        mixture = torch_backend.mix(base, readout.tokens, readout.shares, readout.gamma)
        memory_probs = torch_backend.memory_prob(labels, readout.tokens, readout.shares)
        loss = -torch_backend.target_log_prob(frozen, memory_probs, readout.gamma)
        hypotheses = (
            None if by_hypothesis is None else self._update_hypotheses(by_hypothesis, labels, frozen, pool, session)
        )

        def write(i: int) -> Callable[[Draft], None]:
            one = torch.tensor([i], device=labels.device)

            def learn(draft: Draft) -> None:
                self.labels.learn(draft, readout.select(one), labels[one], frozen[one])
                if hypotheses is not None:
                    draft.put(CHANGE_POINT_SITE, torch.zeros_like(one), [hypotheses[one]])

            return learn

        told = zip(mixture.argmax(-1).tolist(), loss.tolist(), (-frozen).tolist(), strict=True)
        return [(*one, write(i)) for i, one in enumerate(told)]

    def _read_labels(
        self, features: Tensor, pool: Pool, session: Tensor
    ) -> tuple[torch_backend.Prediction, LexicalReadout, LexicalReadout | None]:
        """What the network says, what the memory does, and what it would if each of the guesses [n · J] were true."""
        states, site = self.embed(features), self.labels
        base, keys = self.base(states), site.keys(states)
        cells = site.address(keys)
        rows = torch_backend.LexicalRows(*pool.sites[site.config.name].read(session, cells))
        cosines, recency = (
            torch_backend.similarity(rows, keys),
            recency_log_prior(rows.ages.amax(-1, keepdim=True) - rows.ages).flatten(1),
        )

        def read_masked(missing: Tensor, each: Tensor) -> LexicalReadout:
            """missing [m, K]: which rows do not count, of contexts each [m]."""
            same, bonus = torch.zeros_like(missing, dtype=torch.long), torch.zeros_like(site.bonus)
            tokens = rows.tokens.flatten(1).long()[each]
            candidates = torch_backend.score_candidates(
                tokens, cosines[each], same, recency[each], missing, site.sharpness, site.prior, bonus
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

    def _hypotheses(self, pool: Pool, session: Tensor) -> ChangePointHypotheses:
        return ChangePointHypotheses.of(
            pool.sites[CHANGE_POINT_SITE].read(session, torch.zeros_like(session)[:, None])[0][:, 0]
        )

    def _update_hypotheses(
        self, by_hypothesis: LexicalReadout, labels: Tensor, frozen: Tensor, pool: Pool, session: Tensor
    ) -> Tensor:
        """The rows [n, 2·J] of the sessions' guesses after their labels [n]."""
        assert self.doubt is not None
        hypotheses = self._hypotheses(pool, session)
        num_hypotheses = hypotheses.starts.shape[1]
        memory_probs = torch_backend.memory_prob(
            labels.repeat_interleave(num_hypotheses), by_hypothesis.tokens, by_hypothesis.shares
        )
        likelihoods = torch_backend.target_log_prob(
            frozen.repeat_interleave(num_hypotheses), memory_probs, by_hypothesis.unguarded_gamma
        ).exp()
        label_pool = pool.sites[self.labels.config.name]
        num_labels = (
            label_pool.fields[0][label_pool.tables[session, 0]].amax(1) + 1
        )  # in a lone cell, ages count all labels
        return hypotheses.update(likelihoods.view(-1, num_hypotheses), torch.sigmoid(self.doubt), num_labels)

    # --- identity --------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """sha256 over the configuration and every tensor: the identity that a stored state is bound to."""
        return weights.fingerprint(self.config.to_dict(), self)


def _average_over_hypotheses(by_hypothesis: LexicalReadout, probs: Tensor) -> LexicalReadout:
    """What is believed where guess j of J is true with chances [n, J]; by_guess: of n · J contexts."""
    n, num_hypotheses = probs.shape

    def mean(gamma: Tensor) -> Tensor:
        return (probs * gamma.view(n, num_hypotheses)).sum(1)

    first = by_hypothesis.select(torch.arange(n, device=probs.device) * num_hypotheses)
    counted = mean(by_hypothesis.unguarded_gamma)
    weights = (
        probs * by_hypothesis.unguarded_gamma.view(n, num_hypotheses) / counted.clamp_min(torch_backend.TINY)[:, None]
    )[:, :, None]
    shares = (weights * by_hypothesis.shares.view(n, num_hypotheses, -1)).sum(1)
    return first._replace(shares=shares, gamma=mean(by_hypothesis.gamma), unguarded_gamma=counted)


def update_guard(balance: Tensor, shut: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.guard_step` after one reward of each of some sessions. No reward counts more than GUARD_NATS, so that none
    alone shuts a guard in good standing."""
    return torch_backend.guard_step(
        balance,
        shut,
        gain.clamp(-torch_backend.GUARD_LIMIT_NATS, torch_backend.GUARD_LIMIT_NATS),
        torch.ones_like(gain),
    )


def recency_log_prior(writes: Tensor) -> Tensor:
    """What takes the place of the base's prediction in a label's vote, and counts as much as the site's `prior`:
    −log(1 + writes), of how many writes to its cell, or examples, came after it."""
    return -writes.float().log1p()


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch_backend.rowwise_matmul(x, layer.weight.T) + layer.bias


def new_policy(config: PolicyConfig, *, seed: int) -> Policy:
    """A policy before it is trained: each place of the memory has a random address of its own."""
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
            # Without biases all examples of one direction would have one key.
            policy.trunk.bias.copy_(torch.randn(policy.trunk.bias.shape, generator=generator))
            labels.sharpness.copy_(torch.tensor([20.0, 7.0]))
            labels.prior.fill_(0.2)
            labels.gate_out_bias[0] = 2.0
            labels.trust_rate.fill_(0.02)
            if policy.doubt is not None:
                policy.doubt.fill_(-5.0)
    return policy


def save_policy(policy: Policy, path: Path) -> None:
    """Writes the slow weights as safetensors with the configuration in its metadata."""
    weights.write(policy, path, {"format": FORMAT, "policy": json.dumps(policy.config.to_dict())})


def load_policy(path: Path) -> Policy:
    """Reads what `save_policy` wrote. Raises PolicyError."""
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
