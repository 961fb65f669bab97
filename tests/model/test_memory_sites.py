"""The memory's slow weights: checkpoints load bit for bit or are refused by name; configurations; the lexical site."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from model.memory import (
    Draft,
    LexicalReadout,
    LexicalSite,
    Memory,
    MemoryConfig,
    MemoryConfigError,
    Pool,
    SiteConfig,
    choose_backend,
    load_memory,
    save_memory,
)
from model.memory.config import BALANCE, GATE_CLOSED, TRUST
from model.memory.lexical import ops
from model.memory.lexical.types import NGRAM_SIZES
from model.memory.prediction import base_prediction

LEXICAL = SiteConfig("words", "lexical", slots=15, k=2, width=4, cell=3, surprise=0.1)
DELTA = SiteConfig("states", "hidden", slots=9, k=3, layer=1, width=5, decay=1.0, cap=10.0)
CONFIG = MemoryConfig(hidden_size=6, sites=(LEXICAL, DELTA), block=8)


def random_memory(config: MemoryConfig = CONFIG) -> Memory:
    memory = Memory(config)
    generator = torch.Generator().manual_seed(0)
    for tensor in memory.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return memory


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "memory.safetensors"
    save_memory(random_memory(), path)
    return path


def resave(path: Path, *, without: str | None = None, **metadata: Any) -> None:
    """Write the file again without a tensor, or with other metadata."""
    tensors = {name: tensor for name, tensor in random_memory().state_dict().items() if name != without}
    save_file(tensors, path, metadata={"format": "3", "memory": json.dumps(CONFIG.to_dict())} | metadata)


# Save and load.


def test_a_memory_loads_as_the_same_bits_and_the_same_fingerprint(saved: Path) -> None:
    memory, again = random_memory(), load_memory(saved, hidden_size=6)
    assert again.config == memory.config
    assert again.fingerprint() == memory.fingerprint()
    tensors = again.state_dict()
    assert tensors.keys() == memory.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in memory.state_dict().items())
    assert not any(parameter.requires_grad for parameter in again.parameters()), "slow weights are frozen"


def test_sites_are_found_by_their_kind() -> None:
    memory = random_memory(replace(CONFIG, sites=(DELTA, LEXICAL, replace(DELTA, name="output", layer=-1))))
    assert memory.lexical is memory.sites["words"]
    assert memory.delta == {1: memory.sites["states"], -1: memory.sites["output"]}
    assert Memory(replace(CONFIG, sites=(DELTA,))).lexical is None


def test_any_changed_number_changes_the_fingerprint() -> None:
    seen = {random_memory().fingerprint()}
    for name in random_memory().state_dict():
        memory = random_memory()
        number = memory.state_dict()[name].view(-1)[-1:]
        number.copy_(torch.nextafter(number, torch.tensor(torch.inf)))
        seen.add(memory.fingerprint())
    assert len(seen) == 1 + len(random_memory().state_dict())


@pytest.mark.parametrize(
    "changed",
    [
        replace(CONFIG, block=9),
        replace(CONFIG, sites=(DELTA, LEXICAL)),
        replace(CONFIG, sites=(replace(LEXICAL, k=1), DELTA)),
        replace(CONFIG, sites=(replace(LEXICAL, width=5), DELTA)),
        replace(CONFIG, sites=(replace(LEXICAL, cell=5), DELTA)),
        replace(CONFIG, sites=(replace(LEXICAL, surprise=0.2), DELTA)),
        replace(CONFIG, sites=(LEXICAL, replace(DELTA, decay=0.5))),
        replace(CONFIG, sites=(LEXICAL, replace(DELTA, cap=5.0))),
        replace(CONFIG, sites=(replace(LEXICAL, name="other"), DELTA)),
        replace(CONFIG, sites=(LEXICAL, replace(DELTA, layer=0))),
    ],
)
def test_any_changed_setting_changes_the_fingerprint(changed: MemoryConfig) -> None:
    assert Memory(changed).fingerprint() != Memory(CONFIG).fingerprint()


# Refused checkpoints.


def test_a_memory_for_another_base_is_refused(saved: Path) -> None:
    with pytest.raises(MemoryConfigError, match=r"memory\.safetensors .*hidden size 6, this base has 7"):
        load_memory(saved, hidden_size=7)


def test_a_missing_tensor_is_named(saved: Path) -> None:
    resave(saved, without="sites.words.gate_in")
    with pytest.raises(MemoryConfigError, match=r"(?s)memory\.safetensors .*sites\.words\.gate_in"):
        load_memory(saved, hidden_size=6)


def test_a_tensor_of_another_shape_is_named(saved: Path) -> None:
    config = replace(CONFIG, sites=(LEXICAL, replace(DELTA, width=4)))
    resave(saved, memory=json.dumps(config.to_dict()))
    with pytest.raises(MemoryConfigError, match=r"sites\.states\.out"):
        load_memory(saved, hidden_size=6)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_a_file_of_another_kind_is_refused(content: bytes, saved: Path) -> None:
    saved.write_bytes(content)
    with pytest.raises(MemoryConfigError, match=r"cannot read the memory checkpoint memory\.safetensors"):
        load_memory(saved, hidden_size=6)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MemoryConfigError, match=r"cannot read the memory checkpoint gone\.safetensors"):
        load_memory(tmp_path / "gone.safetensors", hidden_size=6)


def test_another_format_is_refused(saved: Path) -> None:
    resave(saved, format="1")
    with pytest.raises(MemoryConfigError, match=r"memory\.safetensors: format must be 3, got '1'"):
        load_memory(saved, hidden_size=6)
    save_file({"x": torch.zeros(1)}, saved)
    with pytest.raises(MemoryConfigError, match="format must be 3, got None"):
        load_memory(saved, hidden_size=6)


@pytest.mark.parametrize(
    "memory",
    [
        "not JSON",
        "3",
        "{}",
        '{"sites": null}',
        '{"hidden_size": 6}',
        '{"hidden_size": 6, "sites": [3]}',
        '{"hidden_size": 6, "sites": [{"name": 3, "kind": "lexical", "slots": 4, "k": 1, "width": 2}]}',
    ],
)
def test_a_configuration_that_is_none_is_refused(memory: str, saved: Path) -> None:
    resave(saved, memory=memory)
    with pytest.raises(MemoryConfigError, match=r"memory\.safetensors: not a memory configuration"):
        load_memory(saved, hidden_size=6)


def test_a_file_without_a_configuration_is_refused(saved: Path) -> None:
    save_file(random_memory().state_dict(), saved, metadata={"format": "3"})
    with pytest.raises(MemoryConfigError, match="not a memory configuration"):
        load_memory(saved, hidden_size=6)


# Configurations.


def test_a_configuration_is_read_back_from_json() -> None:
    assert MemoryConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


@pytest.mark.parametrize("where", ["memory", "site"])
def test_an_unknown_key_is_named(where: str) -> None:
    data = CONFIG.to_dict()
    site = dict(data["sites"][0])
    (data if where == "memory" else site)["colour"] = 3
    with pytest.raises(MemoryConfigError, match="colour"):
        MemoryConfig.from_dict({**data, "sites": [site]})


@pytest.mark.parametrize("key", ["hidden_size", "sites"])
def test_a_missing_key_is_named(key: str) -> None:
    data = CONFIG.to_dict()
    del data[key]
    with pytest.raises(MemoryConfigError, match=key):
        MemoryConfig.from_dict(data)


@pytest.mark.parametrize(
    ("site", "changes", "message"),
    [
        (LEXICAL, {"name": "two words"}, "name must be an identifier, got 'two words'"),
        (LEXICAL, {"name": "words_own"}, "name must not end in '_own', got 'words_own'"),
        (
            LEXICAL,
            {"kind": "other"},
            "words.kind must be 'lexical', 'hidden', 'episodic', 'meaning', 'journal' or 'names', got 'other'",
        ),
        (DELTA, {"slots": 15}, r"states.slots must be a perfect square \(product keys\), got 15"),
        (DELTA, {"slots": -4}, "states.slots must be at least 1, got -4"),
        (LEXICAL, {"slots": 0}, "words.slots must be .*, got 0"),
        (LEXICAL, {"cell": 4}, "words.cell must divide slots, and be 1 in a hidden site, got 4"),
        (LEXICAL, {"cell": 0}, "words.cell must divide slots, and be 1 in a hidden site, got 0"),
        (DELTA, {"cell": 3}, "states.cell must divide slots, and be 1 in a hidden site, got 3"),
        (LEXICAL, {"k": 0}, "words.k must be in 1..5, got 0"),
        (LEXICAL, {"k": 6}, "words.k must be in 1..5, got 6"),
        (DELTA, {"k": 4}, "states.k must be in 1..3, got 4"),
        (LEXICAL, {"width": 0}, "words.width must be at least 1, got 0"),
        (DELTA, {"width": 0}, "states.width must be at least 1, got 0"),
        (LEXICAL, {"surprise": -0.1}, "words.surprise must not be negative, got -0.1"),
        (LEXICAL, {"surprise": float("nan")}, "words.surprise must not be negative, got nan"),
        (LEXICAL, {"layer": 0}, "words.layer must be -1 for a lexical site, got 0"),
        (DELTA, {"decay": 1.5}, "states.decay must be in 0..1, got 1.5"),
        (DELTA, {"decay": -0.5}, "states.decay must be in 0..1, got -0.5"),
        (DELTA, {"cap": 0.0}, "states.cap must be positive, got 0.0"),
        (DELTA, {"cap": float("nan")}, "states.cap must be positive, got nan"),
    ],
)
def test_a_site_that_cannot_be_built_is_refused(site: SiteConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MemoryConfigError, match=message):
        replace(site, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 0}, "block must be at least 1, got 0"),
        ({"sites": (LEXICAL, replace(DELTA, name="words"))}, r"names must be unique, got \['words', 'words'\]"),
        ({"sites": (DELTA, replace(DELTA, name="other"))}, r"one hidden site a layer, got layers \[1, 1\]"),
        ({"sites": (LEXICAL, replace(LEXICAL, name="other"))}, "at most one lexical site"),
    ],
)
def test_a_memory_that_cannot_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MemoryConfigError, match=message):
        replace(CONFIG, **changes)


def test_the_bytes_of_a_row_are_those_that_are_stored() -> None:
    """A lexical row is an age, a token, hashes and a key; a delta row is fp32 numbers."""
    assert (LEXICAL.row_bytes, DELTA.row_bytes) == (4 + 4 + 2 * len(NGRAM_SIZES) + 4, 5 * 4)
    assert (LEXICAL.cells, DELTA.cells) == (5, 9)
    pool = Pool(CONFIG, rows=15, sessions=2, backend=choose_backend(torch.device("cpu")))
    draft = pool.draft(pool.open())
    for name in ("words", "states"):
        draft.put(name, torch.tensor([1]), [torch.ones_like(field) for field in draft.get(name, torch.tensor([1]))])
    touched = draft.touched()
    assert touched["words"].data.shape == (3, LEXICAL.row_bytes)
    assert touched["states"].data.shape == (1, DELTA.row_bytes)


# The lexical site.


def lexical_site(**changes: float) -> LexicalSite:
    """Return a site with γ = σ(0) and no trust; `changes` set its surprise threshold and its rates."""
    config = replace(LEXICAL, width=16, surprise=changes.get("surprise", 0.0))
    memory = random_memory(replace(CONFIG, sites=(config,)))
    site = memory.lexical
    assert site is not None
    for parameter in (site.gate_out, site.gate_out_bias, site.key_bias):
        parameter.zero_()
    site.sharpness.copy_(torch.tensor([30.0, 9.0]))
    site.prior.fill_(0.2)
    site.request_trust.zero_()
    site.trust_rate.fill_(changes.get("trust_rate", 0.0))
    site.request_trust_rate.fill_(changes.get("request_trust_rate", 0.0))
    return site


def read_and_learn(
    site: LexicalSite,
    draft: Draft,
    seed: int,
    targets: Tensor,
    ngram_hashes: Tensor | None = None,
    trust: Tensor | None = None,
) -> tuple[LexicalReadout, Tensor]:
    """Read and learn one block with random hidden states and predictions; return the readout and the log-probabilities
    [n] of the targets under the base."""
    g, n = torch.Generator().manual_seed(seed), len(targets)
    hidden, base = torch.randn(n, 6, generator=g), base_prediction(torch.randn(n, 20, generator=g))
    ngram_hashes = torch.zeros(n, len(NGRAM_SIZES), dtype=torch.int16) if ngram_hashes is None else ngram_hashes
    trust = site.initial_trust() if trust is None else trust
    readout = site.read(draft.pool, torch.full((n,), draft.index), hidden, ngram_hashes, base, trust.expand(n, -1))
    site.learn(draft, readout, targets, base.log_prob(targets))
    return readout, base.log_prob(targets)


def new_draft(site: LexicalSite) -> Draft:
    pool = Pool(MemoryConfig(6, (site.config,)), rows=60, sessions=4, backend=choose_backend(torch.device("cpu")))
    return pool.draft(pool.open())


@torch.no_grad()
def test_keys_are_of_unit_length_and_cells_are_the_nearest_centres() -> None:
    site, hidden = lexical_site(), torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    keys = site.keys(hidden)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(9))
    torch.testing.assert_close(keys, F.normalize(hidden @ site.key_weight, dim=-1))
    cells = site.address(keys)
    assert cells.shape == (9, 2)
    assert torch.equal(cells, (keys @ site.centres.T).argsort(-1, descending=True)[:, :2])


@torch.no_grad()
def test_what_was_written_is_found_under_its_context() -> None:
    """At first nothing is found and γ is 0; then the token of each context has the largest share."""
    site, targets = lexical_site(), torch.arange(3)
    draft = new_draft(site)
    first, _ = read_and_learn(site, draft, 3, targets)
    assert not first.gamma.any()
    assert not first.shares.any()
    again, _ = read_and_learn(site, draft, 3, targets)
    torch.testing.assert_close(again.gamma, torch.full((3,), 0.5))
    assert torch.equal(again.cells, first.cells)
    assert again.tokens.gather(1, again.shares.argmax(1)[:, None])[:, 0].tolist() == targets.tolist()


@torch.no_grad()
def test_a_token_is_written_once_where_there_is_room() -> None:
    """The row goes to the nearest of the token's cells that has an empty row."""
    site = lexical_site()
    draft, targets = new_draft(site), torch.arange(8, 20)
    readout, _ = read_and_learn(site, draft, 4, targets)
    ages, tokens, _, keys = draft.get("words", torch.arange(5))
    assigned = ops.assign_cells(readout.cells, torch.full_like(readout.cells, 3))
    assert readout.num_empty_rows.tolist() == [[3, 3]] * 12
    assert not torch.equal(assigned, readout.cells[:, 0]), "the test can tell"
    for cell in range(5):
        stored = tokens[cell][ages[cell] > 0]
        assert sorted(stored.tolist()) == targets[assigned == cell][-3:].tolist(), "its youngest three alone"
        for token, key in zip(stored, keys[cell][ages[cell] > 0], strict=True):
            assert torch.equal(key, ops.quantise_keys(readout.keys)[targets == token][0])


