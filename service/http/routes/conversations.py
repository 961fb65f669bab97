"""OpenAI's conversations, as far as a session carries them: a conversation is a session.

Its items are those of the chat of its newest kept response; what was learned of them lies in the session.
"""

from typing import Annotated, Literal
from uuid import uuid4

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from service.concurrency import run_off_loop
from service.errors import BadRequest, NotFound, Unavailable
from service.http.dependencies import PathId, RequestContextDep, SessionsDep
from service.http.json_route import JsonRoute
from service.http.openapi import ERROR_RESPONSES
from service.http.queries import ItemPage
from service.http.response_items import ItemList, ListedItem, input_items, kept_items, listed_reply
from service.http.response_schemas import Item, Metadata, chat_messages, require_calls_before
from service.http.routes.responses import resolve_references, tenant_responses
from service.http.schemas import Body
from service.http.text_formats import compact
from service.store.base import SessionMeta
from service.turns.responses import MAX_KEPT_CHARS, KeptResponse, ResponseId, TenantResponses

MAX_ITEMS = 20  # OpenAI's limit of one request

router = APIRouter(prefix="/v1/conversations", route_class=JsonRoute, responses=ERROR_RESPONSES, tags=["OpenAI"])

ItemPathId = Annotated[
    str,
    Path(alias="item", description="The item's id.", examples=["msg_5f2b9c04d1e75f2b9c04d1e75f2b9c04.i0_alice"]),
]
Items = Annotated[list[Item], Field(max_length=MAX_ITEMS, fail_fast=True)]
ITEMS_EXAMPLE: list[JsonValue] = [{"type": "message", "role": "user", "content": "My cat is called Miso."}]


class ConversationRequest(Body):
    """The body of `POST /v1/conversations`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": ITEMS_EXAMPLE}]})

    items: Items | None = None
    metadata: Metadata | None = Field(None, description="Ignored: a session carries none.")


class ItemsRequest(Body):
    """The body of `POST /v1/conversations/{id}/items`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": ITEMS_EXAMPLE}]})

    items: Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


class Conversation(BaseModel):
    """A conversation."""

    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]


class ConversationDeleted(BaseModel):
    """The reply of `DELETE /v1/conversations/{id}`."""

    id: str
    object: Literal["conversation.deleted"]
    deleted: Literal[True]


@router.post("", summary="Create a conversation")
async def create_conversation(body: ConversationRequest, sessions: SessionsDep, ctx: RequestContextDep) -> Conversation:
    """Create a session with a name of its own; with `items`, they are the chat that its first response goes on with."""
    session, responses = f"conv_{uuid4().hex}", tenant_responses(sessions, ctx)
    chat = await _with_items(session, None, body.items, responses) if body.items else None
    meta, _ = await sessions.put(ctx.tenant, session, {})
    if chat is not None and not await responses.keep(chat, meta.created):
        raise _not_kept()
    return _conversation(meta)


@router.get("/{id}", summary="Describe a conversation")
async def get_conversation(session: PathId, sessions: SessionsDep, ctx: RequestContextDep) -> Conversation:
    """Describe the conversation that a session is."""
    return _conversation(await sessions.get(ctx.tenant, session))


@router.delete("/{id}", summary="Erase a conversation")
async def delete_conversation(session: PathId, sessions: SessionsDep, ctx: RequestContextDep) -> ConversationDeleted:
    """Erase the session, everything that it has learned, and its kept responses."""
    await sessions.delete(ctx.tenant, session)
    return ConversationDeleted(id=session, object="conversation.deleted", deleted=True)


@router.get("/{id}/items", summary="List the items of a conversation", response_model=ItemList)
async def list_items(
    session: PathId, page: Annotated[ItemPage, Query()], sessions: SessionsDep, ctx: RequestContextDep, answer: Response
) -> Response:
    """List the items of the chat of the newest response that is kept; none if none is kept."""
    await sessions.get(ctx.tenant, session)
    kept = await tenant_responses(sessions, ctx).newest(session)
    return await listed_reply(kept, lambda: [] if kept is None else kept_items(kept), page, answer)


@router.post("/{id}/items", summary="Add items to a conversation", response_model=ItemList)
async def add_items(
    session: PathId, body: ItemsRequest, sessions: SessionsDep, ctx: RequestContextDep, answer: Response
) -> Response:
    """Add items to the chat, which the next response goes on with; they are learned when it comes."""
    meta = await sessions.get(ctx.tenant, session)
    responses = tenant_responses(sessions, ctx)
    found = await responses.keep_next(
        session, lambda before: _with_items(session, before, body.items, responses), meta.created
    )
    if found is None:
        raise _not_kept()
    before, kept = found
    num_before = 0 if before is None else len(kept_items(before))
    page = ItemPage(limit=100, after=None, order="asc")
    return await listed_reply(kept, lambda: input_items(kept)[num_before:], page, answer)


@router.get("/{id}/items/{item}", summary="Read an item of a conversation")
async def get_item(session: PathId, item: ItemPathId, sessions: SessionsDep, ctx: RequestContextDep) -> ListedItem:
    """Return an item of a kept response of the conversation."""
    name = ResponseId.parse_item(item)
    kept = await tenant_responses(sessions, ctx).find(name) if name is not None and name.session == session else None
    for each in [] if kept is None else kept_items(kept):
        if each["id"] == item:
            return each  # type: ignore[return-value]  # FastAPI makes the model of it
    raise NotFound(f"Item with id {item[:200]!r} not found.", param="item")


async def _with_items(
    session: str, before: KeptResponse | None, items: list[Item], responses: TenantResponses
) -> KeptResponse:
    """Return the chat of a session with further items. Raises BadRequest."""
    resolved = await resolve_references(items, responses, "items")
    messages = [] if before is None else before.messages
    require_calls_before(messages, resolved, "items")
    name = ResponseId(uuid4().hex, session)
    reply = {"id": str(name), "object": "conversation.items", "output": []}
    chat = KeptResponse([*messages, *chat_messages(resolved)], reply)
    size = await run_off_loop(chat.work, lambda: len(compact({"messages": chat.messages})))
    if size > MAX_KEPT_CHARS:
        raise BadRequest(
            f"The items of a conversation may have {MAX_KEPT_CHARS} characters as JSON, got {size}.", param="items"
        )
    return chat


def _not_kept() -> Unavailable:
    return Unavailable(
        "The server keeps no items now: the store is full or away, others add items all the time, or"
        " IMPRINT_RESPONSE_TTL_S is 0."
    )


def _conversation(meta: SessionMeta) -> Conversation:
    return Conversation(id=meta.id, object="conversation", created_at=int(meta.created), metadata={})
