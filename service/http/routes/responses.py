"""OpenAI's Responses: create a response, streamed or not, read one that is kept, erase one.

A response is a chat completion in another shape. A conversation is a session; what is kept besides the session's memory
is a bounded number of responses with their chats, so that clients need not send them again.
"""

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response

from model.text.tool_calls import ReplyPiece
from service.concurrency import run_off_loop
from service.errors import BadRequest, NotFound, Unavailable
from service.http.dependencies import (
    ImprintHeaders,
    ImprintHeadersDep,
    LearningRequest,
    LearningRequestDep,
    RequestContextDep,
    SessionsDep,
)
from service.http.error_responses import report_error
from service.http.generation_schemas import ChatCompletionRequest
from service.http.json_route import JsonRoute
from service.http.openapi import ERROR_RESPONSES, named_events
from service.http.queries import ItemPage
from service.http.response_formats import call_id
from service.http.response_items import ItemList, as_input, input_items, kept_items, listed_reply
from service.http.response_schemas import (
    InputReference,
    Item,
    ResponseDeleted,
    ResponseReply,
    ResponseRequest,
    chat_messages,
    require_calls_before,
)
from service.http.routes.openai import answer, chat_job, latency_recorder, named_session
from service.http.sse import NamedEventStream
from service.http.text_formats import TextFormatter, TurnEvent, as_chat, compact
from service.turns.completion import TurnEnd
from service.turns.completion_job import CompletionJob
from service.turns.idempotency import RequestContext
from service.turns.prompts import ChatPrompt
from service.turns.responses import KeptResponse, ResponseId, TenantResponses, require_small
from service.turns.sessions import Sessions

MAX_REFERENCED = 64  # kept responses whose items one request names
RENAMED = {  # the fields of a chat completion whose errors name a field of this interface
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
}
ITEM_KINDS = {"message": "msg", "function_call": "fc"}

Json = dict[str, Any]

router = APIRouter(prefix="/v1/responses", route_class=JsonRoute, responses=ERROR_RESPONSES, tags=["OpenAI"])

ResponsePathId = Annotated[
    str, Path(alias="id", description="The response's id.", examples=["resp_5f2b9c04d1e75f2b9c04d1e75f2b9c04"])
]


@dataclass(frozen=True)
class ResponseChat:
    """The chat and the session of a response.

    Attributes:
        messages: the chat that is kept with the response, without its instructions.
        num_before: number of messages of a conversation, before the input; None = of no conversation.
        size: characters of the chat as JSON.
        session: the session that answers; None = the frozen base.
        keeps: whether the response is to be kept.
        responses: the kept responses of the tenant.
    """

    messages: list[Json]
    num_before: int | None
    size: int
    session: str | None
    keeps: bool
    responses: TenantResponses


