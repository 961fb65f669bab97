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

from model.base.backbone import Backbone, KVCache
from model.memory import Draft, HiddenSite, Memory, Pool, Reading
from model.memory.config import RUNS
from model.memory.lexical import torch_backend

EMPTY = 0  # in every pool, the index of the session without rows
OUTPUT = -1  # the "layer" of a site between the final norm and the head


@dataclass(frozen=True)
class Carry:
    """What the next block needs of a request: the final hidden state [d] of its last token, its last tokens [8] (−1
    before its start), its trust in the lexical site [R + 1], the last token's input to each hidden site [d], and its
    final hidden state without memory, where that differs and is kept."""

    hidden: Tensor
    trail: Tensor
    trust: Tensor
    inputs: dict[int, Tensor] = field(default_factory=dict)
    frozen: Tensor | None = None

    def ahead(self, tokens: Sequence[int]) -> Carry:
        """What `decode` needs of the carry that will stand after these tokens."""
        trail = torch.cat([self.trail, self.trail.new_tensor(tokens)])
        return replace(self, trail=trail[-len(self.trail) :])


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
    prints: Tensor
    states: Tensor
    following: Tensor
    before: dict[int, Tensor]
    after: dict[int, Tensor]

    def pick(self, mask: Tensor) -> _Targets:
        return _Targets(
            self.ids[mask],
            self.prints[mask],
            self.states[mask],
            self.following[mask],
            {layer: h[mask] for layer, h in self.before.items()},
            {layer: h[mask] for layer, h in self.after.items()},
        )


@dataclass(frozen=True)
class _Scored:
    """n scored targets. adapted, frozen and top: as in `Scores`; before the lexical site: the prediction, and its
    log-probabilities [n] of the targets; reading: the lexical site's; trust: the request's, after them."""

    adapted: Tensor
    frozen: Tensor | None
    top: tuple[Tensor, Tensor] | None
    base: torch_backend.Prediction
    unmixed: Tensor
    reading: Reading | None
    trust: Tensor


