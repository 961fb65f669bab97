"""`imprint bench`: statistics of timings, targets, and a whole small run on real processes."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import peers, report
from benchmarks.run import Options, plan, run, sizes_for
from benchmarks.scenarios import gaps_between, step_time
from benchmarks.stream_timing import PeerError, StreamTiming, events
from benchmarks.targets import TARGETS, PerformanceTarget
from benchmarks.testbed import QUICK
from benchmarks.texts import random_session
from model.memory import MemoryConfig, Pool, SiteConfig, choose_backend
from research.estimates import mean, percentiles, ratio
from service.base_cache import resolve_gguf
from service.engine.stored_rows import as_tensors, is_valid_site
from service.errors import CommandError
from service.settings import Settings
from service.versions.export_file import pack_session, read_export, unpack_session

TINY = replace(
    QUICK, prompt=16, tokens=6, prefill=64, streams=(3,), lengths=(4, 8), stream_tokens=4, batches=(1, 16),
    batch_tokens=4, sessions=12, session_turns=1, states=(1 / 64, 1 / 16), rate=20.0, rate_s=0.2, long_prompt=128,
    running=48, quiet_s=0.05, learned=64, rounds=(1, 1),
)  # fmt: skip


# --- statistics of timings -------------------------------------------------------------------------------------------


def test_what_slows_a_round_slows_both_arms_and_leaves_their_ratio() -> None:
    slowness = np.array([1.0, 3.0, 0.5, 8.0])
    found = ratio(list(2 * slowness), list(slowness))
    assert (found.value, found.low, found.high, found.rounds) == (2, 2, 2, 4)


def test_an_interval_is_students_over_the_logarithms_of_the_rounds() -> None:
    found = mean([1.0, math.e, math.e**2])  # logarithms 0, 1, 2: mean 1, standard deviation 1, t(2 degrees) 4.303
    assert found.value == pytest.approx(math.e)
    assert found.low == pytest.approx(math.exp(1 - 4.303 / math.sqrt(3)))
    assert found.high == pytest.approx(math.exp(1 + 4.303 / math.sqrt(3)))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng, truth = np.random.default_rng(0), 1.3
    covered = 0
    for _ in range(1000):
        found = mean(list(truth * np.exp(0.2 * rng.standard_normal(5))))
        assert found.low is not None and found.high is not None
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / 1000 <= 0.97


def test_one_round_has_no_interval_and_no_round_no_mean() -> None:
    assert mean([2.0]).low is None
    with pytest.raises(ValueError, match="positive"):
        mean([])
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


def test_percentiles_are_those_of_the_whole_sample() -> None:
    assert percentiles(list(range(101))) == {"p50": 50, "p95": 95, "p99": 99}


def test_a_step_is_timed_while_all_streams_are_at_work() -> None:
    """Time two streams with a token per second each while both run. A stream alone is much faster."""
    first = StreamTiming(0, [0, 0.1, 0.2, 1, 2, 3, 4, 4.1, 4.2], 5, 9)
    second = StreamTiming(0, [1, 2, 3, 4], 5, 4)
    assert step_time([first, second], 1) == pytest.approx(1.0)


def test_a_gap_counts_where_it_overlaps_the_time_and_silence_counts_whole() -> None:
    talking, silent = StreamTiming(0, [0.0, 1.0, 3.0, 3.5, 9.0], 9, 5), StreamTiming(0, [0.5], 9, 1)
    assert gaps_between([talking], 2.0, 3.2) == [2.0, 0.5]
    assert gaps_between([silent], 2.0, 6.0) == [4.0]


async def test_events_are_read_however_a_stream_is_cut() -> None:
    expected = [{"choices": [{"text": "a b"}]}, {"choices": [], "usage": {"completion_tokens": 1}}]
    stream = (
        b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in expected) + b": ping\n\ndata: [DONE]\n\n"
    )
    for size in (1, 7, len(stream)):

        async def parts(size: int = size) -> AsyncIterator[bytes]:
            for start in range(0, len(stream), size):
                yield stream[start : start + size]

        assert [event async for event in events(parts())] == expected


# --- random sessions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lexical", "hidden"])
def test_a_random_session_is_one_that_a_memory_could_have_written(kind: Any) -> None:
    slots, cell = (400, 4) if kind == "lexical" else (400, 1)
    site = SiteConfig("site", kind, slots=slots, cell=cell, k=2, width=8, layer=-1)
    config = MemoryConfig(64, (site,))
    session = random_session(config, "random", "sha256:00", 1000, vocab_size=50)
    assert session.meta.rows == slots  # every slot
    _, sites = unpack_session(*read_export(pack_session(session, ""), ""), config, vocab_size=50)
    assert all(is_valid_site(name, batch, config, 50) for name, batch in sites.items())
    pool = Pool(config, rows=slots, sessions=1, backend=choose_backend(torch.device("cpu")))
    index = pool.open(as_tensors(sites))
    assert pool.num_rows(index) == {"site": slots}
    dumped = pool.dump(index)["site"]
    assert np.array_equal(dumped.data.numpy(), session.sites["site"].data)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run every scenario once, on a real server of the tiny base and a real `transformers` process."""
    out = tmp_path_factory.mktemp("bench")
    page = out / "page.md"
    page.write_text(f"# Before\n\n{report.BEGIN}\nold\n{report.END}\n\nbehind\n")
    peer_selection = peers.PeerSelection(["transformers", "llama.cpp"], llama_server=Path("no-server"))
    options = Options(out, TINY, minutes=0.1, threads=1, peer_selection=peer_selection, page=page)
    return out, run(Settings(model=str(tiny_base)), options)


