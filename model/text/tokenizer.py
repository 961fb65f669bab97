"""Converting text to token ids and back, with the tokenizer files of a Hugging Face folder."""

from __future__ import annotations

import codecs
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from model.base.checkpoint import CheckpointError, read_json
from model.text.chat_template import ChatTemplate, ChatTemplateError, Message, Span


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
    ) -> None:
        """Raises `CheckpointError` if tokens are neither byte-level nor SentencePiece-like."""
        pipeline.no_padding()
        pipeline.no_truncation()
        pipeline.post_processor = None  # a post-processor would trim offsets, and with them spans; `encode` adds BOS
        self._pipeline = pipeline
        self._chat_template = chat_template
        self._bytes = _token_bytes(pipeline)
        self._special = {i for i, token in pipeline.get_added_tokens_decoder().items() if token.special}
        self.vocab_size = pipeline.get_vocab_size()
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.add_bos = add_bos

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
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
        bos = [self.bos_token_id] if self.add_bos and self.bos_token_id is not None else []
        return bos + self._encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, as a continuation of earlier text.

        Special tokens and ids beyond the vocabulary are skipped. Bytes that are not UTF-8 become U+FFFD.
        """
        return b"".join(map(self._visible_bytes, ids)).decode("utf-8", errors="replace")

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
        text, spans = self._chat_template.render_with_spans(messages, add_generation_prompt=add_generation_prompt)
        encoding = self._encode(text)
        return ChatTokens(encoding.ids, _token_spans(encoding.offsets, spans))

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"a lone surrogate at position {error.start}"
            raise ValueError(f"text must be Unicode, got {where}") from None
        return self._pipeline.encode(text, add_special_tokens=False)

    def _visible_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special else self.token_bytes(token_id)


class DecodeStream:
    """An incremental decoder, which returns characters as soon as they are complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._visible_bytes = tokenizer._visible_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(self, token_id: int) -> str:
        """Return the characters that this token completes, possibly none."""
        return self._utf8.decode(self._visible_bytes(token_id))

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
        source = next((each["template"] for each in source if each["name"] == "default"), None)
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


def _byte_alphabet() -> dict[str, int]:
    """Return the bytes of GPT-2's characters (Radford et al. 2019): printable bytes are themselves, the others are
    characters from 256 on."""
    printable = [code for low, high in ("!~", "¡¬", "®ÿ") for code in range(ord(low), ord(high) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _token_spans(offsets: Sequence[Span], spans: Sequence[Span | None]) -> list[tuple[int, int]]:
    """Return the range of tokens inside each range of characters. An empty range starts where the last one ends."""
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    ranges: list[tuple[int, int]] = []
    for span in spans:
        first = bisect_left(starts, span[0]) if span else 0
        last = bisect_right(ends, span[1]) if span else 0
        previous = ranges[-1][1] if ranges else 0
        ranges.append((first, last) if first < last else (previous, previous))
    return ranges
