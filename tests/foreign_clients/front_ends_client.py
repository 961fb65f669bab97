"""Open WebUI and LibreChat: the requests that these front ends send, as their sources and documentation have them.

The programs themselves are not installed: Open WebUI wants another torch, LibreChat a database.
"""

# /// script
# dependencies = ["httpx"]
# ///

import json
from typing import Any

import httpx

TITLE = (
    "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n### Output:\n"
    'JSON format: { "title": "your concise title here" }\n### Chat History:\n<chat_history>\nUSER: Hello.\n'
    "ASSISTANT: Hello!\n</chat_history>"
)
# A front end sends back what it has shown, with fields of its own.
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
    {"role": "assistant", "content": "Hello!", "reasoning_content": "The user greets."},
    {"role": "user", "content": "Say it again."},
]


def _post(url: str, path: str, body: dict[str, Any], **headers: str) -> Any:
    reply = httpx.post(f"{url}{path}", json=body, headers={"Authorization": "Bearer none", **headers}, timeout=300)
    assert reply.status_code == 200, reply.text[:300]
    return reply


def _streamed(reply: Any) -> str:
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def _versions(url: str) -> list[int]:
    listed = httpx.get(f"{url}/v1/sessions").json()["data"]
    return [session["version"] for session in listed]


def check_open_webui_lists_the_models(url: str, model: str) -> None:
    for path in ("/v1/models", "/models"):
        assert [each["id"] for each in httpx.get(f"{url}{path}").json()["data"]] == [model]


def check_open_webui_chats(url: str, model: str) -> None:
    body = {
        **{"model": model, "messages": CHAT, "stream": True, "stream_options": {"include_usage": True}},
        **{"temperature": 0.8, "top_k": 40, "min_p": 0.0, "repeat_penalty": 1.1, "max_tokens": 24, "num_ctx": 2048},
        **{"user": "a6f1c0de-0000-4000-8000-000000000000", "files": None, "seed": None},
    }
    assert _streamed(_post(url, "/v1/chat/completions", body))


def check_open_webuis_titles_teach_nobody(url: str, model: str) -> None:
    before = _versions(url)
    body = {"model": model, "messages": [{"role": "user", "content": TITLE}], "stream": False, "max_tokens": 24}
    body |= {"metadata": {"task": "title_generation", "chat_id": "1"}, "user": "someone"}
    assert _post(url, "/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert _versions(url) == before


def check_open_webui_by_ollamas_routes(url: str, model: str) -> None:
    assert httpx.get(f"{url}/api/version").json()["version"]
    assert httpx.get(f"{url}/api/tags").json()["models"][0]["model"] == model
    assert httpx.get(f"{url}/api/ps").json()["models"][0]["model"] == model
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Hello.", "images": []}]}
    body |= {"stream": True, "options": {"num_predict": 16, "temperature": 0.8}, "keep_alive": "5m"}
    lines = [json.loads(line) for line in _post(url, "/api/chat", body).text.splitlines()]
    assert lines[-1]["done"] and "".join(line["message"]["content"] for line in lines)


def check_open_webuis_documents_become_vectors(url: str, model: str) -> None:
    found = _post(url, "/v1/embeddings", {"model": model, "input": ["A cat.", "A dog."]}).json()["data"]
    assert len(found) == 2
    found = _post(url, "/api/embed", {"model": model, "input": ["A cat.", "A dog."]}).json()["embeddings"]
    assert len(found) == 2


def check_open_webui_with_tools(url: str, model: str) -> None:
    parameters = {"type": "object", "properties": {"query": {"type": "string", "maxLength": 12}}, "required": ["query"]}
    tool = {"type": "function", "function": {"name": "search_web", "description": "Search.", "parameters": parameters}}
    body = {"model": model, "messages": CHAT, "stream": True, "tools": [tool], "max_tokens": 48}
    _streamed(_post(url, "/v1/chat/completions", body))


def check_librechat_chats(url: str, model: str) -> None:
    body = {
        **{"model": model, "messages": CHAT[1:], "stream": True, "stream_options": {"include_usage": True}},
        **{"user": "66f0c0de0000000000000000", "temperature": 1, "top_p": 1, "presence_penalty": 0},
        **{"frequency_penalty": 0, "max_tokens": 24, "stop": [], "n": 1},
    }
    assert _streamed(_post(url, "/v1/chat/completions", body))


def check_librechats_titles_by_a_structured_output(url: str, model: str) -> None:
    schema = {"type": "object", "properties": {"title": {"type": "string", "maxLength": 40}}, "required": ["title"]}
    form = {"type": "json_schema", "json_schema": {"name": "title", "strict": True, "schema": schema}}
    body = {"model": model, "messages": CHAT[1:2], "response_format": form, "max_tokens": 64, "stream": False}
    json.loads(_post(url, "/v1/chat/completions", body).json()["choices"][0]["message"]["content"])


def check_librechat_names_a_session_by_its_headers(url: str, model: str) -> None:
    body = {"model": model, "messages": CHAT[1:2], "max_tokens": 8}
    reply = _post(url, "/v1/chat/completions", body, **{"X-Imprint-Session": "librechat"}).json()
    assert reply["adaptation"]["tokens_learned"] > 0
