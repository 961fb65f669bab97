"""`imprint eval` as a command: on files, without a server."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from research.corpus import text_files
from research.evaluation.trial import CHEAP, COSTLY
from research.runs import ResultCache, content_hash
from tests.service.cli_in_process import run_rejected
from tests.tiny import TEXT

SIZES = ("--requests", 4, "--window", 64)
QUICK = ("--arms", "memory,cache", "--probes", "none")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two streams of each of three kinds, words in random order. One stream is shorter than the others."""
    folder = tmp_path_factory.mktemp("texts")
    words = TEXT.split()
    for kind in ("prose", "notes", "logs"):
        (folder / kind).mkdir()
        for name in ("one", "two"):
            count = 170 if (kind, name) == ("logs", "two") else 900
            shuffled = random.Random(f"{kind}/{name}").choices(words, k=count)
            (folder / kind / f"{name}.txt").write_text(" ".join(shuffled[:99]) + "\x1e\n" + " ".join(shuffled[99:]))
    (folder / "MANIFEST.md").write_text(TEXT * 90)
    return folder


def command(base: Path, arguments: tuple[object, ...], settings: dict[str, object]) -> dict[str, Any]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("IMPRINT_")}
    given = {"IMPRINT_MODEL": str(base), **{f"IMPRINT_{name}": str(value) for name, value in settings.items()}}
    return {"args": [sys.executable, "-m", "service", "eval", *map(str, arguments)], "env": clean | given}


