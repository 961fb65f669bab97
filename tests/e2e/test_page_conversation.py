"""The conversation at `/` in a real browser: what a person tells is remembered, shown with its source, and taken back.

With IMPRINT_SHOTS=FOLDER the tests on the default base save screenshots in that folder; docs/img has some of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from model.base.config import tiny_config
from service.tenants import new_key
from tests.browser import OpenPage, assert_accessible, button, get, hold_requests, shoot
from tests.conftest import Server
from tests.live import NO_EOS, Json
from tests.tiny import build_tiny_base

pytestmark = pytest.mark.e2e

CAT = "My cat is called Miso and she sleeps on the radiator."
CORRECTED = "My cat is called Pixel and she sleeps on the radiator."
WORK = "I work at the bakery on Mill Lane on Fridays."
ASKS = "What is my cat called?"
JARGON = re.compile(
    r"\b(sessions?|nats?|tokens?|episodes?|rows?|versions?|models?|loss|perplexity|prompts?|completions?|tenants?|API)\b",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server of a tiny base with a long context, so that an answer can take long."""
    base = build_tiny_base(tmp_path_factory.mktemp("base") / "long", tiny_config(max_context=8192))
    running = Server(str(base), tmp_path_factory.mktemp("page") / "data").start()
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture
def name() -> str:
    return f"Zoë {uuid4().hex[:8]}"


@pytest.fixture
def page(open_page: OpenPage, server: Server, name: str) -> Page:
    """Open the page of the tiny base as a person who has said nothing yet."""
    page = open_page(server.url, "")
    page.route("**/v1/chat/completions", briefly)
    return enter(page, name)


def briefly(route: Route) -> None:
    """Let the server answer with a few words: a tiny base would go on."""
    route.continue_(post_data=json.dumps({**body_of(route), "max_tokens": 12}))


def body_of(route: Route) -> Json:
    body: Json = json.loads(route.request.post_data or "")
    return body


def enter(page: Page, name: str) -> Page:
    page.get_by_label("Your name").fill(name)
    button(page, "Start").click()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    return page


def memory_of(name: str) -> str:
    return name.replace("ë", "e").replace(" ", "-").lower()


