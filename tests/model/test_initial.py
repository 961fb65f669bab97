"""The memory before training: a function of its seed and text, with distinct keys and evenly used cells."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.memory import LexicalSite, MemoryConfig, Pool, SiteConfig, choose_backend, initial
from model.memory.initial import (
    default_config,
    discriminant_projection,
    fit_centres,
    fitted_memory,
    random_memory,
    random_projection,
)
from model.memory.lexical import ops
from model.memory.prediction import base_prediction

WIDTH = 16
SITE = SiteConfig("words", "lexical", slots=32 * 4, k=4, width=8, cell=4)
CONFIG = MemoryConfig(WIDTH, (SITE,), block=8)


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def similar_states(n: int, seed: int = 1) -> Tensor:
    """Return hidden states like those of a language model: far from zero, with variance in a few directions only."""
    scales = torch.logspace(0, -2, WIDTH)
    return 10.0 + torch.randn(n, WIDTH, generator=noise(seed)) * scales


def lexical_site(states: Tensor | None, seed: int = 0) -> LexicalSite:
    site = random_memory(CONFIG, seed=seed, states=states).lexical
    assert site is not None
    return site


def spread(site: LexicalSite, states: Tensor) -> float:
    """Return the effective number of cells that the states use: exp of the entropy of their nearest cells."""
    share = torch.bincount(site.address(site.keys(states))[:, 0], minlength=SITE.cells) / len(states)
    return float(torch.special.entr(share).sum().exp())


def test_the_default_memory_is_one_lexical_site_for_any_base() -> None:
    for hidden_size in (2, 48, 576):
        config = default_config(hidden_size)
        assert config.hidden_size == hidden_size
        assert [site.kind for site in config.sites] == ["lexical"]
        assert config.sites[0].width <= hidden_size


# Keys.


def test_a_projection_comes_from_its_seed_alone() -> None:
    states = similar_states(200)
    for given in (None, states):
        weight, bias = random_projection(given, WIDTH, 8, noise(3))
        again = random_projection(given, WIDTH, 8, noise(3))
        assert (weight.shape, bias.shape) == ((WIDTH, 8), (8,))
        assert torch.equal(weight, again[0])
        assert torch.equal(bias, again[1])
        assert not torch.equal(weight, random_projection(given, WIDTH, 8, noise(4))[0])


def test_without_a_text_a_projection_keeps_lengths() -> None:
    weight, bias = random_projection(None, WIDTH, 8, noise(0))
    torch.testing.assert_close(weight.T @ weight, torch.eye(8))
    assert not bias.any()


def test_whitened_keys_separate_similar_states() -> None:
    states = similar_states(400)
    weight, bias = random_projection(states, WIDTH, 8, noise(0))
    assert float((states.mean(0) @ weight + bias).abs().max()) < 1e-3, "the mean state has no direction"
    cosines = {}
    for name, given in (("plain", None), ("whitened", states)):
        keys = lexical_site(given).keys(states)
        torch.testing.assert_close(keys.norm(dim=-1), torch.ones(400))
        cosines[name] = float((keys @ keys.T).mean())
    assert cosines["plain"] > 0.9
    assert abs(cosines["whitened"]) < 0.1


def test_directions_without_variance_are_not_amplified() -> None:
    states = similar_states(100)
    states[:, 3] = 7.0
    weight, bias = random_projection(states, WIDTH, 8, noise(0))
    assert weight.isfinite().all()
    nudged = states.clone()
    nudged[:, 3] += 1e-4
    torch.testing.assert_close(nudged @ weight + bias, states @ weight + bias, atol=0.05, rtol=0)


# Cells.


def test_centres_lie_on_the_unit_sphere_and_are_used_evenly() -> None:
    """Held-out states use more cells than with random centres."""
    states = torch.cat([similar_states(600), similar_states(600) + torch.randn(WIDTH, generator=noise(2))])
    site, held_out = lexical_site(states[::2]), states[1::2]
    torch.testing.assert_close(site.centres.norm(dim=-1), torch.ones(SITE.cells))
    fitted = spread(site, held_out)
    random = []
    for seed in range(5):
        site.centres.data = F.normalize(torch.randn(SITE.cells, SITE.width, generator=noise(seed)), dim=-1)
        random.append(spread(site, held_out))
    assert fitted > max(random)
    assert fitted > 0.7 * SITE.cells


def test_each_step_brings_centres_nearer_to_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    states, near = similar_states(600), []
    for steps in (0, 1, 2, 10):
        monkeypatch.setattr(initial, "KMEANS_STEPS", steps)
        site = lexical_site(states)
        near.append(float((site.keys(states) @ site.centres.T).amax(1).mean()))
    assert near == sorted(near)
    assert near[-1] > near[0] + 0.02


@pytest.mark.parametrize("states", [1, SITE.cells - 1, SITE.cells])
def test_fewer_states_than_cells_still_leave_centres(states: int) -> None:
    site = lexical_site(None)
    few_states = torch.randn(states, WIDTH, generator=noise(1))
    fit_centres(site, few_states, noise(0))
    torch.testing.assert_close(site.centres.norm(dim=-1), torch.ones(SITE.cells))
    keys = site.keys(few_states)
    torch.testing.assert_close((keys @ site.centres.T).amax(1), torch.ones(states))


# The whole memory.


def test_a_random_memory_is_frozen_and_a_function_of_its_seed_and_states() -> None:
    memory = random_memory(CONFIG, seed=0)
    assert not any(parameter.requires_grad for parameter in memory.parameters())
    assert memory.fingerprint() == random_memory(CONFIG, seed=0).fingerprint()
    fingerprints = {memory.fingerprint(), random_memory(CONFIG, seed=1).fingerprint()}
    for seed in (1, 2):
        states = similar_states(99, seed)
        fingerprints.add(random_memory(CONFIG, seed=0, states=states).fingerprint())
        again = random_memory(CONFIG, seed=0, states=states.clone())
        assert again.fingerprint() in fingerprints
    assert len(fingerprints) == 4


@torch.no_grad()
def test_a_random_memory_finds_its_rows_and_gives_them_a_small_weight() -> None:
    states, targets = similar_states(99), torch.arange(20)
    site = lexical_site(states)
    pool = Pool(CONFIG, rows=200, sessions=2, backend=choose_backend(torch.device("cpu")))
    draft = pool.draft(pool.open())
    session, base = torch.full((20,), draft.index), base_prediction(torch.zeros(20, 30))
    ngram_hashes = ops.hash_request_ngrams(targets, 29)
    for known in (False, True):
        readout = site.read(pool, session, states[:20], ngram_hashes, base, site.initial_trust().expand(20, -1))
        memory_probs = ops.memory_prob(targets, readout.tokens, readout.shares)
        assert bool((memory_probs > 2 / 30).all()) == known
        assert bool((readout.gamma > 0.05).all()) == known
        assert float(readout.gamma.max()) < 0.3
        site.learn(draft, readout, targets, base.log_prob(targets))


def test_other_configurations_and_too_few_states_are_refused() -> None:
    hidden = SiteConfig("states", "hidden", slots=16, k=2, layer=0, width=3)
    for sites in ((), (hidden,), (SITE, hidden)):
        with pytest.raises(ValueError, match="exactly one site, of kind lexical"):
            random_memory(MemoryConfig(WIDTH, sites), seed=0)
    with pytest.raises(ValueError, match="at least 17 tokens of text are needed, got 16"):
        random_memory(CONFIG, seed=0, states=torch.randn(16, WIDTH))


# Keys that are fitted to a text.


def labelled_states(n: int, classes: int = 6) -> tuple[Tensor, Tensor]:
    """Return states whose target decides two directions of little variance, among louder ones that mean nothing."""
    targets = torch.randint(classes, (n,), generator=noise(5))
    angle = targets * (2 * torch.pi / classes)
    states = 10.0 + torch.randn(n, WIDTH, generator=noise(6)) * torch.logspace(0, -1, WIDTH)
    states[:, -2:] = 0.3 * torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(n, 2, generator=noise(7))
    return states, targets


def same_target_first(keys: Tensor, targets: Tensor) -> float:
    """Return how often the nearest other key has the same target."""
    similar = F.normalize(keys, dim=1) @ F.normalize(keys, dim=1).T - 2 * torch.eye(len(keys))
    return float((targets[similar.argmax(1)] == targets).double().mean())


def test_discriminant_keys_find_contexts_of_the_same_next_token() -> None:
    states, targets = labelled_states(600)
    unseen, wanted = (part[400:] for part in (states, targets))
    weight, bias = discriminant_projection(states[:400], targets[:400], 2)
    assert same_target_first(unseen @ weight + bias, wanted) > 0.9
    weight, bias = random_projection(states[:400], WIDTH, 2, noise(0))
    assert same_target_first(unseen @ weight + bias, wanted) < 0.5
    with pytest.raises(ValueError, match="at least 8 repeated tokens is needed, got 0"):
        discriminant_projection(states[:50], torch.arange(50), 8)


def test_a_fitted_memory_takes_the_gate_of_another_base_but_not_what_the_gate_reads_of_keys() -> None:
    states, targets = labelled_states(600)
    trained = random_memory(MemoryConfig(WIDTH + 4, (SITE,), block=8), seed=1)
    fitted = fitted_memory(CONFIG, states, targets, trained, seed=0)
    assert fitted.lexical is not None and trained.lexical is not None
    shared = len(trained.lexical.gate_in) - SITE.width
    assert torch.equal(fitted.lexical.gate_in[:shared], trained.lexical.gate_in[:shared])
    assert not fitted.lexical.gate_in[shared:].any()
    assert torch.equal(fitted.lexical.gate_out, trained.lexical.gate_out)
    assert fitted.fingerprint() == fitted_memory(CONFIG, states, targets, trained, seed=0).fingerprint()
    assert not any(parameter.requires_grad for parameter in fitted.parameters())
