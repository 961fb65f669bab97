"""The room on the disk of the embedded store. The module decides nothing; `service.store.embedded` does."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

RESERVE_BYTES = 64 * 2**20  # free space below which nothing more is learned
RESERVE_SHARE = 0.05  # of the disk, for disks so small that RESERVE_BYTES would be most of the disk
PROBE_BYTES = 2**20


def lacks_reserve(folder: Path, *, factor: float = 1.0) -> bool:
    """Return whether less than `factor` times the reserve is free on the folder's disk."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return False
    free_blocks = disk.f_bfree if os.geteuid() == 0 else disk.f_bavail
    reserve = min(RESERVE_BYTES, RESERVE_SHARE * disk.f_blocks * disk.f_frsize)
    return free_blocks * disk.f_frsize < factor * reserve


def takes_writes(folder: Path, offset: int) -> bool:
    """Return whether a file on the folder's disk can be written from `offset` bytes on.

    The file is sparse: it takes `PROBE_BYTES` on the disk, and meets the limits of quotas and file sizes that free
    space does not show. `offset` is the size of the file that is to grow.
    """
    path = folder / ".probe"
    try:
        with path.open("wb", buffering=0) as probe:
            written = os.pwrite(probe.fileno(), bytes(PROBE_BYTES), offset)
            os.fsync(probe.fileno())
        return written == PROBE_BYTES
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
