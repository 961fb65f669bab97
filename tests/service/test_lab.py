"""`imprint eval` and `imprint fit` as they are called: on files, without a server."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from model.memory import load_memory
from tests.tiny import TEXT


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kinds of streams, two of each: words in random orders."""
    folder = tmp_path_factory.mktemp("texts")
    words = TEXT.split()
    for kind in ("prose", "notes"):
        (folder / kind).mkdir()
        for name in ("one", "two"):
            shuffled = random.Random(f"{kind}/{name}").choices(words, k=900)
            (folder / kind / f"{name}.txt").write_text(" ".join(shuffled[:450]) + "\x1e\n" + " ".join(shuffled[450:]))
    return folder


def imprint(base: Path, *arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("IMPRINT_")}
    given = {"IMPRINT_MODEL": str(base), **{f"IMPRINT_{name}": str(value) for name, value in settings.items()}}
    return subprocess.run(
        [sys.executable, "-m", "service", *map(str, arguments)], env=clean | given, capture_output=True, text=True
    )


def test_eval_prints_a_table_and_writes_every_number(tiny_base: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    done = imprint(tiny_base, "eval", texts, "--requests", 4, "--window", 64, "--json", out)
    assert done.returncode == 0, done.stderr
    reports = json.loads(out.read_text())
    assert [report["name"] for report in reports] == ["notes/one", "notes/two", "prose/one", "prose/two"]
    for report in reports:
        assert report["frozen"]["tokens"] == report["online"]["tokens"] == [64] * 4
        assert all(len(report[arm]["by_request"]) == 2 for arm in ("own", "same_kind", "other_kind"))
    assert "geometric" in done.stdout


def test_fit_makes_a_checkpoint_that_eval_reads(tiny_base: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "memory.safetensors"
    sizes = ("--requests", 4, "--window", 64)
    done = imprint(tiny_base, "fit", texts, "--out", out, *sizes)
    assert done.returncode == 0, done.stderr
    fingerprint = load_memory(out, hidden_size=64).fingerprint()
    assert fingerprint in done.stdout.replace("\n", "")
    again = imprint(tiny_base, "fit", texts, "--out", tmp_path / "again.safetensors", *sizes)
    assert fingerprint in again.stdout.replace("\n", "")
    assert imprint(tiny_base, "eval", texts, *sizes, MEMORY=out).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "settings", "fault"),
    [
        (["eval", "--requests", "400"], {}, "no text is long enough"),
        (["eval"], {"MEMORY": "nowhere.safetensors"}, "nowhere.safetensors"),
        (["eval"], {"MODEL": "nobody"}, "nobody"),
    ],
)
def test_a_fault_is_one_line(
    tiny_base: Path, texts: Path, arguments: list[str], settings: dict[str, str], fault: str
) -> None:
    done = imprint(tiny_base, *arguments, texts, **settings)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("imprint: ")]
    assert fault in line
    assert "Traceback" not in done.stderr
