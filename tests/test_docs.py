"""The documentation is correct: the site builds, its examples run, its commands exist, its recipes work unchanged."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from service.cli import main
from tests.conftest import Server
from tests.tiny import TEXT

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SERVED = "http://127.0.0.1:8000"
RECIPES = ["openai_client", "langchain_chat", "python_client", "python_async"]


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language in a page. (The recipes include files instead.)"""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each `imprint …` that a page shows, in a block or in a line."""
    text = page.read_text()
    lines = re.findall(r"^(?:\$ |    )(?:\w+=\S+ )*imprint (.+)$", text, flags=re.MULTILINE)
    lines += re.findall(r"`imprint ([^`]+)`", text)
    for line in lines:
        words = shlex.split(line.partition("  # ")[0].partition(" >> ")[0], comments=True)
        yield [word for word in words if word not in ("…", "--help")]


def known(command: Any, words: list[str]) -> bool:
    """Return whether the command has these subcommands and options."""
    if subcommands := getattr(command, "commands", None):
        return not words or (words[0] in subcommands and known(subcommands[words[0]], words[1:]))
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return {word for word in words if word.startswith("--")} <= options


def test_every_command_that_is_shown_exists() -> None:
    shown = [(page.name, words) for page in PAGES for words in commands(page)]
    assert len(shown) > 20
    entry = typer.main.get_command(main.app)
    assert not [(page, words) for page, words in shown if not known(entry, words)]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"^make (\w+)|`make (\w+)`", page.read_text())) <= {("", name) for name in targets}


def test_every_extra_that_is_named_can_be_installed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [
        *PAGES,
        *(ROOT / "service").rglob("*.py"),
        *(ROOT / "research").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
        ROOT / "pyproject.toml",
    ]
    named = {name for file in sources for name in re.findall(r"(?:imprint|'\.)\[([\w,]+)\]", file.read_text())}
    assert {name for names in named for name in names.split(",")} <= extras.keys()
    assert extras.keys() - {"test"} <= {name for names in named for name in names.split(",")}


def test_the_site_builds_without_a_warning_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    pages = {page.name: page.read_text() for page in tmp_path.glob("*.html")}
    assert {page.with_suffix(".html").name for page in PAGES[1:]} <= pages.keys()
    external = (
        r"<(?:script|img|iframe)[^>]* src=\"(?:https?:)?//|<link[^>]* rel=\"(?!canonical)[^>]* href=\"(?:https?:)?//"
    )
    assert not [name for name, page in pages.items() if re.search(external, page)]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [page.name for page in PAGES[1:] if page.name not in navigation]


@pytest.fixture
def at_the_server(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """Point environment and working folder to the server, its model and shortened example texts."""
    monkeypatch.setenv("IMPRINT_URL", server.url)
    monkeypatch.setenv("MODEL", server.model)
    (tmp_path / "examples").mkdir()
    for text in (ROOT / "examples").glob("*.txt"):
        (tmp_path / "examples" / text.name).write_text(text.read_text()[:300])
    monkeypatch.chdir(tmp_path)
    return server


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, at_the_server: Server) -> None:
    """Run all blocks of a page in order, with a session `ada` that has learned before."""
    from imprint import Client

    with Client(at_the_server.url) as client:
        client.observe("ada", TEXT[:60])
        code = "\n".join(blocks(page, "python"))
        code = code.replace(SERVED, at_the_server.url).replace("smollm2-135m-instruct", at_the_server.model)
        exec(compile(code, page.name, "exec"), {})
        client.delete("ada")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "console")], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, at_the_server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for line in re.findall(r"^\$ imprint (.+)$", "\n".join(blocks(page, "console")), flags=re.MULTILINE):
        words = shlex.split(line.partition(" >> ")[0])
        if words[0] not in ("serve", "train", "eval", "doctor"):
            limits = ["--max-tokens", "8"] if words[0] == "chat" else []
            main.app([*words, *limits], standalone_mode=False)
            assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs(recipe: str, at_the_server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / f"{recipe}.py"), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_recipe_for_curl_runs(at_the_server: Server) -> None:
    run = subprocess.run(["sh", str(ROOT / "examples" / "curl.sh")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    learned, *stream, shown, rolled_back, erased = [line for line in run.stdout.splitlines() if line]
    assert '"version":1' in learned and '"version":1' in shown and '"deleted":true' in erased
    assert stream[-1] == "data: [DONE]" and '"version":2' in rolled_back and '"rows":0' in rolled_back
