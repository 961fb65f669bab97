"""Recall: the laws of the generators, the scores, the search, the arms, and the command on a tiny base."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from model.adaptive_lm import AdaptiveLM
from model.base.checkpoint import load_backbone
from model.memory.initial import default_config, random_memory
from model.text.sentence_encoder import SentenceEncoder
from model.text.tokenizer import Tokenizer
from research.corpus import base_folder
from research.estimates import proportion
from research.evaluation.recall import changes, locomo, people, statements, support
from research.evaluation.recall.arms import BatchArm, RecallArm, RetrievalArm, Suggester
from research.evaluation.recall.chapter import chapter, renamed
from research.evaluation.recall.command import RecallOptions, evaluate_recall
from research.evaluation.recall.episodes import EpisodesArm
from research.evaluation.recall.filler import fillers
from research.evaluation.recall.memory import MemoryArm
from research.evaluation.recall.probes import PROBES, ProbeOptions, limited
from research.evaluation.recall.prompt import WORDINGS, with_texts
from research.evaluation.recall.registry import ARMS, EMBEDDER, new_arms
from research.evaluation.recall.scenes import SPLITS, Question, Scene, Split, assistant, user
from research.evaluation.recall.scoring import contains, f1, score_answer
from research.evaluation.recall.search import BM25, Embeddings, Fused, Newest, terms
from research.evaluation.recall.spans import cut_text
from research.evaluation.recall.speaker import Speaker
from research.evaluation.recall.values import Inventor
from service.errors import CommandError
from service.settings import Settings
from tests.model.tiny_encoder import tiny_encoder
from tests.service.cli_in_process import run_rejected

GENERATED = ("people", "numbers", "corrections", "changes", "untold", "support")
CHEAP_ARMS = ("frozen", "memory", "bm25-1", "bm25", "last-tokens", "oracle")
RUN_ARMS = ("frozen", "memory", "bm25", "oracle")  # of the whole command


def scenes(probe: str, split: Split, seed: int = 0) -> list[Scene]:
    return PROBES[probe](ProbeOptions(split, seed, 40, 10_000))


def texts(of: list[Scene]) -> Iterator[str]:
    """Yield everything that is said in scenes."""
    for scene in of:
        yield from (message["content"] for request in scene.requests for message in request)
        yield from (question.text for question in scene.questions)


@pytest.fixture(scope="module")
def speaker(tiny_base: Path) -> Speaker:
    backbone = load_backbone(tiny_base)
    lm = AdaptiveLM(backbone, random_memory(default_config(backbone.config.hidden_size), seed=0))
    return Speaker(lm, Tokenizer.load(tiny_base))


# Generators.


@pytest.mark.parametrize("probe", GENERATED)
def test_a_seed_makes_the_same_scenes_and_another_seed_makes_others(probe: str) -> None:
    assert scenes(probe, "dev") == scenes(probe, "dev")
    assert scenes(probe, "dev") != scenes(probe, "dev", seed=1)


def test_no_template_of_one_split_is_in_another() -> None:
    by_split: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for attribute in people.ATTRIBUTES:
            wording = attribute.wordings[split]
            by_split[split] |= {wording.statement, wording.correction, wording.cue, *wording.questions}
        for topic in (*statements.NUMBERS, *statements.CORRECTIONS):
            by_split[split] |= set(topic.of(split))
        for fact in changes.TOPICS:
            by_split[split] |= set(fact.lines[SPLITS.index(split)])
        number = SPLITS.index(split)
        by_split[split] |= {*support.OPENINGS[number], support.REPLIES[number], *support.PROBLEMS[number]}
        assert len(by_split[split]) > 100
    assert all(not by_split[one] & by_split[other] for one, other in combinations(SPLITS, 2))


@pytest.mark.parametrize("draw", [Inventor.first_name, Inventor.town, Inventor.person, Inventor.company, Inventor.dish])
def test_no_name_of_one_split_is_in_another(draw: Any) -> None:
    """The words of names too: a first name of one split is the first name of nobody in another."""
    drawn: dict[Split, set[str]] = {}
    for split in SPLITS:
        values = [draw(inventor) for inventor in [Inventor(0, split)] for _ in range(60)]
        assert len(set(values)) > 30
        drawn[split] = set(values)
    assert all(not drawn[one] & drawn[other] for one, other in combinations(SPLITS, 2))


@pytest.mark.parametrize("probe", GENERATED)
@pytest.mark.parametrize("split", SPLITS)
def test_every_question_has_its_evidence_among_what_is_taught(probe: str, split: Split) -> None:
    for scene in scenes(probe, split):
        taught = [message["content"] for request in scene.requests for message in request]
        for question in scene.questions:
            if question.label == "untold":
                assert question.evidence == "" and question.answer == changes.UNKNOWN
                continue
            assert contains(question.evidence, question.answer)
            assert question.evidence in taught
            assert question.answer not in question.others
            assert probe == "support" or not contains(question.text, question.answer)
            if question.outdated:  # a correction comes after the statement
                old = max(i for i, text in enumerate(taught) if contains(text, question.outdated))
                assert old < taught.index(question.evidence)


def test_personal_facts_have_people_attributes_questions_and_distractors() -> None:
    found = people.invent_scenes(100, 0, "dev")
    questions = [question for scene in found for question in scene.questions]
    assert len(questions) == 100 * 10 * 4
    assert sum(question.is_cue for question in questions) == 100 * 10
    assert sum(bool(question.outdated) for question in questions) == 100 * 4
    assert sum(bool(question.others) for question in questions) > 0.9 * len(questions)
    kept = limited(found, 50)
    assert sum(len(scene.questions) for scene in kept) == 50
    assert max(len(scene.questions) for scene in kept) == 3


def test_half_of_the_statements_change_and_half_of_the_questions_ask_for_what_was_told() -> None:
    for probe, labels in (("changes", ("changed", "sounds like a change")), ("untold", ("told", "untold"))):
        asked = [question for scene in scenes(probe, "dev") for question in scene.questions]
        counts = Counter(question.label for question in asked)
        assert set(counts) == set(labels) and min(counts.values()) == 20, counts
        assert all(bool(question.outdated) == (question.label == "changed") for question in asked)


def test_numbers_have_three_to_twelve_digits() -> None:
    answers = {question.answer for scene in scenes("numbers", "dev") for question in scene.questions}
    assert {len(answer) for answer in answers} == set(range(3, 13))


# Scores.

CAT = Question("What is my cat called?", "Ildira", "My cat is Ildira.", "self", ("Voralin",), "Tessaka")


@pytest.mark.parametrize(
    ("answer", "right", "fluent_error", "others_value", "outdated"),
    [
        ("Your cat is called Ildira.", True, False, False, False),
        ("ILDIRA'S the one", True, False, False, False),
        ("Your cat is called Voralin.", False, True, True, False),
        ("Your cat is called Tessaka.", False, True, False, True),
        ("Your cat is called Whiskers.", False, True, False, False),
        ("I do not know what your cat is called.", False, False, False, False),
        ("It was Tessaka and is Ildira.", False, True, False, True),
        ("Ildirax", False, False, False, False),
    ],
)
def test_the_scores_of_an_answer(
    answer: str, right: bool, fluent_error: bool, others_value: bool, outdated: bool
) -> None:
    verdict = score_answer(CAT, answer)
    assert (verdict.right, verdict.fluent_error) == (right, fluent_error)
    assert (verdict.others_value, verdict.outdated) == (others_value, outdated)
    assert verdict.found is None


def test_a_number_is_right_whole_or_not_at_all() -> None:
    question = Question("Which code opens the gate?", "482913", "The code is 482913.", "6–8 digits by question")
    assert score_answer(question, "It is 482,913.").right
    assert score_answer(question, "It is 4829135.").fluent_error
    assert score_answer(question, "It is 482914.").fluent_error
    assert not score_answer(question, "I cannot say.").fluent_error


def test_found_means_that_the_evidence_or_the_value_was_read() -> None:
    assert score_answer(CAT, "", ("Something.", "My cat is Ildira.")).found is True
    assert score_answer(CAT, "", ("Something.",)).found is False
    assert score_answer(CAT, "", ()).found is False


def test_f1_counts_common_words_without_articles() -> None:
    assert f1("The red house", "a red house") == 1.0
    assert f1("red", "red house") == pytest.approx(2 / 3)
    assert f1("blue", "red house") == 0.0


def test_the_interval_of_a_share_is_wilsons() -> None:
    assert proportion(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert proportion(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    with pytest.raises(ValueError, match="2 of 1"):
        proportion(2, 1)


# Search.


def test_bm25_equals_its_formula_written_out() -> None:
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(12)]
    stored = [" ".join(rng.choices(vocabulary, k=rng.randrange(2, 9))) for _ in range(40)]
    index = BM25()
    for text in stored:
        index.add(text)
    split = [terms(text) for text in stored]
    mean_length = sum(map(len, split)) / len(split)

    def score(query: str, document: list[str]) -> float:
        total = 0.0
        for word in terms(query):
            n = sum(word in other for other in split)
            idf = math.log(1 + (len(split) - n + 0.5) / (n + 0.5))
            tf = document.count(word)
            total += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(document) / mean_length))
        return total

    for _ in range(10):
        query = " ".join(rng.choices(vocabulary, k=3))
        scores = {i: score(query, document) for i, document in enumerate(split)}
        expected = sorted((i for i in scores if scores[i] > 0), key=lambda i: (-round(scores[i], 9), -i))
        assert index.rank(query, 1000) == expected
        assert index.rank(query, 4) == expected[:4]


def test_ranks_fuse_by_their_reciprocals_and_of_equals_the_newest_is_first() -> None:
    fused = Fused([BM25(), Newest()])
    for text in ("red apple", "green pear", "red pear"):
        fused.add(text)
    assert fused.rank("apple", 3) == [0, 2, 1]
    twice = BM25()
    twice.add("red apple")
    twice.add("red apple")
    assert twice.rank("apple", 2) == [1, 0]


def test_embeddings_rank_by_cosine() -> None:
    index = Embeddings(tiny_encoder(["fox", "hound", "runs", "sleeps"], same=[("fox", "hound")]))
    assert index.rank("the fox runs", 3) == []
    for text in ("fox sleeps", "hound runs", "fox runs"):
        index.add(text)
    assert index.rank("fox runs", 3) == [2, 1, 0]  # of equal ones the newest first


def test_the_encoder_finds_another_wording(encoder_folder: Path) -> None:
    index = Embeddings(SentenceEncoder.load(encoder_folder))
    for text in ("A man plays the guitar.", "The feline is out of doors.", "Rates rose by two percent."):
        index.add(text)
    assert index.rank("The cat sits outside.", 1) == [1]


def test_texts_are_cut_at_sentences_and_nothing_is_lost() -> None:
    text = "One two three. Four five six seven.\n\nEight. " + "word " * 30
    found = list(cut_text(text, lambda piece: len(piece.split()), limit=8))
    assert " ".join(found).split() == text.split()
    assert max(len(piece.split()) for piece in found) <= 8
    assert found[0] == "One two three. Four five six seven."


# Arms.


def test_all_wordings_hold_the_texts_and_the_question() -> None:
    for wording in WORDINGS:
        said = "\n".join(message["content"] for message in with_texts(("first", "second"), "why?", wording))
        assert said.index("first") < said.index("second") < said.index("why?")
    assert with_texts((), "why?") == [user("why?")]


@pytest.mark.parametrize("name", CHEAP_ARMS)
def test_questions_put_together_have_the_answers_that_they_have_alone(speaker: Speaker, name: str) -> None:
    (arm,) = new_arms(speaker, [name], 100)
    assert isinstance(arm, BatchArm)
    arm.forget()
    questions = [f"What did the fox learn on day {i}?" for i in range(5)]
    if name == "oracle":
        arm.evidence = dict.fromkeys(questions, "The fox learned to sleep.")  # type: ignore[attr-defined]
    for i in range(6):
        arm.teach([user(f"The fox learned the way {i} on day {i}.")])
    arm.teach_text("The dog sleeps. " * 20)
    assert arm.ask_all(questions, 8) == [arm.ask(question, 8) for question in questions]
    assert arm.complete_all(questions, 8) == [arm.complete(question, 8) for question in questions]


def test_an_arm_puts_no_more_tokens_than_allowed_and_forgets(speaker: Speaker) -> None:
    for name in ("bm25", "bm25-1", "last-tokens"):
        (arm,) = new_arms(speaker, [name], 60)
        assert isinstance(arm, RetrievalArm)
        for i in range(9):
            arm.teach([user(f"The fox has {i} dogs.")])
        chosen = arm.chosen("Who has dogs?")
        assert 0 < sum(map(speaker.count, chosen)) <= 60
        assert chosen[-1] == "The fox has 8 dogs."  # the newest of equals
        assert len(chosen) == (1 if name == "bm25-1" else len(chosen) > 1 and len(chosen))
        arm.forget()
        assert arm.chosen("Who has dogs?") == ()


def test_the_session_of_episodes_has_the_rows_of_the_memory_and_forgets_all(speaker: Speaker) -> None:
    def rows(arm: MemoryArm) -> dict[str, int]:
        return {name: int((site.physical_cells[arm.session] > 0).sum()) for name, site in arm.pool.sites.items()}

    memory, episodes = new_arms(speaker, ["memory", "episodes"], 60)
    assert isinstance(memory, MemoryArm) and isinstance(episodes, EpisodesArm)
    for arm in (memory, episodes):
        arm.forget()
        arm.teach([user("The fox has nine dogs."), assistant("So it has.")])
    of_memory, of_episodes = rows(memory), rows(episodes)
    assert of_memory["lexical"] > 0 and of_memory.get("episodes", 0) == 0
    assert of_episodes["lexical"] == of_memory["lexical"] and of_episodes["episodes"] == 2
    episodes.forget()
    assert not any(rows(episodes).values())


@pytest.mark.parametrize("name", ["frozen", "memory", "bm25"])
def test_a_suggestion_depends_on_what_was_typed_before_only(speaker: Speaker, name: str) -> None:
    (arm,) = new_arms(speaker, [name], 60)
    assert isinstance(arm, Suggester)
    arm.forget()
    arm.teach_text("The fox learns the way home, and the dog learns to sleep. " * 3)
    ids = speaker.encode("What was said before is said again: the fox learns the way home. " * 20)[:150]
    assert len(ids) == 150
    shown = arm.guess(ids)
    assert len(shown) == len(ids)
    assert arm.guess([*ids[:100], *ids[:50]])[:101] == shown[:101]


# Texts.


def test_names_of_a_text_are_replaced_by_invented_ones() -> None:
    text = "When Alice met Bob, the rose fell. " * 6 + "Then Rose saw Alice and Rose ran. " * 6
    new, names = renamed(text, Inventor(0, "dev"))
    assert "Alice" not in new
    assert "Rose" in new  # also a word in lower case
    assert all(name in new for name in names)


def test_a_chapter_and_fillers_are_made_without_texts(speaker: Speaker) -> None:
    book = chapter([], speaker.tokenizer, 256, 0, "dev")
    assert len(book.names) > 5
    assert len(book.typed) == 4
    made = fillers([], speaker.tokenizer, 1000, 0)
    assert sum(filler.tokens for filler in made) >= 1000
    assert made == fillers([], speaker.tokenizer, 1000, 0)


def talk_file(folder: Path) -> Path:
    """Write a conversation of four turns in the format of LoCoMo."""
    said = [
        ("Ann", "I bought a blue kite."),
        ("Ben", "We sold the boat."),
        ("Ann", "It rains."),
        ("Ben", "Good night."),
    ]
    turns = [{"speaker": who, "dia_id": f"D1:{i}", "text": text} for i, (who, text) in enumerate(said)]
    questions = [
        {"question": "Which kite did Ann buy?", "answer": "blue", "evidence": ["D1:0"], "category": 4},
        {"question": "What fell and was sold?", "answer": "rain, boat", "evidence": ["D1:1", "D1:2"], "category": 1},
        {"question": "Who?", "evidence": ["D1:1"], "category": 5},
    ]
    path = folder / "talk.json"
    path.write_text(json.dumps([{"sample_id": "one", "conversation": {"session_1": turns}, "qa": questions}]))
    return path


def test_evidence_of_a_conversation_is_counted_by_turn(tmp_path: Path, speaker: Speaker) -> None:
    talks = locomo.read_conversations(talk_file(tmp_path))
    arm = RetrievalArm(speaker, "bm25", "", BM25)
    found = locomo.evidence_shares(arm, talks)
    assert found["single-hop"]["1"] == [1.0]
    assert found["multi-hop"]["4"] == [0.5]
    (scene,) = locomo.scenes(talks)
    assert [question.answer for question in scene.questions] == ["blue"]
    (tmp_path / "bad.json").write_text('[{"qa": 1}]')
    with pytest.raises(CommandError, match="no LoCoMo file"):
        locomo.read_conversations(tmp_path / "bad.json")


# The command.


def run(
    tiny_base: Path, out: Path, *, probes: tuple[str, ...], arms: tuple[str, ...], locomo_file: Path
) -> dict[str, Any]:
    settings = Settings(model=str(tiny_base), recall_encoder="none")
    assert base_folder(settings) == tiny_base
    data = ProbeOptions("dev", 0, 5, 4, locomo_file)
    evaluate_recall(settings, [], RecallOptions(probes, arms, (0, 300), 60, data, out))
    results: dict[str, Any] = json.loads((out / "recall.json").read_text())
    return results


def test_all_probes_run_on_a_tiny_base_and_resume(tiny_base: Path, tmp_path: Path) -> None:
    file = talk_file(tmp_path)
    first = run(tiny_base, tmp_path, probes=("all",), arms=RUN_ARMS, locomo_file=file)
    by_key = {(f["probe"], f["distance"], f["label"], f["arm"]): f for f in first["figures"]}
    for probe in (*GENERATED, "locomo"):
        for arm in RUN_ARMS:
            figure = by_key[probe, 300, "all", arm]["right"]
            assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
            assert figure["n"] == (1 if probe == "locomo" else 4)
        assert by_key[probe, 0, "all", "oracle"]["found"]["value"] == 1.0
        assert by_key[probe, 0, "all", "frozen"]["found"] is None
    assert set(first["evidence"]) == {"bm25"}
    assert set(first["suggestions"]) == {"frozen", "memory", "bm25"}
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    assert "| oracle |" in (tmp_path / "recall.md").read_text()
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    again = run(tiny_base, tmp_path, probes=("all",), arms=RUN_ARMS, locomo_file=file)
    assert (again["answers"], again["suggestions"]) == (first["answers"], first["suggestions"])
    assert stored == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}


@pytest.mark.parametrize("name", ["summary", "full-history"])
def test_costly_arms_answer(speaker: Speaker, name: str) -> None:
    (arm,) = new_arms(speaker, [name], 100)
    assert name not in {arm.name for arm in new_arms(speaker, [], 40)}
    taught: RecallArm = arm
    taught.forget()
    taught.teach_text("The fox learns. " * 10)
    answer = taught.ask("Who learns?", 8)
    assert answer.spans
    assert answer == taught.ask("Who learns?", 8)


def test_every_arm_has_its_name(speaker: Speaker) -> None:
    names = [name for name in ARMS if name not in EMBEDDER]
    assert [arm.name for arm in new_arms(speaker, names, 40)] == names
    with pytest.raises(CommandError, match="IMPRINT_RECALL_ENCODER=none"):
        new_arms(speaker, EMBEDDER, 40)
    speaker = Speaker(speaker.lm, speaker.tokenizer, tiny_encoder(["fox"]))
    assert [arm.name for arm in new_arms(speaker, list(ARMS), 40)] == list(ARMS)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--recall", "people,guess"], "guess"),
        (["--recall", "people", "--arms", "magic"], "magic"),
        (["--recall", "people", "--recall-split", "test"], "test"),
        (["--recall", "people", "--recall-after", "soon"], "soon"),
        (["--recall", "locomo", "--arms", "frozen"], "recall-locomo is needed"),
        ([], "texts are needed"),
    ],
)
def test_a_fault_is_one_line(tiny_base: Path, tmp_path: Path, arguments: list[object], fault: str) -> None:
    assert fault in run_rejected("eval", "--out", tmp_path, *arguments, settings={"MODEL": tiny_base})
