"""The end of a memory's training: its gate learns to believe what is really served.

Training weighs everything that a stream has written. Serving finds the rows of the nearest cells only, and those alone
agree more often than all would: the gate is fitted once more, to sessions that the served rule has read and written.
First without the trust of a request, which would only hide a gate that is too sure, then with it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.memory import LexicalReadout, LexicalSite, Memory, Pool
from model.memory.lexical import torch_backend
from model.memory.numerics import TINY
from model.memory.prediction import base_prediction
from research.training.features import BOS_PLACEHOLDER, StreamFeatures

REQUESTS = 6  # of a stream that are read in one session
FORGET = 0.5  # the chance that a session ends after them; else another stream follows
STEPS, BATCH, RATE = 2000, 4096, 2e-3


class GateExamples(NamedTuple):
    """Of n tokens: what the gate looks at [n, F], the request's trust in it [n], each head's p_mem of the target
    [n, H], and the base's log p [n]."""

    inputs: Tensor
    trust: Tensor
    heads: Tensor
    frozen: Tensor


def settle(
    memory: Memory,
    streams: Sequence[StreamFeatures],
    logits: Callable[[Tensor], Tensor],
    *,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> float:
    """Fits the gate of a memory's lexical site to the streams, read in sessions that change their subject.

    logits: final states [n, d] → [n, V] of the base. progress is told of each stream, in both rounds. Returns the mean
    loss (nats) less the frozen base's. Raises ValueError for a memory without a lexical site.
    """
    site = memory.lexical
    if site is None:
        raise ValueError("only a lexical site has a gate to settle")
    for with_trust in (False, True):
        with torch.no_grad():
            parts = list(_replay_as_served(memory, site, streams, logits, seed, progress, with_trust=with_trust))
        gain = _fit(site, GateExamples(*(torch.cat(each) for each in zip(*parts, strict=True))), seed)
    return gain


def _replay_as_served(
    memory: Memory,
    site: LexicalSite,
    streams: Sequence[StreamFeatures],
    logits: Callable[[Tensor], Tensor],
    seed: int,
    progress: Callable[[int], None],
    *,
    with_trust: bool,
) -> Iterator[GateExamples]:
    """Replays the streams block by block, without the session's trust and guards, and yields each block's evidence."""
    rng, device = random.Random(seed), site.key_weight.device
    pool = Pool(memory.config, rows=3 * site.config.slots, sessions=2, device=device)
    site_pool, session = pool.sites[site.config.name], pool.open()
    for stream in rng.sample(list(streams), len(streams)):
        first = rng.randrange(max(1, stream.requests - REQUESTS))
        for number in range(first, min(first + REQUESTS, stream.requests)):
            chunk, draft = stream.chunk(number, 1, device), pool.draft(session)
            ngram_hashes, trust = (
                torch_backend.hash_request_ngrams(chunk.targets, BOS_PLACEHOLDER),
                site.initial_trust() * with_trust,
            )
            parts = (part.split(memory.config.block) for part in (chunk.states, chunk.targets, ngram_hashes))
            for states, targets, context in zip(*parts, strict=True):
                base, at = (
                    base_prediction(logits(states)),
                    torch.full((len(targets),), draft.index, device=device),
                )
                keys, cells, num_empty_rows, found = site.find_candidates(pool, at, states, context, base)
                frozen, (logit, shares) = base.log_prob(targets), site.gate(found, base.entropy, keys)
                has_match, bias = shares.any(-1), trust[found.ngram_matches]
                gamma = torch.sigmoid(logit + bias) * has_match
                if has_match.any():
                    heads = (found.shares * (found.tokens == targets[:, None])[:, None]).sum(-1)
                    inputs = torch_backend.gate_inputs(found, base.entropy, keys)
                    yield GateExamples(inputs[has_match], bias[has_match], heads[has_match], frozen[has_match])
                readout = LexicalReadout(
                    context, keys, cells, num_empty_rows, found.ngram_matches, found.tokens, shares, gamma, gamma
                )
                trust = site.updated_trust(trust, readout, targets, frozen) * with_trust
                site.learn(draft, readout, targets, frozen)
            draft.commit()
            site_pool.session_scalars[session] = 0.0
        if rng.random() < FORGET:
            pool.close(session)
            session = pool.open()
        progress(1)


@torch.enable_grad()
def _fit(site: LexicalSite, evidence: GateExamples, seed: int) -> float:
    weights = [site.gate_in, site.gate_in_bias, site.gate_out, site.gate_out_bias]
    required = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.Adam(weights, lr=RATE)
    generator, n = torch.Generator().manual_seed(seed), len(evidence.frozen)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        picked = torch.randint(n, (BATCH,), generator=generator).to(evidence.frozen.device)
        optimizer.zero_grad()
        _loss(site, GateExamples(*(part[picked] for part in evidence))).backward()
        optimizer.step()
    for weight, was in zip(weights, required, strict=True):
        weight.requires_grad_(was)
    with torch.no_grad():
        return float(_loss(site, evidence) + evidence.frozen.mean())


def _loss(site: LexicalSite, evidence: GateExamples) -> Tensor:
    logit, heads = torch_backend.gate_logits(evidence.inputs, site.gate_weights)
    gamma = torch.sigmoid(logit + evidence.trust)
    p = (1 - gamma) * evidence.frozen.exp() + gamma * (heads * evidence.heads).sum(-1)
    return -(p + TINY).log().mean()
