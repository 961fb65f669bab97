"""Features: the outputs of the base on each request alone, the cut of a stream by its seed, and the files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from model.base.backbone import Backbone
from model.base.config import tiny_config
from research.training.features import FeaturesError, StreamFeatures, compute_features, cut_lengths

VOCAB, BOS = 48, 2


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    base, generator = Backbone(tiny_config(vocab_size=VOCAB)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2, generator=generator)
    return base


@pytest.fixture(scope="module")
def ids() -> list[int]:
    drawn: list[int] = torch.randint(VOCAB, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    return drawn


def test_features_equal_the_outputs_of_the_base_by_request(backbone: Backbone, ids: list[int], tmp_path: Path) -> None:
    reported: list[int] = []
    compute_features(backbone, ids, [7, 4, 6], BOS, tmp_path / "one", progress=reported.append)
    assert reported == [7, 4, 6]
    features = StreamFeatures(tmp_path / "one")
    assert (features.requests, features.tokens) == (3, 17)
    chunk = features.chunk(1, 2)
    assert chunk.lengths == [4, 6]
    assert chunk.targets.tolist() == ids[7:17]
    alone = [backbone(torch.tensor([[BOS, *request[:-1]]]))[0] for request in (ids[7:11], ids[11:17])]
    torch.testing.assert_close(chunk.states, torch.cat(alone), atol=2e-3, rtol=1e-3)
    base = torch.distributions.Categorical(logits=backbone.logits(torch.cat(alone)))
    torch.testing.assert_close(chunk.log_probs, base.log_prob(chunk.targets))
    torch.testing.assert_close(chunk.entropy, base.entropy())


def test_long_requests_are_scored_in_pieces_alike(
    backbone: Backbone, ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_features(backbone, ids, [20], BOS, tmp_path / "whole")
    monkeypatch.setattr("research.training.features.ROWS", 3)
    compute_features(backbone, ids, [20], BOS, tmp_path / "pieces")
    whole, pieces = (StreamFeatures(tmp_path / name).chunk(0, 1) for name in ("whole", "pieces"))
    torch.testing.assert_close(whole.log_probs, pieces.log_probs)
    torch.testing.assert_close(whole.entropy, pieces.entropy)


def test_the_files_are_plain_and_typed(backbone: Backbone, ids: list[int], tmp_path: Path) -> None:
    compute_features(backbone, ids, [7, 13], BOS, tmp_path / "one")
    arrays = {file.stem: np.load(file) for file in (tmp_path / "one").iterdir()}
    assert {name: (str(array.dtype), array.shape) for name, array in arrays.items()} == {
        "states": ("float16", (20, 64)),
        "targets": ("int32", (20,)),
        "log_probs": ("float32", (20,)),
        "entropy": ("float32", (20,)),
        "offsets": ("int64", (3,)),
    }


def test_a_folder_appears_whole_or_not_at_all(backbone: Backbone, ids: list[int], tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(_: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        compute_features(backbone, ids, [7, 13], BOS, tmp_path / "one", progress=kill)
    assert not (tmp_path / "one").exists()
    with pytest.raises(FeaturesError, match=r"cannot read the features in .*one"):
        StreamFeatures(tmp_path / "one")
    (tmp_path / "one.part").mkdir()  # what a kill while writing leaves
    (tmp_path / "one.part" / "states.npy").write_bytes(b"half")
    compute_features(backbone, ids, [7, 13], BOS, tmp_path / "one")
    assert StreamFeatures(tmp_path / "one").tokens == 20
    (tmp_path / "one" / "states.npy").write_bytes(b"damaged")
    with pytest.raises(FeaturesError, match="cannot read"):
        StreamFeatures(tmp_path / "one")


def test_states_beyond_half_precision_are_refused(backbone: Backbone, ids: list[int], tmp_path: Path) -> None:
    with torch.no_grad():
        backbone.norm.weight.mul_(1e6)
        with pytest.raises(FeaturesError, match="must fit fp16"):
            compute_features(backbone, ids, [20], BOS, tmp_path / "one")
        backbone.norm.weight.div_(1e6)
    assert not (tmp_path / "one").exists()


def test_a_chunk_ends_with_its_stream(backbone: Backbone, ids: list[int], tmp_path: Path) -> None:
    compute_features(backbone, ids, [7, 4, 6], BOS, tmp_path / "one")
    features = StreamFeatures(tmp_path / "one")
    shutil.rmtree(tmp_path / "one")  # the mapped files stay readable
    assert features.chunk(2, 8).lengths == [6]
    assert features.chunk(0, 8).targets.tolist() == ids[:17]


def test_lengths_are_mixed_and_come_from_the_seed() -> None:
    lengths = cut_lengths(100_000, 128, 1024, "a")
    assert min(lengths) >= 128
    assert max(lengths) <= 1024
    assert 500 < sum(lengths) / len(lengths) < 650
    assert 100_000 - 128 < sum(lengths) <= 100_000
    assert cut_lengths(50_000, 128, 1024, "a")[:-1] == lengths[: len(cut_lengths(50_000, 128, 1024, "a")) - 1]
    assert lengths != cut_lengths(100_000, 128, 1024, "b")
    assert cut_lengths(127, 128, 1024, "a") == []
    assert cut_lengths(130, 128, 1024, "a") in ([130], [129], [128])
