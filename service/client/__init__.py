"""The Python client of the server, published as the package `imprint`.

`operations` describes every HTTP call once: what to send, and how to parse the answer. `transport` holds what both
clients share and does no input or output; `sync_client` and `async_client` add the input and output. The package needs
httpx and pydantic, not torch.
"""

from service.client.async_client import AsyncClient, AsyncStream
from service.client.errors import ClientError, ConnectionBroken, FileError, NoServer, TimedOut, UnexpectedAnswer
from service.client.operations import ChatOptions, CompletionOptions, Message
from service.client.sync_client import Client, Stream
from service.client.text_files import ObserveProgress

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
    "ObserveProgress",
    "Stream",
    "TimedOut",
    "UnexpectedAnswer",
]
