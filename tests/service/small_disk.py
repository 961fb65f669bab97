"""A file system in memory that a test can fill."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """Mount an empty file system in memory on the folder. Raises CalledProcessError if the machine does not let us."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@cache
def can_mount() -> bool:
    """Return whether this process may mount file systems."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    try:
        with tempfile.TemporaryDirectory() as name, mounted(Path(name)):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def fill(folder: Path) -> Path:
    """Fill the disk of the folder to the last byte, and return the file that fills it."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as filler:
        for size in (2**20, 2**12):
            try:
                while True:
                    filler.write(bytes(size))
            except OSError:
                pass
    return path
