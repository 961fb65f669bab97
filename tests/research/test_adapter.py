"""The plain adapter: the identity at first, a loss with the right gradient, and a file checked for its shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from research.training import features
from research.training.adapter import AdapterObjective, OutputAdapter, load_adapter, rank_of, save_adapter
from research.training.features import Chunk

WIDTH, RANK, VOCAB = 8, 3, 20


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chunk(n: int) -> Chunk:
    targets = torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(3))
    return Chunk(noise(n, WIDTH), targets, torch.zeros(n), torch.zeros(n), [n])


def trained() -> OutputAdapter:
    adapter = OutputAdapter(WIDTH, RANK)
    with torch.no_grad():
        adapter.up.copy_(noise(RANK, WIDTH, seed=4))
    return adapter


def test_a_new_adapter_changes_no_bit() -> None:
    states = noise(5, WIDTH)
    assert torch.equal(OutputAdapter(WIDTH, RANK)(states), states)


def test_its_formula() -> None:
    adapter, h = trained(), noise(5, WIDTH)
    normed = h / (h.square().mean(-1, keepdim=True) + torch.finfo(h.dtype).eps).sqrt()
    torch.testing.assert_close(adapter(h), h + F.gelu(normed @ adapter.down) @ adapter.up)


def test_a_sample_of_the_targets_estimates_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, data = AdapterObjective(trained(), noise(VOCAB, WIDTH, seed=5)), chunk(40)
    with torch.no_grad():
        whole = float(objective.step(None, data)[0])
    monkeypatch.setattr(features, "QUERIES", 16)
    torch.manual_seed(0)
    samples = torch.tensor([objective.step(None, data)[0].item() for _ in range(100)])
    assert samples.std() > 0
    assert float(samples.mean()) == pytest.approx(whole, abs=4 * float(samples.std()) / 10)


@pytest.mark.parametrize("rows", [2, 512])
def test_loss_and_gradient_are_those_of_the_softmax(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research.training.adapter.ROWS", rows)
    adapter, head, data = trained(), noise(VOCAB, WIDTH, seed=5), chunk(7)
    objective = AdapterObjective(adapter, head)
    loss, targets, state = objective.step(None, data)
    assert (targets, state) == (7, None)
    loss.backward()
    found = [adapter.down.grad, adapter.up.grad]
    adapter.zero_grad()
    plain = F.cross_entropy(adapter(data.states) @ head.T, data.targets, reduction="sum")
    plain.backward()
    torch.testing.assert_close(loss, plain)
    for mine, theirs in zip(found, (adapter.down.grad, adapter.up.grad), strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(objective.step(None, data)[0], plain)


def test_every_parameter_is_trained() -> None:
    adapter = trained()
    (group,) = AdapterObjective(adapter, noise(VOCAB, WIDTH)).groups()
    assert {id(p) for p in group["params"]} == {id(adapter.down), id(adapter.up)}


def test_the_rank_of_equal_parameters() -> None:
    assert rank_of(2 * 576 * 100 + 300, 576) == 100
    assert rank_of(10, 576) == 1


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    adapter = trained()
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    shapes = {name: list(t.shape) for name, t in load_file(tmp_path / "adapter.safetensors").items()}
    assert shapes == {"down": [WIDTH, RANK], "up": [RANK, WIDTH]}
    loaded = load_adapter(tmp_path / "adapter.safetensors", WIDTH)
    assert torch.equal(loaded(noise(4, WIDTH)), adapter(noise(4, WIDTH)))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_what_is_no_adapter_of_this_base_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(ValueError, match=r"cannot read the adapter adapter\.safetensors"):
        load_adapter(path, WIDTH)
    save_adapter(trained(), path)
    with pytest.raises(ValueError, match=r"must hold down \[9, r\] and up \[r, 9\], got .*'down': \[8, 3\]"):
        load_adapter(path, 9)
    save_file({"down": noise(WIDTH, RANK)}, path)
    with pytest.raises(ValueError, match="must hold down"):
        load_adapter(path, WIDTH)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="cannot read"):
        load_adapter(path, WIDTH)
