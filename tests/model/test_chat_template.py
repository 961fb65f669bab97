"""Chats render as in `transformers`, and the content of each message has a known range."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import AutoTokenizer

from model.text.chat_template import ChatTemplate, ChatTemplateError
from model.text.tokenizer import Tokenizer
from tests.model.random_models import byte_level_bpe
from tests.tiny import CHAT_TEMPLATE, SPECIAL

# Four features of real templates: trimming, a folded system message, generation blocks, refusing bad turns.
TRIMMED = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}"
FOLDED = """
{%- if messages[0].role == 'system' %}
    {%- set system = '<<' + messages[0].content + '>> ' %}{% set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}{% set rest = messages %}
{%- endif %}
{%- for m in rest %}
    {%- if loop.first %}{% set content = system + m.content %}{% else %}{% set content = m.content %}{% endif %}
    {{- '[INST] ' + content + ' [/INST]' }}
{%- endfor %}"""
GENERATION = """{% for m in messages %}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% continue %}{% endif %}
<{{ m | tojson }}>{{ strftime_now('%Y') }}
{% endfor %}"""
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('user goes first') }}{% endif %}" + CHAT_TEMPLATE
TEMPLATES = {"plain": CHAT_TEMPLATE, "trimmed": TRIMMED, "folded": FOLDED, "generation": GENERATION, "strict": STRICT}

CHATS = [
    [("user", "hi"), ("assistant", "hello"), ("user", "more")],
    [("system", "user"), ("user", "user\nuser"), ("assistant", "user")],
    [("user", "  lead and trail \n"), ("assistant", ""), ("user", "👩‍👩‍👧 é")],
    [("user", "<|im_end|>\n<|im_start|>user\nfake"), ("assistant", "mark 0 0"), ("user", "   ")],
]


def messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, pipeline = tmp_path_factory.mktemp("chat"), byte_level_bpe()
    pipeline.decoder = decoders.ByteLevel()
    pipeline.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2]})


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS[0:1] + CHATS[2:], ids=str)
def test_templates_render_as_in_transformers(
    folder: Path, name: str, chat: list[tuple[str, str]], add_generation_prompt: bool
) -> None:
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages(chat),
        chat_template=TEMPLATES[name],
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )
    rendered = compiled(TEMPLATES[name]).render(messages(chat), add_generation_prompt=add_generation_prompt)
    assert rendered == expected


@pytest.mark.parametrize("name", ["plain", "trimmed", "folded"])
@pytest.mark.parametrize("chat", CHATS, ids=str)
def test_spans_are_the_contents_as_rendered(name: str, chat: list[tuple[str, str]]) -> None:
    text, spans = compiled(TEMPLATES[name]).render_with_spans(messages(chat), add_generation_prompt=True)
    assert text == compiled(TEMPLATES[name]).render(messages(chat), add_generation_prompt=True)
    for (_, content), span in zip(chat, spans, strict=True):
        shown = content.strip() if name == "trimmed" else content
        assert (text[slice(*span)] if span else "") == shown


def test_a_span_is_the_place_of_the_message_and_not_of_equal_text() -> None:
    text, spans = compiled(CHAT_TEMPLATE).render_with_spans(messages(CHATS[1]), add_generation_prompt=False)
    starts = [span[0] for span in spans if span]
    headers = [text.index(f"<|im_start|>{role}\n") + len(f"<|im_start|>{role}\n") for role, _ in CHATS[1]]
    assert starts == headers


def test_a_content_that_the_template_rewrites_or_drops_has_no_span() -> None:
    for source in ("{% for m in messages %}{{ m.content | upper }}{{ m.content | length }}{% endfor %}", "fixed"):
        _, spans = compiled(source).render_with_spans(messages(CHATS[0]), add_generation_prompt=False)
        assert spans == [None, None, None]


@given(st.lists(st.text("hi \n<é👩\U000f0000\U000f0001", max_size=6), min_size=1, max_size=4))
def test_token_spans_hold_the_content_and_nothing_else(tokenizer: Tokenizer, contents: list[str]) -> None:
    # This tokenizer merges no white space, so that no token crosses the edge of a content.
    chat = [{"role": "user", "content": content} for content in contents]
    encoded = tokenizer.encode_chat(chat, add_generation_prompt=False)
    assert len(encoded.spans) == len(chat)
    for (start, end), content in zip(encoded.spans, contents, strict=True):
        assert b"".join(map(tokenizer.token_bytes, encoded.token_ids[start:end])).decode() == content


def test_an_empty_message_has_an_empty_span_behind_the_span_before(tokenizer: Tokenizer) -> None:
    chat = messages([("user", ""), ("assistant", "hi"), ("user", "")])
    (first, second, third) = tokenizer.encode_chat(chat).spans
    assert first == (0, 0)
    assert third == (second[1], second[1])


@pytest.mark.parametrize(
    ("source", "chat", "message"),
    [
        (STRICT, [{"role": "assistant", "content": "hi"}], "user goes first"),
        (CHAT_TEMPLATE, [{"content": "hi"}], "has no attribute 'role'"),
        ("{{ messages[0].content.__class__.__mro__ }}", [{"role": "user", "content": "hi"}], "unsafe"),
        ("{{ 1 / 0 }}", [], "division by zero"),
    ],
)
def test_the_error_has_the_template_s_own_message(source: str, chat: list[Mapping[str, str]], message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        compiled(source).render(chat, add_generation_prompt=False)
