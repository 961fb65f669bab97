"""The memory's slow weights: what is loaded is what was saved, and anything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.memory import Memory, MemoryConfig, MemoryConfigError, SiteConfig, load_memory, save_memory

LEXICAL = SiteConfig("words", "lexical", slots=16, k=2, pairs=3)
HIDDEN = SiteConfig("states", "hidden", slots=9, k=3, layer=1, width=5, decay=1.0, cap=10.0)
CONFIG = MemoryConfig(hidden_size=6, sites=(LEXICAL, HIDDEN), block=8)


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
    """Writes the file again without a tensor, or with other metadata."""
    tensors = {name: tensor for name, tensor in random_memory().state_dict().items() if name != without}
    save_file(tensors, path, metadata={"format": "1", "memory": json.dumps(CONFIG.to_dict())} | metadata)


# Save and load.


def test_a_memory_loads_as_the_same_bits_and_the_same_fingerprint(saved: Path) -> None:
    memory, again = random_memory(), load_memory(saved, hidden_size=6)
    assert again.config == memory.config
    assert again.fingerprint() == memory.fingerprint()
    theirs = again.state_dict()
    assert theirs.keys() == memory.state_dict().keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in memory.state_dict().items())
    assert not any(parameter.requires_grad for parameter in again.parameters()), "slow weights are frozen"


def test_sites_are_found_by_what_they_are() -> None:
    memory = random_memory(replace(CONFIG, sites=(HIDDEN, LEXICAL, replace(HIDDEN, name="output", layer=-1))))
    assert memory.lexical is memory.sites["words"]
    assert memory.hidden == {1: memory.sites["states"], -1: memory.sites["output"]}
    assert Memory(replace(CONFIG, sites=(HIDDEN,))).lexical is None


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
        replace(CONFIG, sites=(HIDDEN, LEXICAL)),
        replace(CONFIG, sites=(replace(LEXICAL, k=1), HIDDEN)),
        replace(CONFIG, sites=(replace(LEXICAL, pairs=4), HIDDEN)),
        replace(CONFIG, sites=(replace(LEXICAL, decay=0.5), HIDDEN)),
        replace(CONFIG, sites=(replace(LEXICAL, cap=5.0), HIDDEN)),
        replace(CONFIG, sites=(replace(LEXICAL, name="other"), HIDDEN)),
        replace(CONFIG, sites=(LEXICAL, replace(HIDDEN, layer=0))),
    ],
)
def test_any_changed_setting_changes_the_fingerprint(changed: MemoryConfig) -> None:
    assert Memory(changed).fingerprint() != Memory(CONFIG).fingerprint()


# What is refused.


def test_a_memory_for_another_base_is_refused(saved: Path) -> None:
    with pytest.raises(MemoryConfigError, match=r"memory\.safetensors .*hidden size 6, this base has 7"):
        load_memory(saved, hidden_size=7)


def test_a_missing_tensor_is_named(saved: Path) -> None:
    resave(saved, without="sites.words.gate")
    with pytest.raises(MemoryConfigError, match=r"(?s)memory\.safetensors .*sites\.words\.gate"):
        load_memory(saved, hidden_size=6)


def test_a_tensor_of_another_shape_is_named(saved: Path) -> None:
    config = replace(CONFIG, sites=(LEXICAL, replace(HIDDEN, width=4)))
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
    resave(saved, format="2")
    with pytest.raises(MemoryConfigError, match=r"memory\.safetensors: format must be 1, got '2'"):
        load_memory(saved, hidden_size=6)
    save_file({"x": torch.zeros(1)}, saved)
    with pytest.raises(MemoryConfigError, match="format must be 1, got None"):
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
        '{"hidden_size": 6, "sites": [{"name": 3, "kind": "lexical", "slots": 4, "k": 1}]}',
    ],
)
def test_a_configuration_that_is_none_is_refused(memory: str, saved: Path) -> None:
    resave(saved, memory=memory)
    with pytest.raises(MemoryConfigError, match=r"memory\.safetensors: not a memory configuration"):
        load_memory(saved, hidden_size=6)


def test_a_file_without_a_configuration_is_refused(saved: Path) -> None:
    save_file(random_memory().state_dict(), saved, metadata={"format": "1"})
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
        (LEXICAL, {"name": "words_trust"}, "name must not end in '_trust', got 'words_trust'"),
        (LEXICAL, {"kind": "other"}, "words.kind must be 'lexical' or 'hidden', got 'other'"),
        (LEXICAL, {"slots": 15}, r"words.slots must be a perfect square \(product keys\), got 15"),
        (LEXICAL, {"slots": 0}, "words.slots must be a perfect square .*, got 0"),
        (LEXICAL, {"slots": -4}, "words.slots must be a perfect square .*, got -4"),
        (LEXICAL, {"k": 0}, r"words.k must be in 1..4 \(√slots\), got 0"),
        (LEXICAL, {"k": 5}, r"words.k must be in 1..4 \(√slots\), got 5"),
        (LEXICAL, {"pairs": 0}, "words.pairs must be at least 1, got 0"),
        (LEXICAL, {"layer": 0}, "words.layer must be -1 for a lexical site, got 0"),
        (LEXICAL, {"decay": 1.5}, "words.decay must be in 0..1, got 1.5"),
        (LEXICAL, {"decay": -0.5}, "words.decay must be in 0..1, got -0.5"),
        (LEXICAL, {"cap": 0.0}, "words.cap must be positive, got 0.0"),
        (LEXICAL, {"cap": float("nan")}, "words.cap must be positive, got nan"),
        (HIDDEN, {"width": 0}, "states.width must be at least 1, got 0"),
    ],
)
def test_a_site_that_cannot_be_built_is_refused(site: SiteConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MemoryConfigError, match=message):
        replace(site, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 0}, "block must be at least 1, got 0"),
        ({"sites": (LEXICAL, replace(HIDDEN, name="words"))}, r"names must be unique, got \['words', 'words'\]"),
        ({"sites": (HIDDEN, replace(HIDDEN, name="other"))}, r"one hidden site a layer, got layers \[1, 1\]"),
        ({"sites": (LEXICAL, replace(LEXICAL, name="other"))}, "at most one lexical site"),
    ],
)
def test_a_memory_that_cannot_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MemoryConfigError, match=message):
        replace(CONFIG, **changes)


def test_a_rows_bytes_are_those_that_are_stored() -> None:
    assert (LEXICAL.row_bytes, HIDDEN.row_bytes) == (3 * (4 + 4), 5 * 4)