class AdaptiveLM:
    """Steps over (slow weights, fast weights, tokens); it keeps no state of its own. Call under `inference_mode`.

    decoder: the base as it generates, if that differs from how it reads, scores and learns.
    """

    def __init__(self, backbone: Backbone, memory: Memory, *, decoder: Backbone | None = None) -> None:
        self.backbone = backbone
        self.decoder = backbone if decoder is None else decoder
        self.memory = memory
        self.needs_frozen_cache = any(layer != OUTPUT for layer in memory.hidden)

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
        draft = pool.draft(EMPTY)
        cache = self.new_cache(3)
        carry, _ = self.block([0, 0], cache, pool, draft.index, learn=[False, True], draft=draft)
        self.predict(self.decode([0], [cache], [carry], pool, [draft.index]), pool, [draft.index])
        pool.close(pool.open(draft.touched()))
        draft.rollback()

    def block(
        self,
        token_ids: Sequence[int],
        cache: KVCache,
        pool: Pool,
        index: int = EMPTY,
        *,
        carry: Carry | None = None,
        score: Sequence[bool] | None = None,
        learn: Sequence[bool] | None = None,
        draft: Draft | None = None,
        frozen: bool = False,
        frozen_cache: KVCache | None = None,
        top: int = 0,
    ) -> tuple[Carry, Scores | None]:
        """Runs one block of T tokens of a request and, given a `draft` of session `index`, learns from it.

        The target of position t is token t, predicted from position t − 1 (the carry, for t = 0; a request's first
        token has no predictor and is never a target). score [T] and learn [T] choose targets; the scores returned are
        of their union, in order. frozen: score without memory too; a memory that reads below the output then needs
        `frozen_cache`, a second cache that has seen the same request. Raises PoolFullError: roll the draft back.
        """
        ids = torch.tensor(token_ids, device=self.device)
        inputs: dict[int, Tensor] = {}
        final = self.backbone(ids[None], [cache], self.hooks(pool, index, inputs))[0]
        unread: Tensor | None = None
        if frozen and self.needs_frozen_cache:
            if frozen_cache is None:
                raise ValueError("frozen_cache is needed: this memory reads below the output")
            unread = self.backbone(ids[None], [frozen_cache])[0]
        first = 1 if carry is None else 0
        learned, wanted = (self._mask(mask, len(ids))[first:] for mask in (learn, score))
        wanted = wanted | learned
        scores: Scores | None = None
        trail = torch.cat([ids.new_full((max(RUNS),), -1) if carry is None else carry.trail, ids])
        trust = self._first_trust() if carry is None else carry.trust
        if bool(wanted.any()):
            targets = _Targets(
                ids[first:],
                torch_backend.fingerprints(trail[:-1])[first:],
                _shift(final, None if carry is None else carry.hidden),
                final[first:],
                {n: _shift(h, None if carry is None else carry.inputs[n]) for n, h in inputs.items()},
                {n: h[first:] for n, h in inputs.items()},
            )
            unread_states = None if unread is None else _shift(unread, None if carry is None else carry.frozen)[wanted]
            chosen = targets.pick(wanted)
            of_chosen = learned[wanted]
            scored = self._score(chosen, pool, index, trust, frozen=frozen, unread=unread_states, top=top)
            trust = scored.trust
            scores = Scores(scored.adapted, scored.frozen, of_chosen, scored.top)
            if draft is not None and bool(of_chosen.any()):
                self._write(draft, chosen.pick(of_chosen), scored, of_chosen)
        last_inputs = {n: h[-1] for n, h in inputs.items()}
        last = Carry(final[-1], trail[-max(RUNS) :], trust, last_inputs, None if unread is None else unread[-1])
        return last, scores

    def decode(
        self,
        token_ids: Sequence[int],
        caches: Sequence[KVCache],
        carries: Sequence[Carry],
        pool: Pool,
        index: Sequence[int],
    ) -> list[Carry]:
        """One step of B sequences, each with its own cache, carry and session; returns the new carry of each.

        Rows that follow one another in one sequence (caches and carries `ahead`) are, bit for bit, what they would be
        in steps of their own."""
        ids = torch.tensor(token_ids, device=self.device)[:, None]
        inputs: dict[int, Tensor] = {}
        final = self.decoder(ids, caches, self.hooks(pool, index, inputs))[:, 0]
        trails = torch.cat([torch.stack([carry.trail for carry in carries])[:, 1:], ids], dim=1)
        return [
            Carry(final[b], trails[b], carry.trust, {layer: x[b] for layer, x in inputs.items()})
            for b, carry in enumerate(carries)
        ]

    def predict(self, carries: Sequence[Carry], pool: Pool, index: Sequence[int]) -> Tensor:
        """Next-token scores [B, V] in fp32: the base's logits, bit for bit, where a session's memory is empty or
        silent, and log-probabilities of the mixture, up to a constant a row, elsewhere."""
        states = torch.stack([carry.hidden for carry in carries])
        if all(i == EMPTY for i in index):
            return self.decoder.logits(states)
        trails, trust = (torch.stack(part) for part in ([c.trail for c in carries], [c.trust for c in carries]))
        return self.mixture(states, trails, trust, pool, torch.tensor(index, device=self.device))

    # --- read ------------------------------------------------------------------------------------------------------

    def mixture(self, states: Tensor, trails: Tensor, trust: Tensor, pool: Pool, session: Tensor) -> Tensor:
        """`predict` [B, V] with the memory of sessions [B], from what carries hold: states [B, d], trails [B, 8] and
        trust [B, R + 1]. No shape depends on what is found, and nothing waits for the device."""
        logits = self.decoder.logits(self._read_output(states, pool, session))
        site = self.memory.lexical
        if site is None:
            return logits
        return site.mixture(pool, session, states, trails, logits, trust)

    def hooks(
        self, pool: Pool, index: int | Sequence[int] | Tensor, inputs: dict[int, Tensor]
    ) -> dict[int, Callable[[Tensor], Tensor]]:
        """The reads of sessions [1 or B] below the output, by layer; each notes its input [T or B, d] in `inputs`."""

        def hook(layer: int, site: HiddenSite) -> Callable[[Tensor], Tensor]:
            def read(hidden: Tensor) -> Tensor:
                flat = hidden.flatten(0, 1)
                inputs[layer] = flat
                session = torch.as_tensor(index, device=self.device).expand(len(flat))
                return site.read(pool, session, flat).view_as(hidden)

            return read

        return {layer: hook(layer, site) for layer, site in self.memory.hidden.items() if layer != OUTPUT}

    def _read_output(self, states: Tensor, pool: Pool, session: Tensor) -> Tensor:
        site = self.memory.hidden.get(OUTPUT)
        return states if site is None else site.read(pool, session, states)

    def _score(
        self,
        targets: _Targets,
        pool: Pool,
        index: int,
        trust: Tensor,
        *,
        frozen: bool,
        unread: Tensor | None,
        top: int,
    ) -> _Scored:
        session = torch.full((len(targets.ids),), index, device=self.device)
        base = torch_backend.predict(self.backbone.logits(self._read_output(targets.states, pool, session)))
        adapted = unmixed = base.log_prob(targets.ids)
        mixed, reading, site = base.logits, None, self.memory.lexical
        if site is not None and index != EMPTY:
            reading = site.read(pool, session, targets.states, targets.prints, base, trust.expand(len(session), -1))
            trust = site.next_trust(trust, reading, targets.ids, unmixed)
            in_memory = torch_backend.memory_prob(targets.ids, reading.tokens, reading.shares)
            adapted = torch_backend.target_log_prob(unmixed, in_memory, reading.gamma)
            mixed = torch_backend.mix(base, reading.tokens, reading.shares, reading.gamma) if top else mixed
        without: Tensor | None = None
        if frozen:
            differs = unread is not None or OUTPUT in self.memory.hidden
            states = targets.states if unread is None else unread
            without = torch_backend.predict(self.backbone.logits(states)).log_prob(targets.ids) if differs else unmixed
        best = mixed.log_softmax(-1).topk(top) if top else None
        alternatives = None if best is None else (best.values, best.indices)
        return _Scored(adapted, without, alternatives, base, unmixed, reading, trust)

    # --- write -----------------------------------------------------------------------------------------------------

    def _write(self, draft: Draft, targets: _Targets, scored: _Scored, mask: Tensor) -> None:
        """Learns the targets, those of `scored` that the mask [n] chooses."""
        if (lexical := self.memory.lexical) is not None and scored.reading is not None:
            lexical.learn(draft, scored.reading.pick(mask), targets.ids, scored.unmixed[mask])
        if self.memory.hidden:
            error = F.embedding(targets.ids, self.backbone.embedding).float()
            error = error - torch.softmax(scored.base.logits[mask], -1) @ self.backbone.embedding.float()
            adapted = scored.adapted[mask]
            for layer, site in self.memory.hidden.items():
                here = targets.states if layer == OUTPUT else targets.before[layer]
                following = targets.following if layer == OUTPUT else targets.after[layer]
                site.learn(draft, here, following, error, adapted)

    def _first_trust(self) -> Tensor:
        site = self.memory.lexical
        return torch.zeros(len(RUNS) + 1, device=self.device) if site is None else site.first_trust()

    def _mask(self, mask: Sequence[bool] | None, length: int) -> Tensor:
        if mask is None:
            return torch.zeros(length, dtype=torch.bool, device=self.device)
        return torch.tensor(mask, dtype=torch.bool, device=self.device)


def _shift(states: Tensor, previous: Tensor | None) -> Tensor:
    """The state before each target: [T, d] with the previous block's last one, or [T − 1, d] at a request's start."""
    return states[:-1] if previous is None else torch.cat([previous[None], states[:-1]])
