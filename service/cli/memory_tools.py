"""The MCP tools of `imprint mcp`: a session's memory for agents."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from typing import Annotated, Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import BaseModel, Field

from service.client import AsyncClient
from service.errors import ImprintError, NotFound

MAX_ANSWER_TOKENS = 96
MAX_ENTRIES = 100  # of one answer of `history`
INSTRUCTIONS = (
    "A memory that lasts across conversations. Call `ask` before you answer what an earlier conversation may have "
    "told; call `teach` when the user states something worth knowing later: a name, a preference, a decision, a "
    "correction. When something taught has become wrong, teach the correction, or `forget` its version."
)
READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)

Text = Annotated[
    str, Field(min_length=1, description='Whole sentences that make sense alone: "Ada\'s cat is called Miso."')
]
Question = Annotated[str, Field(min_length=1, description='One question: "What is Ada\'s cat called?"')]
Version = Annotated[int, Field(ge=1, description="A version that `ask` or `history` named.")]
Limit = Annotated[int, Field(ge=1, le=MAX_ENTRIES, description="Number of entries, at most.")]
Before = Annotated[int | None, Field(ge=1, description="List the versions before this one; none = from the newest.")]


class Taught(BaseModel):
    """The reply of `teach`."""

    version: int = Field(description="The version that holds the text; `forget` takes it back.")
    tokens_learned: int


class Passage(BaseModel):
    """A passage of what was taught."""

    version: int
    text: str
    time: str | None = Field(description="When it was taught, ISO 8601.")


class Answered(BaseModel):
    """The reply of `ask`."""

    recalled: list[Passage] = Field(description="What was taught about it, the oldest first. Trust it over `answer`.")
    answer: str = Field(description="The answer of a small language model that has read it; it may be wrong.")


class Change(BaseModel):
    """One version of the memory."""

    version: int
    kind: str = Field(description="learn, unlearn, rollback, fork or import.")
    of: int | list[int] | str | None = Field(description="The version that an unlearn or a rollback was about.")
    time: str | None = Field(description="ISO 8601.")
    text: str | None = Field(description="What was taught; null where it was forgotten or its text is not kept.")


class History(BaseModel):
    """The reply of `history`."""

    changes: list[Change] = Field(description="The newest first.")


class Forgotten(BaseModel):
    """The reply of `forget`."""

    version: int = Field(description="The memory's version from now on.")


def memory_tools(client: AsyncClient, session: str) -> MCPServer[Any]:
    """Return an MCP server whose tools teach, ask and change one session.

    Args:
        client: the client of the Imprint server.
        session: id of the session.
    """
    server: MCPServer[Any] = MCPServer(
        "imprint", instructions=INSTRUCTIONS, version=installed_version("imprint"), log_level="WARNING"
    )

    @server.tool(annotations=ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False))
    async def teach(text: Text) -> Taught:
        """Remember something for later conversations. A newer statement about the same thing replaces an older one."""
        with _plain_errors():
            await _keep_texts(client, session)
            observed = await client.observe(session, text)
        return Taught(version=observed.version, tokens_learned=observed.tokens_learned)

    @server.tool(annotations=READS)
    async def ask(question: Question) -> Answered:
        """Look up what was taught in this or earlier conversations. Changes nothing."""
        messages = [{"role": "user", "content": question}]
        with _plain_errors():
            reply = await client.chat(
                messages, session=session, adapt="predict", temperature=0, max_tokens=MAX_ANSWER_TOKENS
            )
        recalled = reply.adaptation.recalled if reply.adaptation else []
        passages = [Passage(version=each.version, text=each.text, time=_iso(each.time)) for each in recalled]
        return Answered(recalled=passages, answer=reply.text.strip())

    @server.tool(annotations=ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=False))
    async def forget(version: Version) -> Forgotten:
        """Forget what one version taught, as if it had never been said. Everything else stays."""
        with _plain_errors():
            return Forgotten(version=(await client.unlearn(session, version)).version)

    @server.tool(annotations=READS)
    async def history(limit: Limit = 20, before: Before = None) -> History:
        """List what was taught and forgotten, the newest first, with the versions that `forget` takes."""
        changes: list[Change] = []
        forgotten = set[int | str | None]()
        with _plain_errors():
            async for entry in client.log(session, page_size=MAX_ENTRIES):
                if entry.kind == "unlearn":
                    forgotten.update(entry.of if isinstance(entry.of, list) else [entry.of])
                if before is None or entry.version < before:
                    text = None if entry.version in forgotten else entry.text
                    changes.append(
                        Change(version=entry.version, kind=entry.kind, of=entry.of, time=_iso(entry.time), text=text)
                    )
                if len(changes) == limit:
                    break
        return History(changes=changes)

    return server


async def _keep_texts(client: AsyncClient, session: str) -> None:
    """Create the session, if there is none, as one that keeps its texts: only those can be forgotten."""
    try:
        await client.get(session)
    except NotFound:
        await client.create(session, keep_text=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn an error of the client into one that the agent reads."""
    try:
        yield
    except ImprintError as error:
        raise ToolError(str(error)) from error


def _iso(seconds: float | None) -> str | None:
    """Return a Unix time in ISO 8601."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
