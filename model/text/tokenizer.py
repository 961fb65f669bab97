"""Converting text to token ids and back, with the tokenizer files of a Hugging Face folder."""

from __future__ import annotations

import codecs
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from model.base.checkpoint import CheckpointError, read_json
from model.text.chat_template import ChatTemplate, ChatTemplateError, Message, Span, unused_characters

# A text is tokenised in pieces of this many characters. `tokenizers` takes 100 to 250 bytes a token, and it holds the
# interpreter's lock while it hands lists over and while it frees them.
PIECE_CHARS = 32_768
WHOLE_CHARS = 262_144  # of a piece of a tokenizer that does not find the words of a text without what comes before
MARGIN_CHARS = 16  # right of a cut, on which the words left of the cut may depend; the longest added token comes on top
CALL_CHARS = 4096  # of a text that `encode`, which holds the lock for all of its work, is given
SEARCH_CHARS = 2**20  # that one search looks through
# Boundaries of words of each kind that rules of words distinguish.
_CUT_SAMPLE = (
    "One word, don't stop; WE'LL (a line);\n\nAnother  line\t12 345x = y1 [ 7 ]\r\n  indented 天地玄黃，宇宙。 été’s "
    "naïve … 👍🏽 ok\u00a0no-break x² ١٢٣ end.\n"
)


