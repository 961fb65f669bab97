"""`imprint fit` and `imprint models` as commands: the memory of a base, its worth, and where a server finds it."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.adaptive_lm import AdaptiveLM
from model.base.checkpoint import fingerprint, load_backbone
from model.memory import Memory, load_memory
from model.memory.initial import default_config, random_memory
from model.text.tokenizer import Tokenizer
from research.evaluation.prequential import new_pool, read
from research.training.features import StreamFeatures, compute_features
from research.training.fit import served_loss
from service.model_loading import choose_memory, fitted_memory_path, memory_file, shipped_name
from service.settings import Settings
from tests.service.cli_in_process import run_rejected
from tests.tiny import TEXT


def imprint(*arguments: object, **settings: object) -> str:
    """Run a command that must succeed, and return what it prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("IMPRINT_")}
    given = {"IMPRINT_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "300"}
    given |= {f"IMPRINT_{name}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "service", *map(str, arguments)]
    ran = subprocess.run(command, env=clean | given, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write one text of sentences that come back."""
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(TEXT.split(), k=9)) for _ in range(40)]
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    file.write_text(". ".join(rng.choices(sentences, k=600)))
    return file


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def output(tiny_base: Path, text: Path, cache: Path) -> str:
    return imprint("fit", tiny_base, "--text", text, "--tokens", 9000, CACHE_DIR=cache)


@pytest.fixture(scope="module")
def fitted(output: str, tiny_base: Path, cache: Path) -> Memory:
    return load_memory(fitted_memory_path(cache, fingerprint(tiny_base)), hidden_size=64)


def test_a_fitted_memory_beats_an_unfitted_one_on_text_that_was_kept_apart(output: str) -> None:
    unfitted, fitted = (float(ratio) for ratio in re.findall(r"memory +× ([0-9.]+)", output))
    assert fitted < unfitted < 1
    assert "Written:" in output and "finds this memory by itself" in output


def test_the_next_start_finds_the_fitted_memory(
    fitted: Memory, tiny_base: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = fingerprint(tiny_base)
    found = choose_memory(Settings(model=str(tiny_base), cache_dir=cache), 64, base)
    assert found.fingerprint() == fitted.fingerprint()
    unfitted = choose_memory(Settings(model=str(tiny_base), cache_dir=tmp_path), 64, base)
    assert unfitted.fingerprint() == random_memory(default_config(64), seed=0).fingerprint()
    assert f"`imprint fit {tiny_base}`" in caplog.text


def test_an_empty_session_of_a_fitted_memory_is_the_base_bit_for_bit(fitted: Memory, tiny_base: Path) -> None:
    lm = AdaptiveLM(load_backbone(tiny_base), fitted)
    pool, ids = new_pool(lm), Tokenizer.load(tiny_base).encode(TEXT)[:64]
    session = pool.open()
    alone = lm.backbone(torch.tensor([ids]), [lm.backbone.new_cache(99)])[0]
    decode_state, _ = lm.block(ids, lm.backbone.new_cache(99), pool, session)
    assert torch.equal(lm.predict([decode_state], pool, [session]), lm.backbone.logits(alone[-1:]))


def test_what_the_command_measures_is_what_is_served(
    fitted: Memory, tiny_base: Path, text: Path, tmp_path: Path
) -> None:
    backbone, tokenizer = load_backbone(tiny_base), Tokenizer.load(tiny_base)
    lm, bos, lengths = AdaptiveLM(backbone, fitted), tokenizer.start_token_id, [200, 150, 250]
    ids = tokenizer.encode(text.read_text()[:4000])[: sum(lengths)]
    compute_features(backbone, ids, lengths, bos, tmp_path / "features")
    measured = served_loss(fitted, StreamFeatures(tmp_path / "features"), backbone.head_matrix)
    pool = new_pool(lm)
    session = pool.open()
    parts = torch.tensor(ids).split(lengths)
    served = -sum(float(read(lm, pool, session, part.tolist(), bos, learn=True).sum()) for part in parts)
    assert measured == pytest.approx(served, rel=0.01)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no .txt, .md or .rst file"),
        ("too short", "must have at least 4 parts of 128 tokens, got 0"),
        (b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_bad_texts_are_named(content: str | bytes | None, words: str, tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    if content is not None:
        (folder / "a.txt").write_bytes(content.encode() if isinstance(content, str) else content)
    settings = {"CACHE_DIR": tmp_path, "THREADS": 1}
    assert words in run_rejected("fit", tiny_base, "--text", folder, settings=settings)
    assert not list(tmp_path.glob("memories/*.safetensors"))


def test_bad_bases_are_named(tmp_path: Path) -> None:
    settings = {"CACHE_DIR": tmp_path}
    assert "/no/such/base" in run_rejected("fit", "/no/such/base", settings=settings)
    assert "a trained memory is shipped" in run_rejected("fit", "smollm2-135m-instruct", settings=settings)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("Qwen/Qwen2.5-Coder-0.5B-Instruct@0123", "qwen2.5-coder-0.5b-instruct"),
        ("/models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "qwen2.5-coder-0.5b-instruct"),
        ("Qwen/Qwen2.5-Coder-1.5B-Instruct", None),
        ("/qwen2.5-coder-0.5b-instruct/other", None),
    ],
)
def test_a_shipped_memory_is_found_by_the_name_of_the_base_or_of_its_file(model: str, name: str | None) -> None:
    assert shipped_name(model) == name
    with memory_file(Settings(model=model)) as path:
        assert (path and path.name) == (name and f"{name}.safetensors") and (path is None or path.is_file())


def test_models_lists_bases_their_memories_and_their_costs_without_a_network(
    fitted: Memory, tiny_base: Path, cache: Path
) -> None:
    printed = imprint("models", MODEL=tiny_base, CACHE_DIR=cache)
    assert f"IMPRINT_MODEL is {tiny_base}; its memory: fitted" in printed
    listed = json.loads(imprint("models", "--json", CACHE_DIR=cache))["models"]
    by_name = {base["name"]: base for base in listed}
    assert by_name["smollm2-135m-instruct"]["memory"] == "shipped"
    assert by_name["Qwen/Qwen2.5-Coder-0.5B-Instruct"]["memory"] == "shipped"
    assert by_name["Qwen/Qwen3-0.6B"]["memory"] == "–"
    for name, base in by_name.items():
        assert name in printed and base["licence"] in printed
        assert base["memory_bytes"] > 4 * base["parameters"] and base["prompt_seconds"] > 0 < base["token_seconds"]
