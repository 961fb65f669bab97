"""The items of kept responses, and the lists of them."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal

from fastapi import Response
from pydantic import BaseModel, TypeAdapter

from service.concurrency import dump_json_pieces, run_off_loop
from service.errors import BadRequest
from service.http.dependencies import LargeReply
from service.http.queries import ItemPage
from service.http.response_schemas import InputCall, InputMessage, InputResult, OutputCall, OutputMessage
from service.turns.responses import KeptResponse

Json = dict[str, Any]
INPUT: TypeAdapter[InputMessage | InputCall | InputResult] = TypeAdapter(InputMessage | InputCall | InputResult)


class ListedText(BaseModel):
    """The text of a message that no reply has."""

    type: Literal["input_text"]
    text: str


class ListedMessage(BaseModel):
    """A message that no reply has."""

    id: str
    type: Literal["message"]
    status: Literal["completed"]
    role: Literal["system", "developer", "user"]
    content: list[ListedText]


class ListedResult(BaseModel):
    """The result of a call."""

    id: str
    type: Literal["function_call_output"]
    status: Literal["completed"]
    call_id: str
    output: str


ListedItem = ListedMessage | OutputMessage | OutputCall | ListedResult


class ItemList(BaseModel):
    """A page of the items of a chat."""

    object: Literal["list"]
    data: list[ListedItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


def as_input(item: Json) -> InputMessage | InputCall | InputResult:
    """Return an item of a list, or of an output, as an item of an input."""
    return INPUT.validate_python(item)


def kept_items(kept: KeptResponse) -> list[Json]:
    """Return the items of a kept response: those of the chat, then those of its output."""
    return [*input_items(kept), *kept.reply["output"]]


def input_items(kept: KeptResponse) -> list[Json]:
    """Return the items of the chat that a kept response answers."""
    messages = kept.messages[:-1] if kept.reply["output"] else kept.messages  # the output is one message
    found = list[Json]()
    for kind, item in chain.from_iterable(map(_items, messages)):
        head = {"id": kept.name.item(kind, len(found), of_input=True), "status": "completed"}
        found.append(head | item)
    return found


def _items(message: Json) -> Iterator[tuple[str, Json]]:
    """Yield the items that a message of a chat is, each with the kind of its id."""
    role, content = message["role"], message.get("content")
    if role == "tool":
        yield "fco", {"type": "function_call_output", "call_id": message["tool_call_id"], "output": content}
    elif role != "assistant":
        yield "msg", {"type": "message", "role": role, "content": [{"type": "input_text", "text": content}]}
    elif content is not None:
        part = {"type": "output_text", "text": content, "annotations": [], "logprobs": []}
        yield "msg", {"type": "message", "role": role, "content": [part]}
    for call in message.get("tool_calls", ()):
        yield "fc", {"type": "function_call", "call_id": call["id"], **call["function"]}


async def listed_reply(
    kept: KeptResponse | None, items: Callable[[], Sequence[Json]], page: ItemPage, response: Response
) -> Response:
    """Return a page of items. Raises BadRequest if the page is to begin after an item that is not there.

    kept: the response that the items are of; the work grows with it.
    """
    work = 0 if kept is None else kept.work
    return LargeReply(await run_off_loop(work, lambda: dump_json_pieces(_page(items(), page))), response)


def _page(items: Sequence[Json], page: ItemPage) -> Json:
    ordered = list(items) if page.order == "asc" else list(reversed(items))
    if page.after is not None:
        places = [index for index, item in enumerate(ordered) if item["id"] == page.after]
        if not places:
            raise BadRequest(f"'after' must be the id of an item of this list, got {page.after[:80]!r}.", param="after")
        ordered = ordered[places[0] + 1 :]
    shown = ordered[: page.limit]
    ends = (shown[0]["id"], shown[-1]["id"]) if shown else (None, None)
    more = len(ordered) > len(shown)
    return {"object": "list", "data": shown, "first_id": ends[0], "last_id": ends[1], "has_more": more}
