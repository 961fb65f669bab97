"""The adaptive language model: the frozen base and the memory in one forward pass. Fast weights live in `Pool` and
`Draft`.

A request is a token sequence with its own attention, processed in blocks. The model predicts each block with the fast
weights as they are at the start of the block (score), then writes the block to them (update). A block of one sequence
is always computed alone, in a shape that only depends on the request: other sessions change no bit of what is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.base.backbone import Backbone
from model.base.kv_cache import KVCache
from model.episodes import Episodes, episodic_sites
from model.memory import Draft, LexicalReadout, Memory, MemoryConfig, Pool, choose_backend
from model.memory.lexical.ops import hash_ngrams, memory_prob, mix, target_log_prob
from model.memory.lexical.types import NGRAM_SIZES
from model.memory.prediction import Prediction, base_prediction
from model.memory.site import ResidualSite

EMPTY_SESSION = 0  # in every pool, the index of the session without rows
OUTPUT_LAYER = -1  # the "layer" of a site between the final norm and the head
NUM_LAST_TOKENS = max(NGRAM_SIZES)


@dataclass(frozen=True)
class DecodeState:
    """The part of a request that its next block or step needs.

    hidden: final hidden state [d] of the last token. last_tokens: [8], −1 before the start of the request. trust:
    [R + 1], the request's trust in the lexical site. inputs: the last token's input [d] to each site below the output,
    by layer. frozen_hidden: the last token's final hidden state [d] without memory; None where it equals `hidden` or is
    not kept.
    """

    hidden: Tensor
    last_tokens: Tensor
    trust: Tensor
    inputs: dict[int, Tensor] = field(default_factory=dict)
    frozen_hidden: Tensor | None = None

    def advanced(self, tokens: Sequence[int]) -> DecodeState:
        """Return a copy with the last tokens advanced; `hidden` and `trust` stay as they were."""
        last_tokens = torch.cat([self.last_tokens, self.last_tokens.new_tensor(tokens)])
        return replace(self, last_tokens=last_tokens[-len(self.last_tokens) :])

    def following(self, tokens: Sequence[int]) -> DecodeState:
        """Return a copy for a text that follows `tokens`, and not the last tokens of the sequence."""
        before_start = [-1] * len(self.last_tokens)
        return self.advanced([*before_start, *tokens])


@dataclass(frozen=True)
class Scores:
    """Log-probabilities in nats of n targets.

    adapted and frozen: [n], with and without memory. learned: bool [n], the targets that are learned. top:
    log-probabilities and token ids, both [n, top], of the likeliest tokens.
    """

    adapted: Tensor
    frozen: Tensor | None
    learned: Tensor
    top: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class _Targets:
    """n learned or scored targets of a block and the states that predict them.

    ids: [n]. ngram_hashes: [n, R], of the tokens before each target. states: final hidden states [n, d] one position
    earlier. following: final hidden states [n, d] of the targets. before and after: as `states` and `following`, but
    the input [n, d] of each site below the output, by layer. frozen_states: `states` without memory; None where they
    equal `states` or are not kept.
    """

    ids: Tensor
    ngram_hashes: Tensor
    states: Tensor
    following: Tensor
    before: dict[int, Tensor]
    after: dict[int, Tensor]
    frozen_states: Tensor | None

    def select(self, mask: Tensor) -> _Targets:
        return _Targets(
            self.ids[mask],
            self.ngram_hashes[mask],
            self.states[mask],
            self.following[mask],
            {layer: h[mask] for layer, h in self.before.items()},
            {layer: h[mask] for layer, h in self.after.items()},
            None if self.frozen_states is None else self.frozen_states[mask],
        )


@dataclass(frozen=True)
class _BlockStates:
    """The hidden states of a block of T tokens.

    ids: [T]. last_tokens: [8 + T], the block after the 8 tokens before it. final: final hidden states [T, d]. inputs:
    input [T, d] of each site below the output, by layer. frozen_final: `final` without memory; None where it equals
    `final` or is not kept. previous: the state before the block; None at the start of a request.
    """

    ids: Tensor
    last_tokens: Tensor
    final: Tensor
    inputs: dict[int, Tensor]
    frozen_final: Tensor | None
    previous: DecodeState | None

    def targets(self) -> _Targets:
        """Return every target of the block: all tokens, or all but the first at the start of a request."""
        previous, first = self.previous, 1 if self.previous is None else 0
        return _Targets(
            self.ids[first:],
            hash_ngrams(self.last_tokens[:-1])[first:],
            _shift(self.final, None if previous is None else previous.hidden),
            self.final[first:],
            {
                layer: _shift(h, None if previous is None else previous.inputs[layer])
                for layer, h in self.inputs.items()
            },
            {layer: h[first:] for layer, h in self.inputs.items()},
            None
            if self.frozen_final is None
            else _shift(self.frozen_final, None if previous is None else previous.frozen_hidden),
        )

    def decode_state(self, trust: Tensor) -> DecodeState:
        """Return the state after the block; `trust` [R + 1] is the request's trust after the block."""
        inputs = {layer: h[-1] for layer, h in self.inputs.items()}
        frozen_hidden = None if self.frozen_final is None else self.frozen_final[-1]
        return DecodeState(self.final[-1], self.last_tokens[-NUM_LAST_TOKENS:], trust, inputs, frozen_hidden)


