"""Converting text to token ids and back, with the tokenizer files of a Hugging Face folder."""

from __future__ import annotations

import codecs
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from model.base.checkpoint import CheckpointError, read_json
from model.text.chat_template import ChatTemplate, ChatTemplateError, Message, Span

# A text is tokenised in pieces of about this many characters: the memory that `tokenizers` takes is some 100 bytes a
# token, and it holds the interpreter's lock while it hands over lists.
PIECE_CHARS = 65_536
CUT_WINDOW_CHARS = 4096
# Where GPT-2's rule and its descendants end a word whatever surrounds it: before the space between two words, and
# between the end of a line and a word.
_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S\n)(?=[^\W\d_])")
_CUT_SAMPLES = (
    ("One word", " two words."),
    ("a (line);\n", "Another line"),
    ("don't", " stop.  Now\n"),
    ("12\n", "x = 1"),
)


@dataclass(frozen=True)
class ChatTokens:
    """A rendered chat. `spans[i]` is the half-open range of tokens that lie completely in message i's content."""

    token_ids: list[int]
    spans: list[tuple[int, int]]


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
        self._may_cut = _may_cut(pipeline)
        self._longest_token = _longest_token(pipeline, self._bytes)
        self.vocab_size = pipeline.get_vocab_size()
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.add_bos = add_bos

    @classmethod
    def load(cls, folder: Path, *, special_in_messages: bool = False) -> Tokenizer:
        """Read `tokenizer.json` and the settings beside it. Raises `CheckpointError`."""
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
        ids = [self.bos_token_id] if self.add_bos and self.bos_token_id is not None else []
        for _, piece in self._pieces(text):
            ids += self._encode(piece).ids
        return ids

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

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> ChatTokens:
        """Return the tokens of a chat. Raises `ChatTemplateError`, and `ValueError` if a text is not valid Unicode."""
        if self._chat_template is None:
            raise ChatTemplateError("the model has no chat template")
        messages, plain_ids = self._without_special(messages)
        text, spans = self._chat_template.render_with_spans(messages, add_generation_prompt=add_generation_prompt)
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        for start, piece in self._chat_pieces(text, plain_ids):
            if piece in plain_ids:
                ids += plain_ids[piece]
                starts += [start] * len(plain_ids[piece])
                ends += [start + 1] * len(plain_ids[piece])
            else:
                encoding = self._encode(piece)
                ids += encoding.ids
                for token_start, token_end in encoding.offsets:
                    starts.append(start + token_start)
                    ends.append(start + token_end)
        return ChatTokens(ids, _token_spans(starts, ends, spans))

    def _without_special(self, messages: Sequence[Message]) -> tuple[Sequence[Message], dict[str, list[int]]]:
        """Return the messages with one character in place of each special token's text, and the ids of its plain text.

        The template cannot tell such a character from other text, and `_encode` never makes a special token of it.
        """
        values = "".join(value for message in messages for value in message.values())
        if not self._plain_ids or not self._plain_pattern.search(values):
            return messages, {}
        unused = (character for character in map(chr, range(0x100000, 0x10FFFE)) if character not in values)
        characters = {token: next(unused) for token in self._plain_ids}

        def replace(match: re.Match[str]) -> str:
            return characters[match[0]]

        plain = [{key: self._plain_pattern.sub(replace, value) for key, value in each.items()} for each in messages]
        return plain, {characters[token]: ids for token, ids in self._plain_ids.items()}

    def _chat_pieces(self, text: str, plain_ids: Mapping[str, list[int]]) -> Iterator[tuple[int, str]]:
        """Yield the pieces of a rendered chat, and each character of `plain_ids` by itself; each with its start."""
        start = 0
        for match in re.finditer(f"[{''.join(plain_ids)}]", text) if plain_ids else ():
            if match.start() > start:
                yield from self._pieces(text[start : match.start()], start)
            yield match.start(), match[0]
            start = match.end()
        yield from self._pieces(text[start:], start)

    def _pieces(self, text: str, offset: int = 0) -> Iterator[tuple[int, str]]:
        """Yield the parts of a text that are tokenised one by one, with their starts, to the same tokens as in one."""
        start, search_from = 0, PIECE_CHARS
        while self._may_cut and search_from < len(text):
            if cut := _CUT.search(text, search_from, search_from + CUT_WINDOW_CHARS):
                yield offset + start, text[start : cut.start()]
                start = cut.start()
                search_from = start
            search_from += PIECE_CHARS
        yield offset + start, text[start:]

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"a lone surrogate at position {error.start}"
            raise ValueError(f"text must be Unicode, got {where}") from None
        if len(text) < CUT_WINDOW_CHARS:
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


def _may_cut(pipeline: tokenizers.Tokenizer) -> bool:
    """Return whether texts cut at `_CUT` have the tokens of the whole texts."""
    added = pipeline.get_added_tokens_decoder().values()
    if pipeline.normalizer is not None or pipeline.pre_tokenizer is None or any(map(_takes_neighbours, added)):
        return False
    words = pipeline.pre_tokenizer.pre_tokenize_str
    return all(
        [word for word, _ in words(left)] + [word for word, _ in words(right)]
        == [word for word, _ in words(left + right)]
        for left, right in _CUT_SAMPLES
    )


def _longest_token(pipeline: tokenizers.Tokenizer, token_bytes: Mapping[int, bytes]) -> int:
    """Return the most bytes of a text that one token stands for; 0 if there is no such bound."""
    added = pipeline.get_added_tokens_decoder().values()
    if pipeline.normalizer is not None or not _is_byte_level(pipeline) or any(map(_takes_neighbours, added)):
        return 0
    return max(map(len, token_bytes.values()), default=0)


def _takes_neighbours(token: tokenizers.AddedToken) -> bool:
    """Return whether an added token takes spaces around it, or a place where a text may be cut."""
    return token.lstrip or token.rstrip or " " in token.content or "\n" in token.content


def _is_byte_level(pipeline: tokenizers.Tokenizer) -> bool:
    return pipeline.decoder is not None and '"ByteLevel"' in pipeline.decoder.__getstate__().decode()


def _byte_alphabet() -> dict[str, int]:
    """Return the bytes of GPT-2's characters (Radford et al. 2019): printable bytes are themselves, the others are
    characters from 256 on."""
    printable = [code for low, high in ("!~", "¡¬", "®ÿ") for code in range(ord(low), ord(high) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _token_spans(starts: Sequence[int], ends: Sequence[int], spans: Sequence[Span | None]) -> list[tuple[int, int]]:
    """Return the range of tokens inside each range of characters. An empty range starts where the last one ends."""
    ranges: list[tuple[int, int]] = []
    for span in spans:
        first = bisect_left(starts, span[0]) if span else 0
        last = bisect_right(ends, span[1]) if span else 0
        previous = ranges[-1][1] if ranges else 0
        ranges.append((first, last) if first < last else (previous, previous))
    return ranges
