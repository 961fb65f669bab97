"""Unlearning a version of a learner's session: the examples that came later are learned again as they are stored.

The session keeps its last examples as rows (`model.tabular.memory`) and its schema beside them, so nothing else has to
be kept. A row becomes features again, because without the unlearned version the schema may lack columns and labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import numpy as np
from numpy.typing import NDArray

from model.memory import MemoryConfig
from model.memory.name_layout import HEAD_SIZE
from model.policies.journal import ACTION, HEADER_SIZE, NUMBER, OPEN, PROBABILITY, STATE
from model.policies.journal import NAME as JOURNAL
from model.tabular.config import EXAMPLES, MAX_COLUMNS, MAX_EXAMPLES
from model.tabular.memory import HEADER, unpack_examples
from model.tabular.schema import ARM_FEATURES, NAME, ROW, Schema
from service.engine import Example, PastActions, PastReward, Step, TakenArm
from service.engine.stored_rows import is_valid_site
from service.engine.tabular_job import HELD_OUT, MISSING, ORIGINS
from service.errors import Conflict
from service.store.base import History, RowBatch, StoredSession
from service.store.errors import damaged_session
from service.versions.lineage import lineages

Rows = NDArray[np.float32]


def relearning_steps(
    stored: StoredSession, config: MemoryConfig, history: History, versions: Set[int], later: Sequence[int]
) -> tuple[Step, ...]:
    """Return the steps that learn again what the versions `later` learned, in a session without `versions`.

    Raises Conflict if an example of a later version is no longer among the stored ones.
    """
    meta, sites = stored.meta, stored.sites
    if not all(is_valid_site(name, batch, config, 0) for name, batch in sites.items()):
        raise damaged_session(meta.id)
    try:
        schema = _schema(sites.get(NAME))
        count = int(_dense(sites.get(ORIGINS), 1)[0, 0])
        wanted = _ordinals(history, count, versions, later)
        steps = [*_examples(sites.get(EXAMPLES), schema, wanted, acts=JOURNAL in sites)]
        if JOURNAL in sites:
            steps.append(_kept_actions(sites[JOURNAL], schema, history, versions))
    except (ValueError, IndexError):
        raise damaged_session(meta.id) from None
    return tuple(steps)


def _ordinals(history: History, count: int, versions: Set[int], later: Sequence[int]) -> list[tuple[int, int]]:
    """Return the ordinals of the examples of later versions, oldest first, each with its version. Raises Conflict."""
    learned = {entry["version"]: entry["tokens"] for entry in history.log}
    wanted: list[tuple[int, int]] = []
    end, missing = count, set(later)
    for version in reversed(lineages(history)[history.meta.version]):
        if not missing:
            break
        start = end - learned[version]
        if version in missing:
            missing.remove(version)
            wanted += [(ordinal, version) for ordinal in range(end, start, -1)]
        end = start
    if wanted and wanted[-1][0] <= count - MAX_EXAMPLES:
        raise Conflict(
            f"'version' {min(versions)} can't be unlearned: the session has learned {count - wanted[-1][0] + 1:,} "
            f"examples since, and remembers the last {MAX_EXAMPLES:,}.",
            param="version",
            code="text_not_kept",
        )
    return wanted[::-1]


def _examples(
    batch: RowBatch | None, schema: Schema, wanted: Sequence[tuple[int, int]], *, acts: bool
) -> Iterator[Step]:
    """Yield the stored examples as steps. acts: whether they are rewards of arms."""
    if batch is None or not wanted:
        return
    table = unpack_examples(batch.slots, _floats(batch))
    of_arms = np.array(schema.groups, np.int64) == ARM_FEATURES
    labels, arms = list(schema.labels), list(schema.arms)
    for ordinal, version in wanted:
        head, columns = np.split(table[(ordinal - 1) % MAX_EXAMPLES], [HEADER])
        if int(head[0]) != ordinal:
            raise ValueError(f"example {ordinal} is not stored")
        row = np.empty(schema.width, np.float32)
        row[~of_arms] = columns[: (~of_arms).sum()]
        row[of_arms] = columns[MAX_COLUMNS - 1 - np.arange(of_arms.sum())]
        row[row == MISSING] = np.nan
        value, context = float(head[1]), schema.decode(row)
        if acts:
            taken = TakenArm(context, arms[int(head[2])], schema.decode(row, ARM_FEATURES), float(head[3]))
            yield PastReward(taken, value, version)
        elif labels:
            yield Example(context, labels[int(value)], predict=False, version=version)
        else:
            yield Example(context, target=value, predict=False, version=version)


def _kept_actions(batch: RowBatch, schema: Schema, history: History, versions: Set[int]) -> PastActions:
    """Return the actions of the journal, without those that `versions` took; those that `versions` rewarded wait
    again."""
    rows = _dense(batch, 1 + int(batch.slots.max()))
    taken, rewarded = _actions_of(history, int(rows[0, NUMBER]), versions)
    arms, actions = list(schema.arms), []
    for row, values in enumerate(rows[1:], 1):
        number = int(values[NUMBER])
        if number and number not in taken:
            inputs = values[HEADER_SIZE : HEADER_SIZE + 1 + schema.width].copy()
            inputs[inputs == MISSING] = np.nan
            context, features = (schema.decode(inputs[1:], group) for group in (ROW, ARM_FEATURES))
            arm = TakenArm(context, arms[int(values[ACTION])], features, float(values[PROBABILITY]))
            state = OPEN if number in rewarded else float(values[STATE])
            actions.append((row, number, state, bool(inputs[HELD_OUT]), arm))
    newest = int(rows[0, NUMBER])
    # A number that is higher than the newest one is older: the numbers have begun again at 1.
    return PastActions(tuple(sorted(actions, key=lambda action: (action[1] <= newest, action[1]))))


def _actions_of(history: History, count: int, versions: Set[int]) -> tuple[set[int], set[int]]:
    """Return the numbers of the actions that `versions` took, and of those that `versions` rewarded.

    An undo step has the rows of the journal that its version changed, as they were before. count: the number of the
    last action.
    """
    taken, rewarded = set[int](), set[int]()
    for undo in history.undo:
        if JOURNAL not in undo.sites:
            continue
        slots, rows = undo.sites[JOURNAL].slots.tolist(), _floats(undo.sites[JOURNAL])
        before = count
        if 0 in slots:
            before = int(rows[slots.index(0), NUMBER])
        elif 0 in undo.cleared_slots[JOURNAL]:
            before = 0
        if undo.version in versions:
            taken |= set(range(before + 1, count + 1))
            rewarded |= {int(row[NUMBER]) for slot, row in zip(slots, rows, strict=True) if slot and row[STATE] == OPEN}
        count = before
    return taken, rewarded


def _schema(batch: RowBatch | None) -> Schema:
    if batch is None:
        return Schema()
    heads = np.ascontiguousarray(batch.data[:, : 4 * HEAD_SIZE]).view("<i4")
    return Schema.of_rows(heads, np.ascontiguousarray(batch.data[:, 4 * HEAD_SIZE :]), may_grow=False)


def _floats(batch: RowBatch) -> Rows:
    rows: Rows = np.ascontiguousarray(batch.data).view("<f4")
    return rows


def _dense(batch: RowBatch | None, rows: int) -> Rows:
    """Return the first rows of a site, 0 where a slot is empty."""
    if batch is None:
        return np.zeros((rows, HEADER_SIZE), np.float32)
    table = np.zeros((rows, batch.row_bytes // 4), np.float32)
    found = batch.slots < rows
    table[batch.slots[found]] = _floats(batch)[found]
    return table
