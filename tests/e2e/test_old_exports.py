"""Sessions that older code exported load into the server of today and are worth what they were worth."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Server
from tests.live import Client, assert_success

pytestmark = [pytest.mark.e2e, pytest.mark.real]

EXPORTS = Path(__file__).with_name("exports")
EXAMPLES = Path(__file__).parents[2] / "examples"


def import_session(client: Client, name: str) -> str:
    """Import an export under a name of its own; return that name."""
    session, data = f"old-{name}", (EXPORTS / f"{name}.safetensors").read_bytes()
    created = assert_success(client.http.put(f"/v1/sessions/{session}/import", content=data))
    assert (created["version"], created["tokens_learned"]) == (1, {"text": 770, "bandit": 11, "digits": 6}[name])
    return session


def test_an_old_text_session_predicts_as_one_that_learns_the_same_text_now(real_server: Server) -> None:
    text, unseen = ((EXAMPLES / f"keeper-{half}.txt").read_text() for half in (1, 2))
    with Client(real_server.url) as client:
        session = import_session(client, "text")
        client.observe("new-text", text, recall=False)  # an old session has no episodes
        old, new = (client.score(name, unseen) for name in (session, "new-text"))
        assert client.session(session)["rows"] == client.session("new-text")["rows"] == 684
    assert old["loss"] == pytest.approx(new["loss"], rel=0.01)  # processors round differently
    assert old["loss"] < old["frozen_loss"] - 0.1


def test_old_sessions_of_policies_go_on(real_server: Server) -> None:
    with Client(real_server.url) as client:
        session = import_session(client, "bandit")
        acted = assert_success(client.post(f"sessions/{session}/act", {"observation": [1.0], "reward": 1.0}))
        assert acted["adaptation"]["tokens_learned"] == 1
        session = import_session(client, "digits")
        labelled = assert_success(client.post(f"sessions/{session}/predict", {"features": [0.5] * 64}))
        assert sum(labelled["probabilities"]) == pytest.approx(1)
