"""The memory's slow weights: projections and gates that every session shares. Read-only when serving."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from model import weights
from model.memory.config import BALANCE, RUNS, SHUT, TRUST, MemoryConfig, MemoryConfigError, SiteConfig
from model.memory.lexical import torch_backend
from model.memory.pool import Draft, Pool

FORMAT = "3"
GATE_WIDTH = 32
HEADS = 2  # a sharp and a broad one
TRUST_LIMITS = (-4.0, 1.0)  # the upper one keeps what was read over and over from drowning the base


class Found(NamedTuple):
    """What a lexical site holds for n contexts: their keys [n, d_k], their cells [n, k], the nearest first, how many
    empty rows these have [n, k], and the rows in them."""

    keys: Tensor
    cells: Tensor
    room: Tensor
    candidates: torch_backend.Candidates


class Reading(NamedTuple):
    """What a lexical site makes of n tokens: their contexts (fingerprints [n, R] and keys [n, d_k]) and cells [n, k];
    how many empty rows these have [n, k]; how many runs [n] of the context the best match repeats; p_mem as shares
    [n, K] of tokens [n, K]; the weight γ [n] that counts, and the one that would if the session's guards were open."""

    prints: Tensor
    keys: Tensor
    cells: Tensor
    room: Tensor
    repeats: Tensor
    tokens: Tensor
    shares: Tensor
    gamma: Tensor
    unguarded: Tensor

    def pick(self, mask: Tensor) -> Reading:
        """The reading of some of the tokens; mask [n]."""
        return Reading(*(part[mask] for part in self))

    def by_repeats(self, values: Tensor) -> Tensor:
        """The sums [R + 1] of values [n] over the tokens of each number of repeated runs."""
        return (F.one_hot(self.repeats, len(RUNS) + 1).T * values).sum(1)


