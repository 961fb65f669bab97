"""Text to token ids and back, from the tokenizer files of a Hugging Face folder."""

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
    """A rendered chat. `spans[i]` is the half-open range of tokens that lie wholly in message i's content."""

    token_ids: list[int]
    spans: list[tuple[int, int]]


class Tokenizer:
    """A `tokenizers` pipeline and what surrounds it: special tokens, exact bytes, streaming, chats."""

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
        pipeline.post_processor = None  # it would trim the offsets that spans are cut by; BOS is added here
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
        # As in transformers, what `tokenizer.json` does decides, not what the settings claim.
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
        """Whether `encode_chat` can work."""
        return self._chat_template is not None

    @property
    def start_token_id(self) -> int:
        """What stands before a text's first token: BOS, or the end of another text for a model that has none."""
        return self.bos_token_id if self.bos_token_id is not None else min(self.eos_token_ids, default=0)

    def encode(self, text: str) -> list[int]:
        """Token ids; a special token's text becomes that token. Raises `ValueError` if it is not Unicode."""
        bos = [self.bos_token_id] if self.add_bos and self.bos_token_id is not None else []
        return bos + self._encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens as a continuation of what came before; special tokens are skipped.

        What is not UTF-8 becomes U+FFFD, and ids beyond the vocabulary are skipped.
        """
        return b"".join(map(self._visible_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token stands for: for special tokens their text, for unknown ids nothing."""
        return self._bytes.get(token_id, b"")

    def stream(self) -> DecodeStream:
        """A decoder that takes one token at a time; its pieces concatenate to what `decode` returns."""
        return DecodeStream(self)

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> ChatTokens:
        """Token ids of a chat. Raises `ChatTemplateError`, and `ValueError` if it is not Unicode."""
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
    """Text of a growing token sequence, released as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._visible_bytes = tokenizer._visible_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(self, token_id: int) -> str:
        """The characters that this token completes, possibly none."""
        return self._utf8.decode(self._visible_bytes(token_id))

    def flush(self) -> str:
        """What an unfinished character at the end decodes to."""
        return self._utf8.decode(b"", final=True)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and their like; older files wrap each in an object."""
    tokens = {}
    for name, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _eos_token_ids(folder: Path, tokenizer_eos: int | None) -> frozenset[int]:
    """Every id that one of the files calls an end of text: instruction tuning often adds to the base's."""
    found = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("generation_config.json", "config.json"):
        ids = _optional_json(folder / name).get("eos_token_id")
        found.update(ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else [])
    return frozenset(found)


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
    """The bytes of every token, by the pipeline's kind of decoder."""
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
    """GPT-2's writing of bytes as printable characters (Radford et al. 2019); others move up from 256."""
    printable = [code for low, high in ("!~", "¡¬", "®ÿ") for code in range(ord(low), ord(high) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _token_spans(offsets: Sequence[Span], spans: Sequence[Span | None]) -> list[tuple[int, int]]:
    """Ranges of tokens inside ranges of characters; an empty one stands at the end of the one before it."""
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    found: list[tuple[int, int]] = []
    for span in spans:
        first = bisect_left(starts, span[0]) if span else 0
        last = bisect_right(ends, span[1]) if span else 0
        previous = found[-1][1] if found else 0
        found.append((first, last) if first < last else (previous, previous))
    return found
