"""The Python client of the server; `imprint` is its public name. It needs httpx and pydantic, not torch."""

from service.client.aio import AsyncClient, AsyncStream
from service.client.asks import ChatOptions, CompletionOptions, Message
from service.client.faults import ClientError, ConnectionBroken, FileError, NoServer, TimedOut, UnexpectedAnswer
from service.client.sync import Client, Stream
from service.client.texts import Reading

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "ChatOptions",
    "Client",
    "ClientError",
    "CompletionOptions",
    "ConnectionBroken",
    "FileError",
    "Message",
    "NoServer",
    "Reading",
    "Stream",
    "TimedOut",
    "UnexpectedAnswer",
]
