"""The laboratory in a real browser: it shows what the server answers, without errors, and contacts no other host.

With IMPRINT_SHOTS=FOLDER the tests on the default base save screenshots in that folder; docs/img has some of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from model.base.config import tiny_config
from service.tenants import new_key
from tests.browser import (
    LOOK_MS,
    OpenPage,
    assert_accessible,
    button,
    choose,
    draft,
    get,
    hold_requests,
    learn,
    losses,
    note,
    shoot,
    wait_for_version,
)
from tests.conftest import Server
from tests.live import NO_EOS, wait_until
from tests.tiny import TEXT, build_tiny_base
from tests.tour import first_row, paragraph

pytestmark = pytest.mark.e2e

GUIDE = Path(__file__).parents[2] / "docs" / "playground.md"
EXAMPLES = Path(__file__).parents[2] / "examples"
CONTEXT = 8192
PASTE = """(field, text) => {
  const clipboardData = new DataTransfer();
  clipboardData.setData("text/plain", text);
  field.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server of a tiny base with a long context, so that requests can take long."""
    base = build_tiny_base(tmp_path_factory.mktemp("base") / "long", tiny_config(max_context=CONTEXT))
    running = Server(str(base), tmp_path_factory.mktemp("page") / "data").start()
    yield running
    assert running.stop() == 0, running.log.read_text()


def rows_of_sites(page: Page) -> int:
    """Return the sum of the numbers of rows that the page shows for the sites of the memory."""
    shown = re.findall(r"([\d,]+) rows in", page.locator("#cells").text_content() or "")
    return sum(int(number.replace(",", "")) for number in shown)


@pytest.mark.real
def test_a_reader_sees_the_model_adapt(open_page: OpenPage, real_server: Server) -> None:
    """Paste a page on the default base and see the loss fall; undo, return, fork and compare."""
    page = open_page(real_server.url)
    page.set_viewport_size({"width": 1280, "height": 960})
    page.emulate_media(color_scheme="light")
    choose(page, "reader")
    button(page, "Put in the page").click()
    expect(draft(page)).to_have_value(re.compile("^The Keeper of Orvane Light"))
    draft(page).focus()
    page.keyboard.press("Control+A")
    page.keyboard.press("Control+X")
    expect(draft(page)).to_have_value("")
    page.keyboard.press("Control+V")
    expect(draft(page)).to_have_value(re.compile("^The Keeper of Orvane Light"))
    button(page, "Learn").click()
    wait_for_version(page, 6)
    frozen, adapted = losses(page, 6)
    documented = re.search(r"stays at (\S+) nats.*?falls to (\S+)", GUIDE.read_text(), flags=re.DOTALL)
    assert documented and (frozen, adapted) == pytest.approx(tuple(map(float, documented.groups())), abs=0.05)
    assert page.locator("#curve canvas").count() == 1
    assert page.locator("#manuscript .better").count() > 50
    facts = get(real_server, "reader")
    assert page.locator("#rows").text_content() == f"{facts['rows']:,}"
    wait_until(lambda: rows_of_sites(page) == facts["rows"])

    button(page, "Try a line").click()
    expect(page.locator("#suggestion")).to_contain_text("Quill")
    expect(page.locator("#backdrop .better")).not_to_have_count(0)
    shoot(page, "playground")
    page.emulate_media(color_scheme="dark")
    assert_accessible(page)
    shoot(page, "playground-dark")
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 390, "height": 844})
    assert_accessible(page)
    shoot(page, "playground-phone")
    page.set_viewport_size({"width": 1280, "height": 960})
    page.keyboard.press("Tab")
    expect(draft(page)).to_have_value(re.compile("^Osric Pell has a stone in the churchyard at Quill"))
    draft(page).fill("")

    button(page, "Undo").click()
    assert losses(page, 7) == (frozen, frozen)
    expect(page.locator("#manuscript .better")).to_have_count(0)
    expect(page.locator("#cells")).to_contain_text("0 rows in")
    expect(draft(page)).to_have_value(re.compile("^The Keeper of Orvane Light"))
    button(page, "Return to 6").click()
    assert losses(page, 8) == (frozen, adapted)
    draft(page).fill("")

    page.get_by_label("as", exact=True).fill("other")
    button(page, "Fork").click()
    expect(page.get_by_label("Session", exact=True)).to_have_value("other")
    assert losses(page, 1) == (frozen, adapted)
    learn(page, "Osric Pell came back. He sleeps in the hut, and nobody speaks of the stone.")
    wait_for_version(page, 2)
    page.get_by_label("From", exact=True).select_option("1")
    button(page, "Show difference").click()
    expect(note(page, "diff")).to_contain_text("From 1 to 2: +")
    expect(page.locator("#lessons")).to_contain_text("He sleeps in the hut")
    button(page, "Complete both").click()
    expect(page.locator("#right-note")).to_contain_text("Perplexity of the prompt")
    assert (
        page.get_by_label("Left", exact=True).input_value(),
        page.get_by_label("Right", exact=True).input_value(),
    ) == ("other", "reader")
    assert_accessible(page)
    shoot(page, "playground-versions", whole=True)

    learn(page, (EXAMPLES / "loom-1.txt").read_text())
    expect(note(page, "teach")).to_contain_text("other learned")
    button(page, "Stop").click()
    expect(note(page, "teach")).to_contain_text("Stopped.")
    expect(button(page, "Learn")).to_be_enabled()
    version = get(real_server, "other")["version"]
    expect(page.locator("#version")).to_have_text(str(version))
    assert len(draft(page).input_value()) > 1000  # the unlearned rest stays in the draft
    assert get(real_server, "reader")["version"] == 8  # reading a memory leaves it as it is


@pytest.mark.real
def test_the_page_follows_the_tour(open_page: OpenPage, real_server: Server) -> None:
    """Follow docs/tour.md on the default base: teach a paragraph, and see its next line suggested."""
    page = open_page(real_server.url)
    page.set_viewport_size({"width": 1280, "height": 800})
    page.emulate_media(color_scheme="light")
    choose(page, "tourist")
    learn(page, paragraph())
    wait_for_version(page, 1)
    frozen, adapted = losses(page, 1)
    assert adapted < frozen / 4
    prompt, continuation = first_row()
    draft(page).fill(prompt)
    expect(page.locator("#suggestion")).to_contain_text(continuation)
    expect(page.locator("#backdrop .better")).not_to_have_count(0)
    shoot(page, "tour")


def test_the_page_shows_what_the_server_answers(page: Page, server: Server) -> None:
    choose(page, "ada")
    expect(page.locator("#version")).to_have_text("new")
    sample = TEXT[:90] + "\nNaïve 😀😃 日本 <b>bold</b>"
    learn(page, sample)
    wait_for_version(page, 1)
    expect(draft(page)).to_have_value("")
    assert page.locator("#manuscript p").text_content() == sample
    facts = get(server, "ada")
    expect(page.locator("#tokens-learned")).to_have_text(str(facts["tokens_learned"]))
    expect(page.locator("#rows")).to_have_text(f"{facts['rows']:,}")
    tokens = page.locator("#manuscript span[tabindex]")
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(page.locator("#token")).to_contain_text(re.compile("with the memory, .* for the frozen base"))

    suggested = httpx.get(f"{server.url}/v1/models").json()["data"][0]["sampling"]
    request = {"model": server.model, "prompt": TEXT[:60], "max_tokens": 12, **suggested, "temperature": 0}
    page.get_by_label("The same prompt").fill(TEXT[:60])
    page.get_by_label("Tokens", exact=True).fill("12")
    page.get_by_label("Temperature").fill("0")
    button(page, "Complete both").click()
    expect(page.locator("#right-note")).to_contain_text("Perplexity")
    for side, fields in (("left", {"session": "ada", "adapt": "predict"}), ("right", {})):
        answer = httpx.post(f"{server.url}/v1/completions", json=request | fields).json()
        assert page.locator(f"#{side}-text").text_content() == TEXT[:60] + answer["choices"][0]["text"]
    assert get(server, "ada")["version"] == 1
    page.reload()
    expect(page.get_by_label("Session", exact=True)).to_have_value("ada")
    expect(page.locator("#manuscript")).to_contain_text("bold")  # the session keeps its text


def test_a_suggestion_can_be_accepted_or_dismissed_and_blocks_nothing(page: Page) -> None:
    choose(page, "eve")
    draft(page).focus()
    page.keyboard.type("The quick brown")
    expect(page.locator("#suggestion")).not_to_be_empty()
    ghost = page.locator(".ghost").text_content()
    page.keyboard.press("Tab")
    expect(draft(page)).to_have_value(f"The quick brown{ghost}")
    expect(page.locator("#suggestion")).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.locator(".ghost")).to_be_empty()
    page.keyboard.press("Tab")
    expect(draft(page)).not_to_be_focused()
    page.get_by_label("Suggest as I write").uncheck()
    page.mouse.move(0, 0)
    box = page.locator("#backdrop span").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 2, box["y"] + box["height"] / 2)
    expect(page.locator("#token")).to_contain_text("with the memory")


@pytest.mark.refusals
def test_text_written_during_a_request_is_scored_afterwards(page: Page) -> None:
    choose(page, "gus")
    page.get_by_label("The same prompt").fill("The fox")
    with hold_requests(page, "**/v1/completions"):
        button(page, "Complete both").click()
        draft(page).fill("The quick brown")
        page.wait_for_timeout(LOOK_MS)  # the page must not score the draft now
    expect(page.locator("#suggestion")).not_to_be_empty()

    with hold_requests(page, "**/v1/sessions?*"):
        choose(page, "hal")
        learn(page, TEXT)
        expect(page.locator("#learning-text")).to_have_text(TEXT)
        page.route("**/readyz", lambda route: route.fulfill(status=503, json={"status": "loading"}))
    expect(page.locator("#state")).to_contain_text("The server is loading the model.")  # shown when Learn ends
    draft(page).fill("The lazy dog")
    page.wait_for_timeout(LOOK_MS)
    expect(page.locator("#suggestion")).to_be_empty()
    page.unroute("**/readyz")
    expect(page.locator("#suggestion")).not_to_be_empty()


def test_a_long_text_comes_in_pieces_and_can_be_stopped(page: Page, server: Server) -> None:
    piece = TEXT * 15 + "\n\n"
    choose(page, "cy")
    draft(page).evaluate(PASTE, piece * 100)
    expect(draft(page)).to_have_value(piece * 100)
    button(page, "Learn").click()
    expect(note(page, "teach")).to_contain_text("of 100 pieces")
    expect(page.get_by_role("progressbar")).to_be_visible()
    button(page, "Stop").first.click()
    expect(note(page, "teach")).to_contain_text("Stopped. cy learned")
    expect(button(page, "Learn")).to_be_enabled()
    version = get(server, "cy")["version"]
    assert 0 < version < 100
    rest = draft(page).input_value()
    assert rest in (piece * (100 - version), piece * (101 - version))  # the last answer may have been in flight
    expect(page.locator("#version")).to_have_text(str(version))
    button(page, "Undo").click()
    expect(page.locator("#versions-note")).to_contain_text("is what version 0 was")
    assert get(server, "cy")["rows"] == 0


@pytest.mark.refusals
def test_a_piece_whose_answer_is_lost_is_learned_once(page: Page, server: Server) -> None:
    def lose(route: Route) -> None:
        route.fetch()
        route.abort()

    choose(page, "fay")
    draft(page).fill(TEXT)
    expect(page.locator("#backdrop span").first).to_be_attached()
    page.route(
        "**/score", lambda route: lose(route) if "true" in (route.request.post_data or "") else route.continue_()
    )
    button(page, "Learn").click()
    expect(note(page, "teach")).to_contain_text("does not answer")
    page.unroute("**/score")
    button(page, "Learn").click()
    expect(draft(page)).to_have_value("")
    wait_for_version(page, 1)
    assert get(server, "fay")["version"] == 1


def test_a_completion_can_be_stopped(page: Page, server: Server) -> None:
    def unending(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        route.continue_(post_data=json.dumps(body | {"logit_bias": NO_EOS}))

    page.route("**/v1/completions", unending)
    page.get_by_label("The same prompt").fill("The fox")
    page.get_by_label("Tokens", exact=True).fill(str(CONTEXT - 100))
    button(page, "Complete both").click()
    for side in ("left", "right"):
        expect(page.locator(f"#{side}-text")).to_have_text(re.compile("The fox.+", re.DOTALL))
    button(page, "Stop").click()
    expect(note(page, "compare")).to_have_text("Stopped.")
    expect(button(page, "Complete both")).to_be_enabled()


def test_a_bad_session_name_is_explained_and_never_sent(page: Page) -> None:
    sent: list[str] = []
    for name in ("", "-a", "a b", "a/b", "é", "a" * 129):
        choose(page, name)
        expect(page.get_by_role("alert")).to_contain_text("1 to 128 letters, digits or")
        page.on("request", lambda request: sent.append(request.url))
        learn(page, "A lesson.")
        expect(page.get_by_label("Session", exact=True)).to_be_focused()
    assert not sent
    choose(page, "a.b-c")
    expect(page.get_by_role("alert")).to_have_text("")


@pytest.mark.refusals
def test_an_error_is_shown_in_the_servers_words(page: Page) -> None:
    page.get_by_label("The same prompt").fill("fox 7 " * CONTEXT)
    button(page, "Complete both").click()
    refusal = re.compile(f"^'prompt' and completion may hold {CONTEXT} tokens together")
    expect(note(page, "compare")).to_have_text(refusal)
    expect(button(page, "Complete both")).to_be_enabled()


@pytest.mark.refusals
def test_the_page_shows_that_the_server_loads_and_recovers_by_itself(page: Page) -> None:
    page.route("**/readyz", lambda route: route.fulfill(status=503, json={"status": "loading"}))
    page.reload()
    expect(page.locator("#state")).to_contain_text("The server is loading the model.")
    expect(button(page, "Complete both")).to_be_disabled()
    page.unroute("**/readyz")
    expect(page.locator("#state")).to_have_text("")
    expect(button(page, "Complete both")).to_be_enabled()


@pytest.mark.parametrize("width", [320, 1200])
def test_nothing_overflows_the_page(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_a_chosen_theme_is_kept(page: Page) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background)
    page.get_by_label("Theme").select_option("dark")
    after = page.evaluate(background)
    page.reload()
    assert page.evaluate(background) == after != before


def test_the_page_asks_for_a_key_if_the_server_requires_one(browser: Browser, tiny_base: Path, tmp_path: Path) -> None:
    key, line = new_key("acme")
    server = Server(str(tiny_base), tmp_path / "data", api_keys=line).start()
    page = browser.new_page()
    key_field = page.get_by_label("API key")
    page.goto(f"{server.url}/laboratory")
    expect(page.locator("#state")).to_contain_text("An API key is required")
    key_field.fill("wrong")
    key_field.blur()
    expect(page.locator("#state")).to_contain_text("not known")
    key_field.fill(key)
    key_field.press("Enter")
    expect(key_field).to_be_hidden()
    learn(page, TEXT)
    wait_for_version(page, 1)
    page.reload()
    expect(page.locator("#version")).to_have_text("1")
    page.close()
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("days", "told"),
    [
        (0, r"today at \d\d:\d\d|just now|yesterday at \d\d:\d\d"),
        (1, r"yesterday at \d\d:\d\d"),
        (4, "on (Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"),
        (40, r"on \d+ [A-Z][a-z]+( \d{4})?"),
        (400, r"on \d+ [A-Z][a-z]+ \d{4}"),
    ],
)
def test_when_something_was_said_is_told_as_a_person_would(page: Page, days: int, told: str) -> None:
    script = 'async (days) => (await import("/playground/elements.js")).when(new Date(Date.now() - days * 86400000))'
    word = page.evaluate(script, days)
    assert re.fullmatch(told, word)
