"""A timed run of docs/tour.md, from an empty folder to a page that completes a paragraph it was taught.

    python -m tests.tour

The script clones the repository at its last commit, calls `make serve` there without any cached base, and follows the
tour in a browser. After each step it prints the seconds since the start and the CPU seconds spent.
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
    """Return the paragraph that the tour teaches."""
    lines = (ROOT / "docs" / "tour.md").read_text().splitlines()
    return " ".join(line.removeprefix("> ") for line in lines if line.startswith("> "))


def first_row() -> tuple[str, str]:
    """Return the first prompt of the tour's table, and its continuation with the memory."""
    table = (ROOT / "docs" / "tour.md").read_text().split("| --- | --- | --- |\n| ")[1]
    prompt, continuation, _ = (cell.strip() for cell in table.split("\n")[0].split("|", 2))
    return prompt, continuation


@contextmanager
def run_server(folder: Path) -> Iterator[str]:
    """Run `make serve` in the clone during the block; yield the server's URL once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    settings = {"PORT": url.rpartition(":")[2], "DATA_DIR": str(folder / "data"), "CACHE_DIR": str(folder / "cache")}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("IMPRINT_", "PYTHON"))}
    environment = inherited | {f"IMPRINT_{name}": value for name, value in settings.items()}
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
    """Return the CPU seconds of all processes started by this script."""
    spent = os.times()
    total = spent.children_user + spent.children_system
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            total += process.cpu_times().user + process.cpu_times().system
    return total


def main() -> None:
    """Follow the tour and print the times of its steps."""
    began = time.monotonic()

    def print_step(step: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s, {_cpu_seconds():4.0f} s of CPU: {step}", flush=True)

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
            page.goto(f"{url}/laboratory")
            draft = page.get_by_label("Draft", exact=True)
            learn = page.get_by_role("button", name="Learn", exact=True)
            draft.fill(paragraph())
            learn.click()
            expect(page.locator("#version")).to_have_text("1")
            expect(draft).to_have_value("")
            print_step("page opened and paragraph taught")
            prompt, continuation = first_row()
            draft.fill(prompt)
            expect(page.locator("#suggestion")).to_contain_text(re.compile(re.escape(continuation)))
            print_step(f"it continues {prompt!r} with {continuation!r}")
            browser.close()


if __name__ == "__main__":
    main()