class LexicalSite(nn.Module):
    """Rows of (token, key), read into the output distribution.

    The key of a token is Norm(W_k h + b_k), h the final hidden state that predicts it. Its cells are the k whose
    centres are nearest to it; it is written to the nearest one that has room, which a crowd of like contexts needs. A
    small network looks at what was found, at the base's entropy and at the key, and says γ and how much each head
    counts. Trust is added to γ's logit, one for each number of runs that the best match repeats: what follows a chance
    likeness and what follows a sentence that is said again deserve different trust. Part of it is the session's,
    learned slowly and kept, and part the request's, which begins in doubt and learns fast what the memory is worth to
    this text.
    """

    def __init__(self, config: SiteConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.key_weight = nn.Parameter(torch.zeros(hidden_size, config.width))
        self.key_bias = nn.Parameter(torch.zeros(config.width))
        self.centres = nn.Parameter(torch.zeros(config.cells, config.width))
        self.sharpness = nn.Parameter(torch.ones(HEADS))
        self.prior = nn.Parameter(torch.zeros(HEADS))
        self.bonus = nn.Parameter(torch.zeros(HEADS, len(RUNS)))
        self.gate_in = nn.Parameter(torch.zeros((4 + len(RUNS)) * HEADS + 1 + config.width, GATE_WIDTH))
        self.gate_in_bias = nn.Parameter(torch.zeros(GATE_WIDTH))
        self.gate_out = nn.Parameter(torch.zeros(GATE_WIDTH, 1 + HEADS))
        self.gate_out_bias = nn.Parameter(torch.zeros(1 + HEADS))
        self.trust_rate = nn.Parameter(torch.zeros(()))
        self.request_trust = nn.Parameter(torch.zeros(()))
        self.request_trust_rate = nn.Parameter(torch.zeros(()))

    def keys(self, hidden: Tensor) -> Tensor:
        """Final hidden states [n, d] → keys [n, d_k] of unit length."""
        return F.normalize(torch_backend.rowwise(hidden.float(), self.key_weight) + self.key_bias, dim=-1)

    def address(self, keys: Tensor) -> Tensor:
        """keys [n, d_k] → cells [n, k] long, the nearest first."""
        return torch_backend.rowwise(keys, self.centres.T).topk(self.config.k, dim=-1).indices

    def gate(self, found: torch_backend.Candidates, entropy: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The logit of γ [n] before trust, and p_mem as shares [n, K]; entropy [n] of the base, keys [n, d_k]."""
        logit, heads = torch_backend.judge(torch_backend.gate_inputs(found, entropy, keys), self.network)
        return logit, (heads[:, :, None] * found.shares).sum(1)

    @property
    def network(self) -> torch_backend.Gate:
        """What judges what was found."""
        return torch_backend.Gate(self.gate_in, self.gate_in_bias, self.gate_out, self.gate_out_bias)

    @property
    def scales(self) -> torch_backend.Scales:
        """What the heads think of rows."""
        return torch_backend.Scales(self.sharpness, self.prior, self.bonus)

    def find(
        self, pool: Pool, session: Tensor, hidden: Tensor, prints: Tensor, base: torch_backend.Prediction
    ) -> Found:
        """What sessions [n] hold for final hidden states [n, d]; prints [n, R]: fingerprints of the contexts."""
        keys = self.keys(hidden)
        cells = self.address(keys)
        found, room = pool.sites[self.config.name].find(session, cells, keys, prints, base, self.scales)
        return Found(keys, cells, room, found)

    def first_trust(self) -> Tensor:
        """The trust [R + 1] of a request that begins."""
        return self.request_trust.detach().expand(len(RUNS) + 1)

    def read(
        self, pool: Pool, session: Tensor, hidden: Tensor, prints: Tensor, base: torch_backend.Prediction, trust: Tensor
    ) -> Reading:
        """What sessions [n] know about what follows final hidden states [n, d] and contexts with fingerprints [n, R],
        for which the base predicts `base`; trust [n, R + 1] of their requests."""
        return self.believe(pool, session, prints, base, trust, self.find(pool, session, hidden, prints, base))

    def believe(
        self,
        pool: Pool,
        session: Tensor,
        prints: Tensor,
        base: torch_backend.Prediction,
        trust: Tensor,
        found: Found,
    ) -> Reading:
        """How far to believe what was found; the rest is `read`'s."""
        keys, cells, room, candidates = found
        fast = pool.sites[self.config.name]
        believe = (fast.kernels or torch_backend).believe
        belief = believe(candidates, base.entropy, keys, self.network, fast.own, session, trust)
        return Reading(prints, keys, cells, room, candidates.repeats, candidates.tokens, *belief)

    def mixture(
        self, pool: Pool, session: Tensor, hidden: Tensor, trails: Tensor, logits: Tensor, trust: Tensor
    ) -> Tensor:
        """log p [n, V] of next tokens up to a constant a row, with what sessions [n] know; logits [n, V] of the base,
        which may be overwritten; trails [n, 8]: last tokens; the rest as in `read`."""
        fast = pool.sites[self.config.name]
        if whole := getattr(fast.kernels, "mixture", None):
            address, asked = (self.key_weight, self.key_bias, self.centres), (session, hidden, trails, trust)
            slow = (address, self.config.k, self.scales, self.network)
            mixed: Tensor = whole(fast.tables, fast.fields, fast.own, *slow, *asked, logits)
            return mixed
        base = torch_backend.predict(logits)
        reading = self.read(pool, session, hidden, torch_backend.trail_fingerprints(trails), base, trust)
        return torch_backend.mix(base, reading.tokens, reading.shares, reading.gamma)

    def judged(self, reading: Reading, targets: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor]:
        """log p [n] of targets [n] as if the guards were open, and how they judge the gate [R + 1]; frozen: their
        log-probabilities [n] without this site."""
        in_memory = torch_backend.memory_prob(targets, reading.tokens, reading.shares)
        adapted = torch_backend.target_log_prob(frozen, in_memory, reading.unguarded)
        return adapted, reading.by_repeats(torch_backend.trust_step(frozen, adapted, in_memory, reading.unguarded))

    def next_trust(self, trust: Tensor, reading: Reading, targets: Tensor, frozen: Tensor) -> Tensor:
        """A request's trust [R + 1] after a block; the other arguments are those of `learn`."""
        _, step = self.judged(reading, targets, frozen)
        return (trust + self.request_trust_rate * step).clamp(*TRUST_LIMITS)

    def learn(self, draft: Draft, reading: Reading, targets: Tensor, frozen: Tensor) -> None:
        """Writes one block: the reading of n tokens, their targets [n] and the log-probabilities [n] of these without
        this site. Trust takes one gradient step on the same tokens, and the guard counts what they gained."""
        fast = draft.pool.sites[self.config.name]
        adapted, step = self.judged(reading, targets, frozen)
        own = fast.own[draft.index]
        trust = (own[TRUST] + self.trust_rate * step).clamp(*TRUST_LIMITS)
        gain, tokens = reading.by_repeats(adapted - frozen), reading.by_repeats(torch.ones_like(adapted))
        balance, shut = torch_backend.guard(own[BALANCE], own[SHUT], gain, tokens)
        fast.own[draft.index] = torch.stack([trust, balance, shut])
        news = adapted < -self.config.surprise
        chosen = torch_backend.place(reading.cells[news], reading.room[news])
        touched, at = torch.unique(chosen, return_inverse=True)
        keys = torch_backend.quantise(reading.keys[news])
        draft.write(self.config.name, touched, at, keys, reading.prints[news], targets[news])


class HiddenSite(nn.Module):
    """Rows of d_v numbers, read into the residual stream: h ← h + g·W_o·norm(o), g = σ(g_0 + u·h).

    The address is s = Norm(W_a h + b_a), the write gate β = σ(b_0 + b_1·surprise).
    """

    def __init__(self, config: SiteConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        side = math.isqrt(config.slots)
        self.address_weight = nn.Parameter(torch.zeros(hidden_size, 2 * side))
        self.address_bias = nn.Parameter(torch.zeros(2 * side))
        self.temperature = nn.Parameter(torch.ones(()))
        self.write_gate = nn.Parameter(torch.zeros(2))
        self.value_hidden = nn.Parameter(torch.zeros(hidden_size, config.width))
        self.value_error = nn.Parameter(torch.zeros(hidden_size, config.width))
        self.out = nn.Parameter(torch.zeros(config.width, hidden_size))
        self.gate = nn.Parameter(torch.zeros(1))
        self.gate_hidden = nn.Parameter(torch.zeros(hidden_size))

    def address(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [n, d] → slots [n, k] long, w [n, k]."""
        s = torch_backend.rowwise(hidden.float(), self.address_weight) + self.address_bias
        s = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-12)
        return torch_backend.address(s.unflatten(1, (2, -1)), self.config.k, self.temperature)

    def beta(self, surprise: Tensor) -> Tensor:
        """surprise [n] (nats) → β [n], below 1."""
        return torch.sigmoid(self.write_gate[0] + self.write_gate[1] * surprise)

    def value(self, following: Tensor, error: Tensor) -> Tensor:
        """v_t = W_v [h_{t+1} ; ε_t]; both [n, d] → [n, d_v]."""
        return following.float() @ self.value_hidden + error @ self.value_error

    def read(self, pool: Pool, session: Tensor, hidden: Tensor) -> Tensor:
        """The stream [n, d] of sessions [n] with their memory read into it; an empty read changes no bit."""
        slots, w = self.address(hidden)
        (rows,) = pool.sites[self.config.name].read(session, slots)
        return self.join(hidden, rows, w)

    def join(self, hidden: Tensor, rows: Tensor, w: Tensor) -> Tensor:
        """The stream [n, d] with the rows [n, k, d_v] of its slots read into it."""
        o = torch_backend.read_hidden(rows, w)
        g = torch.sigmoid((hidden.float() * self.gate_hidden).sum(-1) + self.gate)
        changed = hidden + (g[:, None] * torch_backend.rowwise(o, self.out)).to(hidden.dtype)
        return torch.where(o.any(-1, keepdim=True), changed, hidden)

    def learn(self, draft: Draft, hidden: Tensor, following: Tensor, error: Tensor, adapted: Tensor) -> None:
        """Writes one block: stream [n, d] at each predictor, one token later (following), ε [n, d] and log p [n]."""
        slots, w = self.address(hidden)
        touched, at = torch.unique(slots, return_inverse=True)
        (old,) = draft.get(self.config.name, touched)
        values, beta = self.value(following, error), self.beta(-adapted)
        new = torch_backend.write_hidden(old, at, w, beta, values, decay=self.config.decay, cap=self.config.cap)
        draft.put(self.config.name, touched, [new])


class Memory(nn.Module):
    """All sites of one memory, by name; `sites` keeps the order of the configuration."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        kinds = {"lexical": LexicalSite, "hidden": HiddenSite}
        self.sites = nn.ModuleDict(
            {site.name: kinds[site.kind](site, config.hidden_size) for site in config.sites if site.kind in kinds}
        )
        self.requires_grad_(False)

    @property
    def lexical(self) -> LexicalSite | None:
        """The lexical site, if there is one."""
        return next((site for site in self.sites.values() if isinstance(site, LexicalSite)), None)

    @property
    def hidden(self) -> dict[int, HiddenSite]:
        """The hidden sites by layer; -1 is the output."""
        return {site.config.layer: site for site in self.sites.values() if isinstance(site, HiddenSite)}

    def fingerprint(self) -> str:
        """sha256 over the configuration and every tensor: the identity that a stored state is bound to."""
        return weights.fingerprint(self.config.to_dict(), self)


def save_memory(memory: Memory, path: Path) -> None:
    """Writes the slow weights as safetensors with the configuration in its metadata."""
    weights.write(memory, path, {"format": FORMAT, "memory": json.dumps(memory.config.to_dict())})


def load_memory(path: Path, *, hidden_size: int) -> Memory:
    """Reads what `save_memory` wrote. Raises MemoryConfigError if it is none, or made for another hidden size."""
    try:
        metadata, tensors = weights.read(path)
    except (OSError, SafetensorError) as error:
        raise MemoryConfigError(f"cannot read the memory checkpoint {path.name}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise MemoryConfigError(f"{path.name}: format must be {FORMAT}, got {metadata.get('format')!r}")
    try:
        config = MemoryConfig.from_dict(json.loads(metadata["memory"]))
    except (KeyError, ValueError) as error:
        raise MemoryConfigError(f"{path.name}: not a memory configuration: {error}") from error
    if config.hidden_size != hidden_size:
        raise MemoryConfigError(
            f"{path.name} is made for a base of hidden size {config.hidden_size}, this base has {hidden_size}"
        )
    memory = Memory(config)
    try:
        memory.load_state_dict(tensors)
    except RuntimeError as error:
        raise MemoryConfigError(f"{path.name} does not fit its own configuration: {error}") from error
    return memory.requires_grad_(False)
