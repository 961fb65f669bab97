"""A tokenizer built from the metadata of a GGUF file gives the token ids of `transformers`' tokenizer."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.tokenization_utils_base import generate_merges

from model.base.gguf_metadata import GGUFError
from model.base.gguf_tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]
PROSE = [
    "The quick brown fox doesn't jump; WE'LL see, they'Re here and I'd go.",
    "Der schnelle braune Fuchs springt über den faulen Hund, großartig!",
    "Voix ambiguë d’un cœur qui préfère les jattes de kiwis.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。",
    "いろはにほへと ちりぬるを カタカナ",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "نص حكيم له سر قاطع وذو شأن عظيم ١٢٣",
    "यह एक हिन्दी वाक्य है ४५६",
    "ΞΕΣΚΕΠΑΖΩ τὴν ψυχοφθόρα βδελυγμία",
    "👍🏽 👩‍👩‍👧‍👦 🇩🇪 flags and zero\u200bwidth\ufeff",
    "e\u0301 and \u00e9, A\u030a and \u00c5, \u1e9b\u0323 \ufb01",
]
EDGES = ["", " ", "  ", "\n", "\n\n\n", "\r\n", "\t\tx", "  x  ", "x\n  y", " \n ", "\u00a0x", "\u3000", "\x00"]
EDGES += ["1", "12", "123", "1234", "12345678", "3.14159e-10", "0xFF", "x²³", "½", "a1b22c333d4444", "1,234,567.89"]
EDGES += ["'s", "'S", "it's", "IT'S", "''ll", "don''t", "!!!???", "...", "a...b", "<>&|^~$+=", "[[{{(())}}]]", "#!/bin"]
EDGES += ["<|im_start|>user\nHi<|im_start|>", "<s>x</s>", "x<s> y", "<unk>", "▁", "▁▁x", "a▁b", "<0x0A>", "\ud7a3"]
EDGES += ["\u2028a", "\U0010ffff"]


@functools.cache
def sample() -> list[str]:
    """Return 2,000 lines and pieces of text: prose of many scripts, code, and edge cases."""
    files = [file for folder in ("model", "tests/model") for file in sorted((ROOT / folder).glob("*.py"))]
    code = [line for file in files for line in lines(file)]
    pages = [line for file in sorted((ROOT / "docs").glob("*.md")) for line in lines(file)]
    mixed = [f"{a}{join}{b}" for join in ("", " ") for a in PROSE for b in EDGES]
    rest = [*code[::2], *pages]
    return [*PROSE, *EDGES, *mixed, *rest[: 2000 - len(PROSE) - len(EDGES) - len(mixed)]]


def lines(file: Path) -> list[str]:
    return [line for line in file.read_text().split("\n") if line]


def test_the_sample_has_2000_texts() -> None:
    assert len(sample()) == 2000


@functools.cache
def bpe(rule: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges of a BPE trained with a rule of words."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = REFERENCES[rule][0]()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*PROSE * 3, *sample()[::3]], trainer)
    state = json.loads(tokenizer.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def words(*patterns: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """Return the maker of a rule that cuts by regular expressions, in order."""

    def make() -> pre_tokenizers.PreTokenizer:
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    return make


def smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


def gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


TIKTOKEN: str = TikTokenConverter().pattern  # type: ignore[no-untyped-call]
QWEN2 = TIKTOKEN.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
DEFAULT = (r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", r"[0-9]{3}")  # llama.cpp's rule for a file that names none
REFERENCES: dict[str, tuple[Callable[[], pre_tokenizers.PreTokenizer], bool]] = {  # with ignore_merges
    "smollm": (smollm, False),
    "gpt-2": (gpt2, False),
    "llama-bpe": (words(TIKTOKEN), True),
    "dbrx": (words(TIKTOKEN), False),
    "qwen2": (words(QWEN2), False),
    "default": (words(*DEFAULT), False),
}


def metadata(vocabulary: dict[str, int], **more: Any) -> dict[str, Any]:
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = [int(TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL) for token in tokens]
    shared = {"tokens": tokens, "token_type": kinds, "bos_token_id": 1, "add_bos_token": False}
    return {f"tokenizer.ggml.{key}": value for key, value in (shared | more).items()}


def transformers_bpe(rule: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of `transformers`: of its class for Qwen2, else of the published parts."""
    vocabulary, merges = bpe(rule)
    if rule == "qwen2":
        return qwen2_tokenizer(vocabulary, merges, dict.fromkeys(("unk_token", "eos_token", "pad_token"), "</s>"))
    make, ignores_merges = REFERENCES[rule]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignores_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = make(), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]


def qwen2_tokenizer(vocabulary: dict[str, int], merges: Any, names: dict[str, Any]) -> PreTrainedTokenizerFast:
    return Qwen2Tokenizer(vocab=vocabulary, merges=merges, **names)


