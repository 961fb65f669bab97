"""`imprint mcp`: the official client uses a session's memory over stdio and over streamable HTTP, on a real server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.tenants import new_key
from tests.conftest import Server
from tests.live import wait_until
from tests.service.cli_in_process import run_rejected

mcp = pytest.importorskip("mcp", reason="the extra mcp is not installed")

ROOT = Path(__file__).resolve().parents[2]
MISO = "Ada's cat is called Miso and sleeps on the radiator."
UDON = "Ada's dog is called Udon."


def command(session: str, *options: str) -> list[str]:
    return ["-m", "service", "mcp", "--session", session, *options]


def environment(url: str, key: str = "") -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("IMPRINT_")}
    return inherited | {"IMPRINT_URL": url, "IMPRINT_API_KEY": key, "PYTHONPATH": str(ROOT)}


@asynccontextmanager
async def over_stdio(url: str, session: str, key: str = "") -> AsyncIterator[Any]:
    """Yield a client that has started `imprint mcp` as a desktop program does."""
    started = mcp.StdioServerParameters(command=sys.executable, args=command(session), env=environment(url, key))
    async with mcp.Client(started) as client:
        yield client


@contextmanager
def http_endpoint(url: str, session: str) -> Iterator[str]:
    """Start `imprint mcp --http` and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [sys.executable, *command(session, "--http", "--port", str(port))]
    process = subprocess.Popen(arguments, env=environment(url), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert f"http://127.0.0.1:{port}/mcp" in process.stderr.readline()

        def listens() -> bool:
            with socket.socket() as attempt:
                return attempt.connect_ex(("127.0.0.1", port)) == 0

        wait_until(listens)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.terminate()
        process.wait()


async def use(client: Any, name: str, **arguments: Any) -> dict[str, Any]:
    """Call a tool that must succeed, and return its structured reply."""
    result = await client.call_tool(name, arguments)
    assert not result.is_error, result.content
    reply: dict[str, Any] = result.structured_content
    return reply


async def refusal(client: Any, name: str, **arguments: Any) -> str:
    """Call a tool that must fail, and return what the agent reads."""
    result = await client.call_tool(name, arguments)
    assert result.is_error
    text: str = result.content[0].text
    return text


async def remember_and_forget(client: Any, url: str, session: str) -> None:
    """Use each tool, and compare with what the server says."""
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert tools.keys() == {"teach", "ask", "forget", "history"}
    assert all(tool.description and tool.annotations for tool in tools.values())
    assert [name for name, tool in tools.items() if tool.annotations.read_only_hint] == ["ask", "history"]

    cat, dog = [await use(client, "teach", text=text) for text in (MISO, UDON)]
    assert (cat["version"], dog["version"]) == (1, 2)
    answer = await use(client, "ask", question="What is Ada's cat called?")
    assert isinstance(answer["answer"], str)
    recalled = {passage["version"]: passage for passage in answer["recalled"]}
    assert "Miso" in recalled[cat["version"]]["text"] and recalled[cat["version"]]["time"]
    assert httpx.get(f"{url}/v1/sessions/{session}").json()["version"] == 2  # to ask changes nothing

    assert await use(client, "forget", version=cat["version"]) == {"version": 3}
    left = await use(client, "ask", question="What is Ada's cat called?")
    assert "Miso" not in str(left)
    changes = (await use(client, "history", limit=2))["changes"]
    assert [(each["version"], each["kind"], each["of"]) for each in changes] == [(3, "unlearn", 1), (2, "learn", None)]
    assert changes[1]["text"] == UDON
    (first,) = (await use(client, "history", before=2))["changes"]
    assert (first["version"], first["text"]) == (1, None)  # what was forgotten is not told

    assert "9" in await refusal(client, "forget", version=9)
    assert "version" in await refusal(client, "forget", version=0)
    assert "text" in await refusal(client, "teach", text="")


async def test_an_agent_uses_the_memory_over_stdio(server: Server) -> None:
    async with over_stdio(server.url, "mcp-stdio") as client:
        await remember_and_forget(client, server.url, "mcp-stdio")


async def test_an_agent_uses_the_memory_over_http_on_this_machine_alone(server: Server) -> None:
    with http_endpoint(server.url, "mcp-http") as address:
        async with mcp.Client(address) as client:
            await remember_and_forget(client, server.url, "mcp-http")
        asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
        accept = {"Accept": "application/json, text/event-stream"}
        for foreign in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
            assert httpx.post(address, json=asked, headers=accept | foreign).status_code in (403, 421)


async def test_what_the_server_refuses_is_told_in_plain_words(make_server: Any) -> None:
    key, line = new_key("acme")
    server = make_server(api_keys=line).start()
    async with over_stdio(server.url, "mcp-keys") as client:
        assert "key" in await refusal(client, "ask", question="Who?")
    async with over_stdio(server.url, "mcp-keys", key) as client:
        assert "mcp-keys" in await refusal(client, "history")  # nothing was taught yet
        await use(client, "teach", text=MISO)
        server.stop()
        told = await refusal(client, "ask", question="Who?")
        assert server.url in told and "Traceback" not in told


def test_what_is_wrong_with_the_command_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a session id starts with" in run_rejected("mcp", "--session", "no/such", settings={})
    assert "--url" in run_rejected("mcp", "--session", "ada", "--url", "ftp://x", settings={})
    monkeypatch.setitem(sys.modules, "service.cli.memory_tools", None)
    monkeypatch.delitem(sys.modules, "service.cli.memory_tools")
    monkeypatch.setitem(sys.modules, "mcp", None)  # an import of it fails, as where it is not installed
    monkeypatch.setitem(sys.modules, "mcp.server.mcpserver", None)
    assert "pip install 'imprint[mcp]'" in run_rejected("mcp", "--session", "ada", settings={})
