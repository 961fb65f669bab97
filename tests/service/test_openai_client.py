"""The unmodified `openai` client works: sync and async, completions and chat, streamed or not."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

HELLO: list[ChatCompletionMessageParam] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "My cat is "}, {"type": "text", "text": "Miso."}]},
]


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def complete(client: openai.OpenAI, server: Any) -> Any:
    """Return a function that calls `client.completions.create` with the model and a short prompt."""

    def create(prompt: Any = "Once upon a time", **fields: Any) -> Any:
        return client.completions.create(model=server.model, prompt=prompt, **{"max_tokens": 8, "seed": 7} | fields)

    return create


@pytest.fixture
def chat(client: openai.OpenAI, server: Any) -> Any:
    """Return a function that calls `client.chat.completions.create` with the model and a short chat."""

    def create(messages: Any = HELLO, **fields: Any) -> Any:
        return client.chat.completions.create(
            model=server.model, messages=messages, **{"max_completion_tokens": 8, "seed": 7} | fields
        )

    return create


def adaptation(reply: Any) -> Any:
    return reply.model_extra["adaptation"]


def test_models_carry_fingerprints(client: openai.OpenAI, server: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == server.model
    assert client.models.retrieve(server.model) == model
    assert model.model_extra is not None
    assert {"base", "memory"} <= model.model_extra["fingerprints"].keys()


def test_completion(complete: Any, server: Any) -> None:
    reply = complete()
    assert reply.object == "text_completion"
    assert reply.id.startswith("cmpl-")
    assert reply.model == server.model
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert 0 < reply.usage.completion_tokens <= 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert adaptation(reply) is None


def test_completions_default_to_16_tokens(complete: Any) -> None:
    assert complete(max_tokens=None).usage.completion_tokens <= 16


def test_chat_completion(chat: Any, server: Any) -> None:
    reply = chat()
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert reply.model == server.model
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert 0 < reply.usage.completion_tokens <= 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert adaptation(reply) is None


def test_a_reply_can_be_sent_back_as_history(chat: Any) -> None:
    reply = chat()
    chat([*HELLO, reply.choices[0].message, {"role": "user", "content": "And then?"}])


def test_parts_and_developer_are_the_same_prompt_as_plain_system(chat: Any) -> None:
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "My cat is Miso."}]
    assert chat(plain).choices[0].message.content == chat().choices[0].message.content


def test_a_stream_has_the_text_of_the_whole_completion(complete: Any) -> None:
    whole: Completion = complete()
    chunks: list[Completion] = list(complete(stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert chunks[0].system_fingerprint == whole.system_fingerprint
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_a_chat_stream_has_the_text_of_the_whole_reply(chat: Any) -> None:
    whole = chat()
    chunks: list[ChatCompletionChunk] = list(chat(stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("include_usage", [False, True])
def test_the_stream_on_the_wire(server: Any, path: str, include_usage: bool) -> None:
    body: dict[str, Any] = {"model": server.model, "max_tokens": 4, "stream": True, "session": "wire"}
    body |= {"prompt": "a"} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    response = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.text.endswith("\n\n")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    if include_usage:
        last = chunks.pop()
        assert last["choices"] == [] and last["usage"]["total_tokens"] > 0
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    has_adaptation = ["adaptation" in chunk for chunk in chunks]
    assert has_adaptation == [chunk["choices"][0]["finish_reason"] is not None for chunk in chunks]
    assert has_adaptation == [False] * (len(has_adaptation) - 1) + [True]


async def test_async_client(async_client: openai.AsyncOpenAI, server: Any) -> None:
    completions = async_client.completions
    whole = await completions.create(model=server.model, prompt="a", max_tokens=6, seed=1)
    text = ""
    stream = await completions.create(model=server.model, prompt="a", max_tokens=6, seed=1, stream=True)
    async for chunk in stream:
        text += chunk.choices[0].text
    assert text == whole.choices[0].text


async def test_async_client_chat(async_client: openai.AsyncOpenAI, server: Any) -> None:
    chats = async_client.chat.completions
    whole = await chats.create(model=server.model, messages=HELLO, max_tokens=6, seed=1)
    text = ""
    stream = await chats.create(model=server.model, messages=HELLO, max_tokens=6, seed=1, stream=True)
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content


def test_several_prompts_and_n_are_choices_in_order(complete: Any) -> None:
    reply = complete(["One", "Two"], n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.choices[2].text == complete("Two", n=2).choices[0].text


def test_n_choices_of_a_chat_stream(chat: Any) -> None:
    whole = chat(n=2)
    texts = ["", ""]
    ended = []
    for chunk in chat(n=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ended.append(choice.index)
    assert texts == [choice.message.content for choice in whole.choices]
    assert sorted(ended) == [0, 1]


def test_a_seed_makes_sampling_reproducible(complete: Any) -> None:
    assert complete(seed=1).choices[0].text == complete(seed=1).choices[0].text
    assert complete(seed=1).choices[0].text != complete(seed=2).choices[0].text


def test_temperature_0_needs_no_seed(complete: Any) -> None:
    assert complete(temperature=0, seed=None).choices == complete(temperature=0, seed=None).choices


def test_stop_ends_before_the_stop_string(complete: Any) -> None:
    free = complete(max_tokens=16, temperature=0).choices[0].text
    # Not a replacement character: the bytes after it decide whether the broken bytes are one.
    stop = [char for char in free if char != "\N{REPLACEMENT CHARACTER}"][-1]
    for stops in (stop, [stop, "never said"]):
        stopped = complete(max_tokens=16, temperature=0, stop=stops).choices[0]
        assert stopped.text == free[: free.index(stop)]
        assert stopped.finish_reason == "stop"


def test_logit_bias_decides(complete: Any) -> None:
    favoured = complete(temperature=0, logprobs=1, logit_bias={"65": 100}, max_tokens=3)
    assert len(set(favoured.choices[0].logprobs.tokens)) == 1


def test_logprobs_of_a_completion(complete: Any) -> None:
    reply = complete(logprobs=2)
    logprobs = reply.choices[0].logprobs
    counts = {len(logprobs.tokens), len(logprobs.token_logprobs), len(logprobs.top_logprobs)}
    assert counts == {reply.usage.completion_tokens} == {len(logprobs.text_offset)}
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert logprob <= 0
        assert top[token] == logprob
        assert 2 <= len(top) <= 3 and logprob <= max(top.values())
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    chunks = list(complete(logprobs=2, stream=True))
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens]
    assert streamed == logprobs.tokens


def test_logprobs_of_a_chat(chat: Any) -> None:
    reply = chat(logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.logprob <= token.top_logprobs[0].logprob
    text = b"".join(bytes(token.bytes) for token in content).decode(errors="replace")
    assert text.startswith(reply.choices[0].message.content) or reply.choices[0].finish_reason == "stop"
    assert all(token.top_logprobs == [] for token in chat(logprobs=True).choices[0].logprobs.content)
    assert chat().choices[0].logprobs is None


def test_echo_gives_the_prompt_back_and_its_logprobs(complete: Any) -> None:
    reply = complete("Once upon", echo=True, logprobs=0)
    assert reply.choices[0].text == "Once upon" + complete("Once upon").choices[0].text
    assert reply.choices[0].logprobs.token_logprobs[0] is None
    assert len(reply.choices[0].logprobs.tokens) == reply.usage.total_tokens
    scored = complete("Once upon", echo=True, logprobs=0, max_tokens=0)
    assert scored.choices[0].text == "Once upon"
    assert scored.usage.completion_tokens == 0


def test_token_ids_are_a_prompt(complete: Any) -> None:
    assert complete([5, 6, 7]).usage.prompt_tokens == 3
    assert complete([[5, 6, 7], [8, 9]]).usage.prompt_tokens == 5


def test_errors_are_the_clients_own(client: openai.OpenAI, complete: Any, chat: Any) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        complete(temperature=101)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    assert "temperature" in bad.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}])
    assert bad.value.param == "tools.0.function.parameters"
    with pytest.raises(openai.BadRequestError) as bad:
        complete([5] * 600, stream=True)
    assert bad.value.param == "prompt"
    with pytest.raises(openai.NotFoundError) as not_found:
        client.completions.create(model="gpt-4o", prompt="a")
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="any", input="a")
    assert bad.value.request_id


def test_no_op_values_and_nulls_are_fine(client: openai.OpenAI, server: Any) -> None:
    client.chat.completions.create(
        model=server.model,
        messages=HELLO,
        max_tokens=1,
        n=None,
        stop=None,
        logit_bias=None,
        tools=[],
        tool_choice="none",
        parallel_tool_calls=False,
        response_format={"type": "text"},
        modalities=["text"],
        service_tier="auto",
        store=False,
        metadata={},
        stream=False,
        stream_options=None,
    )


def test_a_completion_of_a_session_reports_its_adaptation(complete: Any, server: Any) -> None:
    first = adaptation(complete(extra_body={"session": "learner"}))
    assert first["tokens_learned"] > 0
    assert first["rows_written"] > 0
    assert (first["version_from"], first["version_to"]) == (0, 1)
    assert adaptation(complete(extra_body={"session": "learner"}))["version_to"] == 2
    session = httpx.get(f"{server.url}/v1/sessions/learner")
    assert session.json()["version"] == 2
    assert session.headers["etag"] == '"v2"'


def test_the_last_chunk_of_a_streamed_chat_reports_its_adaptation(chat: Any) -> None:
    for version in (1, 2):
        more = {"role": "user", "content": f"Turn {version}."}
        chunks = list(chat([*HELLO, more], extra_body={"session": "listener"}, stream=True))
        assert adaptation(chunks[-1])["version_to"] == version
        assert all("adaptation" not in chunk.model_extra for chunk in chunks[:-1])


def test_predict_leaves_the_version_alone(complete: Any) -> None:
    complete(extra_body={"session": "reader"})
    done = adaptation(complete(extra_body={"session": "reader", "adapt": "predict"}))
    assert (done["tokens_learned"], done["version_from"], done["version_to"]) == (0, 1, 1)


def test_observe_learns_without_generating(complete: Any, chat: Any) -> None:
    for reply in (
        complete(extra_body={"session": "silent", "adapt": "observe"}),
        chat(extra_body={"session": "silent", "adapt": "observe"}),
    ):
        assert reply.usage.completion_tokens == 0
        assert reply.choices[0].finish_reason == "stop"
        assert adaptation(reply)["tokens_learned"] > 0


def test_the_bodys_session_overrides_the_headers_and_user_names_none(complete: Any, server: Any) -> None:
    def version(session: str) -> int:
        response = httpx.get(f"{server.url}/v1/sessions/{session}")
        return int(response.json()["version"]) if response.status_code == 200 else 0

    header = {"X-Imprint-Session": "of-header"}
    assert adaptation(complete(user="of-user")) is None
    complete(user="of-user", extra_headers=header)
    assert (version("of-user"), version("of-header")) == (0, 1)
    complete(user="of-user", extra_headers=header, extra_body={"session": "of-body"})
    assert (version("of-user"), version("of-header"), version("of-body")) == (0, 1, 1)


def test_if_match_guards_a_turn(complete: Any) -> None:
    complete(extra_body={"session": "guarded"})
    with pytest.raises(openai.APIStatusError) as stale:
        complete(extra_body={"session": "guarded"}, extra_headers={"If-Match": '"v7"'})
    assert stale.value.status_code == 412
    reply = complete(extra_body={"session": "guarded"}, extra_headers={"If-Match": '"v1"'})
    assert adaptation(reply)["version_to"] == 2