@dataclass(frozen=True)
class ChatTokens:
    """A rendered chat. `spans[i]` is the half-open range of tokens that lie completely in message i's content."""

    token_ids: array[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class _Piece:
    """The tokens of one piece of a text.

    start, end: the piece's half-open range of characters in the text. encoding: has the tokens' characters, and perhaps
    more tokens; None if all tokens stand for one character.
    """

    start: int
    end: int
    ids: list[int]
    encoding: tokenizers.Encoding | None

    def offsets(self) -> list[tuple[int, int]]:
        """Return the half-open range of characters of each token in the piece."""
        return [(0, 1)] * len(self.ids) if self.encoding is None else self.encoding.offsets[: len(self.ids)]


class Tokenizer:
    """A `tokenizers` pipeline with special tokens, exact bytes of tokens, streaming and chats."""

    def __init__(
        self,
        pipeline: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None,
        eos_token_ids: frozenset[int],
        add_bos: bool,
        chat_template: ChatTemplate | None,
        special_in_messages: bool = False,
    ) -> None:
        """Raises `CheckpointError` if tokens are neither byte-level nor SentencePiece-like.

        special_in_messages: whether a special token's text in a message of a chat becomes that token, not plain text.
        """
        pipeline.no_padding()
        pipeline.no_truncation()
        pipeline.post_processor = None  # a post-processor would trim offsets, and with them spans; `encode` adds BOS
        self._pipeline = pipeline
        self._chat_template = chat_template
        self._bytes = _token_bytes(pipeline)
        self._special = {i for i, token in pipeline.get_added_tokens_decoder().items() if token.special}
        self._plain_ids = {} if special_in_messages else _plain_ids(pipeline, self._special)
        self._plain_pattern = re.compile("|".join(map(re.escape, sorted(self._plain_ids, key=len, reverse=True))))
        added = pipeline.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._margin = MARGIN_CHARS + max((len(token.content) for token in added.values()), default=0)
        self._finds_words = _finds_words(pipeline)
        self._longest_token = _longest_token(pipeline, self._bytes)
        self.vocab_size = pipeline.get_vocab_size()
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.add_bos = add_bos

    @classmethod
    def load(cls, folder: Path, *, special_in_messages: bool = False) -> Tokenizer:
        """Read `tokenizer.json` and the settings in the same folder. Raises `CheckpointError`."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder}: tokenizer.json is missing")
        try:
            pipeline = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises nothing more specific
            raise CheckpointError(f"{path}: not a tokenizer: {error}") from error
        settings = _optional_json(folder / "tokenizer_config.json")
        special = _special_tokens(settings)
        bos_token_id = pipeline.token_to_id(special.get("bos_token", ""))
        # As in transformers, the pipeline of `tokenizer.json` decides, and not `add_bos_token` in the settings.
        add_bos = bos_token_id is not None and pipeline.encode("").ids[:1] == [bos_token_id]
        return cls(
            pipeline,
            bos_token_id=bos_token_id,
            eos_token_ids=_eos_token_ids(folder, pipeline.token_to_id(special.get("eos_token", ""))),
            add_bos=add_bos,
            chat_template=_chat_template(folder, settings, special),
            special_in_messages=special_in_messages,
        )

    @property
    def has_chat_template(self) -> bool:
        """Return whether the model has a chat template, which `encode_chat` needs."""
        return self._chat_template is not None

    @property
    def start_token_id(self) -> int:
        """Return the token before the first token of a text: BOS, or end-of-text for a model without BOS."""
        return self.bos_token_id if self.bos_token_id is not None else min(self.eos_token_ids, default=0)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; text that spells a special token becomes that token.

        Raises `ValueError` if the text is not valid Unicode.
        """
        return self.encode_array(text).tolist()

    def encode_inside(self, text: str) -> list[int]:
        """Return the token ids of a text within a sequence, without BOS. Raises `ValueError` as `encode` does."""
        token_ids = self.encode(text)
        return token_ids[1:] if self.add_bos else token_ids

    def encode_array(self, text: str) -> array[int]:
        """Return the token ids of a text as `encode` does, in four bytes each.

        The memory beyond the ids does not grow with the text: the text is tokenised in pieces that end between two
        words. A word of more than `PIECE_CHARS` characters is cut there, and its tokens at the cut may differ from
        those of the whole word; so may the tokens at each multiple of `WHOLE_CHARS` characters of a tokenizer whose
        words depend on what comes before them.
        """
        ids = array("i", [self.bos_token_id] if self.add_bos and self.bos_token_id is not None else [])
        for piece in self._pieces(text):
            ids.extend(piece.ids)
        return ids

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its text in the vocabulary; None for no token."""
        return self._pipeline.token_to_id(token)

    def fewest_tokens(self, num_bytes: int) -> int:
        """Return a lower bound of the number of tokens of a text of `num_bytes` bytes; 0 where nothing is known."""
        return -(-num_bytes // self._longest_token) if self._longest_token else 0

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, as a continuation of earlier text.

        Special tokens and ids beyond the vocabulary are skipped. Bytes that are not UTF-8 become U+FFFD.
        """
        return b"".join(map(self.text_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes of a token: for special tokens their text, for unknown ids no bytes."""
        return self._bytes.get(token_id, b"")

    def stream(self) -> DecodeStream:
        """Return a decoder that takes one token at a time. Its pieces concatenate to the result of `decode`."""
        return DecodeStream(self)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continues: bool = False,
        tools: str = "",
    ) -> ChatTokens:
        """Return the tokens of a chat; `continues`: up to the end of the last message's content.

        tools: the tools that the reply may call, as JSON, one a line.

        Raises `ChatTemplateError`, and `ValueError` if a text is not valid Unicode.
        """
        messages, tools, plain_ids = self._without_special(messages, tools)
        text, spans = self._render(messages, add_generation_prompt, continues, tools)
        ids = array("i")
        counts = _TokenCounts(spans)
        for piece in self._chat_pieces(text, plain_ids):
            counts.add(piece, len(ids))
            ids.extend(piece.ids)
        return ChatTokens(ids, counts.ranges(spans, len(ids)))

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continues: bool = False,
        tools: str = "",
    ) -> str:
        """Return the text of a chat, whose tokens `encode_chat` returns. Raises `ChatTemplateError`."""
        return self._render(messages, add_generation_prompt, continues, tools)[0]

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, continues: bool, tools: str
    ) -> tuple[str, list[Span | None]]:
        if self._chat_template is None:
            raise ChatTemplateError("the model has no chat template")
        text, spans = self._chat_template.render_with_spans(
            messages, add_generation_prompt=add_generation_prompt, tools=tools
        )
        if not continues:
            return text, spans
        if (last := spans[-1]) is None:
            raise ChatTemplateError("the last message is empty or changed, and cannot be continued")
        return text[: last[1]], spans

    def _without_special(
        self, messages: Sequence[Message], tools: str
    ) -> tuple[Sequence[Message], str, dict[str, list[int]]]:
        """Return the messages and the tools with one character in place of each special token's text, and the ids of
        its plain text.

        The template cannot tell such a character from other text, and `_encode` never makes a special token of it.
        """
        values = [tools, *(value for message in messages for value in message.values())]
        if not self._plain_ids or not any(map(self._has_special, values)):
            return messages, tools, {}
        unused = unused_characters(values)
        characters = {token: next(unused) for token in sorted(self._plain_ids, key=len, reverse=True)}
        plain = [{key: replace_tokens(value, characters) for key, value in each.items()} for each in messages]
        plain_ids = {characters[token]: ids for token, ids in self._plain_ids.items()}
        return plain, replace_tokens(tools, characters), plain_ids

    def _has_special(self, text: str) -> bool:
        """Return whether a text has a special token's text; no search holds the interpreter's lock for long."""
        search = self._plain_pattern.search
        starts = range(0, len(text), SEARCH_CHARS)
        return any(search(text, start, start + SEARCH_CHARS + self._margin) for start in starts)

    def _chat_pieces(self, text: str, plain_ids: Mapping[str, list[int]]) -> Iterator[_Piece]:
        """Yield the pieces of a rendered chat, and each character of `plain_ids` by itself."""
        start = 0
        for match in re.finditer(f"[{''.join(plain_ids)}]", text) if plain_ids else ():
            yield from self._pieces(text, start, match.start())
            start = match.end()
            yield _Piece(match.start(), start, plain_ids[match[0]], None)
        yield from self._pieces(text, start)

    def _pieces(self, text: str, start: int = 0, stop: int | None = None) -> Iterator[_Piece]:
        """Yield the tokens of the characters from `start` to `stop`, piece by piece."""
        stop = len(text) if stop is None else stop
        size = PIECE_CHARS if self._finds_words else WHOLE_CHARS
        while start < stop:
            piece = text[start : min(start + size, stop)]
            encoding = self._encode(piece, start)
            ids, length = encoding.ids, len(piece)
            if self._finds_words and start + length < stop:
                count, length = self._last_cut(piece, encoding, ids)
                del ids[count:]
            yield _Piece(start, start + length, ids, encoding)
            start += length

    def _last_cut(self, piece: str, encoding: tokenizers.Encoding, ids: Sequence[int]) -> tuple[int, int]:
        """Return how many tokens and characters of a piece do not depend on what follows the piece; all, if unknown.

        The text may be cut there: between two words, next to a letter, a digit or an added token, where no rule looks
        over the cut.
        """
        limit = len(piece) - self._margin
        for index in range(len(ids) - 1, 0, -1):
            if encoding.token_to_word(index) == encoding.token_to_word(index - 1):
                continue
            start, _ = encoding.token_to_chars(index) or (0, 0)
            by_token = ids[index] in self._added or ids[index - 1] in self._added
            if 0 < start <= limit and (by_token or _may_end(piece, start)):
                return index, start
        return len(ids), len(piece)

    def _encode(self, text: str, start: int = 0) -> tokenizers.Encoding:
        """Return the tokens of a text that begins at `start` of a longer text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"a lone surrogate at position {start + error.start}"
            raise ValueError(f"text must be Unicode, got {where}") from None
        if len(text) < CALL_CHARS:
            return self._pipeline.encode(text, add_special_tokens=False)
        # Unlike `encode`, `encode_batch` releases the interpreter's lock.
        return self._pipeline.encode_batch([text], add_special_tokens=False)[0]

    def text_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a decoded text: none for a special token."""
        return b"" if token_id in self._special else self.token_bytes(token_id)


class DecodeStream:
    """An incremental decoder, which returns characters as soon as they are complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._text_bytes = tokenizer.text_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(self, token_id: int) -> str:
        """Return the characters that this token completes, possibly none."""
        return self._utf8.decode(self._text_bytes(token_id))

    def flush(self) -> str:
        """Return the text of an unfinished character at the end."""
        return self._utf8.decode(b"", final=True)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return `bos_token`, `eos_token` and similar settings. Older files wrap each value in an object."""
    tokens = {}
    for name, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _eos_token_ids(folder: Path, tokenizer_eos: int | None) -> frozenset[int]:
    """Return the ids that any of the files calls an end of text: instruction-tuned models often have several."""
    eos_ids = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("generation_config.json", "config.json"):
        ids = _optional_json(folder / name).get("eos_token_id")
        eos_ids.update(ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else [])
    return frozenset(eos_ids)


def _chat_template(folder: Path, settings: Mapping[str, Any], special: Mapping[str, str]) -> ChatTemplate | None:
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(source, list):  # several named templates
        named = (each for each in source if isinstance(each, dict))
        source = next((each.get("template") for each in named if each.get("name") == "default"), None)
    if not isinstance(source, str | None):
        raise CheckpointError(f"{folder}: the chat template must be a text, got {type(source).__name__}")
    try:
        return None if source is None else ChatTemplate(source, special)
    except ChatTemplateError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _token_bytes(pipeline: tokenizers.Tokenizer) -> dict[int, bytes]:
    """Return the bytes of every token, according to the pipeline's decoder."""
    decoder = pipeline.decoder.__getstate__().decode() if pipeline.decoder is not None else ""
    if '"ByteLevel"' in decoder:
        to_bytes = _from_byte_level
    elif '"ByteFallback"' in decoder or '"Metaspace"' in decoder:
        to_bytes = _from_sentencepiece
    else:
        raise CheckpointError("tokenizer.json: decoder must be ByteLevel, ByteFallback or Metaspace")
    added = pipeline.get_added_tokens_decoder()
    return {
        index: added[index].content.encode() if index in added else to_bytes(token)
        for token, index in pipeline.get_vocab().items()
    }


def _from_byte_level(token: str) -> bytes:
    known = all(character in _BYTE_ALPHABET for character in token)
    return bytes(map(_BYTE_ALPHABET.__getitem__, token)) if known else token.encode()


def _from_sentencepiece(token: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def _plain_ids(pipeline: tokenizers.Tokenizer, special: Set[int]) -> dict[str, list[int]]:
    """Return the tokens of the text of each special token, read as plain text."""
    contents = {pipeline.get_added_tokens_decoder()[index].content: index for index in special}
    pipeline.encode_special_tokens = True
    plain = {}
    for content, index in contents.items():
        ids = pipeline.encode(content, add_special_tokens=False).ids
        if index in ids:  # the model itself knows the whole text
            ids = [i for character in content for i in pipeline.encode(character, add_special_tokens=False).ids]
        plain[content] = ids
    pipeline.encode_special_tokens = False
    return plain


def _may_end(text: str, position: int) -> bool:
    """Return whether a text may be cut at the start of a word: the word begins with a letter or a digit, perhaps after
    one other character."""
    return any(character.isalnum() for character in text[position : position + 2])


def _finds_words(pipeline: tokenizers.Tokenizer) -> bool:
    """Return whether the words of a text depend neither on the text before a cut nor on text far behind the cut."""
    added = pipeline.get_added_tokens_decoder().values()
    if pipeline.normalizer is not None or pipeline.pre_tokenizer is None or any(map(_takes_neighbours, added)):
        return False
    words, text = pipeline.pre_tokenizer.pre_tokenize_str, _CUT_SAMPLE
    whole = words(text)
    cuts = [start for _, (start, _) in whole if _may_end(text, start)]
    for cut in cuts:
        left = [word for word in whole if word[1][1] <= cut]
        right = [(word, (start - cut, end - cut)) for word, (start, end) in whole if start >= cut]
        if words(text[cut:]) != right or words(text[: cut + MARGIN_CHARS])[: len(left)] != left:
            return False
    return len(cuts) > 1


def _longest_token(pipeline: tokenizers.Tokenizer, token_bytes: Mapping[int, bytes]) -> int:
    """Return the most bytes of a text that one token stands for; 0 if there is no such bound."""
    added = pipeline.get_added_tokens_decoder().values()
    if pipeline.normalizer is not None or not _is_byte_level(pipeline) or any(map(_takes_neighbours, added)):
        return 0
    return max(map(len, token_bytes.values()), default=0)


def _takes_neighbours(token: tokenizers.AddedToken) -> bool:
    """Return whether an added token takes spaces around it, or depends on the character before it."""
    return token.lstrip or token.rstrip or token.single_word


def _is_byte_level(pipeline: tokenizers.Tokenizer) -> bool:
    return pipeline.decoder is not None and '"ByteLevel"' in pipeline.decoder.__getstate__().decode()


def _byte_alphabet() -> dict[str, int]:
    """Return the bytes of GPT-2's characters (Radford et al. 2019): printable bytes are themselves, the others are
    characters from 256 on."""
    printable = [code for low, high in ("!~", "¡¬", "®ÿ") for code in range(ord(low), ord(high) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def replace_tokens(text: str, characters: Mapping[str, str], size: int = WHOLE_CHARS) -> str:
    """Return a text with a character in place of each token; the longest tokens come first in `characters`.

    size: fewest characters of a part; the text is replaced in parts, since a call holds the interpreter's lock.
    """
    parts, start = [], 0
    while start < len(text):
        end = start + size
        while any(text.find(token, max(0, end - len(token) + 1), end + len(token) - 1) >= 0 for token in characters):
            end += 1  # a token would be cut here
        part, start = text[start:end], end
        for token, character in characters.items():
            part = part.replace(token, character)
        parts.append(part)
    return "".join(parts)


class _TokenCounts:
    """The numbers of tokens before the edges of spans, taken piece by piece: the offsets of all tokens are large."""

    def __init__(self, spans: Sequence[Span | None]) -> None:
        self._edges = sorted({edge for span in spans if span for edge in span}, reverse=True)  # that are to come
        self._begun: dict[int, int] = {}  # number of tokens that begin before an edge
        self._ended: dict[int, int] = {}  # number of tokens that end at an edge or before

    def add(self, piece: _Piece, count: int) -> None:
        """Take the next piece, which comes after `count` tokens."""
        if not self._edges or self._edges[-1] >= piece.end:
            return
        starts, ends = zip(*piece.offsets(), strict=True) if piece.ids else ((), ())
        while self._edges and self._edges[-1] < piece.end:
            edge = self._edges.pop()
            self._begun[edge] = count + bisect_left(starts, edge - piece.start)
            self._ended[edge] = count + bisect_right(ends, edge - piece.start)

    def ranges(self, spans: Sequence[Span | None], count: int) -> list[tuple[int, int]]:
        """Return the range of tokens inside each span of a text with `count` tokens.

        An empty range starts where the last one ends.
        """
        ranges: list[tuple[int, int]] = []
        for span in spans:
            first = self._begun.get(span[0], count) if span else 0
            last = self._ended.get(span[1], count) if span else 0
            previous = ranges[-1][1] if ranges else 0
            ranges.append((first, last) if first < last else (previous, previous))
        return ranges