@torch.no_grad()
@pytest.mark.parametrize("surprise", [0.0, 2.5, 99.0])
def test_what_was_expected_better_than_the_threshold_is_not_written(surprise: float) -> None:
    """The threshold is on the loss with the memory, whether the gate is open or closed."""
    site, targets = lexical_site(surprise=surprise), torch.arange(8)
    draft = new_draft(site)
    draft.put("words", torch.arange(5), [torch.ones_like(field) for field in draft.get("words", torch.arange(5))])
    for closed in (0.0, 1.0):
        draft.pool.sites["words"].session_scalars[draft.index, GATE_CLOSED] = closed
        before = draft.get("words", torch.arange(5))
        readout, frozen = read_and_learn(site, draft, 5 + int(closed), targets)
        memory_probs = ops.memory_prob(targets, readout.tokens, readout.shares)
        adapted = ops.target_log_prob(frozen, memory_probs, readout.unguarded_gamma)
        surprising = targets[adapted < -surprise]
        written = len(surprising) / len(targets)
        assert {0.0: written == 1.0, 2.5: 0.0 < written < 1.0, 99.0: written == 0.0}[surprise], "the test can tell"
        after = draft.get("words", torch.arange(5))
        assigned = ops.assign_cells(readout.cells[adapted < -surprise], readout.num_empty_rows[adapted < -surprise])
        per_cell = torch.bincount(assigned, minlength=5).clamp_max(3)
        changed = after[0] != before[0]
        assert torch.equal(changed.sum(-1), per_cell)
        for token, key in zip(after[1][changed], after[3][changed], strict=True):
            assert token in surprising
            assert torch.equal(key, ops.quantise_keys(readout.keys[int(token)])), "each with the key of its own context"