def test_every_scenario_is_measured_for_every_arm_that_is_there(whole: tuple[Path, dict[str, Any]]) -> None:
    found = whole[1]["scenarios"]
    assert list(found) == [
        "single", "prefill", "streams-3", "batch-1", "batch-16",
        "sessions", "history", "states", "rate", "interruption", "acts", "masked-1", "masked-16",
    ]  # fmt: skip
    assert list(found["masked-16"]["arms"]) == ["plain", "masked"]
    assert sorted(found["acts"]["arms"]) == ["bandit", "bandit-10", "choices", "labels", "regression"]
    assert list(found["single"]["arms"]) == ["off", "predict", "both", "transformers"]
    assert list(found["prefill"]["arms"]) == ["off", "both", "transformers"]
    assert list(found["sessions"]["arms"]) == ["5", "many"]
    assert whole[1]["about"]["model"] == "tiny" and "serving an unfitted one" in (whole[0] / "imprint.log").read_text()
    assert found["history"]["rows"] == {"1,000": 1000, "1,000,000": 51_200}
    for scenario in found.values():
        for arm in scenario["arms"].values():
            assert all(len(values) >= 1 and min(values) > 0 for values in arm.values())


def test_a_missing_peer_is_reported_with_the_reason(whole: tuple[Path, dict[str, Any]]) -> None:
    missing = whole[1]["missing"]
    assert "--llama-server must be a program" in missing["llama.cpp"]
    assert missing["vllm"] == "it was not asked for"
    rows = {row["what"]: row for row in whole[1]["reach"]}
    against = rows["single-stream decode ÷ llama.cpp server (same GGUF)"]
    assert against["measured"] is None and "--llama-server" in against["reached"]
    assert rows["GPU: 256 streams, tokens/s with memory on ÷ off"]["measured"] is None or torch.cuda.is_available()
    assert rows["decode ÷ `transformers` generate, batch 1"]["measured"]["value"] > 0


def test_each_measured_target_describes_its_limit(whole: tuple[Path, dict[str, Any]]) -> None:
    measured = [row for row in whole[1]["reach"] if row["measured"] is not None]
    assert len(measured) >= 6
    for row in measured:
        assert row["limit"], row["what"]


