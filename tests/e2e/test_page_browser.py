"""The page at `/` in a real browser: what it does, what it says, and that it keeps to its own host."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from model.config import tiny_config
from service.tenants import new_key
from tests.conftest import Server
from tests.live import ENDLESS
from tests.tiny import TEXT, build_tiny_base

pytestmark = pytest.mark.e2e

CONTEXT = 8192
PATIENCE_MS = 60_000
REFUSED = "Failed to load resource"  # how the browser itself reports a 4xx


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a tiny base whose requests can take long."""
    base = build_tiny_base(tmp_path_factory.mktemp("base") / "long", tiny_config(max_context=CONTEXT))
    running = Server(str(base), tmp_path_factory.mktemp("page") / "data").start()
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("chromium is not installed")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])


@pytest.fixture
def faults() -> list[str]:
    """What the browser complained about."""
    return []


@pytest.fixture
def page(browser: Browser, server: Server, faults: list[str]) -> Iterator[Page]:
    """The page of a ready server, for somebody who has never been here; it must end without faults."""
    page = browser.new_page()
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(server.url)
    expect(button(page, "Teach")).to_be_enabled()
    expect(page.get_by_label("API key")).to_be_hidden()
    yield page
    page.close()
    assert not faults
    assert all(url.startswith(f"{server.url}/") for url in requests)


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def note(page: Page, form: str) -> Locator:
    return page.locator(f"#{form} .note")


def choose(page: Page, session: str) -> None:
    name = page.get_by_label("Name of the session")
    name.fill(session)
    name.blur()


def teach(page: Page, text: str) -> None:
    page.get_by_label("Text to learn").fill(text)
    button(page, "Teach").click()


def complete(page: Page, prompt: str, tokens: int) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Tokens", exact=True).fill(str(tokens))
    button(page, "Complete").click()


def test_teach_complete_and_score(page: Page, server: Server) -> None:
    choose(page, "ada")
    expect(page.locator("#version")).to_have_text("new")
    teach(page, TEXT * 3)
    expect(note(page, "teach")).to_contain_text("version 1.")
    expect(page.get_by_label("Text to learn")).to_have_value("")
    expect(page.locator("#version")).to_have_text("1")
    facts = httpx.get(f"{server.url}/v1/sessions/ada").json()
    expect(page.locator("#tokens-learned")).to_have_text(str(facts["tokens_learned"]))
    expect(page.locator("#rows")).to_have_text(f"{facts['rows']:,}")
    expect(note(page, "teach")).to_contain_text(f"learned {facts['tokens_learned']} tokens")

    body = {"model": server.model, "prompt": TEXT[:60], "max_tokens": 12, "temperature": 0}
    said = {
        "adapted": httpx.post(f"{server.url}/v1/completions", json=body | {"session": "ada", "adapt": "predict"}),
        "frozen": httpx.post(f"{server.url}/v1/completions", json=body),
    }
    complete(page, TEXT[:60], 12)
    expect(note(page, "complete")).to_have_text("ada learned nothing; version 1.")
    for place, response in said.items():
        text = page.locator(f"#{place}")
        expect(text).to_have_attribute("aria-busy", "false")
        assert text.text_content() == TEXT[:60] + response.json()["choices"][0]["text"]

    page.get_by_label("Learn the prompt").check()
    complete(page, TEXT[:60], 1)
    expect(note(page, "complete")).to_contain_text("version 2.")
    expect(page.locator("#version")).to_have_text("2")

    sample = TEXT[:90] + "\nNaïve 😀😃 日本 <b>bold</b>"
    page.get_by_label("Text to predict").fill(sample)
    button(page, "Score").click()
    expect(note(page, "score")).to_contain_text("Perplexity")
    assert page.locator("#tokens").text_content() == sample
    assert page.locator("#tokens .better").count() > 5
    page.locator("#tokens span").first.focus()
    page.keyboard.press("ArrowRight")
    second = page.locator("#tokens span").nth(1)
    expect(second).to_be_focused()
    expect(page.locator("#token")).to_have_text(second.get_attribute("title") or "")
    expect(page.locator("#version")).to_have_text("2")


def test_the_session_is_remembered(page: Page) -> None:
    choose(page, "bo")
    page.reload()
    expect(page.get_by_label("Name of the session")).to_have_value("bo")


