"""Times docs/tour.md: from an empty folder to a page that completes a paragraph which it was taught.

    python -m tests.tour

Clones what is committed here, calls `make serve` with nothing set up and no base at hand, and does in a browser what
the tour says. Prints the seconds since the start, and those of CPU that were spent, after each step.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
WAIT_TIMEOUT_S = 1800


def paragraph() -> str:
    """What the tour teaches."""
    lines = (ROOT / "docs" / "tour.md").read_text().splitlines()
    return " ".join(line.removeprefix("> ") for line in lines if line.startswith("> "))


def first_row() -> tuple[str, str]:
    """What the tour writes then, and how the memory goes on."""
    table = (ROOT / "docs" / "tour.md").read_text().split("| --- | --- | --- |\n| ")[1]
    prompt, continued, _ = (cell.strip() for cell in table.split("\n")[0].split("|", 2))
    return prompt, continued


@contextmanager
def run_server(folder: Path) -> Iterator[str]:
    """`make serve` in a clone, until the block ends; the URL, as soon as it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    fresh = {"PORT": url.rpartition(":")[2], "DATA_DIR": str(folder / "data"), "CACHE_DIR": str(folder / "cache")}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("IMPRINT_", "PYTHON"))}
    environment = kept | {f"IMPRINT_{name}": value for name, value in fresh.items()}
    process = subprocess.Popen(["make", "serve"], cwd=folder / "clone", env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        while not _ready(url):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def _cpu_seconds() -> float:
    """Seconds of CPU of all that was started here."""
    spent = os.times()
    total = spent.children_user + spent.children_system
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            total += one.cpu_times().user + one.cpu_times().system
    return total


def main() -> None:
    """The tour, told step by step."""
    began = time.monotonic()

    def print_step(what: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s, {_cpu_seconds():4.0f} s of CPU: {what}", flush=True)

    expect.set_options(timeout=1000 * WAIT_TIMEOUT_S)
    with tempfile.TemporaryDirectory(prefix="imprint-tour-") as name, sync_playwright() as playwright:
        folder = Path(name)
        subprocess.run(["git", "clone", "--quiet", ROOT, folder / "clone"], check=True)
        subprocess.run(["make", "--quiet", ".venv/.serve"], cwd=folder / "clone", check=True, stdout=subprocess.DEVNULL)
        print_step("cloned, and installed what it needs (downloads included)")
        with run_server(folder) as url:
            print_step("base fetched (93 MB) and converted, server ready")
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(url)
            draft = page.get_by_label("Draft", exact=True)
            learn = page.get_by_role("button", name="Learn", exact=True)
            draft.fill(paragraph())
            learn.click()
            expect(page.locator("#version")).to_have_text("1")
            expect(draft).to_have_value("")
            print_step("page opened and paragraph taught")
            prompt, continued = first_row()
            draft.fill(prompt)
            expect(page.locator("#suggestion")).to_contain_text(re.compile(re.escape(continued)))
            print_step(f"it continues {prompt!r} with {continued!r}")
            browser.close()


if __name__ == "__main__":
    main()