def evaluate(base: Path, *arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**command(base, arguments, settings), capture_output=True, text=True)


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def whole(tiny_base: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run all arms and probes once, and return the folder and the output."""
    out = tmp_path_factory.mktemp("whole")
    adapter = out / "adapter.safetensors"
    save_file({"down": torch.randn(64, 2), "up": torch.randn(2, 64) / 10}, adapter)
    extra = ("--tune", "notes,prose", "--arms", "all", "--long", 1500, "--adapter", adapter)
    done = evaluate(tiny_base, texts, "--out", out, *SIZES, *extra)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_every_arm_is_reported_with_its_numbers(whole: tuple[Path, str]) -> None:
    found = results(whole[0])
    assert list(found["arms"]) == [*CHEAP, *COSTLY, "adapter"]
    assert found["about"]["kinds"] == ["logs", "notes", "prose"]
    assert found["about"]["tuned_on"] == ["notes", "prose"]
    assert [stream["tokens"] for stream in found["streams"]] == [256, 192, 256, 256, 256, 256]
    for arm in found["arms"].values():
        parts = [arm["ratio_half"]] if arm["part"] == "half" else [arm["ratio_half"], arm["ratio"]]
        for ratio in parts:
            assert set(ratio["kinds"]) == {"logs", "notes", "prose"}
            assert len(ratio["streams"]) == 6
            product = np.prod([ratio["kinds"][kind] for kind in ratio["kinds"]])
            assert ratio["all"]["value"] == pytest.approx(product ** (1 / 3))
            assert ratio["held_out"]["value"] == pytest.approx(ratio["kinds"]["logs"])
            assert ratio["tuned"]["low"] <= ratio["tuned"]["value"] <= ratio["tuned"]["high"]
        assert len(arm["by_request"]["ratio"]) == 4
        assert (arm["by_request"]["ratio"][0] is None) == (arm["part"] == "half")
        assert arm["cost"] > 0
    assert found["arms"]["static"]["ratio"]["all"]["value"] == 1
    assert found["arms"]["cache"]["tuned"]["theta"] > 0
    assert all(stream["rows"] > 0 < stream["state_bytes"] for stream in found["streams"])
    assert found["arms"]["memory"]["state_bytes"] > found["arms"]["cleared"]["state_bytes"] > 0


def test_arms_of_equal_bytes_keep_no_more_than_the_memory(whole: tuple[Path, str]) -> None:
    arms = results(whole[0])["arms"]
    for name in ("cache-bytes", "dense", "last-tokens"):
        assert arms[name]["equal_bytes"]
        assert arms[name]["state_bytes"] <= arms["memory"]["state_bytes"]


def test_every_probe_is_reported_with_its_numbers(whole: tuple[Path, str]) -> None:
    probes = results(whole[0])["probes"]
    for times in ("once", "three times"):
        assert set(probes["facts"][times]) == {"0", "1000"}  # the streams hold no 10,000 tokens
        assert 0 <= probes["facts"][times]["0"]["verbatim"] <= 1
    assert 0 <= probes["keystrokes"]["memory"]["value"] <= 1
    assert probes["cost"]["observe_over_prefill"] > 0
    long = probes["long"]
    assert long["tokens"] == 64 * len(long["position"]) >= 1500
    assert len(long["bins"]["ratio"]) == len(long["position"])
    assert all(ratio > 0 for ratio in long["bins"]["ratio"])
    assert long["rows"][-1] > 0


def test_tables_plots_and_arrays_are_written(whole: tuple[Path, str]) -> None:
    out, printed = whole
    table = (out / "table.md").read_text()
    for text in (printed, table):
        assert "dynamic-lora" in text
        assert "A→B→A" in text
    assert "/" not in table.split("**")[0].replace("nats/token", "")  # no path of the machine
    with np.load(out / "arrays.npz") as arrays:
        assert arrays["memory/notes/one"].shape == (256,)
        static, memory = arrays["static/notes/one"].astype(float), arrays["memory/notes/one"].astype(float)
    ratio = results(out)["arms"]["memory"]["ratio"]["streams"]["notes/one"]
    assert np.exp(static.mean() - memory.mean()) == pytest.approx(ratio)
    drawn = {path.name for path in out.glob("*.png")}
    assert drawn in (set(), {"requests.png", "kinds.png", "novelty.png", "return.png", "long.png"})
    assert drawn or "pip install 'imprint[plots]'" in printed


def test_a_killed_run_resumes_and_ends_the_same(tiny_base: Path, texts: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert evaluate(tiny_base, texts, "--out", whole, *SIZES, *QUICK).returncode == 0
    given = command(tiny_base, (texts, "--out", cut, *SIZES, *QUICK), {})
    running = subprocess.Popen(**given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list((cut / "runs").glob("*.safetensors"))) < 4:
        assert running.poll() is None
        time.sleep(0.005)
    running.kill()
    running.wait()
    assert not (cut / "results.json").exists()
    written = {path: path.stat().st_mtime_ns for path in (cut / "runs").glob("*.safetensors")}
    assert evaluate(tiny_base, texts, "--out", cut, *SIZES, *QUICK).returncode == 0
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    for name in ("memory", "cache"):
        resumed, uninterrupted = (results(out)["arms"][name] for out in (cut, whole))
        assert {**resumed, "cost": 0} == {**uninterrupted, "cost": 0}
    assert {path.name for path in (whole / "runs").iterdir()} == {path.name for path in (cut / "runs").iterdir()}


def test_a_damaged_result_is_not_loaded(tmp_path: Path) -> None:
    runs = ResultCache(tmp_path / "runs")
    assert runs.load("a") is None
    runs.save("a", {"x": torch.arange(3)}, {"seconds": 1.5})
    loaded = runs.load("a")
    assert loaded is not None
    assert loaded[0]["x"].tolist() == [0, 1, 2]
    assert loaded[1] == {"seconds": 1.5}
    (tmp_path / "runs" / "a.safetensors").write_bytes(b"half of it")
    assert runs.load("a") is None
    assert content_hash("a", {"x": 1.0}) == content_hash("a", {"x": 1.0}) != content_hash("a", {"x": 2.0})


def test_a_file_beside_kinds_is_no_stream(texts: Path) -> None:
    assert {file.name for file, _ in text_files([texts])} == {"one.txt", "two.txt"}
    assert [(file.name, kind) for file, kind in text_files([texts / "MANIFEST.md"])] == [("MANIFEST.md", texts.name)]


@pytest.mark.parametrize(
    ("arguments", "settings", "fault"),
    [
        (["--requests", 400, "--window", 64], {}, "a stream needs 200 requests of 64 tokens"),
        (["--window", 512], {}, "window must be at most 511"),
        (["--arms", "memory,magic"], {}, "magic"),
        (["--tune", "prose,verse", *SIZES], {}, "verse"),
        (["--probes", "facts,guess"], {}, "guess"),
        ([], {"MEMORY": "nowhere.safetensors"}, "nowhere.safetensors"),
        ([], {"MODEL": "nobody"}, "nobody"),
    ],
)
def test_a_fault_is_one_line(
    tiny_base: Path, texts: Path, tmp_path: Path, arguments: list[object], settings: dict[str, object], fault: str
) -> None:
    assert fault in run_rejected(
        "eval", texts, "--out", tmp_path / "out", *arguments, settings={"MODEL": tiny_base} | settings
    )


def test_an_adapter_for_another_base_is_refused(tiny_base: Path, texts: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.safetensors"
    save_file({"down": torch.randn(32, 2), "up": torch.randn(2, 32)}, adapter)
    message = run_rejected(
        "eval", texts, "--out", tmp_path / "out", *SIZES, "--adapter", adapter, settings={"MODEL": tiny_base}
    )
    assert "adapter.safetensors" in message
