"""An initial memory is a function of its seed and its text; its keys tell states apart and its gate fits the text."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from model.backbone import Backbone
from model.config import tiny_config
from model.memory import Memory, MemoryConfig, Pool, SiteConfig, ops
from model.training.initial import (
    CAUTION,
    Stream,
    _fit_gate,
    default_config,
    fitted_memory,
    random_keys,
    random_memory,
    read_passage,
)

WIDTH, VOCAB = 16, 64
SITE = SiteConfig("words", "lexical", slots=256, k=4, pairs=4)
CONFIG = MemoryConfig(WIDTH, (SITE,), block=8)


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    base = Backbone(
        tiny_config(vocab_size=VOCAB, hidden_size=WIDTH, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=32)
    )
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2, generator=noise(0))
    return base


@pytest.fixture(scope="module")
def streams(backbone: Backbone) -> list[Stream]:
    """Two streams, each a passage that comes again, changed a little."""
    made = []
    for seed in range(2):
        ids = torch.randint(1, VOCAB, (30,), generator=noise(seed)).tolist()
        made.append([read_passage(backbone, ids, 0), read_passage(backbone, [*ids[:20], 3, 4], 0)])
    return made


def alike_states(n: int) -> Tensor:
    """Hidden states as a language model has them: far from zero, and varying in a few directions only."""
    scales = torch.logspace(0, -2, WIDTH)
    return 10.0 + torch.randn(n, WIDTH, generator=noise(1)) * scales


@dataclass(frozen=True)
class Found:
    """A stream's targets, their frozen log-probabilities, and what the memory knew about them before they came."""

    targets: Tensor
    frozen: Tensor
    candidates: ops.Candidates

    def loss(self, gate: Tensor) -> float:
        """Nats per token with this gate."""
        gamma = ops.mixing_weight(self.candidates, gate, torch.zeros(len(self.targets)))
        return -float(ops.target_log_prob(self.frozen, self.targets, self.candidates, gamma).mean())


def replay(memory: Memory, stream: Stream) -> Found:
    """Predicts a stream block by block, and learns each block after that."""
    site, block = memory.lexical, memory.config.block
    assert site is not None
    pool = Pool(memory.config, rows=600, sessions=2)
    draft, found = pool.draft(pool.open()), []
    for p in stream:
        parts = (x.split(block) for x in (p.states, p.targets, p.log_probs))
        for states, targets, frozen in zip(*parts, strict=True):
            found.append(site.find(pool, torch.full((len(targets),), draft.index), states)[0])
            site.learn(draft, states, targets, frozen, frozen)
    candidates = ops.Candidates(torch.cat([f.tokens for f in found]), torch.cat([f.scores for f in found]))
    return Found(torch.cat([p.targets for p in stream]), torch.cat([p.log_probs for p in stream]), candidates)


def test_a_passage_is_what_the_base_makes_of_it(backbone: Backbone) -> None:
    ids = [5, 6, 7, 5]
    passage = read_passage(backbone, ids, bos=2)
    states = backbone(torch.tensor([[2, 5, 6, 7]]))[0]
    assert passage.targets.tolist() == ids
    assert torch.equal(passage.states, states)
    log_probs = backbone.logits(states).log_softmax(-1)
    torch.testing.assert_close(passage.log_probs, log_probs[range(4), ids])


def test_the_default_memory_is_one_lexical_site_for_any_base() -> None:
    config = default_config(48)
    assert config.hidden_size == 48
    assert [site.kind for site in config.sites] == ["lexical"]


def test_keys_come_from_their_seed_alone() -> None:
    states = alike_states(200)
    for given in (None, states):
        weight, bias = random_keys(given, WIDTH, 8, seed=3)
        again = random_keys(given, WIDTH, 8, seed=3)
        assert (weight.shape, bias.shape) == ((WIDTH, 16), (16,))
        assert torch.equal(weight, again[0])
        assert torch.equal(bias, again[1])
        assert not torch.equal(weight, random_keys(given, WIDTH, 8, seed=4)[0])


