"""`imprint train` as a command: on files, killed, interrupted, with one process and with two."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.memory import load_memory
from model.text.tokenizer import Tokenizer
from research.training.adapter import load_adapter
from research.training.features import StreamFeatures
from research.training.texts import Budget, PlannedStream, draw_streams, find_kinds
from service.errors import CommandError
from tests.model.random_models import random_family_model
from tests.service.cli_in_process import run_rejected
from tests.tiny import TEXT

SIZES = ["--tokens", 9000, "--stream-tokens", 1500, "--request-tokens", 32, 100, "--valid", 1, "--batch", 2]
BUDGET = Budget(9000, 1500, 1, 16_384, (32, 100), 0)
SHORT = [*SIZES, "--steps", 8]


def words(number: int, seed: str) -> str:
    return " ".join(random.Random(seed).choices(TEXT.split(), k=number))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three kinds: several files, one long file, and one file too short to hold a part out."""
    folder = tmp_path_factory.mktemp("texts")
    for kind, sizes in {"prose": [900, 20, 900, 900], "notes": [9000], "scraps": [700]}.items():
        (folder / kind).mkdir()
        for number, size in enumerate(sizes):
            half = words(size // 2, f"{kind}/{number}")
            (folder / kind / f"{number}.txt").write_text(f"{half}\x1e\n{words(size - size // 2, half)}")
    return folder


def start(base: Path, *arguments: object, processes: int = 1, **settings: object) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("IMPRINT_")}
    given = {"IMPRINT_MODEL": str(base), "IMPRINT_THREADS": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    given |= {f"IMPRINT_{name}": str(value) for name, value in settings.items()}
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "service", "train", *map(str, arguments)],
        env=clean | given,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(base: Path, *arguments: object, processes: int = 1, **settings: object) -> tuple[int, str, str]:
    process = start(base, *arguments, processes=processes, **settings)
    output, errors = process.communicate()
    return process.returncode, output, errors


def draw(texts: Path, base: Path, folder: Path, budget: Budget = BUDGET) -> list[PlannedStream]:
    kinds = find_kinds([str(texts)], budget)
    return draw_streams(kinds, budget, Tokenizer.load(base), "base", folder)


def test_kinds_share_the_budget_and_some_files_are_held_out(texts: Path, tiny_base: Path, tmp_path: Path) -> None:
    streams = draw(texts, tiny_base, tmp_path)
    held_out = [stream.name for stream in streams if stream.valid]
    assert len(held_out) == 2  # a file of prose and a part of the long note
    assert {name.split("/")[0] for name in held_out} == {"prose", "notes"}
    trained = [stream for stream in streams if not stream.valid]
    assert not {stream.name for stream in trained} & set(held_out)
    assert "prose/1" not in {stream.name for stream in streams}  # too short
    assert len({stream.id for stream in streams}) == len(streams)
    assert max(stream.tokens for stream in streams) <= 1500
    assert [stream.kind for stream in trained[:3]] == ["notes", "prose", "scraps"]
    assert 9000 <= sum(stream.tokens for stream in trained) < 10_500
    assert draw(texts, tiny_base, tmp_path) == streams
    other_seed = draw(texts, tiny_base, tmp_path, Budget(9000, 1500, 1, 16_384, (32, 100), 1))
    assert {stream.id for stream in other_seed}.isdisjoint(stream.id for stream in streams)


def test_a_smaller_budget_still_has_every_kind(texts: Path, tiny_base: Path, tmp_path: Path) -> None:
    small = draw(texts, tiny_base, tmp_path, Budget(600, 1500, 1, 16_384, (32, 100), 0))
    assert {stream.kind for stream in small if not stream.valid} == {"prose", "notes", "scraps"}
    assert max(stream.tokens for stream in small) <= 200
    with pytest.raises(CommandError, match="tokens must be at least 600 for 3 kinds of text, got 599"):
        draw(texts, tiny_base, tmp_path, Budget(599, 1500, 1, 16_384, (32, 100), 0))


