"""The episodic memory: words without decoding, search, what a request reads, and keys and values hot or cold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.adaptive_lm import AdaptiveLM
from model.base.kv_cache import DenseCache
from model.base.rotary import apply_rotary
from model.episodes import (
    MAX_EPISODES,
    MEANINGS,
    READINGS,
    RUN_EPISODES,
    SITE,
    SLOTS,
    SPAN_TOKENS,
    Episode,
    Episodes,
    RecallRequest,
)
from model.memory import Draft, Pool
from model.memory.episodic.choice import changed_value
from model.memory.episodic.layout import LENGTH, ORDINAL
from model.memory.episodic.lexicon import Lexicon, load_lexicon, save_lexicon, shipped_lexicon
from model.memory.episodic.search import cosines, count_words, counts_reference, query_words
from model.memory.episodic.word_tables import build_tables, cut_spans, is_question, words_of
from model.text.sentence_encoder import SentenceEncoder
from tests.model.tiny_encoder import tiny_encoder
from tests.model.tiny_lm import LEXICAL, VOCAB, build, new_pool, text, tiny_backbone

WORDS = [
    "my",
    "cat",
    "is",
    "called",
    "pixel",
    "luna",
    "dog",
    "rex",
    "now",
    "what",
    "the",
    "lives",
    "in",
    "oslo",
    "rome",
]
WORDS += ["pet", "anna", "ben", "a", "colour", "teal", "bus", "leaves", "at", "nine", "hat", "Luna"]
WORDS += [
    "i",
    "live",
    "moved",
    "to",
    "where",
    "do",
    "our",
    "club",
    "meets",
    "sister",
    "locker",
    "number",
    "how",
    "old",
    "paint",
    "can",
    "you",
]
MARKS = (".", "?", "\n", "\n\n", "!", ",", "s", "'")
# Every word with and without a space before it, as a tokenizer has them, then the marks.
VOCABULARY = [b"", *(f"{space}{word}".encode() for word in WORDS for space in ("", " ")), *map(str.encode, MARKS)]
TABLES = build_tables([*VOCABULARY, *([b""] * (VOCAB - len(VOCABULARY)))])
IDS = {token: number for number, token in enumerate(VOCABULARY)}
HEADER = (90, 91, 92)
LEXICON = shipped_lexicon()

tokens = st.lists(st.integers(0, VOCAB - 1), max_size=SPAN_TOKENS)


def ids(sentence: str) -> list[int]:
    """Return the tokens of words and marks with spaces between."""
    return [IDS[part.encode()] if part in MARKS else IDS[b" " + part.encode()] for part in sentence.split(" ")]


def decode(token_ids: Sequence[int]) -> str:
    return b"".join(VOCABULARY[token] for token in token_ids).decode()


def new_lm(encoder: SentenceEncoder | None = None) -> AdaptiveLM:
    """Return a tiny model that keeps episodes; without an encoder it finds them by their words."""
    backbone = tiny_backbone()
    episodes = Episodes(backbone, TABLES, LEXICON, decode, encoder, hot_bytes=2**20)
    return AdaptiveLM(backbone, build(backbone, LEXICAL).memory, episodes=episodes)


@pytest.fixture(scope="module")
def lm() -> AdaptiveLM:
    return new_lm()


@pytest.fixture
def pool(lm: AdaptiveLM) -> Pool:
    return new_pool(lm)


def episodes_of(lm: AdaptiveLM) -> Episodes:
    assert lm.episodes is not None
    return lm.episodes


def keep(lm: AdaptiveLM, draft: Draft, token_ids: Sequence[int], learn: Sequence[bool], version: int = 1) -> None:
    episodes_of(lm).write(draft, episodes_of(lm).cut(token_ids, learn), version=version)


def teach(lm: AdaptiveLM, pool: Pool, session: int, *sentences: str) -> None:
    """Keep each sentence as an episode of a version of its own."""
    for version, sentence in enumerate(sentences, 1):
        draft, token_ids = pool.draft(session), ids(sentence)
        keep(lm, draft, token_ids, [True] * len(token_ids), version)
        draft.commit()


def ask(lm: AdaptiveLM, pool: Pool, session: int, sentence: str, max_tokens: int = 64) -> list[list[int]]:
    question = ids(sentence)
    request = RecallRequest(1, (0, len(question)), max_tokens, HEADER)
    return [list(episode.token_ids) for episode in episodes_of(lm).find(pool, session, question, request)]


def test_a_word_is_the_same_however_its_tokens_are_cut_and_written() -> None:
    def hashes(*parts: bytes) -> list[int]:
        tables = build_tables(parts)
        return words_of(range(len(parts)), tables)

    assert hashes(b" Pixel") == hashes(b"pi", b"xel") == hashes(b" P", b"ixels")
    assert hashes(b"cat", b"'", b"s") == [*hashes(b"cat"), *hashes(b"s")]
    assert hashes(b" cat", b" dog") == [*hashes(b"cat"), *hashes(b"dog")]
    assert len(set(hashes(b" 12", b" 21", b" 1", b"2"))) == 2


@settings(deadline=None)
@given(st.lists(tokens, min_size=1, max_size=8), st.lists(st.integers(1, len(VOCABULARY) - 1), min_size=1))
def test_the_compiled_word_counts_equal_the_reference(rows: list[list[int]], asked: list[int]) -> None:
    query = query_words(asked, TABLES)
    padded = np.array([row + [0] * (SPAN_TOKENS - len(row)) for row in rows], np.int32)
    lengths = np.array([len(row) for row in rows], np.int32)
    counts, sizes = count_words(padded, lengths, query, TABLES)
    expected_counts, expected_sizes = counts_reference(padded, lengths, query, TABLES)
    assert (counts == expected_counts).all() and (sizes == expected_sizes).all()


@settings(deadline=None)
@given(st.lists(st.integers(0, VOCAB - 1), max_size=300))
def test_spans_cover_a_text_in_order_and_are_bounded(token_ids: list[int]) -> None:
    spans = cut_spans(token_ids, 0, len(token_ids), TABLES, SPAN_TOKENS)
    assert [i for start, stop in spans for i in range(start, stop)] == list(range(len(token_ids)))
    assert all(0 < stop - start <= SPAN_TOKENS for start, stop in spans)


def test_a_span_ends_where_a_paragraph_does() -> None:
    token_ids = ids(" ".join(["my cat is called pixel ."] * 8 + ["\n\n"] + ["a dog lives in oslo ."] * 4))
    assert cut_spans(token_ids, 0, len(token_ids), TABLES, SPAN_TOKENS)[0] == (0, token_ids.index(IDS[b"\n\n"]) + 1)


def test_only_a_single_sentence_that_asks_is_a_question() -> None:
    assert is_question(ids("what is the cat called ?"), TABLES)
    assert is_question(ids("what is the cat called ? \n"), TABLES)
    assert not is_question(ids("my cat is called pixel ."), TABLES)
    assert not is_question(ids("my cat is called pixel . what is the dog called ?"), TABLES)


def test_a_question_finds_the_episode_that_has_its_words(lm: AdaptiveLM, pool: Pool) -> None:
    session = pool.open()
    teach(lm, pool, session, "my cat is called pixel .", "the bus leaves at nine .", "anna lives in oslo .")
    assert ask(lm, pool, session, "what is my cat called ?") == [ids("my cat is called pixel .")]
    assert ask(lm, pool, session, "the bus ?") == [ids("the bus leaves at nine .")]
    assert ask(lm, pool, session, "hat ?") == []
    assert ask(lm, pool, 0, "what is my cat called ?") == []


def test_what_stands_beside_a_good_match_ranks_before_what_does_not(lm: AdaptiveLM, pool: Pool) -> None:
    session = pool.open()
    teach(lm, pool, session, "a bus leaves", "my hat", "the cat lives in oslo", "teal", "my cat", "at nine", "the dog")
    found = episodes_of(lm).rank(pool, session, ids("what cat lives in oslo"), 7)
    assert [episode.ordinal for episode in found[:4]] == [3, 5, 4, 2]  # 4 stands beside both, 2 beside one
    assert len({episode.ordinal for episode in found}) == 7
    for number in range(3):
        few = pool.open()
        teach(lm, pool, few, *["the cat"] * number)
        assert len(episodes_of(lm).rank(pool, few, ids("what cat"), 7)) == number


def test_of_statements_under_one_cue_the_newest_is_read(lm: AdaptiveLM, pool: Pool) -> None:
    session = pool.open()
    teach(lm, pool, session, "my cat is called pixel .", "anna lives in oslo .", "my cat is called luna now .")
    assert ask(lm, pool, session, "what is my cat called ?") == [ids("my cat is called luna now .")]


def test_neither_a_question_nor_what_the_prompt_has_is_read(lm: AdaptiveLM, pool: Pool) -> None:
    session = pool.open()
    teach(lm, pool, session, "what is my cat called ?", "my cat is called pixel .")
    assert ask(lm, pool, session, "what is my cat called ?") == [ids("my cat is called pixel .")]
    assert ask(lm, pool, session, "my cat is called pixel . what is my cat called ?") == []


def test_a_statement_reads_only_what_has_a_name_of_it(lm: AdaptiveLM, pool: Pool) -> None:
    session = pool.open()
    teach(lm, pool, session, "ben lives in oslo .", "Luna lives in rome .")
    assert ask(lm, pool, session, "what lives in oslo ?") == [ids("ben lives in oslo .")]
    assert ask(lm, pool, session, "anna lives in oslo .") == []
    assert ask(lm, pool, session, "now Luna lives in oslo .") == [ids("Luna lives in rome .")]


def test_a_change_in_other_words_is_read_in_the_place_of_what_it_changes() -> None:
    lm = new_lm(tiny_encoder(WORDS, same=[("live", "moved")]))
    pool = new_pool(lm)
    session = pool.open()
    teach(lm, pool, session, "i live in oslo .", "our club meets in oslo .", "i moved to rome .")
    assert ask(lm, pool, session, "where do i live ?") == [ids("i moved to rome .")]
    assert ask(lm, pool, session, "where meets our club ?") == [ids("our club meets in oslo .")]
    teach(lm, pool, session, "my sister moved to oslo .", "ben moved to oslo .")
    assert ask(lm, pool, session, "where do i live ?") == [ids("i moved to rome .")]
    teach(lm, pool, session, "i moved to luna .")
    assert ask(lm, pool, session, "where do i live ?") == [ids("i moved to luna .")]
    teach(lm, pool, session, "i live in rome .")
    assert ask(lm, pool, session, "where do i live ?") == [ids("i live in rome .")]


def test_what_belongs_to_somebody_else_answers_no_question_of_the_speaker(lm: AdaptiveLM, pool: Pool) -> None:
    session = pool.open()
    teach(lm, pool, session, "Luna ' s locker is number nine .")
    assert ask(lm, pool, session, "what is my locker number ?") == []
    for question in ("what is the locker number ?", "what is Luna ' s locker number ?"):
        assert ask(lm, pool, session, question) == [ids("Luna ' s locker is number nine .")]
    teach(lm, pool, session, "my locker is number nine now Luna ' s .")
    assert ask(lm, pool, session, "what is my locker number ?") == [ids("my locker is number nine now Luna ' s .")]


def test_what_the_speaker_has_not_told_is_read_as_such(lm: AdaptiveLM, pool: Pool) -> None:
    session, empty, untold = pool.open(), pool.open(), (7, 8)
    teach(lm, pool, session, "my cat is called pixel .", "the bus leaves at nine .")

    def found(question: str, session: int = session, said: str = "", max_tokens: int = 64) -> list[tuple[int, ...]]:
        before = [*HEADER, *(ids(said) if said else [])]
        at = len(before)
        prompt = [*before, *ids(question)]
        request = RecallRequest(at, (at, len(prompt)), max_tokens, HEADER, untold=untold)
        return [each.token_ids for each in episodes_of(lm).find(pool, session, prompt, request)]

    assert found("where do i live ?") == found("how old do i do ?") == [untold]
    assert found("what is my cat called ?") == [tuple(ids("my cat is called pixel ."))]
    for general in (
        "how do i paint ?",
        "where is rome ?",
        "paint my hat .",
        "my hat is teal . where do i live ?",
        "where can i paint ?",
        "do you paint my hat ?",
    ):
        assert found(general) == [], general
    assert found("where do i live ?", said="i live in oslo .") == [], "the chat may say it"
    assert found("where do i live ?", max_tokens=1) == []
    assert found("where do i live ?", session=empty) == [], "an empty session answers as the base"


def test_a_question_about_several_things_reads_an_episode_for_each(lm: AdaptiveLM, pool: Pool) -> None:
    session = pool.open()
    teach(lm, pool, session, "my cat is called pixel .", "anna lives in oslo .", "the bus leaves at nine .")
    question = "what is my cat called ? the bus leaves at ? anna lives in ?"
    everything = ask(lm, pool, session, question)
    assert everything == [
        ids(text) for text in ("my cat is called pixel .", "anna lives in oslo .", "the bus leaves at nine .")
    ]
    assert len(everything) <= MAX_EPISODES
    assert 0 < sum(map(len, ask(lm, pool, session, question, max_tokens=9))) <= 9
    assert ask(lm, pool, session, question, max_tokens=0) == []


def test_a_statement_about_another_thing_renews_nothing(lm: AdaptiveLM, pool: Pool) -> None:
    session = pool.open()
    teach(lm, pool, session, "my cat is called pixel .", "my dog is called rex .", "ben lives in rome .")
    assert ask(lm, pool, session, "what is my cat called ?") == [ids("my cat is called pixel .")]
    assert ask(lm, pool, session, "what is my dog called ?") == [ids("my dog is called rex .")]


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("my cat is called pixel", "my cat is called luna now", "pixel"),
        ("my cat is called pixel", "my dog is called rex", None),
        ("my cat is called pixel", "anna lives in oslo", None),
        ("anna lives in oslo", "anna now lives in rome", "oslo"),
        ("the bus leaves at nine", "the bus leaves at nine", ""),
    ],
)
def test_the_value_that_a_newer_statement_changes(old: str, new: str, value: str | None) -> None:
    words = [words_of(ids(text), TABLES) for text in (old, new)]
    found = changed_value(words[0], frozenset(words[1]))
    assert value == (None if found is None else " ".join(old.split()[place] for place in found))


def test_an_episode_in_other_words_is_found_by_its_meaning() -> None:
    lm = new_lm(tiny_encoder(WORDS, same=[("pet", "dog")]))
    pool = new_pool(lm)
    session = pool.open()
    teach(lm, pool, session, "my bus leaves at nine .", "my dog is rex .", "the hat is teal .")
    assert ask(lm, pool, session, "what pet is my pet ?") == [ids("my dog is rex .")]
    assert ask(lm, pool, session, "anna lives in oslo") == []


def test_what_another_encoder_or_none_has_learned_is_found_by_its_words() -> None:
    lms = [new_lm(encoder) for encoder in (tiny_encoder(WORDS), tiny_encoder(WORDS, number=2), None)]
    pool = new_pool(lms[0])
    for learned_by in lms:
        session = pool.open()
        teach(learned_by, pool, session, "my dog is rex .", "my cat is called pixel .")
        for asked_of in lms:
            found = ask(asked_of, pool, session, "what is my cat called ?")
            assert found == [ids("my cat is called pixel .")], (lms.index(learned_by), lms.index(asked_of))
        assert (MEANINGS in pool.dump(session)) == (learned_by is not lms[-1])


def test_the_compiled_cosines_are_those_of_the_vectors() -> None:
    rng = np.random.default_rng(0)
    vectors, query = rng.integers(-127, 128, (9, 384), np.int8), rng.integers(-127, 128, 384, np.int8)
    assert cosines(vectors, query) == pytest.approx(vectors.astype(float) @ query.astype(float) / 127**2)


def test_a_lexicon_keeps_its_words(tmp_path: Path) -> None:
    hashes = np.array([7, 3, 4_000_000_000, 3], np.uint32)
    save_lexicon(Lexicon.of(hashes, np.array([0.1, 0.2, 0.3, 0.4], np.float32)), tmp_path / "words.safetensors")
    loaded = load_lexicon(tmp_path / "words.safetensors")
    asked = np.array([4_000_000_000, 5, 3], np.uint32)
    assert loaded.frequencies(asked) == pytest.approx([0.3, 1e-5, 0.2])
    assert loaded.knows(asked).tolist() == [True, False, True]


def test_a_newer_statement_that_does_not_fit_is_not_read(lm: AdaptiveLM, pool: Pool) -> None:
    session = pool.open()
    teach(lm, pool, session, "my cat is called pixel .", "my cat is called luna now anna .")
    assert ask(lm, pool, session, "what is my cat called ?", max_tokens=8) == [ids("my cat is called luna now anna .")]
    assert all(len(found) <= 6 for found in ask(lm, pool, session, "what is my cat called ?", max_tokens=6))


def test_the_newest_episode_replaces_the_oldest(lm: AdaptiveLM, pool: Pool) -> None:
    session = pool.open()
    for count in (SLOTS - 1, 3):
        draft, token_ids = pool.draft(session), ids("my cat .") * count
        mask = [token != IDS[b"."] for token in token_ids]
        keep(lm, draft, token_ids, mask)
        draft.commit()
    rows = pool.dump(session)[SITE]
    ordinals = rows.data.numpy().view("<i4")[:, ORDINAL]
    assert len(rows.slots) == SLOTS and ordinals.min() == 3 and ordinals.max() == SLOTS + 2


def test_the_newest_are_read_in_runs_that_keep_their_bounds(lm: AdaptiveLM, pool: Pool) -> None:
    sentences = [f"my {word} is called rex" for word in ("cat", "dog", "pet", "bus", "hat", "anna", "ben")]
    session, request = pool.open(), RecallRequest(1, None, 5 * len(sentences), HEADER)
    first, second = (
        [token for sentence in run for token in ids(sentence)]
        for run in (sentences[:RUN_EPISODES], sentences[RUN_EPISODES:])
    )

    def newest(room: int = 1000) -> list[list[int]]:
        return [list(run.token_ids) for run in episodes_of(lm).find(pool, session, ids("a hat"), request, room)]

    assert newest() == []
    teach(lm, pool, session, *sentences)
    assert newest() == [first, second]
    assert newest(room=len(first)) == [second]
    assert newest(room=len(second) - 1) == []
    teach(lm, pool, session, "now rome")
    assert newest() == [second + ids("now rome")]  # with the first run they are more than a request may read


def test_only_learned_runs_become_episodes_and_a_rollback_drops_them(lm: AdaptiveLM, pool: Pool) -> None:
    session = pool.open()
    draft, token_ids = pool.draft(session), ids("my cat is called pixel . the dog")
    keep(lm, draft, token_ids, [False] * 3 + [True] * 3 + [False] + [True], version=4)
    kept = draft.touched()[SITE].data.numpy().view("<i4")
    assert kept[:, LENGTH].tolist() == [3, 1]
    assert kept[0, 4:7].tolist() == token_ids[3:6]
    draft.rollback()
    assert SITE not in pool.dump(session)


def cache_with(lm: AdaptiveLM, episodes: Episodes, *sentences: str, place: int = 5) -> DenseCache:
    """Return a cache of `place` tokens and then the episodes."""
    cache = lm.backbone.new_cache(100)
    assert isinstance(cache, DenseCache)
    lm.backbone(torch.tensor([text(1)[:place]]), [cache])
    request = RecallRequest(place, (0, 1), 64, HEADER)
    found = [Episode(tuple(ids(sentence)), 1, 1, 0, 1.0) for sentence in sentences]
    episodes.append(cache, "owner", found, request)
    return cache


@torch.inference_mode()
def test_hot_and_cold_episodes_have_the_same_bits_beside_any_others(lm: AdaptiveLM) -> None:
    cold = Episodes(lm.backbone, TABLES, LEXICON, decode, None, hot_bytes=0)
    hot = Episodes(lm.backbone, TABLES, LEXICON, decode, None, hot_bytes=2**20)
    cache_with(lm, hot, "anna lives in oslo .", "my cat is called pixel .")
    one = cache_with(lm, hot, "my cat is called pixel .")
    other = cache_with(lm, cold, "my cat is called pixel .")
    assert torch.equal(one.keys[:, :, : one.length], other.keys[:, :, : one.length])
    assert torch.equal(one.values[:, :, : one.length], other.values[:, :, : one.length])
    hot.forget("owner")
    assert not hot._hot and hot._bytes_held == 0


@torch.inference_mode()
@pytest.mark.parametrize("place", [3, 2, 40])
def test_keys_and_values_are_those_of_the_base_after_the_header(lm: AdaptiveLM, place: int) -> None:
    sentence = "my cat is called pixel ."
    cache = cache_with(lm, episodes_of(lm), sentence, place=min(place, 27))
    start = min(place, 27)
    expected = lm.backbone.new_cache(64)
    assert isinstance(expected, DenseCache)
    lm.backbone(torch.tensor([[*HEADER, *ids(sentence)]]), [expected])
    keys, values = (field[:, :, len(HEADER) : expected.length] for field in (expected.keys, expected.values))
    for reading in range(READINGS):
        place = start + reading * len(ids(sentence))
        shift, stop = place - len(HEADER), place + len(ids(sentence))
        cos, sin = lm.backbone.cos[0, abs(shift)], lm.backbone.sin[0, abs(shift)]
        rotated = apply_rotary(keys, cos, sin if shift >= 0 else -sin)
        for got, want in ((cache.keys, rotated), (cache.values, values)):
            error = (got[:, :, place:stop] - want).abs().amax(-1)
            assert bool((error <= want.abs().amax(-1) / 127).all())
    assert cache.length == stop


def test_a_configuration_of_episodes_is_part_of_the_served_memory_only(lm: AdaptiveLM) -> None:
    assert SITE in [site.name for site in lm.memory_config.sites]
    assert replace(lm.memory_config, sites=lm.memory.config.sites) == lm.memory.config
