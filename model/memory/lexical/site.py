"""The lexical site: slow weights that read rows of (token, key of its context) into the output distribution.

The equations L1–L7, S1 and S2 are in model/memory/README.md; a `MemoryBackend` computes L3–L7.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.memory.config import BALANCE, GATE_CLOSED, TRUST, SiteConfig
from model.memory.guard import guard_step
from model.memory.lexical.ops import (
    assign_cells,
    context_keys,
    gate_inputs,
    gate_logits,
    memory_prob,
    nearest_cells,
    quantise_keys,
    target_log_prob,
    trust_gradient,
)
from model.memory.lexical.types import NGRAM_SIZES, AddressWeights, Candidates, GateWeights, HeadParams
from model.memory.pool import Draft, Pool, SitePool
from model.memory.prediction import Prediction
from model.memory.site import MemorySite

GATE_WIDTH = 32  # G
NUM_HEADS = 2  # H: a sharp and a broad head
TRUST_LIMITS = (-4.0, 1.0)  # without the upper limit, p_mem would replace p_LM after many repeats of one text


class FoundCandidates(NamedTuple):
    """The result of a read before the gate, for n contexts: their keys [n, d_k], their cells [n, k] with the nearest
    first, the number of empty rows in these cells [n, k], and the candidates in them."""

    keys: Tensor
    cells: Tensor
    num_empty_rows: Tensor
    candidates: Candidates


class LexicalReadout(NamedTuple):
    """The result of a read for n tokens.

    ngram_hashes [n, R] and keys [n, d_k] of the contexts. cells [n, k] and the number of their empty rows [n, k].
    ngram_matches [n]: number of n-grams of the context that the best match repeats. p_mem as shares [n, K] of tokens
    [n, K]. gamma [n]: weight of p_mem. unguarded_gamma [n]: weight that p_mem would have if the guards were open.
    """

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
        """Return the readout of the tokens that mask [n] selects."""
        return LexicalReadout(*(part[mask] for part in self))

    def sum_by_ngram_matches(self, values: Tensor) -> Tensor:
        """Return the sums [R + 1] of values [n] over the tokens of each number of n-gram matches."""
        return (F.one_hot(self.ngram_matches, len(NGRAM_SIZES) + 1).T * values).sum(1)


class LexicalSite(MemorySite):
    """Rows of (token, key), read into the output distribution.

    A token is written under the key of the final hidden state that predicts it, to the nearest of its cells that has an
    empty row, because similar contexts share a few cells. The gate has one trust per number of n-grams that the best
    match repeats, since a similar context predicts less reliably than a repeated sentence. The session's part of the
    trust is learned slowly and stored. The request's part starts at `request_trust` (−0.5 before training), adapts
    within the request and is not stored.
    """

    def __init__(self, config: SiteConfig, hidden_size: int) -> None:
        super().__init__(config)
        self.key_weight = nn.Parameter(torch.zeros(hidden_size, config.width))
        self.key_bias = nn.Parameter(torch.zeros(config.width))
        self.centres = nn.Parameter(torch.zeros(config.cells, config.width))
        self.sharpness = nn.Parameter(torch.ones(NUM_HEADS))
        self.prior = nn.Parameter(torch.zeros(NUM_HEADS))
        self.bonus = nn.Parameter(torch.zeros(NUM_HEADS, len(NGRAM_SIZES)))
        self.gate_in = nn.Parameter(torch.zeros((4 + len(NGRAM_SIZES)) * NUM_HEADS + 1 + config.width, GATE_WIDTH))
        self.gate_in_bias = nn.Parameter(torch.zeros(GATE_WIDTH))
        self.gate_out = nn.Parameter(torch.zeros(GATE_WIDTH, 1 + NUM_HEADS))
        self.gate_out_bias = nn.Parameter(torch.zeros(1 + NUM_HEADS))
        self.trust_rate = nn.Parameter(torch.zeros(()))
        self.request_trust = nn.Parameter(torch.zeros(()))
        self.request_trust_rate = nn.Parameter(torch.zeros(()))

    @property
    def address_weights(self) -> AddressWeights:
        """Return the weights of equations L1 and L2."""
        return AddressWeights(self.key_weight, self.key_bias, self.centres)

    @property
    def head_params(self) -> HeadParams:
        """Return the weights of equation L4."""
        return HeadParams(self.sharpness, self.prior, self.bonus)

    @property
    def gate_weights(self) -> GateWeights:
        """Return the weights of equation L5."""
        return GateWeights(self.gate_in, self.gate_in_bias, self.gate_out, self.gate_out_bias)

    def keys(self, hidden: Tensor) -> Tensor:
        """Return the keys [n, d_k] of final hidden states [n, d] (equation L1)."""
        return context_keys(hidden, self.key_weight, self.key_bias)

    def address(self, keys: Tensor) -> Tensor:
        """Return the cells [n, k] long of keys [n, d_k], the nearest first (equation L2)."""
        return nearest_cells(keys, self.centres, self.config.k)

    def gate(self, found: Candidates, entropy: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logit of γ [n] before trust, and p_mem as shares [n, K]; base entropy [n], keys [n, d_k]."""
        logit, heads = gate_logits(gate_inputs(found, entropy, keys), self.gate_weights)
        return logit, (heads[:, :, None] * found.shares).sum(1)

    def initial_trust(self) -> Tensor:
        """Return the trust [R + 1] of a request that begins."""
        return self.request_trust.detach().expand(len(NGRAM_SIZES) + 1)

    # --- read ------------------------------------------------------------------------------------------------------

    def find_candidates(
        self, pool: Pool, session: Tensor, hidden: Tensor, ngram_hashes: Tensor, prediction: Prediction
    ) -> FoundCandidates:
        """Return the candidates of sessions [n] for final hidden states [n, d] and n-gram hashes [n, R] (L1–L4)."""
        keys = self.keys(hidden)
        cells = self.address(keys)
        site_pool = self._site_pool(pool)
        candidates, num_empty_rows = site_pool.backend.find_candidates(
            site_pool.tables, site_pool.fields, session, cells, keys, ngram_hashes, prediction, self.head_params
        )
        return FoundCandidates(keys, cells, num_empty_rows, candidates)

    def gate_mixture(
        self,
        pool: Pool,
        session: Tensor,
        ngram_hashes: Tensor,
        prediction: Prediction,
        trust: Tensor,
        found: FoundCandidates,
    ) -> LexicalReadout:
        """Return the readout of candidates that were found (equation L5); the other arguments are those of `read`."""
        keys, cells, num_empty_rows, candidates = found
        site_pool = self._site_pool(pool)
        gated = site_pool.backend.gate_mixture(
            candidates, prediction.entropy, keys, self.gate_weights, site_pool.session_scalars, session, trust
        )
        return LexicalReadout(
            ngram_hashes, keys, cells, num_empty_rows, candidates.ngram_matches, candidates.tokens, *gated
        )

    def read(
        self,
        pool: Pool,
        session: Tensor,
        hidden: Tensor,
        ngram_hashes: Tensor,
        prediction: Prediction,
        trust: Tensor,
    ) -> LexicalReadout:
        """Return the readout of sessions [n] for contexts with the base's `prediction` (equations L1–L5).

        hidden: final hidden states [n, d]. ngram_hashes: [n, R]. trust: [n, R + 1] of the requests.
        """
        found = self.find_candidates(pool, session, hidden, ngram_hashes, prediction)
        return self.gate_mixture(pool, session, ngram_hashes, prediction, trust, found)

    def mixture(
        self, pool: Pool, session: Tensor, hidden: Tensor, last_tokens: Tensor, logits: Tensor, trust: Tensor
    ) -> Tensor:
        """Return log p [n, V] of the next tokens up to a constant per row, with the memory of sessions [n] (L1–L6).

        logits: [n, V] of the base; they may be overwritten. last_tokens: [n, 8]. The rest is as in `read`.
        """
        site_pool = self._site_pool(pool)
        return site_pool.backend.mixture(
            site_pool.tables,
            site_pool.fields,
            site_pool.session_scalars,
            self.address_weights,
            self.config.k,
            self.head_params,
            self.gate_weights,
            session,
            hidden,
            last_tokens,
            trust,
            logits,
        )

    def _site_pool(self, pool: Pool) -> SitePool:
        return pool.sites[self.config.name]

    # --- write -----------------------------------------------------------------------------------------------------

    def log_probs_and_trust_gradient(
        self, readout: LexicalReadout, targets: Tensor, unmixed_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return log p [n] of targets [n] as if the guards were open, and the gradient of trust [R + 1] (S1).

        unmixed_log_probs: log-probabilities [n] of the targets without this site.
        """
        memory_probs = memory_prob(targets, readout.tokens, readout.shares)
        adapted = target_log_prob(unmixed_log_probs, memory_probs, readout.unguarded_gamma)
        gradient = trust_gradient(unmixed_log_probs, adapted, memory_probs, readout.unguarded_gamma)
        return adapted, readout.sum_by_ngram_matches(gradient)

    def updated_trust(
        self, trust: Tensor, readout: LexicalReadout, targets: Tensor, unmixed_log_probs: Tensor
    ) -> Tensor:
        """Return a request's trust [R + 1] after a block (S1); the other arguments are those of `learn`."""
        _, gradient = self.log_probs_and_trust_gradient(readout, targets, unmixed_log_probs)
        return (trust + self.request_trust_rate * gradient).clamp(*TRUST_LIMITS)

    def learn(
        self,
        draft: Draft,
        readout: LexicalReadout,
        targets: Tensor,
        unmixed_log_probs: Tensor,
        *,
        has_row: Tensor | None = None,
        is_evidence: Tensor | None = None,
    ) -> None:
        """Write one block of n tokens to the draft: rows (L7), the session's trust (S1) and its guards (S2).

        readout: of the n contexts. targets: [n]. unmixed_log_probs: log-probabilities [n] of the targets without this
        site. has_row: bool [n], the tokens of which rows are written; None: all. is_evidence: bool [n], the tokens that
        the guards count; None: all. Raises PoolFullError: roll the draft back.
        """
        site_pool = self._site_pool(draft.pool)
        adapted, gradient = self.log_probs_and_trust_gradient(readout, targets, unmixed_log_probs)
        scalars = site_pool.session_scalars[draft.index]
        trust = (scalars[TRUST] + self.trust_rate * gradient).clamp(*TRUST_LIMITS)
        counts = torch.ones_like(adapted) if is_evidence is None else is_evidence.to(adapted.dtype)
        gain = readout.sum_by_ngram_matches((adapted - unmixed_log_probs) * counts)
        tokens = readout.sum_by_ngram_matches(counts)
        balance, closed = guard_step(scalars[BALANCE], scalars[GATE_CLOSED], gain, tokens)
        site_pool.session_scalars[draft.index] = torch.stack([trust, balance, closed])
        surprising = adapted < -self.config.surprise
        if has_row is not None:
            surprising &= has_row
        chosen = assign_cells(readout.cells[surprising], readout.num_empty_rows[surprising])
        touched, at = torch.unique(chosen, return_inverse=True)
        keys, ngram_hashes = quantise_keys(readout.keys[surprising]), readout.ngram_hashes[surprising]
        old, new = draft.copy_on_write(self.config.name, touched)
        site_pool.backend.write(site_pool.fields, old, new, at, keys, ngram_hashes, targets[surprising])
