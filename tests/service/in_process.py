"""The whole server in the test's own process: real sockets and the real engine."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import uvicorn

from service.engine import Engine
from service.metrics import Metrics
from service.model_loading import load_model
from service.settings import Settings
from service.store.base import SessionStore
from service.store.memory import MemoryStore
from service.tenants import ApiKeys
from service.turns.sessions import Sessions
from service.wiring import create_app, new_sessions
from tests.conftest import START_TIMEOUT_S


class InProcessServer:
    """A server in a thread, without a process of its own.

    engine, sessions, loop: of the server.
    """

    engine: Engine
    sessions: Sessions
    loop: asyncio.AbstractEventLoop

    def __init__(self, base: Path, store: SessionStore | None = None, **settings: Any) -> None:
        """store: of the sessions; default: one in memory. settings: of the server, by name."""
        self.model = base.name
        self._store = store or MemoryStore()
        self._settings = Settings(model=str(base), threads=1, **{"recall_encoder": "none", **settings})
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(START_TIMEOUT_S), "the server did not become ready"
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        """End the server and wait for its thread."""
        self._server.should_exit = True
        self._thread.join()

    async def _serve(self) -> None:
        metrics = Metrics()
        self.loop = asyncio.get_running_loop()
        self.sessions = sessions = new_sessions(self._settings, self._store, metrics)
        app = create_app(sessions, metrics, self._settings, ApiKeys(self._settings))
        model = load_model(self._settings, metrics)
        self.engine = model.engine
        await model.engine.start()
        sessions.set_ready(model)
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
        self._ready.set()
        await serving
        await model.engine.stop()
