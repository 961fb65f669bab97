"""The calls of tools in the bodies of replies, whole and in pieces."""

from typing import Literal

from pydantic import BaseModel


class CalledFunction(BaseModel):
    """A tool that the assistant calls; `arguments` is JSON, unless the reply was cut off."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool; a message of the role `tool` answers it by its `id`."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionDelta(BaseModel):
    """The name of a called tool, with the first piece of a call, and the next text of its arguments."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """The next piece of call number `index`; the first piece has the `id`."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta
