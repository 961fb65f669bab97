"""Training of the lexical site: its loss is the loss of the served site, and every trained number has a gradient."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.memory import Memory, MemoryConfig, Pool, SiteConfig, choose_backend
from model.memory.initial import random_memory
from model.memory.lexical import ops
from model.memory.prediction import base_prediction
from research.training import features, gate_calibration
from research.training.features import BOS_PLACEHOLDER, Chunk, StreamFeatures
from research.training.lexical import LexicalObjective

VOCAB, WIDTH, BLOCK = 40, 96, 8
# Every read sees every cell, and no cell forgets, so the site equals the limit that training assumes.
SITE = SiteConfig("words", "lexical", slots=4 * 256, k=4, width=64, cell=256)
CONFIG = MemoryConfig(WIDTH, (SITE,), block=BLOCK)
LENGTHS = [20, 8, 5, 17]
ROUNDING = 5e-3  # nats per token; the site stores keys in eight bits


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_memory() -> Memory:
    """Return a memory without zero weights and without trust."""
    memory = random_memory(CONFIG, seed=0)
    site = memory.lexical
    assert site is not None
    with torch.no_grad():
        site.key_bias.normal_(0.0, 0.02, generator=noise(1))
        site.gate_in_bias.normal_(0.0, 0.3, generator=noise(2))
        site.gate_out.normal_(0.0, 0.5, generator=noise(3))
        site.gate_out_bias[0] = 0.0
        site.prior.copy_(torch.tensor([0.2, 0.7]))
        for trust in (site.trust_rate, site.request_trust, site.request_trust_rate):
            trust.zero_()
    return memory


def head() -> Tensor:
    return 0.3 * torch.randn(VOCAB, WIDTH, generator=noise(4))


def stream(lengths: list[int] = LENGTHS) -> Chunk:
    """Return requests whose contexts recur with noise, mostly with the same target."""
    n, g = sum(lengths), noise(5)
    kinds = torch.randint(0, 6, (n,), generator=g)
    states = torch.randn(6, WIDTH, generator=g)[kinds] + 0.3 * torch.randn(n, WIDTH, generator=g)
    targets = torch.where(torch.rand(n, generator=g) < 0.8, kinds, torch.randint(0, VOCAB, (n,), generator=g))
    base = base_prediction(states @ head().T)
    return Chunk(states, targets, base.log_prob(targets), base.entropy, lengths)


def requests(chunk: Chunk) -> list[Chunk]:
    edges = itertools.pairwise(itertools.accumulate(chunk.lengths, initial=0))
    return [
        Chunk(chunk.states[a:b], chunk.targets[a:b], chunk.log_probs[a:b], chunk.entropy[a:b], [b - a])
        for a, b in edges
    ]


@torch.no_grad()
def served(memory: Memory, chunk: Chunk) -> Tensor:
    """Return −log p [n] of a stream that the site itself reads and writes, with an open guard."""
    site, found = memory.lexical, []
    assert site is not None
    pool = Pool(memory.config, rows=2 * SITE.slots, sessions=2, backend=choose_backend(torch.device("cpu")))
    draft = pool.draft(pool.open())
    for request in requests(chunk):
        ngram_hashes = ops.hash_request_ngrams(request.targets, BOS_PLACEHOLDER)
        parts = (part.split(BLOCK) for part in (request.states, request.targets, ngram_hashes))
        for states, targets, context in zip(*parts, strict=True):
            base = base_prediction(states @ head().T)
            trust = site.initial_trust().expand(len(targets), -1)
            readout = site.read(pool, torch.full((len(targets),), draft.index), states, context, base, trust)
            memory_probs = ops.memory_prob(targets, readout.tokens, readout.shares)
            found.append(-ops.target_log_prob(base.log_prob(targets), memory_probs, readout.unguarded_gamma))
            site.learn(draft, readout, targets, base.log_prob(targets))
    return torch.cat(found)


@torch.no_grad()
def test_the_loss_is_that_of_the_stream_read_and_written_by_the_site_itself() -> None:
    memory, chunk = some_memory(), stream()
    expected, n = served(memory, chunk), len(chunk.targets)
    assert float((expected + chunk.log_probs).abs().mean()) > 0.2, "the memory says something"
    objective = LexicalObjective(memory, head())
    loss, count, _ = objective.step(objective.start(), chunk)
    assert count == n
    assert float(loss) / n == pytest.approx(float(expected.mean()), abs=ROUNDING)
    state, start = objective.start(), 0
    for request in requests(chunk):
        loss, count, state = objective.step(state, request)
        part = expected[start : start + count]
        assert float(loss) / count == pytest.approx(float(part.mean()), abs=ROUNDING), "request by request"
        start += count


@torch.no_grad()
def test_a_token_is_visible_only_after_its_block_is_written() -> None:
    """Check that the first block has the loss of the base, and that a later request sees all requests before it."""
    chunk = stream([BLOCK, BLOCK])
    objective = LexicalObjective(some_memory(), head())
    first, second = requests(chunk)
    alone, _, state = objective.step(objective.start(), first)
    assert float(alone) == pytest.approx(-float(first.log_probs.sum()), abs=1e-3)
    informed, _, _ = objective.step(state, second)
    assert abs(float(informed) + float(second.log_probs.sum())) > 0.1
    other = replace(second, targets=(second.targets + 1) % VOCAB)
    _, _, same = objective.step(state, other)
    assert torch.equal(same.tokens[:BLOCK], state.tokens)
    assert torch.equal(same.keys[:BLOCK], state.keys)


def test_a_state_carries_the_past_and_once_detached_no_gradient() -> None:
    memory = some_memory()
    objective, parts = LexicalObjective(memory, head()), requests(stream())
    _, _, state = objective.step(objective.start(), parts[0])
    assert state.keys.requires_grad
    detached = objective.detach(state)
    assert not detached.keys.requires_grad
    assert torch.equal(detached.keys, state.keys)
    assert detached.tokens.tolist() == parts[0].targets.tolist()
    losses = [objective.step(past, parts[1])[0] for past in (state, detached, objective.start())]
    assert losses[0].item() == losses[1].item() != losses[2].item()
    site = memory.lexical
    assert site is not None
    through, stopped = (torch.autograd.grad(loss, site.key_weight)[0] for loss in losses[:2])
    assert stopped.any()
    assert not torch.allclose(through, stopped)


def test_gradients_reach_every_number_that_is_trained_and_no_other() -> None:
    memory = some_memory()
    objective = LexicalObjective(memory, head())
    loss, _, _ = objective.step(objective.start(), stream())
    loss.backward()
    named = dict(memory.named_parameters())
    trained = [p for group in objective.groups() for p in group["params"]]
    untrained = {name for name, p in named.items() if not any(p is q for q in trained)}
    trust = {f"sites.words.{name}" for name in ("trust_rate", "request_trust", "request_trust_rate")}
    assert untrained == {"sites.words.centres", *trust}
    assert len(trained) == len(named) - 4, "each once"
    for name, p in named.items():
        if name in untrained:
            assert p.grad is None
        else:
            assert p.grad is not None
            assert p.grad.isfinite().all(), name
            assert p.grad.any(), name


def test_a_sample_of_the_targets_estimates_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "QUERIES", 16)
    objective, chunk = LexicalObjective(some_memory(), head()), stream()
    with torch.no_grad():
        whole = float(objective.step(objective.start(), chunk)[0])
    torch.manual_seed(0)
    samples = torch.tensor([objective.step(objective.start(), chunk)[0].item() for _ in range(100)])
    assert samples.std() > 0
    assert float(samples.mean()) == pytest.approx(whole, abs=4 * float(samples.std()) / 10)


def test_a_few_steps_lower_the_loss_of_the_site_itself() -> None:
    memory, chunk = some_memory(), stream()
    before = served(memory, chunk)
    objective = LexicalObjective(memory, head())
    optimizer = torch.optim.AdamW(
        [{"params": g["params"], "lr": 3e-3 * g["factor"], "weight_decay": 0.0} for g in objective.groups()]
    )
    for _ in range(20):
        optimizer.zero_grad()
        objective.step(objective.start(), chunk)[0].backward()
        optimizer.step()
    assert float(served(memory, chunk).mean()) < float(before.mean()) - 0.1


def test_only_a_memory_of_one_lexical_site_is_trained() -> None:
    hidden = SiteConfig("states", "hidden", slots=16, k=2, layer=0, width=3)
    for sites in ((), (hidden,), (SITE, hidden)):
        with pytest.raises(ValueError, match="exactly one lexical site"):
            LexicalObjective(Memory(MemoryConfig(WIDTH, sites)), head())


def test_calibration_fits_only_the_gate_to_what_is_served(tmp_path: Path) -> None:
    chunk, memory = stream([30] * 12), some_memory()
    offsets = np.cumsum([0, *chunk.lengths])
    names = {"states": chunk.states.half(), "log_probs": chunk.log_probs, "entropy": chunk.entropy}
    arrays = {name: tensor.numpy() for name, tensor in names.items()}
    for name, array in {**arrays, "targets": chunk.targets.int().numpy(), "offsets": offsets}.items():
        np.save(tmp_path / f"{name}.npy", array)
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    worse = served(memory, chunk).mean()
    reported: list[int] = []
    streams = [StreamFeatures(tmp_path)] * 3
    gate_calibration.calibrate_gate(memory, streams, head(), seed=0, steps=100, progress=reported.append)
    assert sum(reported) == 2 * 3, "two rounds"
    assert served(memory, chunk).mean() < worse - 0.01
    changed = {name.split(".")[-1] for name, tensor in memory.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {"gate_in", "gate_in_bias", "gate_out", "gate_out_bias"}
    assert not any(parameter.requires_grad for parameter in memory.parameters())