class ResponseEvents(TextFormatter):
    """The format of `/v1/responses`."""

    def __init__(
        self, learning: LearningRequest, body: ResponseRequest, chat: ResponseChat, job: CompletionJob
    ) -> None:
        (prompt,) = job.prompts
        assert isinstance(prompt, ChatPrompt)
        super().__init__(latency_recorder(learning), prompt.tools)
        self._request, self._ctx, self._chat = learning.request, learning.ctx, chat
        sampling = job.generation.sampling
        self._echoed = body.echoed() | {
            "model": learning.sessions.model_id,
            "conversation": None if body.conversation_id is None else {"id": body.conversation_id},
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        self._output = list[Json]()
        self._number = 0

    async def stream(self, events: AsyncGenerator[TurnEvent, None]) -> AsyncGenerator[str, None]:
        """Yield the events of a stream; an error is the last one."""
        try:
            async with aclosing(super().stream(events)) as texts:
                async for text in texts:
                    yield text
        except Exception as error:
            reported = await report_error(self._request, error)
            code = "rate_limit_exceeded" if reported.status == 429 else "server_error"
            failed = {"status": "failed", "store": False, "error": {"code": code, "message": reported.message}}
            yield self._event("response.failed", response=self._response() | failed)

    async def whole(self, parts: Sequence[ReplyPiece], end: TurnEnd) -> Json:
        self._output = [self._item(index, part, "completed") for index, part in enumerate(parts)]
        return await self._finished(end)

    def opening(self, prompt_tokens: int) -> Iterable[str]:
        yield self._event("response.created", response=self._response())
        yield self._event("response.in_progress", response=self._response())

    def piece(self, piece: ReplyPiece) -> Iterable[str]:
        if piece.name is not None or not self._output:
            yield from self._end_item("completed")
            self._output.append(self._item(len(self._output), ReplyPiece("", piece.call, piece.name), "in_progress"))
            shown = self._output[-1] | ({"content": []} if piece.call is None else {})
            yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=shown)
            if piece.call is None:
                yield self._item_event("content_part.added", part=self._output[-1]["content"][0])
        item = self._output[-1]
        if not piece.text:
            return
        if piece.call is None:
            item["content"][0]["text"] += piece.text
            yield self._item_event("output_text.delta", delta=piece.text, logprobs=[])
        else:
            item["arguments"] += piece.text
            yield self._item_event("function_call_arguments.delta", delta=piece.text)

    async def closing(self, end: TurnEnd) -> Iterable[str]:
        events = list(self._end_item(_status(end)))
        reply = await self._finished(end)
        return [*events, self._event(f"response.{reply['status']}", response=reply)]

    def _end_item(self, status: str) -> Iterator[str]:
        """Yield the events that end the last item."""
        if not self._output:
            return
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            yield self._item_event("output_text.done", text=part["text"], logprobs=[])
            yield self._item_event("content_part.done", part=part)
        else:
            yield self._item_event("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    async def _finished(self, end: TurnEnd) -> Json:
        """Return the response as the turn leaves it, and keep the response."""
        status, reply = _status(end), self._response()
        if self._output:
            self._output[-1]["status"] = status
        total = end.prompt_tokens + end.completion_tokens
        reply |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": {
                "input_tokens": end.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": end.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": total,
            },
            "adaptation": end.adaptation and asdict(end.adaptation),
        }
        if self._chat.keeps:
            reply["store"] = await self._keep(reply, end.session_created)
        return reply

    async def _keep(self, reply: Json, created: float | None) -> bool:
        """Keep the response; return whether it is kept. Of a conversation, it goes on with what others have added."""
        chat = self._chat
        messages = chat.messages + chat_messages([as_input(item) for item in self._output])
        if chat.num_before is None or chat.session is None:
            return await chat.responses.keep(KeptResponse(messages, reply), created)
        added = messages[chat.num_before :]

        async def grow(newest: KeptResponse | None) -> KeptResponse:
            return KeptResponse([*([] if newest is None else newest.messages), *added], reply)

        try:
            return await chat.responses.keep_next(chat.session, grow, created) is not None
        except Unavailable:  # the newest one cannot be read, but the reply is there
            return False

    @property
    def _id(self) -> ResponseId:
        """Return the id, which is that of the first answer where this one is a replay."""
        return ResponseId(self._ctx.id, self._chat.session or "")

    def _response(self) -> Json:
        """Return the response before its end."""
        head = {"id": str(self._id), "object": "response", "created_at": self._ctx.created, "status": "in_progress"}
        head |= {"background": False, "error": None, "incomplete_details": None, "output": self._output}
        return head | self._echoed | {"store": self._chat.keeps, "usage": None, "adaptation": None}

    def _item(self, index: int, part: ReplyPiece, status: str) -> Json:
        """Return item number `index` of the output."""
        kind = "message" if part.call is None else "function_call"
        head = {"id": self._id.item(ITEM_KINDS[kind], index), "type": kind, "status": status}
        if part.call is None:
            text = {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}
            return head | {"role": "assistant", "content": [text]}
        return head | {"call_id": call_id(self._ctx.id, 0, part.call), "name": part.name, "arguments": part.text}

    def _item_event(self, kind: str, **fields: Any) -> str:
        """Return an event about the last item, or about the part of a message that it is."""
        index = len(self._output) - 1
        where: Json = {"item_id": self._output[index]["id"], "output_index": index}
        if self._output[index]["type"] == "message":
            where["content_index"] = 0
        return self._event(f"response.{kind}", **where, **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        self._number += 1
        return compact({"type": kind, "sequence_number": self._number - 1} | fields)


@router.post(
    "",
    summary="Create a response",
    response_model=ResponseReply,
    responses=named_events(
        "ResponseEvent",
        "The response, or a stream of its events. The last one carries `adaptation`, after the commit.",
        *("response.function_call_arguments.delta", "response.function_call_arguments.done"),
        *("response.incomplete", "response.failed"),
    ),
)
async def create_response(
    body: ResponseRequest, learning: LearningRequestDep, headers: ImprintHeadersDep
) -> Json | Response:
    """Reply to a chat as `POST /v1/chat/completions` does; keep the response, so that a later one can go on with it."""
    chat = await _find_chat(body, learning, headers)
    with _renamed_errors():
        request = await run_off_loop(chat.size, _chat_request, body, chat)
        job = chat_job(request, learning, headers)
        if job.session is not None and job.adapt == "predict" and body.store is None:
            chat = replace(chat, keeps=False)  # a request that only reads writes nothing that it does not ask for
        return await answer(learning, request, job, ResponseEvents(learning, body, chat, job), NamedEventStream)


@router.get("/{id}", summary="Read a kept response")
async def get_response(id: ResponsePathId, sessions: SessionsDep, ctx: RequestContextDep) -> ResponseReply:
    """Return a response that is kept: for `IMPRINT_RESPONSE_TTL_S`, with its session, among the newest."""
    kept = await _kept(id, sessions, ctx)
    return ResponseReply.model_validate(kept.reply)


@router.get("/{id}/input_items", summary="List the items before a kept response", response_model=ItemList)
async def list_input_items(
    id: ResponsePathId,
    page: Annotated[ItemPage, Query()],
    sessions: SessionsDep,
    ctx: RequestContextDep,
    response: Response,
) -> Response:
    """List the items of the chat that a kept response answers, without its instructions."""
    kept = await _kept(id, sessions, ctx)
    return await listed_reply(kept, lambda: input_items(kept), page, response)


@router.delete("/{id}", summary="Erase a kept response")
async def delete_response(id: ResponsePathId, sessions: SessionsDep, ctx: RequestContextDep) -> ResponseDeleted:
    """Erase a response that is kept, with its chat. What a session has learned from it stays."""
    name = ResponseId.parse(id)
    if name is None or not await tenant_responses(sessions, ctx).delete(name):
        raise _not_found(id)
    return ResponseDeleted(id=id, object="response", deleted=True)


async def _find_chat(body: ResponseRequest, learning: LearningRequest, headers: ImprintHeaders) -> ResponseChat:
    """Return the chat that a request goes on with, and its session. Raises NotFound and BadRequest."""
    responses = tenant_responses(learning.sessions, learning.ctx)
    session = named_session(body.model, body.conversation_id or body.session, body.user, learning, headers)
    kept = None
    if body.previous_response_id is not None:
        kept = await responses.find(ResponseId.parse(body.previous_response_id))
        if kept is None:
            raise _not_previous(body.previous_response_id)
        before = kept.name.session
        if before and session not in (None, before):
            message = f"'previous_response_id' is of session {before!r}, the request of {session!r}."
            raise BadRequest(message, param="previous_response_id")
        session = session or before or None
    elif body.conversation_id is not None:
        kept = await responses.newest(body.conversation_id)
    messages = [] if kept is None else kept.messages
    num_before = None if body.conversation_id is None else len(messages)
    items = body.input if isinstance(body.input, str) else await resolve_references(body.input, responses)
    keeps = body.store is not False and learning.sessions.gate.limits.response_ttl_s > 0
    work = len(await learning.request.body()) + sum(len(message["content"] or "") for message in messages)
    messages, size = await run_off_loop(work, _joined, messages, items, body)
    if keeps:
        require_small(size)
    return ResponseChat(messages, num_before, size, session, keeps, responses)


def _joined(before: list[Json], items: str | Sequence[Item], body: ResponseRequest) -> tuple[list[Json], int]:
    """Return the messages of a chat that goes on, and the characters that are kept. Raises BadRequest."""
    require_calls_before(before, items)
    messages = before + chat_messages(items)
    return messages, len(compact({"messages": messages} | body.echoed()))


async def resolve_references(items: Sequence[Item], responses: TenantResponses, field: str = "input") -> list[Item]:
    """Return the items of a request's field, with those of kept responses in place of references. Raises BadRequest."""
    found: dict[ResponseId, dict[str, Json]] = {}
    resolved = list[Item]()
    for position, item in enumerate(items):
        if not isinstance(item, InputReference):
            resolved.append(item)
            continue
        param, name = f"{field}.{position}.id", ResponseId.parse_item(item.id)
        if name is not None and name not in found:
            if len(found) == MAX_REFERENCED:
                raise BadRequest(f"'{field}' may name items of {MAX_REFERENCED} responses, got more.", param=param)
            kept = await responses.find(name)
            found[name] = {} if kept is None else {each["id"]: each for each in kept_items(kept)}
        if name is None or item.id not in found[name]:
            raise BadRequest(f"'{param}': no response that is kept has the item {item.id[:80]!r}.", param=param)
        resolved.append(as_input(found[name][item.id]))
    return resolved


def _chat_request(body: ResponseRequest, chat: ResponseChat) -> ChatCompletionRequest:
    """Return the chat completion that a response is. Raises BadRequest."""
    instructions = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    fields = body.fields() | {"messages": [*instructions, *chat.messages], "session": chat.session}
    if body.store is False and chat.session is not None:
        fields["adapt"] = "predict"
    return as_chat(fields)


@contextmanager
def _renamed_errors() -> Iterator[None]:
    """Let the errors of the chat completion name the fields of this interface."""
    try:
        yield
    except BadRequest as error:
        field = (error.param or "").partition(".")[0]
        if field not in RENAMED:
            raise
        name = RENAMED[field]
        raise BadRequest(error.message.replace(field, name), param=name, code=error.code) from error


def tenant_responses(sessions: Sessions, ctx: RequestContext) -> TenantResponses:
    """Return the kept responses of the tenant that sends a request."""
    return TenantResponses(sessions.store, ctx.tenant.name, sessions.gate.limits.response_ttl_s)


async def _kept(id: str, sessions: Sessions, ctx: RequestContext) -> KeptResponse:
    """Return a kept response. Raises NotFound."""
    kept = await tenant_responses(sessions, ctx).find(ResponseId.parse(id))
    if kept is None or not kept.is_response:
        raise _not_found(id)
    return kept


def _status(end: TurnEnd) -> str:
    return "incomplete" if end.finish_reasons[0] == "length" else "completed"


def _not_previous(name: str) -> BadRequest:
    """Return the error for a response that cannot go on, as OpenAI words it."""
    return BadRequest(
        f"Previous response with id {name[:200]!r} not found: it has expired, was not stored, or was deleted.",
        param="previous_response_id",
        code="previous_response_not_found",
    )


def _not_found(name: str) -> NotFound:
    return NotFound(f"Response with id {name[:200]!r} not found.", param="id")