@dataclass(frozen=True)
class _ScoredTargets:
    """n scored targets.

    adapted, frozen and top: as in `Scores`. prediction: before the lexical site. unmixed_log_probs: log-probabilities
    [n] of the targets under `prediction`. readout: of the lexical site. trust: [R + 1], the request's trust
    after the targets.
    """

    adapted: Tensor
    frozen: Tensor | None
    top: tuple[Tensor, Tensor] | None
    prediction: Prediction
    unmixed_log_probs: Tensor
    readout: LexicalReadout | None
    trust: Tensor


class AdaptiveLM:
    """Steps over slow weights, fast weights and tokens, without state of its own. Call under `torch.inference_mode`.

    decoder: the base as it generates, if it differs from the base that reads, scores and learns (`backbone`).
    episodes: the episodic memory; None = sessions keep no episodes.
    """

    def __init__(
        self,
        backbone: Backbone,
        memory: Memory,
        *,
        decoder: Backbone | None = None,
        episodes: Episodes | None = None,
    ) -> None:
        self.backbone = backbone
        self.decoder = backbone if decoder is None else decoder
        self.memory = memory
        self.episodes = episodes
        self.needs_frozen_cache = any(layer != OUTPUT_LAYER for layer in memory.residual)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.backbone.embedding.device

    @property
    def memory_config(self) -> MemoryConfig:
        """Return the configuration of the sites that a session of this model has."""
        config = self.memory.config
        return config if self.episodes is None else replace(config, sites=(*config.sites, *episodic_sites()))

    def new_pool(self, *, rows: int, sessions: int, make_room: Callable[[], bool] = lambda: False) -> Pool:
        """Return an empty pool on the model's device with its backend; the arguments are those of `Pool`."""
        backend = choose_backend(self.device)
        return Pool(
            self.memory_config, rows=rows, sessions=sessions, backend=backend, device=self.device, make_room=make_room
        )

    def new_cache(self, capacity: int) -> KVCache:
        """Return an empty cache for one sequence of at most `capacity` tokens."""
        return self.backbone.new_cache(capacity)

    def prepare(self, pool: Pool) -> None:
        """Run every kernel once, before sessions of this pool are served: a kernel is compiled at its first call."""
        draft = pool.draft(EMPTY_SESSION)
        cache = self.new_cache(3)
        decode_state, _ = self.block([0, 0], cache, pool, draft.index, learn=[False, True], draft=draft)
        self.predict(self.decode([0], [cache], [decode_state], pool, [draft.index]), pool, [draft.index])
        if self.episodes is not None:
            self.episodes.prepare()
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
        score: Sequence[int] | None = None,
        learn: Sequence[int] | None = None,
        without_rows: Sequence[int] | None = None,
        draft: Draft | None = None,
        score_frozen: bool = False,
        frozen_cache: KVCache | None = None,
        top: int = 0,
    ) -> tuple[DecodeState, Scores | None]:
        """Run one block of T tokens of a request and, given a `draft` of session `index`, learn from the block.

        The target of position t is token t, predicted from position t − 1 (from `decode_state` for t = 0; the first
        token of a request has no predictor and is never a target). score [T] and learn [T] select targets; the scores
        returned are those of their union, in order. without_rows [T]: learned targets that change the trust and the
        guards alone. score_frozen: score without memory too; a memory that is read below
        the output then needs `frozen_cache`, a second cache that has seen the same request. top: number of the
        likeliest tokens to return. Raise PoolFullError: roll the draft back.
        """
        if score_frozen and self.needs_frozen_cache and frozen_cache is None:
            raise ValueError("frozen_cache is needed: this memory reads below the output")
        states = self._forward(token_ids, cache, pool, index, decode_state, frozen_cache if score_frozen else None)
        trust = self._initial_trust() if decode_state is None else decode_state.trust
        first = 1 if decode_state is None else 0
        learned, wanted = (self._mask(mask, len(token_ids))[first:] for mask in (learn, score))
        wanted = wanted | learned
        scores: Scores | None = None
        if bool(wanted.any()):
            targets = states.targets().select(wanted)
            scored = self._score(targets, pool, index, trust, score_frozen=score_frozen, top=top)
            trust, is_learned = scored.trust, learned[wanted]
            scores = Scores(scored.adapted, scored.frozen, is_learned, scored.top)
            if draft is not None and bool(is_learned.any()):
                has_row = ~self._mask(without_rows, len(token_ids))[first:][wanted]
                self._write(draft, targets.select(is_learned), scored, is_learned, has_row[is_learned])
        return states.decode_state(trust), scores

    def decode(
        self,
        token_ids: Sequence[int],
        caches: Sequence[KVCache],
        decode_states: Sequence[DecodeState],
        pool: Pool,
        index: Sequence[int],
    ) -> list[DecodeState]:
        """Run one step of B sequences, each with its own cache, state and session; return the new state of each.

        Rows that follow one another in one sequence (caches and states `advanced`) have, bit for bit, the results that
        they would have in steps of their own.
        """
        ids = torch.tensor(token_ids, device=self.device)[:, None]
        inputs: dict[int, Tensor] = {}
        final = self.decoder(ids, caches, self.hooks(pool, index, inputs))[:, 0]
        last_tokens = torch.cat([torch.stack([state.last_tokens for state in decode_states])[:, 1:], ids], dim=1)
        return [
            DecodeState(final[b], last_tokens[b], state.trust, {layer: h[b] for layer, h in inputs.items()})
            for b, state in enumerate(decode_states)
        ]

    def predict(self, decode_states: Sequence[DecodeState], pool: Pool, index: Sequence[int]) -> Tensor:
        """Return next-token scores [B, V] in fp32.

        The scores are the base's logits, bit for bit, where a session's memory is empty, or gated off
        (γ = 0), and log-probabilities of the mixture, up to a constant per row, elsewhere.
        """
        states = torch.stack([state.hidden for state in decode_states])
        if all(i == EMPTY_SESSION for i in index):
            return self.decoder.logits(states)
        last_tokens = torch.stack([state.last_tokens for state in decode_states])
        trust = torch.stack([state.trust for state in decode_states])
        return self.mixture(states, last_tokens, trust, pool, torch.tensor(index, device=self.device))

    def _forward(
        self,
        token_ids: Sequence[int],
        cache: KVCache,
        pool: Pool,
        index: int,
        previous: DecodeState | None,
        frozen_cache: KVCache | None,
    ) -> _BlockStates:
        """Run the base over one block with the memory, and once more without memory where that is needed."""
        ids = torch.tensor(token_ids, device=self.device)
        inputs: dict[int, Tensor] = {}
        final = self.backbone(ids[None], [cache], self.hooks(pool, index, inputs))[0]
        frozen_final: Tensor | None = None
        if frozen_cache is not None and self.needs_frozen_cache:
            frozen_final = self.backbone(ids[None], [frozen_cache])[0]
        before_start = ids.new_full((NUM_LAST_TOKENS,), -1)
        last_tokens = torch.cat([before_start if previous is None else previous.last_tokens, ids])
        return _BlockStates(ids, last_tokens, final, inputs, frozen_final, previous)

    # --- read ------------------------------------------------------------------------------------------------------

    def mixture(self, states: Tensor, last_tokens: Tensor, trust: Tensor, pool: Pool, session: Tensor) -> Tensor:
        """Return the scores [B, V] of `predict` with the memory of sessions [B].

        states: [B, d]. last_tokens: [B, 8]. trust: [B, R + 1]. No shape depends on what is found, and nothing waits for
        the device, so that a CUDA graph can capture the call.
        """
        logits = self.decoder.logits(self._read_output(states, pool, session))
        site = self.memory.lexical
        if site is None:
            return logits
        return site.mixture(pool, session, states, last_tokens, logits, trust)

    def hooks(
        self, pool: Pool, index: int | Sequence[int] | Tensor, inputs: dict[int, Tensor]
    ) -> dict[int, Callable[[Tensor], Tensor]]:
        """Return the reads of sessions [1 or B] below the output, by layer.

        inputs: an output; each read stores its input [T or B, d] under its layer.
        """

        def hook(layer: int, site: ResidualSite) -> Callable[[Tensor], Tensor]:
            def read(hidden: Tensor) -> Tensor:
                flat = hidden.flatten(0, 1)
                inputs[layer] = flat
                session = torch.as_tensor(index, device=self.device).expand(len(flat))
                return site.read(pool, session, flat).view_as(hidden)

            return read

        return {layer: hook(layer, site) for layer, site in self.memory.residual.items() if layer != OUTPUT_LAYER}

    def _read_output(self, states: Tensor, pool: Pool, session: Tensor) -> Tensor:
        site = self.memory.residual.get(OUTPUT_LAYER)
        return states if site is None else site.read(pool, session, states)

    def _score(
        self, targets: _Targets, pool: Pool, index: int, trust: Tensor, *, score_frozen: bool, top: int
    ) -> _ScoredTargets:
        session = torch.full((len(targets.ids),), index, device=self.device)
        prediction = base_prediction(self.backbone.logits(self._read_output(targets.states, pool, session)))
        adapted = unmixed_log_probs = prediction.log_prob(targets.ids)
        mixed, readout, site = prediction.logits, None, self.memory.lexical
        if site is not None and index != EMPTY_SESSION:
            request_trust = trust.expand(len(session), -1)
            readout = site.read(pool, session, targets.states, targets.ngram_hashes, prediction, request_trust)
            trust = site.updated_trust(trust, readout, targets.ids, unmixed_log_probs)
            memory_probs = memory_prob(targets.ids, readout.tokens, readout.shares)
            adapted = target_log_prob(unmixed_log_probs, memory_probs, readout.gamma)
            mixed = mix(prediction, readout.tokens, readout.shares, readout.gamma) if top else mixed
        frozen_log_probs = self._frozen_log_probs(targets, unmixed_log_probs) if score_frozen else None
        best = mixed.log_softmax(-1).topk(top) if top else None
        likeliest = None if best is None else (best.values, best.indices)
        return _ScoredTargets(adapted, frozen_log_probs, likeliest, prediction, unmixed_log_probs, readout, trust)

    def _frozen_log_probs(self, targets: _Targets, unmixed_log_probs: Tensor) -> Tensor:
        """Return the log-probabilities [n] of the targets without any memory."""
        if targets.frozen_states is None and OUTPUT_LAYER not in self.memory.residual:
            return unmixed_log_probs
        states = targets.states if targets.frozen_states is None else targets.frozen_states
        return base_prediction(self.backbone.logits(states)).log_prob(targets.ids)

    # --- write -----------------------------------------------------------------------------------------------------

    def _write(self, draft: Draft, targets: _Targets, scored: _ScoredTargets, mask: Tensor, has_row: Tensor) -> None:
        """Write m targets, which are those of `scored` that the mask [n] selects, to the draft; has_row: [m]."""
        if (lexical := self.memory.lexical) is not None and scored.readout is not None:
            readout, unmixed = scored.readout.select(mask), scored.unmixed_log_probs[mask]
            lexical.learn(draft, readout, targets.ids, unmixed, has_row=has_row)
        if self.memory.residual and bool(has_row.any()):
            targets, mask = targets.select(has_row), mask.masked_scatter(mask, has_row)
            error = F.embedding(targets.ids, self.backbone.embedding).float()
            error = error - torch.softmax(scored.prediction.logits[mask], -1) @ self.backbone.embedding.float()
            adapted = scored.adapted[mask]
            for layer, site in self.memory.residual.items():
                hidden = targets.states if layer == OUTPUT_LAYER else targets.before[layer]
                following = targets.following if layer == OUTPUT_LAYER else targets.after[layer]
                site.learn(draft, hidden, following, error, adapted)

    def _initial_trust(self) -> Tensor:
        site = self.memory.lexical
        return torch.zeros(len(NGRAM_SIZES) + 1, device=self.device) if site is None else site.initial_trust()

    def _mask(self, mask: Sequence[int] | None, length: int) -> Tensor:
        if mask is None:
            return torch.zeros(length, dtype=torch.bool, device=self.device)
        return torch.tensor(mask, dtype=torch.bool, device=self.device)


def _shift(states: Tensor, previous: Tensor | None) -> Tensor:
    """Return the state before each target: [T, d] after the previous block's last state, or [T − 1, d] at the start of
    a request."""
    return states[:-1] if previous is None else torch.cat([previous[None], states[:-1]])
