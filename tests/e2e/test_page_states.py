"""The laboratory says what it does and what it cannot do: while it learns, and where there is nothing to show."""

from __future__ import annotations

import json
import re

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser import button, choose, draft, get, hold_requests, learn, note, wait_for_version
from tests.conftest import Server
from tests.live import EOS
from tests.tiny import TEXT

pytestmark = pytest.mark.e2e

WRITTEN = "What was written meanwhile."


def test_text_written_while_the_page_learns_is_kept(page: Page, server: Server) -> None:
    """Type during a lesson: the page shows the lesson apart from the draft, and the draft keeps each character."""
    choose(page, "writer")
    with hold_requests(page, "**/score"):
        learn(page, TEXT)
        expect(page.locator("#learning")).to_contain_text("Being learned")
        expect(page.locator("#learning-text")).to_have_text(TEXT)
        expect(page.get_by_label("Session", exact=True)).not_to_be_editable()
        expect(button(page, "Put in the page")).to_be_hidden()
        draft(page).focus()
        page.keyboard.type(WRITTEN)
        page.keyboard.press("Control+Enter")  # learns; it must not stop what is learned now
    wait_for_version(page, 1)
    expect(page.locator("#learning")).to_be_hidden()
    page.keyboard.type(" And after it.")
    expect(draft(page)).to_have_value(f"{WRITTEN} And after it.")
    assert get(server, "writer")["version"] == 1


def test_text_that_was_not_learned_comes_back_before_what_was_written_since(page: Page) -> None:
    choose(page, "stopper")
    with hold_requests(page, "**/score"):
        learn(page, TEXT.strip())
        draft(page).focus()
        page.keyboard.type(WRITTEN)
        button(page, "Stop").click()
        expect(note(page, "teach")).to_contain_text("Stopped.")
    expect(draft(page)).to_have_value(f"{TEXT.strip()}\n{WRITTEN}")


@pytest.mark.refusals
def test_a_lost_piece_is_learned_once_though_the_draft_has_grown(page: Page, server: Server) -> None:
    def lose(route: Route) -> None:
        route.fetch()
        route.abort()

    choose(page, "grower")
    page.get_by_label("Suggest as I write").uncheck()
    page.route(
        "**/score",
        lambda route: lose(route) if '"learn":true' in (route.request.post_data or "") else route.continue_(),
    )
    learn(page, TEXT)
    expect(note(page, "teach")).to_contain_text("does not answer")
    page.unroute("**/score")
    learned = get(server, "grower")["tokens_learned"]
    assert learned > 0
    draft(page).fill(f"{TEXT} One.")
    button(page, "Learn").click()
    wait_for_version(page, 2)
    [newest, first] = get(server, "grower/log")["data"]
    assert (newest["text"], first["text"]) == (" One.", TEXT)


def test_what_somebody_writes_is_not_replaced(page: Page) -> None:
    """The page proposes texts and names only where nothing is written."""
    choose(page, "proposer")
    with hold_requests(page, "**/samples/*"):
        button(page, "Put in the page").click()
        draft(page).fill(TEXT)
    page.get_by_label("The same prompt").fill("My own prompt")
    page.get_by_label("as", exact=True).fill("proposer")  # on the way to a longer name
    button(page, "Learn").click()
    wait_for_version(page, 1)
    assert page.locator("#manuscript p").text_content() == TEXT
    expect(page.get_by_label("as", exact=True)).to_have_value("proposer")
    button(page, "Try a line").click()
    expect(draft(page)).to_have_value(re.compile("^Osric Pell"))
    expect(page.get_by_label("The same prompt")).to_have_value("My own prompt")


def test_a_first_text_tells_what_was_learned_and_no_gain_of_0(page: Page) -> None:
    choose(page, "beginner")
    expect(page.locator("#gain")).to_have_text("not measured")
    expect(page.locator("#versions")).to_be_empty()
    learn(page, "The quick brown fox.")
    wait_for_version(page, 1)
    expect(note(page, "teach")).to_have_text(
        re.compile(r"^beginner learned \d+ tokens, 1 of 1 piece; perplexity [\d,.]+ before, as the memory was empty;")
    )
    expect(page.locator("#gain")).to_have_text("from the next text on")
    learn(page, "The quick brown fox.")
    wait_for_version(page, 2)
    expect(note(page, "teach")).to_contain_text("for the frozen base")
    expect(page.locator("#gain")).to_have_text(re.compile(r"^[+-]\d"))


def test_a_side_that_has_nothing_to_add_says_so(page: Page) -> None:
    def end_at_once(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        route.continue_(post_data=json.dumps(body if "session" in body else body | {"logit_bias": {EOS: 100}}))

    choose(page, "speaker")
    draft(page).focus()
    learn(page, TEXT)
    wait_for_version(page, 1)
    page.route("**/v1/completions", end_at_once)
    page.get_by_label("The same prompt").fill("The quick brown")
    page.get_by_label("Left", exact=True).select_option("speaker")
    button(page, "Complete both").click()
    expect(page.locator("#right-note")).to_have_text(
        re.compile(r"^Nothing to add: here the model ends the text\. Perplexity of the prompt: [\d.,]+\.$")
    )
    expect(page.locator("#left-note")).to_have_text(re.compile(r"^Perplexity of the prompt"))


def test_sessions_that_write_no_text_are_not_offered(page: Page, server: Server) -> None:
    made = httpx.put(f"{server.url}/v1/sessions/gambler", json={"model": "bandit"})
    assert made.status_code == 201
    choose(page, "talker")
    learn(page, TEXT)
    wait_for_version(page, 1)
    page.reload()
    expect(page.locator("#version")).to_have_text("1")
    for place in ("#sessions", "#left", "#right"):
        names = page.locator(f"{place} option").evaluate_all("all => all.map((one) => one.value)")
        assert "talker" in names and "gambler" not in names
    choose(page, "gambler")
    expect(page.get_by_role("alert")).to_have_text(
        "gambler is a session of the policy bandit, which writes no text. Choose another name."
    )
    learn(page, TEXT)
    expect(page.get_by_label("Session", exact=True)).to_be_focused()
    choose(page, "talker")
    expect(page.get_by_role("alert")).to_have_text("")
    expect(page.locator("#version")).to_have_text("1")
    assert get(server, "gambler")["version"] == 0


def test_an_answer_that_is_none_of_the_servers_is_told_in_words(page: Page) -> None:
    """A proxy answers in the server's place: the page shows no message of the browser's own JSON parser."""
    page.route("**/readyz", lambda route: route.fulfill(status=200, body="<html>Welcome</html>"))
    page.reload()
    expect(page.locator("#state")).to_have_text(
        "Something answered that is not the server; a proxy may be in between. This page tries again by itself."
    )


def test_the_page_takes_the_sampling_that_the_server_suggests(page: Page, server: Server) -> None:
    suggested = httpx.get(f"{server.url}/v1/models").json()["data"][0]["sampling"]
    expect(page.get_by_label("Temperature")).to_have_value(str(suggested["temperature"]))
    page.get_by_label("The same prompt").fill("The quick brown")
    with page.expect_request("**/v1/completions") as sent:
        button(page, "Complete both").click()
    body = sent.value.post_data_json
    assert body == body | suggested
    expect(button(page, "Complete both")).to_be_enabled()