def test_an_adapter_is_trained_and_everything_is_written(tiny_base: Path, texts: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "new" / "adapter.safetensors", tmp_path / "work"
    code, output, errors = train(tiny_base, texts, "--out", out, "--work", work, "--adapter", "--rank", 3, *SIZES)
    assert code == 0, errors
    assert {name: list(t.shape) for name, t in load_file(out).items()} == {"down": [64, 3], "up": [3, 64]}
    assert load_adapter(out, 64).up.any()
    manifest: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    assert manifest["arm"] == "adapter"
    assert manifest["best"]["ratio"] < 1
    assert manifest["command"].startswith("imprint train")
    assert {"base", "code", "torch", "hardware", "seconds", "date", "schedule", "budget"} <= manifest.keys()
    assert all(len(stream["sha256"]) == 64 for stream in manifest["streams"])
    assert "about" in output
    records = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert sum("loss" in record for record in records) == manifest["schedule"]["steps"]
    if importlib.util.find_spec("matplotlib"):
        assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    else:
        assert "imprint[plots]" in output
    for stream in manifest["streams"]:
        features = StreamFeatures(work / "features" / stream["id"])
        assert (features.tokens, features.requests) == (stream["tokens"], stream["requests"])


@pytest.fixture(scope="module")
def memory(tiny_base: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a memory without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    out = folder / "memory.safetensors"
    code, _, errors = train(tiny_base, texts, "--out", out, "--work", folder / "work", *SHORT)
    assert code == 0, errors
    return out


def test_a_memory_is_trained(memory: Path) -> None:
    manifest = json.loads(memory.with_suffix(".json").read_text())
    assert manifest["config"] == json.loads(json.dumps(load_memory(memory, hidden_size=64).config.to_dict()))


def test_without_a_rank_the_adapter_is_as_large_as_the_memory(
    memory: Path, tiny_base: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    code, _, errors = train(tiny_base, texts, "--out", out, "--work", tmp_path, *SIZES, "--steps", 1, "--adapter")
    assert code == 0, errors
    sizes = [sum(tensor.numel() for tensor in load_file(file).values()) for file in (memory, out)]
    assert sizes[1] == pytest.approx(sizes[0], abs=64)


def test_a_killed_and_interrupted_run_ends_in_the_same_bits(
    memory: Path, tiny_base: Path, texts: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    for sign, started in ((signal.SIGKILL, "work/features/*"), (signal.SIGINT, "work/runs/*/latest")):
        process = start(tiny_base, texts, "--out", cut / "a.safetensors", "--work", cut / "work", *SHORT)
        while process.poll() is None and not list(cut.glob(started)):
            time.sleep(0.002)
        process.send_signal(sign)
        output, _ = process.communicate()
        if sign == signal.SIGINT and process.returncode:  # the run may have ended before the signal
            assert process.returncode == 130
            assert "The same command goes on" in output
    code, _, errors = train(tiny_base, texts, "--out", cut / "a.safetensors", "--work", cut / "work", *SHORT)
    assert code == 0, errors
    one, other = load_file(cut / "a.safetensors"), load_file(memory)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_two_processes_equal_one_with_twice_the_batch(tiny_base: Path, texts: Path, tmp_path: Path) -> None:
    adapters = []
    for processes, batch in ((1, 2), (2, 1)):
        folder = tmp_path / str(processes)
        arguments = [
            "--out",
            folder / "a.safetensors",
            "--work",
            folder,
            "--adapter",
            "--rank",
            3,
            *SHORT,
            "--batch",
            batch,
        ]
        code, _, errors = train(tiny_base, texts, *arguments, processes=processes)
        assert code == 0, errors
        adapters.append(load_file(folder / "a.safetensors"))
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["{texts}", "--tokens", "100"], "tokens must be at least"),
        (["{texts}", "--request-tokens", "32", "600"], "600 tokens exceed the base's context of 512"),
        (["{texts}/prose/1.txt"], "no text is left to train on"),
        (["{texts}/nowhere"], "no such file or folder"),
    ],
)
def test_a_fault_is_one_line(tiny_base: Path, texts: Path, tmp_path: Path, arguments: list[str], fault: str) -> None:
    given = [argument.format(texts=texts) for argument in arguments]
    sizes = SHORT if "--request-tokens" not in given else SHORT[:4]
    outputs = ["--out", tmp_path / "a.safetensors", "--work", tmp_path, "--adapter"]
    settings = {"MODEL": tiny_base, "THREADS": 1}
    assert fault in run_rejected("train", *outputs, *sizes, *given, settings=settings)


def test_a_base_that_cannot_be_trained_on_is_one_line(tiny_base: Path, texts: Path, tmp_path: Path) -> None:
    capped = tmp_path / "capped"
    random_family_model("gemma3-capped").save_pretrained(capped)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / name, capped / name)
    outputs = ["--out", tmp_path / "a.safetensors", "--work", tmp_path / "work"]
    settings = {"MODEL": capped, "THREADS": 1}
    assert "soft cap" in run_rejected("train", *outputs, *SHORT, str(texts), settings=settings)
    assert not (tmp_path / "work").exists()


def test_a_data_set_that_is_not_there_is_one_line(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # no network access, even with the extra installed
    outputs = ["--out", tmp_path / "a.safetensors", "--work", tmp_path, "--adapter"]
    code, _, errors = train(tiny_base, *outputs, *SHORT, "hf:owner/name")
    assert code == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("imprint: ")]
    assert "owner/name" in line
    assert "Traceback" not in errors


def test_a_data_set_is_read_as_documents(tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with (tmp_path / "train.jsonl").open("w") as file:
        for number in range(80):
            file.write(json.dumps({"body": words(60, f"row {number}")}) + "\n")
    kinds = find_kinds([f"hf:{tmp_path}:::body"], BUDGET)
    streams = draw_streams(kinds, BUDGET, Tokenizer.load(tiny_base), "base", tmp_path / "tokens")
    assert {stream.kind for stream in streams} == {tmp_path.name}
    assert [stream.valid for stream in streams] == [True] + [False] * (len(streams) - 1)
    with pytest.raises(CommandError, match="split train has no column 'text'"):
        draw_streams(find_kinds([f"hf:{tmp_path}"], BUDGET), BUDGET, Tokenizer.load(tiny_base), "base", tmp_path / "t")
