"""Building a tokenizer from the metadata of a GGUF file: byte-level BPE, and the BPE of SentencePiece.

A GGUF file names the rule by which text is cut into words before BPE (`tokenizer.ggml.pre`). The results are those of
the models' own tokenizers in `transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from model.base.gguf_metadata import GGUFError, Metadata, required

SPECIAL_KINDS = (TokenType.CONTROL, TokenType.UNKNOWN)

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_WORDS = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{{digits}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_GPT2_WORDS = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"


@dataclass(frozen=True)
class WordRule:
    """The rule by which a text becomes words, which BPE then cuts into tokens.

    patterns: regular expressions whose matches become words of their own, one after the other; GPT-2's rule if there
    are none. splits_digits: every digit is a word. nfc: the text is brought into the normal form C first.
    ignores_merges: a word that is a token is that token, whatever the merges say.
    """

    patterns: tuple[str, ...] = ()
    splits_digits: bool = False
    nfc: bool = False
    ignores_merges: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Return the rule as a part of a tokenizer."""
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        digits = [pre_tokenizers.Digits(individual_digits=True)] if self.splits_digits else []
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.patterns)
        return pre_tokenizers.Sequence([*splits, *digits, to_bytes])


_LLAMA3 = WordRule((_WORDS.replace("{digits}", r"\p{N}{1,3}"),), ignores_merges=True)
_CL100K = WordRule(_LLAMA3.patterns)
_STARCODER = WordRule(splits_digits=True)
WORD_RULES: Mapping[str, WordRule] = MappingProxyType(
    {
        "smollm": _STARCODER,
        "starcoder": _STARCODER,
        "refact": _STARCODER,  # Granite 3
        "gpt-2": WordRule(),
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "dbrx": _CL100K,  # OLMo 2
        "smaug-bpe": _CL100K,
        "qwen2": WordRule((_WORDS.replace("{digits}", r"\p{N}"),), nfc=True),
        # llama.cpp's rule for files that name none.
        "default": WordRule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    }
)


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """Return the tokenizer of a GGUF file. Raises `GGUFError` for what is missing or unsupported."""
    tokens: list[str] = required(metadata, "tokenizer.ggml.tokens")
    kinds: list[int] = required(metadata, "tokenizer.ggml.token_type")
    match required(metadata, "tokenizer.ggml.model"):
        case "gpt2":
            tokenizer = _byte_level_bpe(metadata, tokens)
        case "llama":
            tokenizer = _sentencepiece_bpe(metadata, tokens, kinds)
        case kind:
            known = "gpt2 (byte-level BPE) or llama (SentencePiece)"
            raise GGUFError(f"tokenizer.ggml.model must be {known}, got {kind}")
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (*SPECIAL_KINDS, TokenType.USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind in SPECIAL_KINDS)])
    if metadata.get("tokenizer.ggml.add_bos_token", _adds_bos(metadata)):
        bos = required(metadata, "tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _adds_bos(metadata: Metadata) -> bool:
    """Return whether a text starts with BOS in a file that does not say so."""
    return bool(metadata["tokenizer.ggml.model"] == "llama")


def _byte_level_bpe(metadata: Metadata, tokens: Sequence[str]) -> Tokenizer:
    rule = WORD_RULES.get(pre := metadata.get("tokenizer.ggml.pre", "default"))
    if rule is None:
        raise GGUFError(f"tokenizer.ggml.pre must be {' or '.join(WORD_RULES)}, got {pre}")
    merges = [tuple(merge.split(" ")) for merge in required(metadata, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    options = {"ignore_merges": True} if rule.ignores_merges else {}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **options))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: Metadata, tokens: Sequence[str], kinds: Sequence[int]) -> Tokenizer:
    """Return the BPE whose merges follow from the scores of the pieces."""
    scores: list[float] = required(metadata, "tokenizer.ggml.scores")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges_of_pieces(tokens, scores, kinds)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        to_text.append(decoders.Strip(content=" ", left=1))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer


def _merges_of_pieces(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that make a piece, the pairs of the highest score first."""
    pieces = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == TokenType.NORMAL}
    found = []
    for token, index in pieces.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = sorted(
            (pieces[left], pieces[right], left, right) for left, right in pairs if {left, right} <= pieces.keys()
        )
        found += [(scores[index], len(left), len(right), left, right) for _, _, left, right in known]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in found]
