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
from model.memory.config import BALANCE, GATE_CLOSED, NGRAM_SIZES, TRUST, MemoryConfig, MemoryConfigError, SiteConfig
from model.memory.lexical import torch_backend
from model.memory.pool import Draft, Pool

FORMAT = "3"
GATE_WIDTH = 32
HEADS = 2  # a sharp and a broad one
TRUST_LIMITS = (-4.0, 1.0)  # the upper one keeps what was read over and over from drowning the base


class FoundCandidates(NamedTuple):
    """What a lexical site holds for n contexts: their keys [n, d_k], their cells [n, k], the nearest first, how many
    empty rows these have [n, k], and the rows in them."""

    keys: Tensor
    cells: Tensor
    num_empty_rows: Tensor
    candidates: torch_backend.Candidates


class LexicalReadout(NamedTuple):
    """What a lexical site makes of n tokens: their contexts (fingerprints [n, R] and keys [n, d_k]) and cells [n, k];
    how many empty rows these have [n, k]; how many runs [n] of the context the best match repeats; p_mem as shares
    [n, K] of tokens [n, K]; the weight γ [n] that counts, and the one that would if the session's guards were open."""

    ngram_hashes: Tensor
    keys: Tensor
    cells: Tensor
    num_empty_rows: Tensor
    ngram_matches: Tensor
    tokens: Tensor
    shares: Tensor
    gamma: Tensor
    unguarded_gamma: Tensor

    def select(self, mask: Tensor) -> LexicalReadout:
        """The reading of some of the tokens; mask [n]."""
        return LexicalReadout(*(part[mask] for part in self))

    def sum_by_ngram_matches(self, values: Tensor) -> Tensor:
        """The sums [R + 1] of values [n] over the tokens of each number of repeated runs."""
        return (F.one_hot(self.ngram_matches, len(NGRAM_SIZES) + 1).T * values).sum(1)


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
        self.bonus = nn.Parameter(torch.zeros(HEADS, len(NGRAM_SIZES)))
        self.gate_in = nn.Parameter(torch.zeros((4 + len(NGRAM_SIZES)) * HEADS + 1 + config.width, GATE_WIDTH))
        self.gate_in_bias = nn.Parameter(torch.zeros(GATE_WIDTH))
        self.gate_out = nn.Parameter(torch.zeros(GATE_WIDTH, 1 + HEADS))
        self.gate_out_bias = nn.Parameter(torch.zeros(1 + HEADS))
        self.trust_rate = nn.Parameter(torch.zeros(()))
        self.request_trust = nn.Parameter(torch.zeros(()))
        self.request_trust_rate = nn.Parameter(torch.zeros(()))

    def keys(self, hidden: Tensor) -> Tensor:
        """Final hidden states [n, d] → keys [n, d_k] of unit length."""
        return F.normalize(torch_backend.rowwise_matmul(hidden.float(), self.key_weight) + self.key_bias, dim=-1)

    def address(self, keys: Tensor) -> Tensor:
        """keys [n, d_k] → cells [n, k] long, the nearest first."""
        return torch_backend.rowwise_matmul(keys, self.centres.T).topk(self.config.k, dim=-1).indices

    def gate(self, found: torch_backend.Candidates, entropy: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The logit of γ [n] before trust, and p_mem as shares [n, K]; entropy [n] of the base, keys [n, d_k]."""
        logit, heads = torch_backend.gate_logits(torch_backend.gate_inputs(found, entropy, keys), self.gate_weights)
        return logit, (heads[:, :, None] * found.shares).sum(1)

    @property
    def gate_weights(self) -> torch_backend.GateWeights:
        """What judges what was found."""
        return torch_backend.GateWeights(self.gate_in, self.gate_in_bias, self.gate_out, self.gate_out_bias)

    @property
    def head_params(self) -> torch_backend.HeadParams:
        """What the heads think of rows."""
        return torch_backend.HeadParams(self.sharpness, self.prior, self.bonus)

    def find_candidates(
        self, pool: Pool, session: Tensor, hidden: Tensor, ngram_hashes: Tensor, base: torch_backend.Prediction
    ) -> FoundCandidates:
        """What sessions [n] hold for final hidden states [n, d]; prints [n, R]: fingerprints of the contexts."""
        keys = self.keys(hidden)
        cells = self.address(keys)
        found, num_empty_rows = pool.sites[self.config.name].find_candidates(
            session, cells, keys, ngram_hashes, base, self.head_params
        )
        return FoundCandidates(keys, cells, num_empty_rows, found)

    def initial_trust(self) -> Tensor:
        """The trust [R + 1] of a request that begins."""
        return self.request_trust.detach().expand(len(NGRAM_SIZES) + 1)

    def read(
        self,
        pool: Pool,
        session: Tensor,
        hidden: Tensor,
        ngram_hashes: Tensor,
        base: torch_backend.Prediction,
        trust: Tensor,
    ) -> LexicalReadout:
        """What sessions [n] know about what follows final hidden states [n, d] and contexts with fingerprints [n, R],
        for which the base predicts `base`; trust [n, R + 1] of their requests."""
        return self.gate_mixture(
            pool, session, ngram_hashes, base, trust, self.find_candidates(pool, session, hidden, ngram_hashes, base)
        )

    def gate_mixture(
        self,
        pool: Pool,
        session: Tensor,
        ngram_hashes: Tensor,
        base: torch_backend.Prediction,
        trust: Tensor,
        found: FoundCandidates,
    ) -> LexicalReadout:
        """How far to believe what was found; the rest is `read`'s."""
        keys, cells, num_empty_rows, candidates = found
        site_pool = pool.sites[self.config.name]
        gate_mixture = (site_pool.kernels or torch_backend).gate_mixture
        gated = gate_mixture(
            candidates, base.entropy, keys, self.gate_weights, site_pool.session_scalars, session, trust
        )
        return LexicalReadout(
            ngram_hashes, keys, cells, num_empty_rows, candidates.ngram_matches, candidates.tokens, *gated
        )

    def mixture(
        self, pool: Pool, session: Tensor, hidden: Tensor, last_tokens_batch: Tensor, logits: Tensor, trust: Tensor
    ) -> Tensor:
        """log p [n, V] of next tokens up to a constant a row, with what sessions [n] know; logits [n, V] of the base,
        which may be overwritten; trails [n, 8]: last tokens; the rest as in `read`."""
        site_pool = pool.sites[self.config.name]
        if fused_mixture := getattr(site_pool.kernels, "mixture", None):
            address, request_inputs = (
                (self.key_weight, self.key_bias, self.centres),
                (session, hidden, last_tokens_batch, trust),
            )
            slow_weights = (address, self.config.k, self.head_params, self.gate_weights)
            mixed: Tensor = fused_mixture(
                site_pool.tables, site_pool.fields, site_pool.session_scalars, *slow_weights, *request_inputs, logits
            )
            return mixed
        base = torch_backend.predict(logits)
        readout = self.read(pool, session, hidden, torch_backend.hash_last_ngrams(last_tokens_batch), base, trust)
        return torch_backend.mix(base, readout.tokens, readout.shares, readout.gamma)

    def log_probs_and_trust_gradient(
        self, readout: LexicalReadout, targets: Tensor, frozen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log p [n] of targets [n] as if the guards were open, and how they judge the gate [R + 1]; frozen: their
        log-probabilities [n] without this site."""
        memory_probs = torch_backend.memory_prob(targets, readout.tokens, readout.shares)
        adapted = torch_backend.target_log_prob(frozen, memory_probs, readout.unguarded_gamma)
        return adapted, readout.sum_by_ngram_matches(
            torch_backend.trust_gradient(frozen, adapted, memory_probs, readout.unguarded_gamma)
        )

    def updated_trust(self, trust: Tensor, readout: LexicalReadout, targets: Tensor, frozen: Tensor) -> Tensor:
        """A request's trust [R + 1] after a block; the other arguments are those of `learn`."""
        _, step = self.log_probs_and_trust_gradient(readout, targets, frozen)
        return (trust + self.request_trust_rate * step).clamp(*TRUST_LIMITS)

    def learn(self, draft: Draft, readout: LexicalReadout, targets: Tensor, frozen: Tensor) -> None:
        """Writes one block: the reading of n tokens, their targets [n] and the log-probabilities [n] of these without
        this site. Trust takes one gradient step on the same tokens, and the guard counts what they gained."""
        site_pool = draft.pool.sites[self.config.name]
        adapted, step = self.log_probs_and_trust_gradient(readout, targets, frozen)
        session_scalars = site_pool.session_scalars[draft.index]
        trust = (session_scalars[TRUST] + self.trust_rate * step).clamp(*TRUST_LIMITS)
        gain, tokens = (
            readout.sum_by_ngram_matches(adapted - frozen),
            readout.sum_by_ngram_matches(torch.ones_like(adapted)),
        )
        balance, closed = torch_backend.guard_step(session_scalars[BALANCE], session_scalars[GATE_CLOSED], gain, tokens)
        site_pool.session_scalars[draft.index] = torch.stack([trust, balance, closed])
        surprising = adapted < -self.config.surprise
        chosen = torch_backend.assign_cells(readout.cells[surprising], readout.num_empty_rows[surprising])
        touched, at = torch.unique(chosen, return_inverse=True)
        keys = torch_backend.quantise_keys(readout.keys[surprising])
        draft.write(self.config.name, touched, at, keys, readout.ngram_hashes[surprising], targets[surprising])


class DeltaSite(nn.Module):
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
        s = torch_backend.rowwise_matmul(hidden.float(), self.address_weight) + self.address_bias
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
        o = torch_backend.read_delta(rows, w)
        g = torch.sigmoid((hidden.float() * self.gate_hidden).sum(-1) + self.gate)
        changed = hidden + (g[:, None] * torch_backend.rowwise_matmul(o, self.out)).to(hidden.dtype)
        return torch.where(o.any(-1, keepdim=True), changed, hidden)

    def learn(self, draft: Draft, hidden: Tensor, following: Tensor, error: Tensor, adapted: Tensor) -> None:
        """Writes one block: stream [n, d] at each predictor, one token later (following), ε [n, d] and log p [n]."""
        slots, w = self.address(hidden)
        touched, at = torch.unique(slots, return_inverse=True)
        (old,) = draft.get(self.config.name, touched)
        values, beta = self.value(following, error), self.beta(-adapted)
        new = torch_backend.write_delta(old, at, w, beta, values, decay=self.config.decay, cap=self.config.cap)
        draft.put(self.config.name, touched, [new])


class Memory(nn.Module):
    """All sites of one memory, by name; `sites` keeps the order of the configuration."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        kinds = {"lexical": LexicalSite, "hidden": DeltaSite}
        self.sites = nn.ModuleDict(
            {site.name: kinds[site.kind](site, config.hidden_size) for site in config.sites if site.kind in kinds}
        )
        self.requires_grad_(False)

    @property
    def lexical(self) -> LexicalSite | None:
        """The lexical site, if there is one."""
        return next((site for site in self.sites.values() if isinstance(site, LexicalSite)), None)

    @property
    def delta(self) -> dict[int, DeltaSite]:
        """The hidden sites by layer; -1 is the output."""
        return {site.config.layer: site for site in self.sites.values() if isinstance(site, DeltaSite)}

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
    except (KeyError, ValueError, RecursionError) as error:
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