@torch.no_grad()
def test_a_closed_gate_has_weight_zero_and_reports_the_open_weight() -> None:
    site, targets = lexical_site(), torch.arange(4)
    draft = new_draft(site)
    read_and_learn(site, draft, 3, targets)
    draft.pool.sites["words"].session_scalars[draft.index, GATE_CLOSED] = 1.0
    readout, _ = read_and_learn(site, draft, 3, targets)
    assert not readout.gamma.any()
    assert readout.unguarded_gamma.all()


@torch.no_grad()
def test_session_scalars_follow_the_gain_of_the_memory() -> None:
    site, targets = lexical_site(trust_rate=0.5), torch.arange(2)
    draft = new_draft(site)
    read_and_learn(site, draft, 3, targets)
    session_scalars = draft.pool.sites["words"].session_scalars[draft.index]
    assert not session_scalars.any(), "nothing was read, nothing was gained"
    readout, frozen = read_and_learn(site, draft, 3, targets)
    memory_probs = ops.memory_prob(targets, readout.tokens, readout.shares)
    adapted = ops.target_log_prob(frozen, memory_probs, readout.unguarded_gamma)
    step = ops.trust_gradient(frozen, adapted, memory_probs, readout.unguarded_gamma).sum()
    expected = torch.stack([0.5 * step, (adapted - frozen).sum(), torch.zeros(())])
    assert float(expected[TRUST]) > 0.1
    torch.testing.assert_close(session_scalars[:, 0], expected)
    assert not session_scalars[:, 1:].any(), "no n-gram was repeated"
    readout, _ = read_and_learn(site, draft, 3, targets)
    torch.testing.assert_close(readout.gamma, torch.sigmoid(0.5 * step).expand(2))


