"""The documentation is correct: the site builds, its examples run, its commands exist, its recipes work unchanged."""

from __future__ import annotations

import json
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
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
SERVED = "http://127.0.0.1:8000"
RECIPES = ["openai_client", "ollama_client", "anthropic_client", "langchain_chat", "python_client", "python_async"]


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
    pages = {str(page.relative_to(tmp_path)): page.read_text() for page in tmp_path.rglob("*.html")}
    written = {str(page.relative_to(DOCS).with_suffix(".html")) for page in PAGES[1:]}
    assert {name.replace("README.html", "index.html") for name in written} <= pages.keys()
    external = (
        r"<(?:script|img|iframe)[^>]* src=\"(?:https?:)?//|<link[^>]* rel=\"(?!canonical)[^>]* href=\"(?:https?:)?//"
    )
    assert not [name for name, page in pages.items() if re.search(external, page)]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [page.name for page in PAGES[1:] if str(page.relative_to(DOCS)) not in navigation]


def test_the_links_of_the_readme_lead_somewhere() -> None:
    """`mkdocs build --strict` checks the links of the other pages."""
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[0].read_text())
    assert len(links) > 20
    for link in links:
        name, _, anchor = link.partition("#")
        headings = re.findall(r"^#+ (.+)$", (ROOT / name).read_text(), flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, link


def test_the_readme_says_first_when_to_use_it_and_when_not_without_jargon() -> None:
    first_screen = PAGES[0].read_text().partition("## Two commands")[0]
    assert "**Use Imprint when**" in first_screen and "**Do not use it when**" in first_screen
    assert not re.findall(r"\b(nats|rows|cells|slow weights|fast weights)\b", first_screen)


def test_no_row_of_a_table_is_cut() -> None:
    for page in PAGES:
        rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
        assert not [row for row in rows if not row.rstrip().endswith("|")], page.name


@pytest.mark.parametrize("name", ["results", "performance"])
def test_a_page_of_results_is_an_answer_a_table_and_a_plot(name: str) -> None:
    text = (DOCS / f"{name}.md").read_text()
    assert len(text.splitlines()) <= 60
    assert len(re.findall(r"^\| ---", text, flags=re.MULTILINE)) == text.count("![") == 1


def test_every_law_names_tests_that_exist() -> None:
    text = (DOCS / "laws.md").read_text()
    assert re.findall(r"^## (\d+)\. ", text, flags=re.MULTILINE) == [str(number) for number in range(1, 16)]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", "".join(page.read_text() for page in PAGES))
    assert len(named) > 100
    missing = []
    for file, test in named:
        path = ROOT / file
        if not path.exists() or not re.search(rf"^(?:async )?def {test}\(", path.read_text(), flags=re.MULTILINE):
            missing.append(f"{file}::{test}")
    assert not missing


def test_every_decision_has_a_date_and_a_status() -> None:
    dated = r".+\n20\d\d-\d\d-\d\d · (accepted|superseded)\b"
    pages = {page.name: page.read_text().split("\n## ")[1:] for page in (DOCS / "decisions").glob("*.md")}
    topics = {
        name: decisions for name, decisions in pages.items() if any(re.match(dated, decision) for decision in decisions)
    }
    assert len(topics) > 10
    assert not [
        (name, decision[:80])
        for name, decisions in topics.items()
        for decision in decisions
        if not re.match(dated, decision)
    ]


def test_every_alert_has_a_line_for_those_on_call() -> None:
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    assert set(alerts) == set(re.findall(r"^\| `(Imprint\w+)`", (DOCS / "operate.md").read_text(), flags=re.MULTILINE))


def test_every_decision_names_its_evidence() -> None:
    """The evidence may say that there is no measurement, and why."""
    for page in (DOCS / "decisions").glob("*.md"):
        decisions = page.read_text().split("\n## ")[1:]
        assert not [decision[:80] for decision in decisions if "\n*Evidence:* " not in decision], page.name


@pytest.fixture
def at_the_server(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """Point environment and working folder to the server, its model, and short examples of files."""
    monkeypatch.setenv("IMPRINT_URL", server.url)
    monkeypatch.setenv("MODEL", server.model)
    (tmp_path / "examples").mkdir()
    for text in (ROOT / "examples").glob("*.txt"):
        (tmp_path / "examples" / text.name).write_text(text.read_text()[:300])
    (tmp_path / "wine.csv").write_text("alcohol,cultivar\n" + "13.2,a\n12.1,b\n" * 5)
    line = {"context": {"hour": 8}, "reward": 1, "propensity": 0.5}
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(line | {"action": action}) for action in "abab"))
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
        if words[0] not in ("serve", "fit", "train", "eval", "doctor"):
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
