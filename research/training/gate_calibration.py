"""The calibration of a trained memory's gate on sessions as they are served.

Training scores all pairs that a stream has written. Serving finds only the rows of the nearest cells, which agree with
the target more often than all pairs. The gate is therefore fitted once more, to sessions that the served rule has read
and written: first without the trust of a request, which would hide an overconfident gate, then with the trust.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.memory import Draft, LexicalReadout, LexicalSite, Memory, Pool, choose_backend
from model.memory.lexical import ops
from model.memory.numerics import TINY
from model.memory.prediction import Prediction
from research.training.features import BOS_PLACEHOLDER, Chunk, StreamFeatures

REQUESTS = 6  # of a stream that are read in one session
FORGET = 0.5  # probability that a session ends after a stream; else another stream follows
STEPS, BATCH, RATE = 2000, 4096, 2e-3


class GateExamples(NamedTuple):
    """The examples of n tokens that the gate is fitted to.

    inputs [n, F]: inputs of the gate
    trust [n]: trust of the request
    heads [n, H]: probability of the target under each head of the memory
    frozen [n]: log p of the target under the base, in nats
    """

    inputs: Tensor
    trust: Tensor
    heads: Tensor
    frozen: Tensor


class StreamVocabulary:
    """The tokens of streams, numbered anew: rows hold no other tokens, so the base's other logits are not needed."""

    def __init__(self, streams: Sequence[StreamFeatures], head: Tensor) -> None:
        """head: [V, d] of the base"""
        targets = [stream.chunk(0, stream.requests).targets for stream in streams]
        self._tokens = torch.unique(torch.cat(targets))
        self._head = head[self._tokens.to(head.device)].float()

    def numbers(self, tokens: Tensor) -> Tensor:
        """Return the numbers [n] of tokens [n] of the streams."""
        return torch.searchsorted(self._tokens.to(tokens.device), tokens)

    def predict(self, states: Tensor, numbers: Tensor, log_probs: Tensor, entropy: Tensor) -> Prediction:
        """Return the base's prediction over the vocabulary from features of the targets `numbers` [n]."""
        logits = states @ self._head.T
        return Prediction(logits, logits.gather(1, numbers[:, None])[:, 0] - log_probs, entropy)


def calibrate_gate(
    memory: Memory,
    streams: Sequence[StreamFeatures],
    head: Tensor,
    *,
    seed: int,
    steps: int = STEPS,
    progress: Callable[[int], None] = lambda _: None,
) -> float:
    """Fit the gate of the lexical site to streams that are read in sessions of changing subjects.

    head: [V, d] of the base
    steps: of the optimiser in each of the two rounds
    progress: called once for each stream in each round
    Returns the mean loss minus the frozen base's, in nats per token. Raises ValueError for a memory without a lexical
    site.
    """
    site = memory.lexical
    if site is None:
        raise ValueError("only a memory with a lexical site has a gate to calibrate")
    vocabulary = StreamVocabulary(streams, head)
    for with_trust in (False, True):
        with torch.no_grad():
            parts = list(_replay_as_served(memory, site, streams, vocabulary, seed, progress, with_trust=with_trust))
        gain = _fit(site, GateExamples(*(torch.cat(column) for column in zip(*parts, strict=True))), seed, steps)
    return gain


def _replay_as_served(
    memory: Memory,
    site: LexicalSite,
    streams: Sequence[StreamFeatures],
    vocabulary: StreamVocabulary,
    seed: int,
    progress: Callable[[int], None],
    *,
    with_trust: bool,
) -> Iterator[GateExamples]:
    """Yield the examples of each block of the streams, replayed without the trust and the guards of a session."""
    rng, device = random.Random(seed), site.key_weight.device
    pool = Pool(memory.config, rows=3 * site.config.slots, sessions=2, device=device, backend=choose_backend(device))
    session = pool.open()
    for stream in rng.sample(list(streams), len(streams)):
        first = rng.randrange(max(1, stream.requests - REQUESTS))
        for number in range(first, min(first + REQUESTS, stream.requests)):
            chunk, draft = stream.chunk(number, 1, device), pool.draft(session)
            yield from _replay_request(site, pool, draft, chunk, vocabulary, memory.config.block, with_trust=with_trust)
            draft.commit()
            pool.sites[site.config.name].session_scalars[session] = 0.0
        if rng.random() < FORGET:
            pool.close(session)
            session = pool.open()
        progress(1)


def _replay_request(
    site: LexicalSite,
    pool: Pool,
    draft: Draft,
    chunk: Chunk,
    vocabulary: StreamVocabulary,
    block: int,
    *,
    with_trust: bool,
) -> Iterator[GateExamples]:
    """Yield the examples of each block of one request, and write the block to the draft."""
    device = chunk.targets.device
    ngram_hashes = ops.hash_request_ngrams(chunk.targets, BOS_PLACEHOLDER)
    trust = site.initial_trust() * with_trust
    parts = (chunk.states, vocabulary.numbers(chunk.targets), chunk.log_probs, chunk.entropy, ngram_hashes)
    for states, targets, frozen, entropy, context in zip(*(part.split(block) for part in parts), strict=True):
        base = vocabulary.predict(states, targets, frozen, entropy)
        session_of = torch.full((len(targets),), draft.index, device=device)
        keys, cells, num_empty_rows, found = site.find_candidates(pool, session_of, states, context, base)
        logit, shares = site.gate(found, entropy, keys)
        has_match, bias = shares.any(-1), trust[found.ngram_matches]
        gamma = torch.sigmoid(logit + bias) * has_match
        if has_match.any():
            heads = (found.shares * (found.tokens == targets[:, None])[:, None]).sum(-1)
            inputs = ops.gate_inputs(found, entropy, keys)
            yield GateExamples(inputs[has_match], bias[has_match], heads[has_match], frozen[has_match])
        readout = LexicalReadout(
            context, keys, cells, num_empty_rows, found.ngram_matches, found.tokens, shares, gamma, gamma
        )
        trust = site.updated_trust(trust, readout, targets, frozen) * with_trust
        site.learn(draft, readout, targets, frozen)


@torch.enable_grad()
def _fit(site: LexicalSite, examples: GateExamples, seed: int, steps: int) -> float:
    """Fit the gate by Adam, and return the mean loss minus the frozen base's, in nats per token."""
    weights = [site.gate_in, site.gate_in_bias, site.gate_out, site.gate_out_bias]
    required = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.Adam(weights, lr=RATE)
    generator, n = torch.Generator().manual_seed(seed), len(examples.frozen)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        sampled = torch.randint(n, (BATCH,), generator=generator).to(examples.frozen.device)
        optimizer.zero_grad()
        _loss(site, GateExamples(*(part[sampled] for part in examples))).backward()
        optimizer.step()
    for weight, requires_grad in zip(weights, required, strict=True):
        weight.requires_grad_(requires_grad)
    with torch.no_grad():
        return float(_loss(site, examples) + examples.frozen.mean())


def _loss(site: LexicalSite, examples: GateExamples) -> Tensor:
    """Return the mean −log p of the served mixture on the examples."""
    logit, heads = ops.gate_logits(examples.inputs, site.gate_weights)
    gamma = torch.sigmoid(logit + examples.trust)
    p = (1 - gamma) * examples.frozen.exp() + gamma * (heads * examples.heads).sum(-1)
    return -(p + TINY).log().mean()
