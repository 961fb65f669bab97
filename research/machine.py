"""The description of the machine and of the code that a result was made with."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch


def processor() -> str:
    """Return the name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware() -> str:
    """Return the number and name of the GPUs, or the CPU with its cores and torch's threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def code_version() -> str:
    """Return the commit of a checkout, marked if files differ from the commit; else the version of the package."""
    root = Path(__file__).parents[1]
    git = shutil.which("git")
    if git is not None and (root / ".git").exists():
        commands = [[git, "-C", str(root), *words] for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])]
        done = [subprocess.run(command, capture_output=True, text=True) for command in commands]
        if not any(completed.returncode for completed in done):
            return done[0].stdout.strip() + (" with changes" if done[1].stdout.strip() else "")
    return metadata.version("imprint")
