"""The streams that nobody here wrote: the prior, the training of a mixer, one pass, and the report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from model.tabular import arm_readers
from model.tabular.columns import MISSING
from model.tabular.label_learner import Labels
from model.tabular.label_readers import E
from model.tabular.mixer import Mixer
from research.scenarios.label_stream import SCENARIO, load_omniglot
from research.streams import omniglot
from research.streams.ablation import PARTS, measure, without
from research.streams.array_learners import Encoder, ImprintArms, ImprintLabels, ImprintNumbers
from research.streams.bandits import run_bernoulli
from research.streams.datasets import STREAMS, find_stream
from research.streams.prequential import result_file, run_labels, run_numbers, save
from research.streams.prior import label_task, number_task
from research.streams.report import calibration_error, mean_and_interval, report
from research.streams.training import fit, mixer_loss, record_labels, record_numbers
from tests.model.tabular_cases import learner_of, new_pool


@pytest.mark.parametrize("seed", range(8))
def test_a_task_of_the_prior_is_a_stream(seed: int) -> None:
    task, again = (label_task(np.random.default_rng(seed), longest=120) for _ in range(2))
    assert task.x.tobytes() == again.x.tobytes() and task.y.tolist() == again.y.tolist()
    _, first = np.unique(task.y, return_index=True)
    assert (np.diff(first) > 0).all()  # labels are numbered in the order in which they appear
    assert 30 <= len(task.x) <= 120 and np.isfinite(task.x).all()
    numbers = number_task(np.random.default_rng(seed), longest=120)
    assert np.isfinite(numbers.y).all() and ((numbers.x == MISSING) | (np.abs(numbers.x) < 1e6)).all()


def test_a_mixer_learns_from_what_the_readers_said() -> None:
    for record in (record_labels, record_numbers):
        records = record(2, 3, lambda done: None)
        before = mixer_loss(Mixer(records.readouts.shape[1]), records, torch.arange(len(records.readouts)))
        mixer, losses = fit(records, 60, 0, lambda done: None)
        after = mixer_loss(mixer, records, torch.arange(len(records.readouts)))
        assert len(losses) == 60 and after < before


def test_the_array_learners_are_the_served_ones() -> None:
    pairs = find_stream("iris").examples(0, 25)
    beside, served = ImprintLabels(Mixer(E)), cast(Labels, learner_of("labels"))
    pool, encode, names = new_pool(served), Encoder(), []
    session = pool.open()
    for x, label in pairs:
        probs = list(beside.predict(x).values())
        features = encode(x)
        assert served.predict(features, pool, session).probs.tolist() == pytest.approx(probs, abs=1e-6)
        names += [label] if label not in names else []
        draft = pool.draft(session)
        served.learn(features, names.index(label), draft)
        draft.commit()
        beside.learn(x, label)


def test_strings_become_columns_of_their_own() -> None:
    encode = Encoder()
    assert encode({"a": 1.5, "b": "x"}).tolist() == [1.5, 1.0]
    assert np.nan_to_num(encode({"b": "y"}), nan=-1).tolist() == [-1.0, 0.0, 1.0]


def test_streams_are_the_same_for_a_seed_and_differ_between_seeds() -> None:
    assert len({stream.name for stream in STREAMS}) == len(STREAMS)
    stream = find_stream("agrawal, sudden")
    assert stream.examples(1, 20) == stream.examples(1, 20) != stream.examples(2, 20)


def test_the_report_compares_learners(tmp_path: Path) -> None:
    pairs = find_stream("iris").examples(0, 60)
    steps = run_labels(ImprintLabels(Mixer(E)), pairs)
    worse = steps | {"hit": steps["hit"] * np.float32(0.5)}
    for name, each in (("imprint", steps), ("naive bayes", worse)):
        save(result_file(tmp_path, "iris", 0, name), each)
    numbers = find_stream("linnerud").examples(0)
    learner = ImprintNumbers()
    save(
        result_file(tmp_path, "linnerud", 0, "imprint"),
        run_numbers(learner, numbers) | {"covered": np.array(learner.covered)},
    )
    save(
        result_file(tmp_path / "arms", "bernoulli", 0, "imprint"),
        run_bernoulli(lambda: ImprintArms(10), 1, 0),
    )
    report(tmp_path, 1)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["labels"]["mean rank"] == 1
    assert "| iris |" in (tmp_path / "report.md").read_text()


def test_figures_of_the_report() -> None:
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(2.484, abs=1e-3)
    assert math.isnan(mean_and_interval([1.0])[1])
    hit = np.array([1.0, 0.0, 1.0, 0.0])
    assert calibration_error(np.full(4, 0.5), hit) == 0.0
    assert calibration_error(np.full(4, 0.9), hit) == pytest.approx(0.4)


def test_the_chances_of_arms_are_those_of_draws() -> None:
    means, deviations = np.array([0.0, 0.3, 0.1], np.float32), np.array([0.2, 0.1, 0.4], np.float32)
    probs = np.empty(3, np.float32)
    arm_readers.chances(means, deviations, probs)
    draws = np.random.default_rng(0).normal(means, deviations, size=(40_000, 3)).argmax(1)
    np.testing.assert_allclose(probs, np.bincount(draws) / 40_000, atol=0.01)


def test_characters_are_told_apart_after_one_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    drawings = np.repeat(rng.random((9, 1, 28, 28)) > 0.5, 2, axis=1) * 255.0  # two equal drawings of each character
    path = tmp_path / "characters.npz"
    np.savez(path, x=drawings.reshape(18, 28, 28), y=np.repeat(np.arange(9), 2))
    monkeypatch.setattr(omniglot, "WAYS", (3,))
    monkeypatch.setattr(omniglot, "EPISODES", 2)
    recipe = SCENARIO.recipes["digits"].with_train_config(batch=2, steps=6, span=6)
    monkeypatch.setattr(omniglot, "SCENARIO", replace(SCENARIO, recipes={"digits": recipe}))
    policy = omniglot.trained_policy(path, rounds=1)
    arms: dict[str, omniglot.Arm] = {
        "policy": lambda shots, queries: omniglot.by_policy(policy, shots, queries),
        "labels": omniglot.by_labels,
        "pixels": omniglot.by_pixels,
        "the first": lambda shots, queries: np.zeros(len(queries)),
    }
    found = omniglot.measure(arms, load_omniglot(path, held_out=True), 3, seed=0)
    assert found == {"policy": 1.0, "labels": 1.0, "pixels": 1.0, "the first": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("task", "stream", "part"),
    [
        ("labels", "sine, sudden", "forests"),
        ("labels", "sine, sudden", "sharpening"),
        ("regression", "airline passengers", "ridge regression"),
        ("bandit", "wine", "columns"),
    ],
)
def test_a_part_is_taken_away_and_comes_back(task: str, stream: str, part: str) -> None:
    whole = measure(task, stream, 60)
    with without(task, PARTS[task][part]):
        assert measure(task, stream, 60) != pytest.approx(whole, nan_ok=True)
    assert measure(task, stream, 60) == pytest.approx(whole, nan_ok=True)