def test_whitened_keys_score_the_mean_state_zero_and_spread_the_others() -> None:
    states = alike_states(400)
    weight, bias = random_keys(states, WIDTH, 16, seed=0)
    assert float((states.mean(0) @ weight + bias).abs().max()) < 1e-3
    slots = {}
    for name, given in (("plain", None), ("whitened", states)):
        site = random_memory(CONFIG, seed=0, states=given).lexical
        assert site is not None
        slots[name] = len(site.address(states)[0][:, 0].unique())
    assert slots["whitened"] > 4 * slots["plain"]


def test_directions_without_any_variance_are_not_blown_up() -> None:
    states = alike_states(100)
    states[:, 3] = 7.0
    weight, bias = random_keys(states, WIDTH, 8, seed=0)
    assert weight.isfinite().all()
    nudged = states.clone()
    nudged[:, 3] += 1e-4
    torch.testing.assert_close(nudged @ weight + bias, states @ weight + bias, atol=0.05, rtol=0)


def test_a_random_memory_is_frozen_and_ready_to_write() -> None:
    memory = random_memory(CONFIG, seed=0)
    site = memory.lexical
    assert site is not None
    assert not any(parameter.requires_grad for parameter in memory.parameters())
    assert (site.beta(torch.tensor([0.0, 5.0])) > 0.9).all()
    assert memory.fingerprint() == random_memory(CONFIG, seed=0).fingerprint()
    assert memory.fingerprint() != random_memory(CONFIG, seed=1).fingerprint()


def test_what_cannot_be_drawn_is_refused() -> None:
    hidden = SiteConfig("states", "hidden", slots=16, k=2, layer=0, width=3)
    for sites in ((), (hidden,), (SITE, hidden)):
        with pytest.raises(ValueError, match="exactly one site, of kind lexical"):
            random_memory(MemoryConfig(WIDTH, sites), seed=0)
    with pytest.raises(ValueError, match="at least 17 tokens of text are needed, got 16"):
        random_memory(CONFIG, seed=0, states=torch.randn(16, WIDTH))


def test_a_fitted_gate_serves_its_text_better_than_any_near_it(streams: list[Stream]) -> None:
    heard: list[int] = []
    memory = fitted_memory(CONFIG, streams, seed=0, progress=heard.append)
    assert heard == [1, 2]
    site = memory.lexical
    assert site is not None
    found = [replay(memory, stream) for stream in streams]

    def mean_loss(gate: Tensor) -> float:
        return sum(one.loss(gate) for one in found) / len(found)

    fitted = site.gate + torch.tensor([CAUTION, 0.0, 0.0])
    assert mean_loss(fitted) < mean_loss(torch.tensor([-1e9, 0.0, 0.0])) - 0.3
    for number in range(3):
        for step in (-0.3, 0.3):
            assert mean_loss(fitted + step * torch.eye(3)[number]) > mean_loss(fitted)


def test_a_fitted_memory_is_a_function_of_seed_and_streams(streams: list[Stream]) -> None:
    memory = fitted_memory(CONFIG, streams, seed=0)
    assert memory.fingerprint() == fitted_memory(CONFIG, streams, seed=0).fingerprint()
    assert memory.fingerprint() != fitted_memory(CONFIG, streams[:1], seed=0).fingerprint()
    assert not any(parameter.requires_grad for parameter in memory.parameters())


def test_every_stream_counts_alike_whatever_its_length() -> None:
    """A stream that only goes on as it began moves the gate no further."""
    total, rest = torch.randn(2, 20, 1, generator=noise(0)), torch.rand(2, 20, 2, generator=noise(1))
    first, second = torch.cat([total, rest, -rest.sum(-1, keepdim=True)], dim=-1)
    gate = _fit_gate([first, second])
    torch.testing.assert_close(_fit_gate([first.repeat(9, 1), second]), gate, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(_fit_gate([torch.cat([first.repeat(9, 1), second])]), gate, atol=1e-1)


def test_a_text_that_never_finds_anything_still_leaves_a_gate() -> None:
    nothing = torch.tensor([[-torch.inf, 0.0, 0.0, -2.0]]).expand(5, 4)
    assert _fit_gate([nothing]).isfinite().all()