def send(page: Page, text: str) -> Locator:
    """Send a message with the keyboard; return the turn after the answer."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    turn = page.locator(".turn").last
    expect(turn.locator(".you .text")).to_have_text(text)
    expect(turn).to_have_attribute("aria-busy", "false")
    return turn


def remembered(turn: Locator) -> Locator:
    return turn.locator(".remembered .entry")


def entries(page: Page) -> Locator:
    return page.locator("#entries .entry")


def in_dialog(page: Page, name: str) -> None:
    """Press a button of the open dialog, and wait until the dialog is done and, after a change, the focus has moved."""
    page.get_by_role("dialog").get_by_role("button", name=name, exact=True).click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    if name != "Cancel":
        expect(page.get_by_label("Message", exact=True)).to_be_focused()


def correct(page: Page, entry: Locator, text: str) -> None:
    entry.get_by_role("button", name="Correct").click()
    page.get_by_label("What is right").fill(text)
    in_dialog(page, "Correct")


def forget(page: Page, entry: Locator) -> None:
    entry.get_by_role("button", name="Forget").click()
    expect(page.get_by_role("dialog")).to_contain_text("all that you said in that message")
    in_dialog(page, "Forget")


def assert_plain(page: Page) -> None:
    """Assert that the page shows and speaks no jargon."""
    spoken = page.locator("[aria-label], [title], [placeholder]").evaluate_all(
        "all => all.flatMap((one) => [one.ariaLabel, one.title, one.placeholder])"
    )
    for text in (page.locator("main").inner_text(), *filter(None, spoken)):
        assert not JARGON.search(text), text


def greedily(route: Route) -> None:
    """Let the server answer with the likeliest words, so that the answer is the same each time."""
    body = body_of(route)
    assert body["temperature"] > 0 and body["adapt"] == "predict"
    route.continue_(post_data=json.dumps(body | {"temperature": 0}))


@pytest.mark.real
def test_the_story_of_the_readme(open_page: OpenPage, real_server: Server, name: str) -> None:
    """Teach, ask in a new conversation, correct, ask, forget, ask: on the default base, as a person does it."""
    page = open_page(real_server.url, "")
    page.route("**/v1/chat/completions", greedily)
    page.set_viewport_size({"width": 1280, "height": 860})
    page.emulate_media(color_scheme="light")
    assert_plain(page)
    assert_accessible(page)
    enter(page, "Ada")
    assert_plain(page)
    send(page, CAT)
    send(page, WORK)
    expect(entries(page)).to_have_count(2)

    button(page, "New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    turn = send(page, ASKS)
    expect(turn.locator(".answer > .text")).to_contain_text("Miso")
    expect(remembered(turn)).to_contain_text(CAT)
    expect(remembered(turn)).to_contain_text("You said so just now.")
    assert_plain(page)
    assert_accessible(page)
    shoot(page, "conversation")

    correct(page, remembered(turn), CORRECTED)
    expect(turn).to_contain_text("from before you corrected")
    again = send(page, ASKS)
    expect(again.locator(".answer > .text")).to_contain_text("Pixel")
    expect(again.locator(".answer > .text")).not_to_contain_text("Miso")
    expect(remembered(again)).to_contain_text(CORRECTED)
    expect(entries(page)).to_have_count(2)
    page.emulate_media(color_scheme="dark")
    assert_plain(page)
    assert_accessible(page)
    shoot(page, "conversation-dark")
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 390, "height": 844})
    assert_accessible(page)
    shoot(page, "conversation-phone")
    button(page, "What I remember").click()
    expect(entries(page).first).to_be_visible()
    assert_accessible(page)
    shoot(page, "conversation-phone-list")
    button(page, "Back to the conversation").click()
    page.set_viewport_size({"width": 1280, "height": 860})

    forget(page, remembered(again))
    expect(entries(page)).to_have_text([re.compile("bakery")])
    last = send(page, ASKS)
    expect(last.locator(".answer > .text")).not_to_contain_text(re.compile("Pixel|Miso"))
    expect(remembered(last)).to_have_count(0)
    assert_plain(page)
    kept = httpx.get(f"{real_server.url}/v1/sessions/ada/episodes").text
    assert "Miso" not in kept and "Pixel" not in kept


def test_a_message_teaches_once_and_an_answer_teaches_nothing(page: Page, server: Server, name: str) -> None:
    turn = send(page, CAT)
    expect(entries(page)).to_contain_text(CAT)
    assert get(server, memory_of(name))["version"] == 1
    first = turn.locator(".answer > .text").text_content()
    turn.get_by_role("button", name="Answer again").click()
    expect(turn).to_have_attribute("aria-busy", "true")
    expect(turn).to_have_attribute("aria-busy", "false")
    assert first and get(server, memory_of(name))["version"] == 1
    send(page, ASKS)
    log = get(server, f"{memory_of(name)}/log")["data"]
    assert [entry["text"] for entry in log] == [ASKS, CAT]


def large(route: Route) -> None:
    """Let the page think that the base is a large one."""
    told: Json = route.fetch().json()
    route.fulfill(json={"data": [told["data"][0] | {"meta": {"n_params": 10**9}}]})


def test_history_ends_with_a_conversation_and_a_change(page: Page) -> None:
    sent: list[list[str]] = []

    def note(route: Route) -> None:
        sent.append([message["content"] for message in body_of(route)["messages"]])
        route.fallback()

    page.route("**/v1/chat/completions", note)
    send(page, ASKS)
    send(page, ASKS)
    assert sent == [[ASKS], [ASKS]], "a small base gets no history"
    sent.clear()
    page.route("**/v1/models", large)
    page.reload()
    send(page, CAT)
    turn = send(page, WORK)
    assert [len(messages) for messages in sent] == [1, 3] and sent[1][0] == CAT
    correct(page, entries(page).last, CORRECTED)
    expect(page.locator(".line")).to_have_text("What stands above is no longer used.")
    expect(page.locator(".turn").first).to_contain_text(f"Corrected: {CORRECTED}")
    send(page, ASKS)
    assert sent[2] == [ASKS]
    button(page, "New conversation").click()
    expect(turn).to_have_count(0)
    send(page, ASKS)
    assert sent[3] == [ASKS]


def test_an_answer_can_be_stopped_and_what_was_said_stays(page: Page, server: Server, name: str) -> None:
    def unending(route: Route) -> None:
        route.continue_(post_data=json.dumps(body_of(route) | {"logit_bias": NO_EOS, "max_tokens": 8000}))

    page.route("**/v1/chat/completions", unending)
    for with_keyboard in (False, True):
        page.get_by_label("Message", exact=True).fill(CAT)
        page.keyboard.press("Enter")
        turn = page.locator(".turn").last
        expect(turn.locator(".answer > .text")).not_to_be_empty()
        page.keyboard.press("Enter")  # in the empty field: it must not stop the answer
        expect(turn).to_have_attribute("aria-busy", "true")
        if with_keyboard:
            page.keyboard.press("Escape")
        else:
            button(page, "Stop").click()
        expect(turn.locator(".note")).to_have_text("Stopped.")
        expect(button(page, "Send")).to_be_visible()
    assert get(server, memory_of(name))["version"] == 2


@pytest.mark.refusals
def test_a_message_whose_answer_is_lost_is_taught_once(page: Page, server: Server, name: str) -> None:
    def lose(route: Route) -> None:
        route.fetch()
        route.abort()

    page.route("**/observe", lose)
    page.get_by_label("Message", exact=True).fill(CAT)
    page.keyboard.press("Enter")
    turn = page.locator(".turn").last
    expect(turn.locator(".note")).to_have_text("The server does not answer.")
    page.unroute("**/observe")
    turn.get_by_role("button", name="Try again").click()
    expect(turn.get_by_role("button", name="Answer again")).to_be_visible()
    assert get(server, memory_of(name))["version"] == 1


@pytest.mark.refusals
@pytest.mark.parametrize("lost", ["observe", "unlearn"])
def test_a_correction_that_breaks_off_is_ended_once_when_the_page_is_opened_again(
    page: Page, server: Server, name: str, lost: str
) -> None:
    def lose(route: Route) -> None:
        route.fetch()
        route.abort()

    send(page, CAT)
    page.route(f"**/{lost}", lose)
    entries(page).get_by_role("button", name="Correct").click()
    page.get_by_label("What is right").fill(CORRECTED)
    press = page.get_by_role("dialog").get_by_role("button", name="Correct")
    alert = page.get_by_role("dialog").get_by_role("alert")
    press.click()
    expect(alert).to_have_text("The server does not answer. This is done when you open the page again.")
    with page.expect_event("requestfailed"):
        press.click()
    page.unroute(f"**/{lost}")
    page.reload()
    expect(entries(page)).to_contain_text(CORRECTED)
    log = get(server, f"{memory_of(name)}/log")["data"]
    assert [entry["kind"] for entry in log] == ["unlearn", "learn", "learn"]
    kept = get(server, f"{memory_of(name)}/episodes")["data"]
    assert [episode["text"] for episode in kept] == [CORRECTED]


def test_what_was_forgotten_can_be_said_again(page: Page) -> None:
    send(page, CAT)
    forget(page, entries(page))
    expect(page.locator("#known-note")).to_contain_text("Nothing yet")
    expect(page.locator(".turn").first.locator(".you")).to_contain_text("Forgotten.")
    send(page, CAT)
    expect(entries(page)).to_contain_text(CAT)


def test_forgetting_says_what_goes_with_it(page: Page) -> None:
    """A long message is kept in several texts; the dialog shows the whole message, and all of it goes."""
    message = f"{CAT} {WORK} " + "On Sundays I walk along the river to the old bridge and back. " * 6 + "I sing."
    send(page, message)
    send(page, WORK)
    page.get_by_label("Search what I remember").fill("sing")
    expect(entries(page)).to_have_count(1)
    entries(page).get_by_role("button", name="Forget").click()
    expect(page.get_by_role("dialog").locator("blockquote")).to_have_text(message)
    page.keyboard.press("Escape")
    expect(entries(page)).to_have_count(1)
    forget(page, entries(page))
    page.get_by_label("Search what I remember").fill("")
    expect(entries(page)).to_have_text([re.compile("bakery")])


def test_the_list_is_searched_and_shows_questions_on_demand(page: Page) -> None:
    for text in (CAT, WORK, ASKS):
        send(page, text)
    expect(entries(page)).to_have_text([re.compile("bakery"), re.compile("Miso")])  # the newest first
    page.get_by_label("Search what I remember").fill("RADI cat")
    expect(entries(page)).to_have_text([re.compile("Miso")])
    page.get_by_label("Search what I remember").fill("zebra")
    expect(page.locator("#known-note")).to_have_text("Nothing like that.")
    page.get_by_label("Search what I remember").fill("")
    expect(entries(page)).to_have_count(2)
    page.get_by_label("Your questions too").check()
    expect(entries(page)).to_have_count(3)


def test_a_long_list_comes_page_by_page(page: Page, server: Server, name: str) -> None:
    for number in range(25):
        body = {"text": f"Number {number} is on my list."}
        assert httpx.post(f"{server.url}/v1/sessions/{memory_of(name)}/observe", json=body).is_success
    page.reload()
    expect(entries(page)).to_have_count(20)
    expect(entries(page).first).to_contain_text("Number 24")
    button(page, "Show more").click()
    expect(entries(page)).to_have_count(25)
    expect(button(page, "Show more")).to_be_hidden()


def test_what_was_said_long_ago_is_corrected_and_forgotten_too(page: Page, server: Server, name: str) -> None:
    """The server keeps no text that it could learn around."""
    httpx.put(f"{server.url}/v1/sessions/{memory_of(name)}", json={"keep_text": False})
    for text in (f"{CAT} " + "On Sundays I walk along the river to the old bridge and back. " * 6, WORK, ASKS):
        httpx.post(f"{server.url}/v1/sessions/{memory_of(name)}/observe", json={"text": text})
    page.reload()
    forget(page, entries(page).last)
    expect(entries(page)).to_have_text([re.compile("bakery")])
    correct(page, entries(page), CORRECTED)
    expect(entries(page)).to_have_text([re.compile("Pixel")])
    assert_plain(page)


def test_everything_is_forgotten_at_once(page: Page, server: Server, name: str) -> None:
    send(page, CAT)
    button(page, "Forget everything").click()
    in_dialog(page, "Forget")
    expect(page.locator("#known-note")).to_contain_text("Nothing yet")
    expect(page.locator(".turn")).to_have_count(0)
    assert httpx.get(f"{server.url}/v1/sessions/{memory_of(name)}").status_code == 404


def test_the_person_is_kept_and_can_change(page: Page, name: str) -> None:
    send(page, CAT)
    page.reload()
    expect(page.locator("#who")).to_have_text(name)
    expect(entries(page)).to_contain_text(CAT)
    button(page, "Not you?").click()
    enter(page, f"{name} the second")
    expect(page.locator("#known-note")).to_contain_text("Nothing yet")
    button(page, "Not you?").click()
    enter(page, name.upper())
    expect(entries(page)).to_contain_text(CAT)


def test_a_name_that_cannot_be_used_is_explained(open_page: OpenPage, server: Server) -> None:
    assert httpx.put(f"{server.url}/v1/sessions/gambler", json={"model": "bandit"}).is_success
    page = open_page(server.url, "")
    for bad in ("!?", "Gambler"):
        page.get_by_label("Your name").fill(bad)
        button(page, "Start").click()
        expect(page.get_by_role("alert")).to_have_text("This name can’t be used here. Choose another one.")
    enter(page, "李雷")
    send(page, CAT)
    assert get(server, "674e.96f7")["version"] == 1


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_overflows_the_page(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    send(page, "A" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_copying_takes_the_answer(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    turn = send(page, CAT)
    turn.get_by_role("button", name="Copy").click()
    expect(page.locator("#announcement")).to_have_text("Copied.")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == (turn.locator(".answer > .text").text_content() or "").strip()


@pytest.mark.refusals
def test_what_another_window_forgot_is_told_in_plain_words(
    page: Page, open_page: OpenPage, server: Server, name: str
) -> None:
    send(page, CAT)
    other = enter(open_page(server.url, ""), name)
    forget(other, entries(other))
    entries(page).get_by_role("button", name="Forget").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Forget", exact=True).click()
    expect(dialog.get_by_role("alert")).to_have_text("It was taken back already.")
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.locator("#known-note")).to_contain_text("Nothing yet")


def test_an_answer_is_spoken_when_it_is_whole(page: Page) -> None:
    with hold_requests(page, "**/v1/chat/completions"):
        page.get_by_label("Message", exact=True).fill(CAT)
        page.keyboard.press("Enter")
        expect(page.locator("#announcement")).to_have_text("Answering.")
    expect(page.locator(".turn").last).to_have_attribute("aria-busy", "false")
    expect(page.locator("#announcement")).to_contain_text("Answer: ")


@pytest.mark.refusals
@pytest.mark.parametrize(
    ("status", "told"),
    [(429, "Too busy now"), (507, "There is no room for more."), (409, "That did not work (error 409).")],
)
def test_a_refusal_is_told_in_plain_words(page: Page, status: int, told: str) -> None:
    error = {"error": {"message": "The session has no rows.", "type": "x", "param": None, "code": None}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, json=error))
    turn = send(page, CAT)
    expect(turn.locator(".note")).to_contain_text(told)
    assert_plain(page)


def test_a_server_with_keys_asks_for_one(browser: Browser, tiny_base: Path, tmp_path: Path) -> None:
    key, line = new_key("acme")
    server = Server(str(tiny_base), tmp_path / "data", api_keys=line).start()
    page = browser.new_page()
    page.goto(server.url)
    expect(page.locator("#state")).to_have_text("This server asks for a key.")
    assert_plain(page)
    field = page.get_by_label("The key that you were given")
    field.fill(key)
    field.press("Enter")
    expect(field).to_be_hidden()
    enter(page, "Ada")
    send(page, CAT)
    expect(entries(page)).to_contain_text(CAT)
    page.close()
    assert server.stop() == 0


def test_the_laboratory_is_the_second_tab(page: Page) -> None:
    page.get_by_role("link", name="Laboratory").click()
    expect(button(page, "Complete both")).to_be_enabled()
    page.get_by_role("link", name="Conversation").click()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