@pytest.mark.parametrize("rule", REFERENCES)
def test_byte_level_bpe_has_the_ids_of_transformers(rule: str) -> None:
    vocabulary, merges = bpe(rule)
    content = metadata(vocabulary, model="gpt2", pre=rule, merges=[" ".join(pair) for pair in merges])
    ours, theirs = build_tokenizer(content), transformers_bpe(rule)
    theirs.add_special_tokens({"additional_special_tokens": SPECIAL})
    for text in sample():
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False).input_ids, text


def test_the_rules_of_words_differ_on_the_sample() -> None:
    """Otherwise the sample would not tell one rule from another."""
    rules = ("smollm", "gpt-2", "llama-bpe", "qwen2", "default")
    cut = {rule: [REFERENCES[rule][0]().pre_tokenize_str(text) for text in sample()] for rule in rules}
    assert all(cut[a] != cut[b] for a in rules for b in rules if a != b)


def test_a_file_without_a_rule_has_the_default_one() -> None:
    vocabulary, merges = bpe("default")
    content = metadata(vocabulary, model="gpt2", pre="default", merges=[" ".join(pair) for pair in merges])
    unnamed = {key: value for key, value in content.items() if key != "tokenizer.ggml.pre"}
    assert build_tokenizer(unnamed).to_str() == build_tokenizer(content).to_str()


# SentencePiece.


@functools.cache
def pieces() -> tuple[dict[str, int], list[float], list[int]]:
    """Return the vocabulary of a SentencePiece BPE, with the score and the kind of each piece."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=SPECIAL, limit_alphabet=300, show_progress=False)
    tokenizer.train_from_iterator([*PROSE * 3, *sample()[::3]], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    first = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    learned = [token for token in dict.fromkeys(map("".join, trained["merges"])) if token not in first]
    letters = [token for token in trained["vocab"] if token not in (*learned, *first)]
    tokens = [*first, *learned, *letters]
    scores = [0.0] * (len(SPECIAL) + 256) + [-float(rank) for rank in range(len(learned) + len(letters))]
    kinds = [TokenType.CONTROL] * len(SPECIAL) + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(learned + letters)
    kinds[0] = TokenType.UNKNOWN
    return {token: i for i, token in enumerate(tokens)}, scores, [int(kind) for kind in kinds]


def merge_by_score(text: str) -> list[int]:
    """Return the ids of a text without special tokens: the pair whose piece has the highest score merges first."""
    numbers, scores, kinds = pieces()
    vocabulary = {token: i for token, i in numbers.items() if kinds[i] == TokenType.NORMAL}
    parts = list(text.replace(" ", "▁"))
    while True:
        known = [(i, pair) for i, pair in enumerate(map("".join, pairwise(parts))) if pair in vocabulary]
        if not known:
            break
        i, pair = max(known, key=lambda found: (scores[vocabulary[found[1]]], -found[0]))
        parts[i : i + 2] = [pair]
    in_bytes = {part: [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts if part not in vocabulary}
    return [numbers[token] for part in parts for token in in_bytes.get(part, [part])]


@pytest.mark.parametrize("add_space", [True, False])
def test_sentencepiece_has_the_ids_of_transformers_and_of_its_algorithm(add_space: bool) -> None:
    vocabulary, scores, kinds = pieces()
    more = {"token_type": kinds, "scores": scores, "unknown_token_id": 0, "add_space_prefix": add_space}
    ours = build_tokenizer(metadata(vocabulary, model="llama", **more))
    by_name = {token: scores[i] for token, i in vocabulary.items()}
    skipped = {token for token, i in vocabulary.items() if kinds[i] != TokenType.NORMAL}
    merges = generate_merges(vocabulary, by_name, skipped)
    kind = LlamaTokenizer if add_space else GemmaTokenizer
    ids = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "mask_token": "</s>"}
    theirs = kind(vocab=vocabulary, merges=merges, **ids)
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    for text in sample():
        found = ours.encode(text, add_special_tokens=False).ids
        assert found == theirs(text, add_special_tokens=False).input_ids, text
        if text and not any(special in text for special in SPECIAL) and len(text) < 80:
            assert found == merge_by_score(f" {text}" if add_space and not text.startswith(("▁", " ")) else text), text
    assert ours.decode(ours.encode(PROSE[2]).ids) == PROSE[2]


def test_sentencepiece_starts_a_text_with_bos_unless_the_file_says_otherwise() -> None:
    vocabulary, scores, kinds = pieces()
    content = metadata(vocabulary, model="llama", token_type=kinds, scores=scores)
    assert build_tokenizer(content).encode("x").ids[0] != 1
    del content["tokenizer.ggml.add_bos_token"]
    assert build_tokenizer(content).encode("x").ids[0] == 1


def test_an_unknown_rule_is_refused_with_the_known_ones() -> None:
    vocabulary, merges = bpe("smollm")
    content = metadata(vocabulary, model="gpt2", pre="tekken", merges=[" ".join(pair) for pair in merges])
    with pytest.raises(GGUFError, match=r"tokenizer\.ggml\.pre must be smollm or .* or default, got tekken"):
        build_tokenizer(content)
