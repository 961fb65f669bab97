"""The public ids of actions, `act-<number>-<tag>`: no two actions of any sessions have the same id.

The number is never given twice in a session, not even after a rollback (`SessionMeta.actions`). The tag names the
session that took the action, so forks of one session give different ids. An id of an earlier release has no tag.
"""

from __future__ import annotations

import hashlib

from service.errors import Conflict
from service.store.base import ActionTags, SessionMeta

PREFIX = "act-"
TAG_DIGITS = 12
MAX_TAGS = 64  # more sessions than the actions of a journal can come from


def format_action_id(number: int, meta: SessionMeta) -> str:
    """Return the id of an action that the session takes."""
    return f"{PREFIX}{number}-{session_tag(meta.id, meta.created)}"


def parse_action_id(action_id: str, meta: SessionMeta, field: str = "action_id") -> int:
    """Return the number of an action that is part of the session's content, or that the session never took.

    field: the part of the request that has the id.

    Raises:
        Conflict: another session took the action, and the session's content does not have the action.
    """
    digits, _, tag = action_id.removeprefix(PREFIX).partition("-")
    number = int(digits)
    if number <= meta.actions and tag != _tag_of(number, meta):
        raise Conflict(
            f"'{field}' {action_id} can't be learned: the action is not part of the session, or has been undone.",
            param=field,
            code="action_closed",
        )
    return number


def inherited_tags(sid: str, created: float, actions: int, tags: ActionTags) -> ActionTags:
    """Return `SessionMeta.action_tags` of a session that begins with the content of another session.

    Args:
        sid, created, actions, tags: `id`, `created`, `actions` and `action_tags` of the other session.
    """
    if actions > (tags[-1][0] if tags else 0):
        tags = (*tags, (actions, session_tag(sid, created)))
    return tags[-MAX_TAGS:]


def session_tag(sid: str, created: float) -> str:
    """Return what tells the session from all other sessions, those of the same id included."""
    return hashlib.sha256(f"{sid} {created!r}".encode()).hexdigest()[:TAG_DIGITS]


def _tag_of(number: int, meta: SessionMeta) -> str:
    """Return the tag of the session that took an action of this session's content."""
    return next((tag for last, tag in meta.action_tags if number <= last), session_tag(meta.id, meta.created))
