"""The on-disk cache of kernels sees every change in what a kernel is compiled from, and changes no result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import model.numba_cache
from model.numba_cache import kernel_digest

INNER = """
import numpy as np
from model.numba_support import cached_njit

@cached_njit
def add(x):
    return x + {added}

@cached_njit
def softmax(row):
    total = np.float32(0.0)
    for s in range(len(row)):
        row[s] = np.exp(row[s])
        total += row[s]
    for s in range(len(row)):
        row[s] /= total
"""
CONSTANTS = "FACTOR = {factor}"
# The outer kernel calls kernels of another module, one through a name and one through the module.
OUTER = """
import numpy as np
from kernels import inner
from kernels.constants import FACTOR
from kernels.inner import add
from model.numba_support import cached_njit

@cached_njit
def outer(rows):
    for b in range(len(rows)):
        inner.softmax(rows[b, :len(rows[b]) - b])
    return FACTOR * add(rows.shape[0])

rows = np.random.default_rng(0).normal(size=(2, 67)).astype(np.float32)
print(outer(rows), sum(outer.stats.cache_hits.values()), rows.tobytes().hex())
"""


class Kernels:
    """A package of kernels in a folder of its own, which a new process runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "kernels"
        self.folder.mkdir()
        self.write(added=1, factor=10)

    def write(self, *, added: int, factor: int) -> None:
        for name, text in (
            ("inner", INNER.format(added=added)),
            ("constants", CONSTANTS.format(factor=factor)),
            ("outer", OUTER),
            ("__init__", ""),
        ):
            (self.folder / f"{name}.py").write_text(text)

    def run(self) -> tuple[int, int, str]:
        """Return what the outer kernel returns, how often it was found in the cache, and what it has written."""
        root = Path(model.numba_cache.__file__).parents[1]
        environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
        environment |= {"PYTHONPATH": os.pathsep.join([str(self.folder.parent), str(root)]), "PYTHONHASHSEED": "random"}
        command = [sys.executable, "-B", "-c", "import kernels.outer"]
        completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        result, hits, written = completed.stdout.split()
        return int(result), int(hits), written

    def cache_files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "__pycache__").glob("outer.outer*"))


@pytest.fixture
def kernels(tmp_path: Path) -> Kernels:
    return Kernels(tmp_path)


def test_changes_of_inlined_kernels_and_constants_are_seen_and_leave_no_files_behind(kernels: Kernels) -> None:
    result, hits, written = kernels.run()
    assert (result, hits) == (30, 0)
    files = kernels.cache_files()
    assert len(files) == 2  # an index and machine code
    (kernels.folder / "outer.py").touch()  # an installation or a checkout sets a new time
    assert kernels.run() == (30, 1, written), "a cached kernel computes the same bits as a compiled one"
    kernels.write(added=2, factor=100)
    assert kernels.run()[:2] == (400, 0)
    assert kernels.cache_files() == files


def test_a_kernel_runs_where_no_directory_can_be_written(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    (kernels.folder / "__pycache__").touch()  # a file, where a directory is needed
    home = kernels.folder / "__pycache__"
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(home))
    assert kernels.run()[:2] == (30, 0)
    assert home.is_file()


def module(source: str) -> ModuleType:
    loaded = ModuleType("loaded")
    exec(source, loaded.__dict__)
    return loaded


@pytest.mark.parametrize(
    ("source", "same"),
    [
        ("N = 3\ndef g(x): return x + N\ndef f(x):\n    return g(x)", True),
        ("N = 4\ndef g(x): return x + N\ndef f(x): return g(x)", False),
        ("N = 3.0\ndef g(x): return x + N\ndef f(x): return g(x)", False),
        ("N = 3\ndef g(x): return x - N\ndef f(x): return g(x)", False),
        ("N = 3\ndef g(x): return x + N\ndef f(x): return g(x) + 1", False),
        ("N = 3\ndef g(x): return x + N\ndef h(x): return 0\ndef f(x): return g(x)", True),
        ("N = 3\ndef g(x): return x + N\ndef f(x, y=1): return g(x)", False),
    ],
)
def test_a_digest_changes_with_what_is_compiled_and_with_nothing_else(source: str, same: bool) -> None:
    plain = module("N = 3\ndef g(x): return x + N\ndef f(x): return g(x)")
    assert (kernel_digest(module(source).f, {}) == kernel_digest(plain.f, {})) is same


def test_a_digest_contains_options_and_the_values_of_arrays() -> None:
    loaded = module("def f(i): return TABLE[i]")
    digests = set()
    for table in (np.zeros(5000, np.float32), np.zeros(5000), np.eye(100)[0], (1, 2), (1.0, 2), frozenset("ab")):
        loaded.__dict__["TABLE"] = table
        digests |= {kernel_digest(loaded.f, {"fastmath": flags}) for flags in ({"nnan"}, {"nsz"})}
    assert len(digests) == 12
