"""The errors that every store raises, so that two stores word the same refusal alike. The module decides nothing."""

from __future__ import annotations

import logging

from service.errors import Conflict, EngineError, NotFound, SessionBusy, StoreFull, StoreRefused, VersionConflict

log = logging.getLogger(__name__)


def store_full() -> StoreFull:
    return StoreFull("The session store is full: nothing can be learned until there is room in it again.")


def store_refused() -> StoreRefused:
    return StoreRefused("The session store refuses a command that this server needs; its log says which.")


def session_leased(sid: str, wait_s: float) -> SessionBusy:
    return SessionBusy(f"Session {sid!r} is being taught by another replica, for more than {wait_s:g} s now.")


def session_missing(sid: str) -> NotFound:
    return NotFound(f"session {sid!r} does not exist")


def version_moved(sid: str, found: int | str, expected: int) -> VersionConflict:
    return VersionConflict(f"session {sid!r} is at version {found}, the turn began at {expected}")


def version_differs(sid: str, found: int | str, expected: int | None) -> VersionConflict:
    return VersionConflict(f"session {sid!r} is at version {found}, not {expected}")


def session_renewed(sid: str) -> VersionConflict:
    return VersionConflict(f"session {sid!r} was deleted and created again since the turn began")


def newest_response_moved(sid: str) -> VersionConflict:
    return VersionConflict(f"another response of session {sid!r} has been kept since its newest one was read")


def lease_lost(sid: str) -> VersionConflict:
    return VersionConflict(f"somebody else has taken the lease of session {sid!r} since the turn began")


def session_erased(sid: str) -> Conflict:
    return Conflict(f"Session {sid!r} was erased while this request ran.", code="session_erased")


def row_size_differs(sid: str, detail: str) -> EngineError:
    """Return the error for rows of another size; `detail` names the site and both sizes."""
    return EngineError(f"rows of session {sid!r} at site {detail}")


def damaged_session(sid: str, fault: str = "it has rows that no memory writes") -> EngineError:
    """Return the error for a session that the store does not hold as it was committed; `fault` says what is wrong."""
    log.error("a session is damaged in the store: %s", fault)
    return EngineError(
        f"session {sid!r} is damaged in the store: {fault}; erase the session, then import an export of it",
        code="damaged_session",
    )


def unknown_format(sid: str, found: str, newest: str) -> EngineError:
    return EngineError(
        f"session {sid!r} is stored in format {found}, but this release knows only "
        f"formats up to {newest}: serve it with the release that wrote it, or a later one",
        code="unknown_store_format",
    )
