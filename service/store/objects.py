"""Files that are written once, in a folder or in a bucket of an S3-compatible store. `obstore` does the work."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from service.errors import ArchiveUnavailable

if TYPE_CHECKING:
    from obstore.store import ObjectStore

TIMEOUT_S = 30.0  # of one operation, its repetitions included
LISTED_AT_ONCE = 1000
# Without TLS only where the operator's own endpoint has none.
CLIENT_OPTIONS = {"timeout": "20s", "connect_timeout": "3s", "allow_http": True}
RETRIES = {"max_retries": 3}
LACKS_EXTRA = "the package obstore is missing: pip install 'imprint[archive]'"

T = TypeVar("T")

log = logging.getLogger(__name__)


class ObjectsError(ValueError):
    """The address of a folder or bucket cannot be used. The message says why in one line."""


@dataclass(frozen=True)
class StoredObject:
    """A file as a list names it. age_s: seconds since its writing, by this machine's clock."""

    name: str
    size: int
    age_s: float


def local_folder(url: str) -> Path | None:
    """Return the folder that an address names; None for that of a bucket."""
    if "://" in url and not url.startswith("file://"):
        return None
    return Path(url.removeprefix("file://")).expanduser().absolute()


class Objects:
    """The files under one address. Every method raises ArchiveUnavailable while that is away.

    url: a folder, or `file://`, `s3://bucket/prefix`, `gs://`, `az://`; keys and endpoint come from the environment
        (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …). Raises ObjectsError.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._folder = local_folder(url)
        try:
            from obstore.store import LocalStore, from_url

            if self._folder is not None:
                self._store: ObjectStore = LocalStore(self._folder, mkdir=True)
            else:
                self._store = cast(Any, from_url)(url, client_options=CLIENT_OPTIONS, retry_config=RETRIES)
        except ImportError as error:
            raise ObjectsError(LACKS_EXTRA) from error
        except Exception as error:  # obstore's errors have no common class but this one
            raise ObjectsError(str(error).partition("\n")[0]) from error

    async def put(self, name: str, data: bytes) -> None:
        """Write a file unless there is one of that name; the file is on the disk when the call returns."""
        from obstore.exceptions import AlreadyExistsError

        try:
            await self._call(self._store.put_async(name, data, mode="create"))
        except AlreadyExistsError:  # a repetition within this call, since names are not used twice
            return
        if self._folder is not None:
            await self._call(asyncio.to_thread(_sync, self._folder / name, self._folder))

    async def get(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is none of that name."""

        async def read() -> bytes:
            reply = await self._store.get_async(name)
            return (await reply.bytes_async()).to_bytes()

        try:
            return await self._call(read(), may_be_absent=True)
        except FileNotFoundError:
            return None

    async def exists(self, name: str) -> bool:
        """Return whether there is a file of that name."""
        try:
            await self._call(self._store.head_async(name), may_be_absent=True)
        except FileNotFoundError:
            return False
        return True

    async def delete(self, name: str) -> None:
        """Remove a file. Idempotent."""
        try:
            await self._call(self._store.delete_async(name), may_be_absent=True)
        except FileNotFoundError:
            return

    async def list(self, prefix: str = "") -> AsyncIterator[list[StoredObject]]:
        """Yield the files under a folder, page by page, in no order."""
        pages = aiter(self._store.list(prefix or None, chunk_size=LISTED_AT_ONCE))
        while True:
            try:
                page = await self._call(anext(pages))
            except StopAsyncIteration:
                return
            now = time.time()
            yield [StoredObject(x["path"], x["size"], now - x["last_modified"].timestamp()) for x in page]

    async def _call(self, operation: Awaitable[T], *, may_be_absent: bool = False) -> T:
        """Return what an operation returns; raise FileNotFoundError only if the file `may_be_absent`."""
        from obstore.exceptions import AlreadyExistsError

        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await operation
        except (AlreadyExistsError, StopAsyncIteration):
            raise
        except Exception as error:
            if may_be_absent and isinstance(error, FileNotFoundError):
                raise
            log.warning("%s does not answer: %s", self.url, str(error).partition("\n")[0] or type(error).__name__)
            raise ArchiveUnavailable("the archive of idle sessions does not answer, try again") from error


def _sync(file: Path, root: Path) -> None:
    """Let a file and the folders that name it reach the disk."""
    for path in (file, *(folder for folder in file.parents if folder.is_relative_to(root))):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