@torch.no_grad()
def test_repeated_ngrams_have_their_own_trust() -> None:
    """Trust, balance and guard are separate for each number of n-gram matches, in the session and the request."""
    site, targets = lexical_site(trust_rate=0.5, request_trust_rate=0.25), torch.arange(2)
    draft, ngram_hashes = new_draft(site), torch.tensor([[3, 4, 0], [0, 0, 0]], dtype=torch.int16)
    read_and_learn(site, draft, 3, targets, ngram_hashes)
    session_scalars = draft.pool.sites["words"].session_scalars[draft.index]
    readout, frozen = read_and_learn(site, draft, 3, targets, ngram_hashes)
    assert readout.ngram_matches.tolist() == [2, 0]
    _, step = site.log_probs_and_trust_gradient(readout, targets, frozen)
    assert (step != 0).tolist() == [True, False, True, False]
    torch.testing.assert_close(session_scalars[TRUST], 0.5 * step)
    assert (session_scalars[BALANCE] != 0).tolist() == [True, False, True, False]
    request = site.updated_trust(torch.full((4,), -0.5), readout, targets, frozen)
    torch.testing.assert_close(request, -0.5 + 0.25 * step)
    again, _ = read_and_learn(site, draft, 3, targets, ngram_hashes, trust=request)
    torch.testing.assert_close(again.gamma, torch.sigmoid(0.5 * step + request)[[2, 0]])
    draft.pool.sites["words"].session_scalars[draft.index, GATE_CLOSED, 2] = 1.0
    closed, _ = read_and_learn(site, draft, 3, targets, ngram_hashes)
    assert (closed.gamma > 0).tolist() == [False, True]
