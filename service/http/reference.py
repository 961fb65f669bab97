"""The page docs/http.md: a table of the routes and a table of the errors, printed from the code."""

import inspect
from collections.abc import Iterator

from fastapi import FastAPI

from service import errors
from service.http.routes import ROUTERS


def markdown() -> str:
    """Return the page docs/http.md."""
    app = FastAPI(title="Imprint")
    for router in ROUTERS:
        app.include_router(router)
    routes = "\n".join(
        _row(f"`{method.upper()} {path}`", operation["description"])
        for path, methods in app.openapi()["paths"].items()
        for method, operation in methods.items()
    )
    faults = "\n".join(
        _row(str(kind.status), f"`{kind.__name__}`", _code(kind), _meaning(kind)) for kind in _tree(errors.ImprintError)
    )
    return f"""\
# Routes and errors

Printed by `.venv/bin/python -m service.http.reference`; edit the routes and `service/errors.py` instead of this page.
A running server describes every route at `/openapi.json`, with schemas, examples of requests and replies, and, where
the server has keys, the key that each route takes. OpenAI's routes are OpenAI's, streamed (server-sent events) or not.

## Routes

| route | description |
| --- | --- |
{routes}

The body's `session` names the session of a completion, else the header `X-Imprint-Session`, else the name of the model
(`NAME@SESSION`). OpenAI's `user` names a session only with `IMPRINT_USER_SESSIONS`: front ends send it with every
request, also with those for titles and summaries. Such requests should teach nobody: the body's `adapt` says so, else
the header `X-Imprint-Adapt`, else the name of the model (`NAME:predict`, `NAME:predict@SESSION`), else the API key
(`adapt=predict` after its entry). The replies of a session's routes carry the session's version as their `ETag`
(`"v3"`); with `If-Match`, a request is only honoured at that version. Completions carry `adaptation`. In a stream,
`adaptation` comes with the chunk that has the `finish_reason`, and that chunk is sent after the commit.

## Clients of other servers

A base URL of OpenAI's routes works with `/v1` and without. Clients of Ollama and of Anthropic work unchanged with the
server's address as their base URL: `/api/chat` and `/api/generate` take Ollama's options, `/v1/messages` takes texts,
blocks of text, calls of tools and their results. A chat is the same in every shape: the same session, the same reply,
and a message that was learned in one shape is known in the others. Their errors have the shape of their own servers. A
key may come as `x-api-key` instead of `Authorization`. `/v1/health` answers as `/health` does.

Completions take the samplers of vLLM and llama.cpp by both names, and they draw after the memory is mixed in. Fields
that change no answer (`store`, `metadata`, `reasoning_effort`, unknown ones) are ignored, and the header
`X-Imprint-Ignored` names them; with `IMPRINT_STRICT_FIELDS` they are a 400. A field that would change the answer and is
not supported is a 400, unless its value changes nothing, and so is a misspelt field (`sesion`). A request without
`model` means the language model. More tokens than the context has room for are as many as fit; a prompt that leaves no
room is a 400. With `prompt_logprobs`, each token of the prompt has its log-probability with the session's memory and
without.

`/infill` is llama.cpp's, for editors ([Code completion](code.md)): it fills the gap between two texts, as a completion
with a `suffix` does, and teaches nothing unless the request says so. `/completion` is llama.cpp's too: one prompt, as
`/v1/completions` continues it, answered with `content` and `stop`.

A text follows a JSON Schema (`response_format`, `structured_outputs`, `guided_json`, `json_schema`), a regular
expression, one of several texts, or rules (`grammar`). A schema with a keyword that cannot be followed is a 400. Tokens
that the grammar forces teach a session nothing.

## Responses and conversations

`POST /v1/responses` replies as a chat does, in the shape of OpenAI's Responses: `input` is a text or a list of items
(messages, `function_call`, `function_call_output`, `item_reference`), `instructions` are a message of the system, and a
stream has OpenAI's events. The samplers are those of completions. Functions are the only tools. What OpenAI's servers
do by themselves (`background`, `truncation: "auto"`, `prompt`, tools that run on the server) is a 400.

A conversation is a session. `conversation` names the session, whose memory is read and updated; besides, the chat of
its newest kept response comes before the input. `previous_response_id` names any kept response: its chat comes before
the input, and its session, if it has one, is the session of the request. A message that comes again in this way is not
learned again. The `instructions` of earlier responses do not come again. `session` (also as a header or in the name of
the model) uses the memory alone. Without a session nothing is learned, as in chats.

The server keeps a response with its chat, in the store beside the sessions: for `IMPRINT_RESPONSE_TTL_S`, the newest
32 of a session and the newest 1,024 of a tenant that have no session, each of at most 1,048,576 characters. What is
kept of a session goes with the session, at the latest when it expires, and when the session is rolled back, unlearned
or replaced by an import. `GET /v1/responses/{{id}}` reads a response, `DELETE` erases it; what a session has learned
stays. `…/input_items` lists the chat that the response answers. The reply's `store` says whether the response is kept.
With `"store": false` it is not, and no session learns; a request that only reads (`adapt: "predict"`) keeps nothing
unless it says `"store": true`. A `previous_response_id` that is not kept any more is a 400
(`previous_response_not_found`); a conversation of which nothing is kept goes on with its memory.

`POST /v1/conversations` creates a session with a new name. The items of a conversation are the chat of its newest kept
response; added items come before the next input, and are learned with it. Items cannot be erased one by one, and
`metadata` of conversations is ignored: a session carries none. `DELETE` erases the session and what it has learned.

## Tools

Chats take OpenAI's `tools` (functions), `tool_choice` (`none`, `auto`, `required`, a tool by its name, `allowed_tools`)
and `parallel_tool_calls`. A reply is a text, or a text and calls; the arguments of a call follow the tool's JSON
Schema. A keyword of the schema that cannot be followed is left out, unless the tool is `strict`: then it is a 400. A
reply with calls ends with `tool_calls`, also where the call was required; one that is cut off ends with `length`, and
its last arguments are no JSON. With `response_format`, a reply without calls has that form. The prompt has the tools
that `tool_choice` lets the reply call. Each message of a tool must answer a call that stands before it.

The tools are in the prompt as the base's chat template lists them, if the template has the form of Hermes and Qwen
(`<tool_call>`, JSON, `</tool_call>`); otherwise the system's message lists them in that form, and the results of tools
are in messages of the user. A reply that is nothing but the JSON of a call, perhaps as a block of code, is a call too.
A message's `reasoning_content` is given to the template; most templates leave it out.

Responses, Anthropic's messages and Ollama's chats take tools in their own words, with the same effect. Ollama has no
`tool_choice`.

A session learns the calls of resent messages as it learns the assistant's text, and knows them again in whatever way a
client writes the arguments or names the ids. It never learns tools and their schemas, and results of tools only with
`"learn_tool_results": true`.

## Idempotency

The server learns from a request with an `Idempotency-Key` once, however often the request arrives. A repeated request
gets the first answer, with `Idempotent-Replayed: true`. OpenAI's client needs no key, because the client says in a
header that a request is repeated. Without a key and without that header, the server learns twice from a body that is
sent twice. The server remembers a key for `IMPRINT_IDEMPOTENCY_TTL_S`.

## Errors

Bodies are OpenAI's: `{{"error": {{"message", "type", "param", "code"}}}}`; under `/api/` they are Ollama's, and under
`/v1/messages` Anthropic's. Answers of 429 and 503 have a `Retry-After`; answers to which a retry is of no use have
`x-should-retry: false`. `X-Request-Id` is the client's own id, or a new one. The class is that of the Python client and
of the server; general classes stand before special ones. Some errors have another `code` than the one in this table.

| status | class | code | meaning |
| --- | --- | --- | --- |
{faults}
"""


def _row(*cells: str) -> str:
    """Return a row of a Markdown table; a line break or a bar within a cell would end the row or the cell."""
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _tree(root: type[errors.ImprintError]) -> Iterator[type[errors.ImprintError]]:
    """Yield the subclasses of `root` that the server defines, each before its own subclasses."""
    for kind in sorted(root.__subclasses__(), key=lambda kind: kind.status):
        if kind.__module__ == errors.__name__:
            yield kind
            yield from _tree(kind)


def _code(kind: type[errors.ImprintError]) -> str:
    return f"`{kind.code}`" if kind.code else ""


def _meaning(kind: type[errors.ImprintError]) -> str:
    meaning = (inspect.getdoc(kind) or "").partition(": ")[2]
    return meaning[:1].upper() + meaning[1:]


if __name__ == "__main__":
    print(markdown(), end="")
