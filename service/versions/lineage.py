"""The lineage of a version: the learning turns that the version consists of, read from the session's history."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

from service.errors import Conflict, NotFound
from service.store.base import History
from service.turns.state_delta import unpack_learned_tokens


def with_text(
    entry: Mapping[str, Any], kept_tokens: Mapping[int, bytes], decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """Return a log entry with the text that its version learned; the text is None where no tokens are kept.

    kept_tokens: the return value of `kept_tokens_of`.
    """
    packed = kept_tokens.get(entry["version"])
    if packed is None:
        return {**entry, "text": None}
    parts = [(part.token_ids, part.learn or ()) for part in unpack_learned_tokens(packed)]
    return {**entry, "text": "".join(decode([t for t, new in zip(*part, strict=True) if new]) for part in parts)}


def kept_tokens_of(history: History) -> dict[int, bytes]:
    """Return the packed learned tokens that are kept, by version."""
    return {undo.version: undo.packed_tokens for undo in history.undo if undo.packed_tokens}


def prompt_tokens_of(history: History, entry: Mapping[str, Any]) -> list[int]:
    """Return the prompt tokens of the completion of a log entry; an empty list if the session did not keep them."""
    learned_tokens = kept_tokens_of(history).get(entry["version"])
    _, length = entry["answer"]
    return list(unpack_learned_tokens(learned_tokens)[0].token_ids[:length]) if learned_tokens else []


def completion_entry(history: History, completion_key: str) -> Mapping[str, Any]:
    """Return the log entry of a completion. Raises NotFound for a completion that is not in the session's log."""
    for entry in history.log:
        if entry.get("answer", ("", 0))[0] == completion_key:
            return entry
    raise NotFound(
        f"'completion_id' names no completion of one prompt among the last commits of session {history.meta.id!r}.",
        param="completion_id",
        code="completion_not_found",
    )


def plan_unlearn(history: History, versions: Set[int]) -> tuple[int, list[tuple[int, bytes]]]:
    """Return how to unlearn versions: the kept version to start from, and the later versions with the packed tokens to
    learn again.

    Raises Conflict if the session does not consist of the versions, or if tokens that are needed are not kept.
    """
    base, later_versions = find_base(history, versions)
    texts = {undo.version: undo.packed_tokens for undo in history.undo}
    kept_tokens = []
    for later in later_versions:
        if not texts[later]:
            raise Conflict(
                f"'version' {min(versions)} can't be unlearned: what version {later} learned after it was not kept. "
                "(The session option 'keep_text' keeps texts.)",
                param="version",
                code="text_not_kept",
            )
        kept_tokens.append((later, texts[later]))
    return base, kept_tokens


def find_base(history: History, versions: Set[int]) -> tuple[int, list[int]]:
    """Return the kept version from which a session without `versions` starts, and the later versions to learn again.

    Raises Conflict if the session does not consist of the versions.
    """
    lines = lineages(history)
    now = lines[history.meta.version]
    for version in sorted(versions - set(now)):
        raise Conflict(
            f"'version' must be one that learned, is kept and has not been undone, got {version}.",
            param="version",
            code="version_not_kept",
        )
    remaining = [other for other in now if other not in versions]
    base = max((v for v, line in lines.items() if line == remaining[: len(line)]), key=lambda v: (len(lines[v]), v))
    return base, remaining[len(lines[base]) :]


def lineages(history: History) -> dict[int, list[int]]:
    """Return the lineage of each kept version: the versions whose learned tokens it consists of, in order.

    A complement (~v) stands for the whole content that the session had at version v.
    """
    entries = {entry["version"]: entry for entry in history.log}
    first = history.undo[-1].version - 1 if history.undo else history.meta.version
    lines = {first: [~first]}
    for version in range(first + 1, history.meta.version + 1):
        entry, before = entries.get(version, {}), lines[version - 1]
        match entry.get("kind"), entry.get("of"):
            case "learn", _:
                lines[version] = [*before, version]
            case "rollback", int(of) if of in lines:
                lines[version] = lines[of]
            case "unlearn", int() | list() as of if (gone := {of} if isinstance(of, int) else set(of)) <= set(before):
                lines[version] = [other for other in before if other not in gone]
            case _:
                lines[version] = [~version]
    return lines
