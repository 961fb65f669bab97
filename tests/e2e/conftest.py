"""Fixtures of the tests in a real browser. There must be no warning or error, and no request to another host."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser import REFUSED, WAIT_TIMEOUT_MS, OpenPage, button
from tests.conftest import Server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("chromium is not installed")
    expect.set_options(timeout=WAIT_TIMEOUT_MS)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture
def open_page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[OpenPage]:
    """Yield a function that opens a server's laboratory, or its conversation, in a fresh browser context.

    At the end there must be no warning or error, and no request to another host. A test with the mark `refusals`
    provokes requests that fail: the browser may tell of them, at any time.
    """
    pages: list[tuple[str, Page, list[str]]] = []
    faults: list[str] = []  # the browser's warnings and errors

    def open_url(url: str, face: str = "laboratory") -> Page:
        page, requests = browser.new_page(), list[str]()
        page.on(
            "console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda sent: requests.append(sent.url))
        pages.append((url, page, requests))
        page.goto(f"{url}/{face}")
        expect(page.locator("#model") if face else page.locator("#state")).not_to_have_text(re.compile("…"))
        return page

    yield open_url
    for url, page, requests in pages:
        page.close()
        assert requests and all(sent.startswith(f"{url}/") for sent in requests)
    may_be_refused = request.node.get_closest_marker("refusals") is not None
    assert not [fault for fault in faults if not (may_be_refused and fault.startswith(REFUSED))]


@pytest.fixture
def page(open_page: OpenPage, server: Server) -> Page:
    page = open_page(server.url)
    expect(button(page, "Complete both")).to_be_enabled()
    expect(page.get_by_label("API key")).to_be_hidden()
    return page