def test_the_results_are_written_and_the_page_is_changed_between_its_marks_alone(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    out, results = whole
    assert json.loads((out / "results.json").read_text()) == results == json.loads((out / "page.json").read_text())
    page = (out / "page.md").read_text()
    assert page.startswith(f"# Before\n\n{report.BEGIN}\n") and page.endswith(f"{report.END}\n\nbehind\n")
    assert "old" not in page and "| off |" in page and "decode 1, predict" in page
    assert str(out) not in page
    for name in ("speed", "state", "latency"):
        assert (out / "img" / f"page-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](img/page-{name}.png)" in page


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["single", "nothing"]}, "scenarios must be among single, prefill, .*got nothing"),
        (
            {"peer_selection": peers.PeerSelection(["ollama"])},
            "peers must be among transformers, llama.cpp, vllm or none, got ollama",
        ),
        ({"page": Path("no-page.md")}, "cannot read no-page.md"),
    ],
)
def test_invalid_options_are_refused_before_anything_starts(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    options = Options(tmp_path / "out", TINY, minutes=0.1)
    with pytest.raises(CommandError, match=message):
        run(Settings(), replace(options, **changes))
    assert not options.out.exists()


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# nothing")
    with pytest.raises(CommandError, match="must have the lines"):
        report.check_page(page)


async def test_the_error_of_a_process_that_ends_early_has_its_last_log_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such file', flush=True); raise SystemExit(3)"]
    process = peers.Process(command, tmp_path / "log", os.environ)
    with pytest.raises(PeerError, match="it did not start; the end of its log: no such file"):
        await process.ready("it", "http://127.0.0.1:9/health")


def test_a_benchmark_takes_no_addresses_keys_or_limits_from_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEYS", "API_KEYS_FILE", "REDIS_URL", "TENANT_BYTES", "PORT", "SESSION_TTL_S", "PROOF_RATE"):
        monkeypatch.setenv(f"IMPRINT_{name}", "1")
    kept = {name for name in peers.measured_environment(2) if name.startswith("IMPRINT_")}
    assert "IMPRINT_PROOF_RATE" in kept
    assert not kept & {f"IMPRINT_{name}" for name in ("API_KEYS", "API_KEYS_FILE", "REDIS_URL", "TENANT_BYTES", "PORT")}
    assert peers.measured_environment(2)["OMP_NUM_THREADS"] == "2"


def test_a_base_that_is_no_gguf_file_has_none(tmp_path: Path) -> None:
    assert resolve_gguf(str(tmp_path), tmp_path, progress=print) is None
    file = tmp_path / "base.gguf"
    file.touch()
    assert resolve_gguf(str(file), tmp_path, progress=print) == file


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "reached"),
    [([0.985, 0.99, 0.995], "aim"), ([1.04, 1.05, 1.06], "least"), ([1.19, 1.2, 1.21], "no"), ([0.5, 1.0, 2.0], "aim?"),
     ([0.6, 1.2, 2.4], "no?"), ([1.0], "aim?")],
)  # fmt: skip
def test_a_target_is_reached_for_sure_only_with_the_whole_interval(rounds: list[float], reached: str) -> None:
    target = PerformanceTarget("cost", 1.1, 1.02, False, lambda results: mean(rounds), lambda results: "")
    assert target.evaluate({})["reached"] == reached


def test_a_gpu_measures_the_targets_that_need_a_gpu() -> None:
    assert "batch-256" in plan(sizes_for(Settings(device="cuda"), quick=False))
    about = {"device": "cuda", "weight_bytes": 270e6, "read_bytes_per_s": 2.7e12}  # read in 0.1 ms
    measured = {
        "single": {"off": {"s_per_token": [0.4e-3]}},
        "batch-256": {"off": {"s_per_step": [4.0e-3]}, "predict": {"s_per_step": [5.0e-3]}},
        "streams-64": {"off": {"tokens_per_s": [300.0]}, "vllm": {"tokens_per_s": [200.0]}},
    }
    scenarios = {name: {"arms": arms} for name, arms in measured.items()}
    results = {"about": about, "missing": {}, "scenarios": scenarios, "profile": {}}
    gpu = [target for target in TARGETS if target.what.startswith("GPU")]
    assert [target.value(results).value for target in gpu] == pytest.approx([4.0, 0.8, 1.5])
    reached = [target.evaluate(results | {"about": about | {"device": "cpu"}})["reached"] for target in gpu]
    assert reached == ["not measured: there was no GPU"] * 3
