"""Helpers for tests of the page in a real browser: they find its parts and act as a reader does."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import httpx
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, Route, expect

from tests.conftest import Server
from tests.live import Json

WAIT_TIMEOUT_MS = 300_000
LOOK_MS = 600  # longer than the page waits before it sends a request about the written text
REFUSED = "Failed to load resource"  # the browser's own message about a 4xx


class OpenPage(Protocol):
    """A function that opens a page of a server."""

    def __call__(self, url: str, face: str = "laboratory") -> Page: ...


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def note(page: Page, form: str) -> Locator:
    return page.locator(f"#{form} > .note")


def choose(page: Page, session: str) -> None:
    name = page.get_by_label("Session", exact=True)
    name.fill(session)
    name.blur()


def draft(page: Page) -> Locator:
    return page.get_by_label("Draft", exact=True)


def learn(page: Page, text: str) -> None:
    draft(page).fill(text)
    button(page, "Learn").click()


def wait_for_version(page: Page, version: int) -> None:
    """Wait until the page shows the version and is idle."""
    expect(page.locator("#version")).to_have_text(str(version))
    expect(button(page, "Learn")).to_be_visible()
    expect(page.locator("#versions")).to_contain_text(str(version))


def losses(page: Page, version: int) -> tuple[float, float]:
    """Return the frozen and the adapted loss of the learned text, once the page shows those of this version."""
    caption = page.locator("#curve-text")
    expect(caption).to_contain_text(f"with version {version}:")
    frozen, adapted = re.findall(r"(\d+\.\d\d)(?: nats a token| with version)", caption.text_content() or "")
    return float(frozen), float(adapted)


@contextmanager
def hold_requests(page: Page, pattern: str) -> Iterator[None]:
    """Delay the requests that match the pattern until the block ends."""
    delayed: list[Route] = []
    finished = False

    def hold(route: Route) -> None:
        if finished:
            route.continue_()
        else:
            delayed.append(route)

    page.route(pattern, hold)
    yield
    finished = True
    for route in delayed:
        route.continue_()


def get(server: Server, path: str) -> Json:
    answer: Json = httpx.get(f"{server.url}/v1/sessions/{path}").json()
    return answer


def assert_accessible(page: Page) -> None:
    """Assert that axe-core finds no serious violation of the accessibility rules."""
    violations = [
        (violation["id"], violation["impact"], [node["html"][:200] for node in violation["nodes"][:3]])
        for violation in Axe().run(page).response["violations"]
    ]
    assert not [rule for rule, impact, _ in violations if impact in ("serious", "critical")], violations


def shoot(page: Page, name: str, *, whole: bool = False) -> None:
    """Save a screenshot if IMPRINT_SHOTS names a folder."""
    if folder := os.environ.get("IMPRINT_SHOTS"):
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=whole)
