"""The result cache on disk, with which a killed run resumes, and the hashes that key the cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import model
from model import weights


class ResultCache:
    """A folder of results. The name of each file is the hash of everything that the result depends on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, key: str) -> tuple[dict[str, Tensor], Any] | None:
        """Return the tensors and the note of a key; None if the file is missing, damaged or of another version."""
        path = self._folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            metadata, tensors = weights.read(path)
            return tensors, json.loads(metadata["note"])
        except (SafetensorError, KeyError, ValueError):
            return None

    def save(self, key: str, tensors: dict[str, Tensor], note: Any) -> None:
        """Write tensors and a JSON value atomically."""
        path = self._folder / f"{key}.safetensors"
        part = path.with_suffix(".part")
        save_file({name: t.contiguous() for name, t in tensors.items()}, part, metadata={"note": json.dumps(note)})
        part.replace(path)


def content_hash(*parts: object) -> str:
    """Return the hash of values that JSON can hold; other values count by their `str()`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def code_hash(device: torch.device, *files: str) -> str:
    """Return the hash of the code that computes a result.

    The hash covers every source file of `model/`, torch's version, the device, and the given files of this package
    (such as "evaluation/arms.py").
    """
    digest = hashlib.sha256(f"{torch.__version__} {device}".encode())
    package = Path(__file__).parent
    for file in [*sorted(Path(model.__file__).parent.rglob("*.py")), *(package / name for name in files)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()
