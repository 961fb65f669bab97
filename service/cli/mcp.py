"""`imprint mcp`."""

import asyncio
from typing import Annotated

import typer

from service.cli.console import print_note
from service.cli.options import SessionOption, Url
from service.client import AsyncClient, ClientError, operations
from service.client.transport import DEFAULT_URL
from service.errors import CommandError

HOST = "127.0.0.1"  # the endpoint asks for no key, and whoever reaches it has the session's memory


def mcp(
    session: SessionOption,
    http: Annotated[
        bool, typer.Option("--http", help="Serve streamable HTTP on this machine instead of stdio.")
    ] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of --http.")] = 8765,
    url: Url = DEFAULT_URL,
) -> None:
    """Offer a session's memory to agents as MCP tools: teach, ask, forget, history.

    The tools speak to a running server, with the key in IMPRINT_API_KEY where the server has keys.
    """
    try:
        from service.cli.memory_tools import memory_tools
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mcp":
            raise
        raise CommandError("`imprint mcp` needs the package mcp: pip install 'imprint[mcp]'") from None
    operations.get(session)  # refuses an invalid id
    try:
        client = AsyncClient(url)
    except ClientError as error:
        raise CommandError(f"--url: {error}") from None

    async def serve() -> None:
        async with client:
            tools = memory_tools(client, session)
            if not http:
                await tools.run_stdio_async()
                return
            print_note(f"the memory of session {session}: http://{HOST}:{port}/mcp")
            # The tools keep nothing between requests, and so does the endpoint.
            await tools.run_streamable_http_async(host=HOST, port=port, stateless_http=True)

    asyncio.run(serve())
