"""The views of a session: how full its memory cells are, and the difference between two versions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from model.base.config import tiny_config
from model.memory.config import MemoryConfig, SiteConfig
from service.store.base import RowBatch
from service.versions.views import MAX_BINS, NO_SLOTS, RowChanges, _changes, _fill
from tests.live import Client, Json, assert_error, assert_success, rows_of, stored
from tests.tiny import TEXT


@pytest.fixture
def client(server: Any) -> Iterator[Client]:
    with Client(server.url, server.model) as client:
        yield client


@pytest.fixture
def session(client: Client) -> str:
    """Create a session that keeps its texts, and return its id."""
    name = uuid4().hex
    assert client.http.put(f"/v1/sessions/{name}", json={"keep_text": True}).status_code == 201
    return name


def diff(client: Client, session: str, start: int, end: int) -> Json:
    answer = client.http.get(f"/v1/sessions/{session}/diff", params={"from": start, "to": end})
    assert (answer.json().get("from"), answer.json().get("to")) == (start, end), answer.text
    return assert_success(answer)


def counts(client: Client, session: str) -> Json:
    """Return the number of rows per bin of cells, by site."""
    view = assert_success(client.http.get(f"/v1/sessions/{session}/cells"))
    return {site["name"]: site["counts"] for site in view["sites"]}


def test_the_cells_hold_the_rows_that_are_stored(client: Client, server: Any, session: str) -> None:
    empty = assert_success(client.http.get(f"/v1/sessions/{session}/cells"))
    assert empty["version"] == 0 and not any(any(site["counts"]) for site in empty["sites"])
    client.observe(session, TEXT)
    answer = client.http.get(f"/v1/sessions/{session}/cells")
    view = assert_success(answer)
    assert answer.headers["etag"] == '"v1"' and view["version"] == 1
    assert sum(site["rows"] for site in view["sites"]) == client.session(session)["rows"] > 0
    content = stored(server.data_dir, session)
    for site in view["sites"]:
        capacity = site["bin_cells"] * site["bin_rows"]
        assert len(site["counts"]) * site["bin_cells"] >= site["cells"] and capacity >= max(site["counts"])
        slots = np.array([*rows_of(content[f"rows:{site['name']}"])])
        assert site["counts"] == np.bincount(slots // site["bin_rows"], minlength=len(site["counts"])).tolist()


def test_a_version_differs_by_what_it_learned(client: Client, session: str) -> None:
    for text in ("The keeper trims the lamp.", "The log is written at night.", TEXT):
        client.observe(session, text)
    assert diff(client, session, 2, 2) | {"rows": None} == {
        "object": "session.diff", "from": 2, "to": 2, "tokens_learned": 0, "rows": None, "learned": [], "forgotten": [],
    }  # fmt: skip
    forward, backward = diff(client, session, 1, 3), diff(client, session, 3, 1)
    assert [entry["text"] for entry in forward["learned"]] == ["The log is written at night.", TEXT]
    assert forward["forgotten"] == [] == backward["learned"]
    assert backward["forgotten"] == forward["learned"]
    assert (
        forward["tokens_learned"] == sum(entry["tokens"] for entry in forward["learned"]) == -backward["tokens_learned"]
    )
    for name, rows in forward["rows"].items():
        assert backward["rows"][name] == {
            "added": rows["removed"],
            "removed": rows["added"],
            "changed": rows["changed"],
        }
    first = diff(client, session, 0, 3)
    num_rows = {name: sum(cells) for name, cells in counts(client, session).items()}
    assert {name: rows["added"] for name, rows in first["rows"].items()} == num_rows


def test_a_rollback_forgets_later_versions_and_equals_the_earlier_one(client: Client, session: str) -> None:
    for text in ("The keeper trims the lamp.", "The log is written at night."):
        client.observe(session, text)
    before = counts(client, session)
    assert_success(client.post(f"sessions/{session}/rollback", {"version": 1}))
    client.observe(session, TEXT)
    none = {"added": 0, "removed": 0, "changed": 0}
    assert set(map(str, diff(client, session, 1, 3)["rows"].values())) == {str(none)}
    difference = diff(client, session, 2, 4)
    assert [entry["version"] for entry in difference["forgotten"]] == [2]
    assert [entry["version"] for entry in difference["learned"]] == [4]
    assert_success(client.post(f"sessions/{session}/rollback", {"version": 2}))
    assert counts(client, session) == before


def test_a_text_that_is_not_kept_is_not_shown(client: Client) -> None:
    name = uuid4().hex
    client.observe(name, TEXT)
    assert [entry["text"] for entry in diff(client, name, 0, 1)["learned"]] == [None]


@pytest.mark.parametrize(
    ("span", "status", "param"),
    [
        ({"from": 0}, 400, "to"),
        ({"from": -1, "to": 1}, 400, "from"),
        ({"from": 0, "to": 2}, 409, "to"),
        ({"from": 9, "to": 1}, 409, "from"),
        ({"from": 0, "to": 1, "of": 3}, 400, "of"),
    ],
)
def test_an_invalid_span_is_refused(client: Client, session: str, span: Json, status: int, param: str) -> None:
    client.observe(session, TEXT[:20])
    answer = client.http.get(f"/v1/sessions/{session}/diff", params=span)
    code = "version_not_kept" if status == 409 else None
    assert assert_error(answer, status, answer.json()["error"]["code"])["param"] == param
    assert code is None or answer.json()["error"]["code"] == code


@pytest.mark.parametrize("view", ["cells", "diff?from=0&to=0"])
def test_the_views_of_a_missing_session_are_not_found(client: Client, view: str) -> None:
    assert_error(client.http.get(f"/v1/sessions/nobody-here/{view}"), 404, "session_not_found")


def test_neighbouring_cells_share_a_bin_if_there_are_many() -> None:
    site = SiteConfig("wide", "hidden", slots=65_536, k=4, width=8)
    assert MemoryConfig(tiny_config().hidden_size, (site,)).sites == (site,)
    fill = _fill(site, np.array([0, 63, 64, 65_535], np.int32))
    assert (fill.bin_cells, fill.bin_rows, len(fill.counts)) == (64, 64, MAX_BINS)
    assert (fill.counts[0], fill.counts[1], fill.counts[-1], sum(fill.counts)) == (2, 1, 1, 4)
    assert sum(_fill(replace(site, slots=1_089 * 1_089), NO_SLOTS).counts) == 0


def test_row_changes_are_counted_by_slot() -> None:
    def rows(**cells: int) -> RowBatch:
        slots = np.array([int(name[1:]) for name in cells], np.int32)
        return RowBatch(slots, np.array([[value] for value in cells.values()], np.uint8))

    before, after = {"a": rows(s1=1, s2=2, s5=5)}, {"a": rows(s2=2, s5=6, s7=7, s8=8)}
    assert _changes("a", before, after) == RowChanges(added=2, removed=1, changed=1)
    assert _changes("a", {}, after) == RowChanges(added=4, removed=0, changed=0)
    assert _changes("b", before, after) == RowChanges(0, 0, 0)
