"""The probes: facts, keystrokes, cost, poison and long sessions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from model.adaptive_lm import EMPTY_SESSION, AdaptiveLM
from model.base.checkpoint import load_backbone
from model.memory.initial import default_config, random_memory
from model.text.tokenizer import Tokenizer
from research.evaluation.cost import learning_cost
from research.evaluation.facts import Fact, FactRecall, invent_facts, recall
from research.evaluation.keystrokes import greedy_predictions, keystrokes, saved_share
from research.evaluation.long import LongRun, ratio_between, read_long
from research.evaluation.poison import harm, poison_streams
from research.evaluation.prequential import read, read_passage

BOS = 1
REPETITIONS = 8  # enough for a memory whose trust is low at first


@pytest.fixture(scope="module")
def lm(tiny_base: Path) -> AdaptiveLM:
    backbone = load_backbone(tiny_base)
    return AdaptiveLM(backbone, random_memory(default_config(backbone.config.hidden_size), seed=0))


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.load(tiny_base)


def request(seed: int, size: int = 60) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(3, 300, (size,), generator=generator).tolist()
    return ids


def test_invented_facts_differ_and_do_not_change() -> None:
    facts = invent_facts(48)
    assert facts == invent_facts(48)
    assert facts != invent_facts(48, seed=1)
    for field in ("cue", "paraphrase", "answer"):
        assert len({getattr(fact, field) for fact in facts}) == 48
    assert len({fact.cue.split()[1] for fact in facts}) >= 10
    assert all(fact.sentence == f"{fact.cue} {fact.answer}." for fact in facts)
    assert all(fact.answer not in fact.cue + fact.paraphrase for fact in facts)


def test_a_fact_is_recalled_token_by_token_or_not_at_all(lm: AdaptiveLM) -> None:
    pool = lm.new_pool(rows=200_000, sessions=4)
    session = pool.open()
    ids = request(0, 20)
    for _ in range(REPETITIONS):
        read(lm, pool, session, ids, BOS, learn=True)
    state = pool.dump(session)
    assert recall(lm, pool, session, ids[:12], ids[12:], BOS)
    assert not recall(lm, pool, session, ids[:12], [*ids[12:-1], (ids[-1] + 1) % 300], BOS)
    assert not recall(lm, pool, EMPTY_SESSION, ids[:12], ids[12:], BOS)
    assert all(torch.equal(rows.data, state[name].data) for name, rows in pool.dump(session).items())


def test_recall_is_asked_at_each_distance_that_the_fillers_reach(lm: AdaptiveLM, tokenizer: Tokenizer) -> None:
    facts = [
        Fact("The keeper of the fox is", "The fox is kept by", "Vorlund"),
        Fact("The dog is", "A dog is", "Tessel"),
    ]
    it = FactRecall(lm, tokenizer.encode, BOS, facts)
    fillers = [read_passage(lm.backbone, request(seed), BOS) for seed in range(4)]
    steps: list[int] = []
    found = it.run(fillers, (0, 100, 240, 241), times=REPETITIONS, progress=steps.append)
    assert set(found) == {"0", "100", "240"}
    assert sum(steps) == 240
    assert found["0"]["verbatim"] == 1
    assert it.shares() == {"verbatim": 0, "paraphrased": 0}


def test_the_rule_of_keystrokes() -> None:
    typed = [b"The", b" light", b"house", b" stands", b".", b" \xc3\xa9t\xc3\xa9", b" end"]
    nothing = [b"x"] * len(typed)
    assert keystrokes(typed, [b" "] * 7) == (0, 30)
    assert keystrokes(typed, typed) == (2 + 10 + 6 + 0 + 3, 30)  # one key a word; the last word is typed
    assert keystrokes(typed, nothing) == (0, 30)
    shown = list(typed)
    shown[1] = b" dark"  # the first part has to be typed, the rest is offered
    assert keystrokes(typed, shown)[0] == 21 - 10 + 4
    shown = list(typed)
    shown[2] = b"ning"
    assert keystrokes(typed, shown)[0] == 21 - 10
    shown = list(typed)
    shown[3] = b"s"  # " lighthouses" is offered
    assert keystrokes(typed, shown)[0] == 21 - 10 - 6
    assert keystrokes([], []) == (0, 0)


def test_a_memory_saves_keys_on_what_it_has_read(lm: AdaptiveLM, tokenizer: Tokenizer) -> None:
    pool = lm.new_pool(rows=200_000, sessions=4)
    session = pool.open()
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog and learns the way home. " * 3)
    frozen = read_passage(lm.backbone, ids, BOS)
    assert (
        greedy_predictions(lm, pool, EMPTY_SESSION, ids, BOS) == lm.backbone.logits(frozen.states).argmax(-1).tolist()
    )
    for _ in range(REPETITIONS):
        read(lm, pool, session, ids, BOS, learn=True)
    shares = [
        saved_share(ids, greedy_predictions(lm, pool, s, ids, BOS), tokenizer.token_bytes)
        for s in (EMPTY_SESSION, session)
    ]
    assert shares[0] < 0.1
    assert shares[1] > 0.3


def test_cost_is_measured_in_turns(lm: AdaptiveLM) -> None:
    steps: list[int] = []
    found = learning_cost(lm, [request(0), request(1)], BOS, steps=2, progress=steps.append)
    assert steps == [1, 1]
    assert all(value > 0 for value in found.values())
    assert {"observe_over_prefill", "observe_over_score_frozen", "decode_over_frozen"} <= set(found)


def test_a_long_session_tells_what_fills_it(lm: AdaptiveLM) -> None:
    passages = [read_passage(lm.backbone, request(seed % 3), BOS) for seed in range(6)]
    steps: list[int] = []
    run = read_long(lm, passages, BOS, steps.append)
    assert run.position == [0, 60, 120, 180, 240, 300]
    assert run.tokens == 360
    assert steps == [1] * 6
    assert run.rows == sorted(run.rows)
    assert run.rows[1] > run.rows[0] > 0
    assert run.norm[5] > run.norm[0] > 0
    assert run.state_bytes > run.rows[-1]
    assert ratio_between(run, 180, 360) < 1


def test_ratios_between_positions() -> None:
    run = LongRun(position=[0, 10, 20], frozen=[2.0, 2.0, 2.0], adapted=[2.0, 1.0, 0.5])
    assert ratio_between(run, 10, 30) == pytest.approx(math.exp(-1.25))
    assert math.isnan(ratio_between(run, 30, 40))


def test_poisons_are_what_they_are_called() -> None:
    streams = poison_streams(300, 64)
    assert streams == poison_streams(300, 64)
    assert all(len(ids) == 64 and all(0 <= i < 300 for i in ids) for ids in streams.values())
    assert len(set(streams["one token repeated"])) == 1
    context = streams["alternating continuations"][:7]
    assert streams["alternating continuations"][8:15] == context
    assert streams["alternating continuations"][7] != streams["alternating continuations"][15]


def test_harm_is_what_a_poisoned_session_loses(lm: AdaptiveLM) -> None:
    passages = [read_passage(lm.backbone, request(seed), BOS) for seed in (1, 2)]
    reported: list[int] = []
    found = harm(lm, {"text": passages}, BOS, tokens=128, window=64, progress=reported.append)
    assert list(found) == list(poison_streams(300, 1))
    assert sum(reported) == 3 * 2
    pool = lm.new_pool(rows=200_000, sessions=3)
    session = pool.open()
    for start in (0, 64):
        read(
            lm,
            pool,
            session,
            poison_streams(lm.backbone.config.vocab_size, 128)["random tokens"][start : start + 64],
            BOS,
            learn=True,
        )
    lost = sum(
        float((p.log_probs - read(lm, pool, session, p.targets.tolist(), BOS, learn=True)).sum()) for p in passages
    )
    assert found["random tokens"]["text"] == pytest.approx(lost / 120, abs=1e-4)
