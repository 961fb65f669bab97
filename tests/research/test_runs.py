"""The keys of the result cache: a result is reused only if the same code computed it on the same device."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import model
from research import runs
from research.runs import code_hash

CPU = torch.device("cpu")


@pytest.fixture
def model_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy `model/` to a folder that may be changed, and let the hash read the copy."""
    copy = tmp_path / "model"
    shutil.copytree(Path(model.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(model, "__file__", str(copy / "__init__.py"))
    return copy


def test_a_change_of_any_file_of_the_model_changes_the_code_hash(model_copy: Path) -> None:
    original = code_hash(CPU)
    assert code_hash(CPU) == original
    files = sorted(model_copy.rglob("*.py"))
    assert {model_copy / "memory" / "config.py", model_copy / "base" / "linear.py"} <= set(files)
    for file in files:
        text = file.read_text()
        file.write_text(text + "# changed\n")
        assert code_hash(CPU) != original, file.relative_to(model_copy)
        file.write_text(text)
    (model_copy / "memory" / "new_kernel.py").write_text("STEP = 1\n")
    assert code_hash(CPU) != original


def test_the_code_hash_depends_on_torch_and_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    original = code_hash(CPU)
    assert code_hash(torch.device("cuda", 0)) != original
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    assert code_hash(CPU) != original


def test_the_code_hash_depends_on_the_named_files_of_research_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    for name in ("named.py", "other.py"):
        (tmp_path / name).write_text("")
    original = code_hash(CPU, "named.py")
    (tmp_path / "other.py").write_text("CHANGED = True")
    assert code_hash(CPU, "named.py") == original
    (tmp_path / "named.py").write_text("CHANGED = True")
    assert code_hash(CPU, "named.py") != original