def test_a_long_lesson_comes_in_pieces_and_can_be_stopped(page: Page, server: Server) -> None:
    piece = TEXT * 15 + "\n\n"
    lesson = piece * 100
    choose(page, "cy")
    teach(page, lesson)
    expect(note(page, "teach")).to_contain_text("of 100 pieces")
    expect(page.get_by_role("progressbar")).to_be_visible()
    page.locator("#teach button").click()
    expect(note(page, "teach")).to_contain_text("Stopped. cy learned")
    expect(button(page, "Teach")).to_be_enabled()
    rest = page.get_by_label("Text to learn").input_value()
    learned = httpx.get(f"{server.url}/v1/sessions/cy").json()["version"]
    assert 0 < learned < 100
    assert rest in (piece * (100 - learned), piece * (101 - learned))  # the last answer may have been on its way
    expect(page.locator("#version")).to_have_text(str(learned))


def test_a_completion_can_be_stopped(page: Page, server: Server) -> None:
    def unending(route: Route) -> None:
        asked = json.loads(route.request.post_data or "")
        route.continue_(post_data=json.dumps(asked | {"logit_bias": ENDLESS}))

    page.route("**/v1/completions", unending)
    choose(page, "di")
    page.get_by_label("Learn the prompt").check()
    complete(page, "The fox", CONTEXT - 100)
    expect(page.locator("#adapted")).to_have_text(re.compile("The fox.+", re.DOTALL))
    expect(page.locator("#frozen")).to_have_text(re.compile("The fox.+", re.DOTALL))
    button(page, "Stop").click()
    expect(note(page, "complete")).to_have_text("Stopped.")
    expect(button(page, "Complete")).to_be_enabled()
    expect(page.locator("#version")).to_have_text("new")
    assert httpx.get(f"{server.url}/v1/sessions/di").status_code == 404


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "é", "a" * 129])
def test_a_bad_session_name_is_explained_and_never_sent(page: Page, name: str) -> None:
    choose(page, name)
    expect(page.get_by_role("alert")).to_contain_text("1 to 128 letters, digits or")
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    teach(page, "A lesson.")
    expect(page.get_by_label("Name of the session")).to_be_focused()
    assert not sent
    choose(page, "a.b-c")
    expect(page.get_by_role("alert")).to_have_text("")


def test_a_refusal_is_told_in_the_servers_words(page: Page, server: Server, faults: list[str]) -> None:
    complete(page, "The fox", CONTEXT + 1)
    expect(note(page, "complete")).to_have_text(
        f"'max_tokens' exceeds the context of {CONTEXT} tokens, got {CONTEXT + 1}."
    )
    expect(button(page, "Complete")).to_be_enabled()
    assert all(fault.startswith(REFUSED) for fault in faults)
    faults.clear()


def test_while_the_server_loads_the_page_says_so_and_goes_on_by_itself(page: Page, faults: list[str]) -> None:
    page.route("**/readyz", lambda route: route.fulfill(status=503, json={"status": "loading"}))
    page.reload()
    expect(page.locator("#state")).to_contain_text("The server is loading the model.")
    expect(button(page, "Teach")).to_be_disabled()
    page.unroute("**/readyz")
    expect(page.locator("#state")).to_have_text("")
    expect(button(page, "Teach")).to_be_enabled()
    assert all(fault.startswith(REFUSED) for fault in faults)
    faults.clear()


@pytest.mark.parametrize("width", [320, 1200])
def test_nothing_sticks_out(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_page_asks_for_a_key_where_the_server_does(browser: Browser, tiny_base: Path, tmp_path: Path) -> None:
    key, line = new_key("acme")
    server = Server(str(tiny_base), tmp_path / "data", api_keys=line).start()
    page = browser.new_page()
    asked = page.get_by_label("API key")
    page.goto(server.url)
    expect(page.locator("#state")).to_contain_text("An API key is required")
    asked.fill("wrong")
    asked.blur()
    expect(page.locator("#state")).to_contain_text("not known")
    asked.fill(key)
    asked.blur()
    expect(asked).to_be_hidden()
    teach(page, TEXT)
    expect(page.locator("#version")).to_have_text("1")
    page.reload()
    expect(page.locator("#version")).to_have_text("1")
    page.close()
    assert server.stop() == 0
