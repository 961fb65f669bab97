"""Starting child processes that end with this process, however this process ends, SIGKILL included.

On Linux the kernel sends the child a SIGTERM when its parent is gone (`PR_SET_PDEATHSIG`, prctl(2)). Other systems have
no such signal: there a child outlives a killed parent, and its user has to find the child (`service.store.embedded`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Runs in the child before the program, in an interpreter of its own: code between fork and exec in a process with
# threads may deadlock. The parent may have died before the prctl, hence the comparison. Python ignores SIGPIPE, and
# exec would keep SIGPIPE ignored. SIGXFSZ stays ignored: a file that may not grow is then an error of the write, and
# does not end the child.
LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.execvp(sys.argv[2], sys.argv[2:])
"""

# The kernel sends the signal when the thread ends that started the child, so one thread starts all children.
_SPAWNER = ThreadPoolExecutor(1, thread_name_prefix="imprint-spawn")


def spawn(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a child process that ends with this process; `options` are those of `subprocess.Popen`. Raises OSError."""

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(with_launcher(command), **options)

    return _SPAWNER.submit(start).result()


def with_launcher(command: Sequence[str]) -> list[str]:
    """Return the command with the launcher before it, or the command alone where the system has no such signal."""
    if sys.platform != "linux" or not sys.executable:
        return list(command)
    return [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), *command]
