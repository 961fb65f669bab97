"""Prompts for filling in the middle: each family's tokens, the order of the parts, and what is cut."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Pipeline

from model.text.infill import FAMILIES, Cut, InfillTokens, Snippet, encode_plain
from model.text.tokenizer import Tokenizer

ROOM = 1000


def tokenizer_with(*names: str) -> Tokenizer:
    """Return a tokenizer of single bytes and some tokens by their names."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pipeline = Pipeline(models.BPE(alphabet, []))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    pipeline.add_tokens([AddedToken(name, normalized=False) for name in names])
    return Tokenizer(pipeline, bos_token_id=None, eos_token_ids=frozenset(), add_bos=False, chat_template=None)


def shown(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, token_ids)).decode()


@pytest.mark.parametrize("names", FAMILIES)
def test_each_family_is_known_by_its_own_tokens(names: tuple[str, ...]) -> None:
    tokenizer = tokenizer_with(*filter(None, names))
    tokens = InfillTokens.of(tokenizer)
    assert tokens is not None
    found = (tokens.prefix, tokens.suffix, tokens.middle, tokens.repository, tokens.file)
    assert found == tuple(tokenizer.token_id(name) if name else None for name in names)
    prompt = tokens.prompt(tokenizer, "a", "b", [], ROOM)
    assert shown(tokenizer, prompt.token_ids.tolist()) == f"{names[0]}a{names[1]}b{names[2]}"
    assert set(found) - {None} <= tokens.ends


def test_a_base_without_these_tokens_fills_nothing() -> None:
    assert InfillTokens.of(tokenizer_with("<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>")) is None


def test_other_texts_are_files_of_a_repository() -> None:
    tokenizer = tokenizer_with(*FAMILIES[0])
    tokens = InfillTokens.of(tokenizer)
    assert tokens is not None
    prompt = tokens.prompt(tokenizer, "a", "b", [Snippet("x = 1", "x.py"), Snippet("y = 2", "y.py")], ROOM)
    assert shown(tokenizer, prompt.token_ids.tolist()) == (
        "<|repo_name|>repository\n<|file_sep|>x.py\nx = 1<|file_sep|>y.py\ny = 2<|file_sep|>file\n"
        "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    )
    assert [shown(tokenizer, prompt.token_ids[slice(*span)].tolist()) for span in (prompt.prefix, prompt.suffix)] == [
        "a",
        "b",
    ]
    plain = tokenizer_with(*filter(None, FAMILIES[4]))
    tokens = InfillTokens.of(plain)
    assert tokens is not None
    prompt = tokens.prompt(plain, "a", "b", [Snippet("x = 1", "x.py")], ROOM)
    assert shown(plain, prompt.token_ids.tolist()).startswith("\n\n--- snippet ---\n\nx = 1<fim-prefix>a")


@pytest.mark.parametrize(
    ("prefix", "suffix", "expected"),
    [
        (100, 100, (15, 5)),  # both are long: three quarters and one quarter
        (100, 2, (18, 2)),
        (3, 100, (3, 17)),
        (10, 10, (10, 10)),
        (0, 0, (0, 0)),
    ],
)
def test_what_does_not_fit_is_cut_away_from_the_gap(prefix: int, suffix: int, expected: tuple[int, int]) -> None:
    tokenizer = tokenizer_with(*FAMILIES[0])
    tokens = InfillTokens.of(tokenizer)
    assert tokens is not None
    before, after = "".join(map(chr, range(33, 33 + 90))), "".join(map(chr, range(126, 36, -1)))
    before, after = (before * 2)[:prefix], (after * 2)[:suffix]
    filled = tokens.prompt(tokenizer, before, after, [], room=23)
    kept_before, kept_after = expected
    assert len(filled.token_ids) == 3 + sum(expected) <= 23
    assert shown(tokenizer, filled.token_ids[slice(*filled.prefix)].tolist()) == before[prefix - kept_before :]
    assert shown(tokenizer, filled.token_ids[slice(*filled.suffix)].tolist()) == after[:kept_after]
    assert filled.cut == Cut(prefix - kept_before, suffix - kept_after, 0)


def test_other_texts_have_the_room_that_is_left_and_keep_their_end() -> None:
    tokenizer = tokenizer_with(*FAMILIES[0])
    tokens = InfillTokens.of(tokenizer)
    assert tokens is not None
    filled = tokens.prompt(tokenizer, "abc", "de", [Snippet("0123456789" * 10, "x.py")], room=30)
    assert len(filled.token_ids) == 30 and filled.cut.extra > 0 and not filled.cut.prefix + filled.cut.suffix
    assert shown(tokenizer, filled.token_ids.tolist()).endswith(
        "6789<|file_sep|>file\n<|fim_prefix|>abc<|fim_suffix|>de<|fim_middle|>"
    )


def test_source_that_spells_the_tokens_is_text() -> None:
    tokenizer = tokenizer_with(*FAMILIES[0])
    text = "MIDDLE = '<|fim_middle|>' + '<|fim_prefix|>'"
    token_ids = encode_plain(tokenizer, text).tolist()
    assert shown(tokenizer, token_ids) == text
    assert not {tokenizer.token_id(name) for name in FAMILIES[0]} & set(token_ids)


def test_the_gap_of_a_prompt_that_a_client_filled_in_is_found() -> None:
    tokenizer = tokenizer_with(*FAMILIES[0])
    tokens = InfillTokens.of(tokenizer)
    assert tokens is not None
    for text in ("<|fim_prefix|>abc<|fim_suffix|>de<|fim_middle|>", "<|fim_suffix|>de<|fim_prefix|>abc<|fim_middle|>"):
        token_ids = tokenizer.encode(text)
        span = tokens.find_prefix(token_ids)
        assert span is not None and shown(tokenizer, token_ids[slice(*span)]) == "abc"
    for text in ("abc", "<|fim_prefix|>abc<|fim_suffix|>de<|fim_middle|>x", "abc<|fim_middle|>"):
        assert tokens.find_prefix(tokenizer.encode(text)) is None
