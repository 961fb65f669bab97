"""Grammars: a text that follows the masks is valid, and the forced tokens are those that could be no other text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from model.text.grammar import GrammarCompiler, GrammarError, GrammarSource
from model.text.sampling import Sampler, SamplingParams
from model.text.tokenizer import Tokenizer

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False},
    {"enum": ["red", "green", {"not": ["a", "word"]}]},
    {"type": "array", "items": {"type": "integer", "minimum": 3, "maximum": 40}, "minItems": 2, "maxItems": 3},
    {"type": "string", "pattern": "^[a-c]{2,5}$"},
    {"anyOf": [{"type": "null"}, {"const": 7}]},
    {"$defs": {"leaf": {"enum": [1, 2]}}, "type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 3},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.load(tiny_base)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + 5)


def write(compiler: GrammarCompiler, tokenizer: Tokenizer, source: GrammarSource, seed: int) -> tuple[str, str]:
    """Return a text drawn from random scores, and the part of it that was forced."""
    options = SamplingParams(seed=seed, grammar=compiler.compile(source), temperature=3.0)
    sampler, text, forced = Sampler(options, eos=tokenizer.eos_token_ids), b"", b""
    for step in range(400):
        scores = torch.randn(tokenizer.vocab_size + 5, generator=torch.Generator().manual_seed(1000 * seed + step))
        token = sampler.draw(scores)
        if token in sampler.ends:
            return text.decode(), forced.decode(errors="replace")
        text += tokenizer.token_bytes(token)
        forced += tokenizer.token_bytes(token) if sampler.forced[-1] else b""
    raise AssertionError(f"no end: {text!r}")


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_a_text_follows_its_schema_whatever_the_scores(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any]
) -> None:
    for seed in range(10):
        text, _ = write(compiler, tokenizer, GrammarSource("json_schema", json.dumps(schema)), seed)
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        (GrammarSource("regex", "[0-9]{3}-[a-f]+x"), "[0-9]{3}-[a-f]+x"),
        (GrammarSource("choice", json.dumps(["yes", 'no "way"', "猫"])), 'yes|no "way"|猫'),
        (GrammarSource("rules", 'root ::= "a" ("b" | "c")+ "d"'), "a[bc]+d"),
        (GrammarSource("rules", 'start: "x" NUM\nNUM: /[0-9]+/'), "x[0-9]+"),
    ],
    ids=str,
)
def test_a_text_follows_its_rules(
    compiler: GrammarCompiler, tokenizer: Tokenizer, source: GrammarSource, pattern: str
) -> None:
    for seed in range(5):
        assert re.fullmatch(pattern, write(compiler, tokenizer, source, seed)[0])


def test_what_could_be_no_other_text_is_forced(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    text, forced = write(compiler, tokenizer, GrammarSource("choice", '["the only one"]'), seed=1)
    assert text == forced == "the only one"
    text, forced = write(compiler, tokenizer, GrammarSource("regex", "fox [0-9]{2} dog"), seed=1)
    assert forced == re.sub("[0-9]", "", text)


@pytest.mark.parametrize(
    "source",
    [
        GrammarSource("json_schema", '{"type": "nothing"}'),
        GrammarSource("json_schema", "no JSON"),
        GrammarSource("regex", "("),
        GrammarSource("rules", "start: missing"),
    ],
    ids=str,
)
def test_what_is_no_grammar_or_too_large_is_refused(compiler: GrammarCompiler, source: GrammarSource) -> None:
    with pytest.raises(GrammarError):
        compiler.compile(source)


def test_after_a_failure_the_text_can_only_end(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """A grammar that becomes too large on the way fails as one that gets a token it does not allow."""
    state = compiler.compile(GrammarSource("regex", "[0-9]+")).start()
    forbidden = int((~state.allowed()).nonzero()[10])
    assert not state.failed
    state.advance(forbidden)
    assert state.failed
    assert set(state.allowed().nonzero()[:, 0].tolist()) <= tokenizer.eos_token_ids
    assert state.allowed().any()
