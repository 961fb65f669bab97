"""The adaptive language model: the frozen base and the memory in one forward. What it learns lives in `Pool` and
`Draft`.

A request is a token sequence with attention of its own, processed in blocks. Each block is predicted with the fast
weights as they stand at its start (score), then written to them (update). A block of one sequence is always computed
alone, in a shape that only depends on the request: what it teaches does not depend on who else is being served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.base.backbone import Backbone
from model.base.kv_cache import KVCache
from model.memory import DeltaSite, Draft, LexicalReadout, Memory, Pool
from model.memory.config import NGRAM_SIZES
from model.memory.lexical import torch_backend

EMPTY_SESSION = 0  # in every pool, the index of the session without rows
OUTPUT_LAYER = -1  # the "layer" of a site between the final norm and the head


@dataclass(frozen=True)
class DecodeState:
    """What the next block needs of a request: the final hidden state [d] of its last token, its last tokens [8] (−1
    before its start), its trust in the lexical site [R + 1], the last token's input to each hidden site [d], and its
    final hidden state without memory, where that differs and is kept."""

    hidden: Tensor
    last_tokens: Tensor
    trust: Tensor
    inputs: dict[int, Tensor] = field(default_factory=dict)
    frozen: Tensor | None = None

    def advanced(self, tokens: Sequence[int]) -> DecodeState:
        """What `decode` needs of the carry that will stand after these tokens."""
        last_tokens = torch.cat([self.last_tokens, self.last_tokens.new_tensor(tokens)])
        return replace(self, last_tokens=last_tokens[-len(self.last_tokens) :])


@dataclass(frozen=True)
class Scores:
    """Log-probabilities (nats) of n targets, with and without memory; learned [n]: which of them are learned; top:
    log-probabilities and token ids [n, top] of the likeliest."""

    adapted: Tensor
    frozen: Tensor | None
    learned: Tensor
    top: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class _Targets:
    """n learned or scored targets of a block and what predicts them.

    ids [n]; prints [n, R]: fingerprints of what stands before them; states: final hidden states [n, d] one token
    earlier; following: those of the targets themselves. before and after: the same two, at the input of each hidden
    site below the output.
    """

    ids: Tensor
    ngram_hashes: Tensor
    states: Tensor
    following: Tensor
    before: dict[int, Tensor]
    after: dict[int, Tensor]

    def select(self, mask: Tensor) -> _Targets:
        return _Targets(
            self.ids[mask],
            self.ngram_hashes[mask],
            self.states[mask],
            self.following[mask],
            {layer: h[mask] for layer, h in self.before.items()},
            {layer: h[mask] for layer, h in self.after.items()},
        )


@dataclass(frozen=True)
class _ScoredTargets:
    """n scored targets. adapted, frozen and top: as in `Scores`; before the lexical site: the prediction, and its
    log-probabilities [n] of the targets; reading: the lexical site's; trust: the request's, after them."""

    adapted: Tensor
    frozen: Tensor | None
    top: tuple[Tensor, Tensor] | None
    base: torch_backend.Prediction
    unmixed_log_probs: Tensor
    readout: LexicalReadout | None
    trust: Tensor


class AdaptiveLM:
    """Steps over (slow weights, fast weights, tokens); it keeps no state of its own. Call under `inference_mode`.

    decoder: the base as it generates, if that differs from how it reads, scores and learns.
    """

    def __init__(self, backbone: Backbone, memory: Memory, *, decoder: Backbone | None = None) -> None:
        self.backbone = backbone
        self.decoder = backbone if decoder is None else decoder
        self.memory = memory
        self.needs_frozen_cache = any(layer != OUTPUT_LAYER for layer in memory.delta)

    @property
    def device(self) -> torch.device:
        return self.backbone.embedding.device

    def new_pool(self, *, rows: int, sessions: int, make_room: Callable[[], bool] = lambda: False) -> Pool:
        """An empty pool on the model's device; the arguments are those of `Pool`."""
        return Pool(self.memory.config, rows=rows, sessions=sessions, device=self.device, make_room=make_room)

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for one sequence of at most `capacity` tokens."""
        return self.backbone.new_cache(capacity)

    def prepare(self, pool: Pool) -> None:
        """Does everything once, before sessions of this pool are served: kernels are compiled when they are called."""
        draft = pool.draft(EMPTY_SESSION)
        cache = self.new_cache(3)
        decode_state, _ = self.block([0, 0], cache, pool, draft.index, learn=[False, True], draft=draft)
        self.predict(self.decode([0], [cache], [decode_state], pool, [draft.index]), pool, [draft.index])
        pool.close(pool.open(draft.touched()))
        draft.rollback()

    def block(
        self,
        token_ids: Sequence[int],
        cache: KVCache,
        pool: Pool,
        index: int = EMPTY_SESSION,
        *,
        decode_state: DecodeState | None = None,
        score: Sequence[bool] | None = None,
        learn: Sequence[bool] | None = None,
        draft: Draft | None = None,
        frozen: bool = False,
        frozen_cache: KVCache | None = None,
        top: int = 0,
    ) -> tuple[DecodeState, Scores | None]:
        """Runs one block of T tokens of a request and, given a `draft` of session `index`, learns from it.

        The target of position t is token t, predicted from position t − 1 (the carry, for t = 0; a request's first
        token has no predictor and is never a target). score [T] and learn [T] choose targets; the scores returned are
        of their union, in order. frozen: score without memory too; a memory that reads below the output then needs
        `frozen_cache`, a second cache that has seen the same request. Raises PoolFullError: roll the draft back.
        """
        ids = torch.tensor(token_ids, device=self.device)
        inputs: dict[int, Tensor] = {}
        final = self.backbone(ids[None], [cache], self.hooks(pool, index, inputs))[0]
        frozen_hidden: Tensor | None = None
        if frozen and self.needs_frozen_cache:
            if frozen_cache is None:
                raise ValueError("frozen_cache is needed: this memory reads below the output")
            frozen_hidden = self.backbone(ids[None], [frozen_cache])[0]
        first = 1 if decode_state is None else 0
        learned, wanted = (self._mask(mask, len(ids))[first:] for mask in (learn, score))
        wanted = wanted | learned
        scores: Scores | None = None
        last_tokens = torch.cat(
            [ids.new_full((max(NGRAM_SIZES),), -1) if decode_state is None else decode_state.last_tokens, ids]
        )
        trust = self._initial_trust() if decode_state is None else decode_state.trust
        if bool(wanted.any()):
            targets = _Targets(
                ids[first:],
                torch_backend.hash_ngrams(last_tokens[:-1])[first:],
                _shift(final, None if decode_state is None else decode_state.hidden),
                final[first:],
                {n: _shift(h, None if decode_state is None else decode_state.inputs[n]) for n, h in inputs.items()},
                {n: h[first:] for n, h in inputs.items()},
            )
            frozen_predictors = (
                None
                if frozen_hidden is None
                else _shift(frozen_hidden, None if decode_state is None else decode_state.frozen)[wanted]
            )
            chosen = targets.select(wanted)
            of_chosen = learned[wanted]
            scored = self._score(chosen, pool, index, trust, frozen=frozen, frozen_hidden=frozen_predictors, top=top)
            trust = scored.trust
            scores = Scores(scored.adapted, scored.frozen, of_chosen, scored.top)
            if draft is not None and bool(of_chosen.any()):
                self._write(draft, chosen.select(of_chosen), scored, of_chosen)
        last_inputs = {n: h[-1] for n, h in inputs.items()}
        last = DecodeState(
            final[-1],
            last_tokens[-max(NGRAM_SIZES) :],
            trust,
            last_inputs,
            None if frozen_hidden is None else frozen_hidden[-1],
        )
        return last, scores

    def decode(
        self,
        token_ids: Sequence[int],
        caches: Sequence[KVCache],
        decode_states: Sequence[DecodeState],
        pool: Pool,
        index: Sequence[int],
    ) -> list[DecodeState]:
        """One step of B sequences, each with its own cache, carry and session; returns the new carry of each.

        Rows that follow one another in one sequence (caches and carries `advanced`) are, bit for bit, what they would
        be in steps of their own."""
        ids = torch.tensor(token_ids, device=self.device)[:, None]
        inputs: dict[int, Tensor] = {}
        final = self.decoder(ids, caches, self.hooks(pool, index, inputs))[:, 0]
        last_tokens_batch = torch.cat(
            [torch.stack([decode_state.last_tokens for decode_state in decode_states])[:, 1:], ids], dim=1
        )
        return [
            DecodeState(
                final[b], last_tokens_batch[b], decode_state.trust, {layer: x[b] for layer, x in inputs.items()}
            )
            for b, decode_state in enumerate(decode_states)
        ]

    def predict(self, decode_states: Sequence[DecodeState], pool: Pool, index: Sequence[int]) -> Tensor:
        """Next-token scores [B, V] in fp32: the base's logits, bit for bit, where a session's memory is empty or
        silent, and log-probabilities of the mixture, up to a constant a row, elsewhere."""
        states = torch.stack([decode_state.hidden for decode_state in decode_states])
        if all(i == EMPTY_SESSION for i in index):
            return self.decoder.logits(states)
        last_tokens_batch, trust = (
            torch.stack(part) for part in ([c.last_tokens for c in decode_states], [c.trust for c in decode_states])
        )
        return self.mixture(states, last_tokens_batch, trust, pool, torch.tensor(index, device=self.device))

    # --- read ------------------------------------------------------------------------------------------------------

    def mixture(self, states: Tensor, last_tokens_batch: Tensor, trust: Tensor, pool: Pool, session: Tensor) -> Tensor:
        """`predict` [B, V] with the memory of sessions [B], from what carries hold: states [B, d], trails [B, 8] and
        trust [B, R + 1]. No shape depends on what is found, and nothing waits for the device."""
        logits = self.decoder.logits(self._read_output(states, pool, session))
        site = self.memory.lexical
        if site is None:
            return logits
        return site.mixture(pool, session, states, last_tokens_batch, logits, trust)

    def hooks(
        self, pool: Pool, index: int | Sequence[int] | Tensor, inputs: dict[int, Tensor]
    ) -> dict[int, Callable[[Tensor], Tensor]]:
        """The reads of sessions [1 or B] below the output, by layer; each notes its input [T or B, d] in `inputs`."""

        def hook(layer: int, site: DeltaSite) -> Callable[[Tensor], Tensor]:
            def read(hidden: Tensor) -> Tensor:
                flat = hidden.flatten(0, 1)
                inputs[layer] = flat
                session = torch.as_tensor(index, device=self.device).expand(len(flat))
                return site.read(pool, session, flat).view_as(hidden)

            return read

        return {layer: hook(layer, site) for layer, site in self.memory.delta.items() if layer != OUTPUT_LAYER}

    def _read_output(self, states: Tensor, pool: Pool, session: Tensor) -> Tensor:
        site = self.memory.delta.get(OUTPUT_LAYER)
        return states if site is None else site.read(pool, session, states)

    def _score(
        self,
        targets: _Targets,
        pool: Pool,
        index: int,
        trust: Tensor,
        *,
        frozen: bool,
        frozen_hidden: Tensor | None,
        top: int,
    ) -> _ScoredTargets:
        session = torch.full((len(targets.ids),), index, device=self.device)
        base = torch_backend.predict(self.backbone.logits(self._read_output(targets.states, pool, session)))
        adapted = unmixed_log_probs = base.log_prob(targets.ids)
        mixed, readout, site = base.logits, None, self.memory.lexical
        if site is not None and index != EMPTY_SESSION:
            readout = site.read(
                pool, session, targets.states, targets.ngram_hashes, base, trust.expand(len(session), -1)
            )
            trust = site.updated_trust(trust, readout, targets.ids, unmixed_log_probs)
            memory_probs = torch_backend.memory_prob(targets.ids, readout.tokens, readout.shares)
            adapted = torch_backend.target_log_prob(unmixed_log_probs, memory_probs, readout.gamma)
            mixed = torch_backend.mix(base, readout.tokens, readout.shares, readout.gamma) if top else mixed
        frozen_log_probs: Tensor | None = None
        if frozen:
            differs = frozen_hidden is not None or OUTPUT_LAYER in self.memory.delta
            states = targets.states if frozen_hidden is None else frozen_hidden
            frozen_log_probs = (
                torch_backend.predict(self.backbone.logits(states)).log_prob(targets.ids)
                if differs
                else unmixed_log_probs
            )
        best = mixed.log_softmax(-1).topk(top) if top else None
        alternatives = None if best is None else (best.values, best.indices)
        return _ScoredTargets(adapted, frozen_log_probs, alternatives, base, unmixed_log_probs, readout, trust)

    # --- write -----------------------------------------------------------------------------------------------------

    def _write(self, draft: Draft, targets: _Targets, scored: _ScoredTargets, mask: Tensor) -> None:
        """Learns the targets, those of `scored` that the mask [n] chooses."""
        if (lexical := self.memory.lexical) is not None and scored.readout is not None:
            lexical.learn(draft, scored.readout.select(mask), targets.ids, scored.unmixed_log_probs[mask])
        if self.memory.delta:
            error = F.embedding(targets.ids, self.backbone.embedding).float()
            error = error - torch.softmax(scored.base.logits[mask], -1) @ self.backbone.embedding.float()
            adapted = scored.adapted[mask]
            for layer, site in self.memory.delta.items():
                here = targets.states if layer == OUTPUT_LAYER else targets.before[layer]
                following = targets.following if layer == OUTPUT_LAYER else targets.after[layer]
                site.learn(draft, here, following, error, adapted)

    def _initial_trust(self) -> Tensor:
        site = self.memory.lexical
        return torch.zeros(len(NGRAM_SIZES) + 1, device=self.device) if site is None else site.initial_trust()

    def _mask(self, mask: Sequence[bool] | None, length: int) -> Tensor:
        if mask is None:
            return torch.zeros(length, dtype=torch.bool, device=self.device)
        return torch.tensor(mask, dtype=torch.bool, device=self.device)


def _shift(states: Tensor, previous: Tensor | None) -> Tensor:
    """The state before each target: [T, d] with the previous block's last one, or [T − 1, d] at a request's start."""
    return states[:-1] if previous is None else torch.cat([previous[None], states[:-1]])
