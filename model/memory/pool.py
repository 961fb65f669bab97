"""The pool of fast weights on the device: the cells of all sessions, and a table cell → physical cell for each session.

Physical cell 0 is the empty cell and session 0 is the empty session, so a batch may mix sessions, empty sessions and
requests without a session. A turn writes to a `Draft`, which copies the cells that the turn touches before their first
write: a rollback drops the copies, and a commit stores the rows in them that changed.

Every site also has session scalars [3, R + 1] for each session: per number of n-gram matches, the online-learned offset
of the gate's logit (trust), and the balance and the state of the guard. They are stored like a site of one slot, named
`<site>_own`. The pool does not know the equations of a read; each kind's site does (`<kind>/site.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.device import copy_to_host, upload
from model.memory.backend import MemoryBackend, choose_backend
from model.memory.config import GATE_CLOSED, SESSION_SCALARS_SUFFIX, MemoryConfig, SiteConfig
from model.memory.lexical.types import NGRAM_SIZES
from model.memory.rows import SiteRows, as_bytes

CellIndices = NDArray[np.integer[Any]]  # cells or physical cells, on the host
CellMask = NDArray[np.bool_]  # [cells]
HOST = torch.device("cpu")


class PoolFullError(RuntimeError):
    """An error for too few free rows or sessions; nothing was changed."""


class FreeList:
    """The free indices of 1 … capacity: a stack of those that came back, then those that were never taken.

    When indices run short, `make_room` is called until it returns False.
    """

    def __init__(self, capacity: int, make_room: Callable[[], bool] = lambda: False) -> None:
        self._released = np.empty(capacity, np.int64)  # takes memory only where it is written
        self._top = self._num_taken = 0
        self._make_room = make_room

    def __len__(self) -> int:
        return self._top + len(self._released) - self._num_taken

    @property
    def utilization(self) -> float:
        """Return the share of the indices that is not free."""
        return 1.0 - len(self) / len(self._released)

    def allocate(self, n: int) -> CellIndices:
        """Take n free indices. Raise PoolFullError if there are fewer, changing nothing."""
        while n > len(self) and self._make_room():
            pass
        if n > len(self):
            raise PoolFullError(f"{n} needed, {len(self)} of {len(self._released)} free")
        num_again = min(n, self._top)
        self._top -= num_again
        new = np.arange(self._num_taken + 1, self._num_taken + 1 + n - num_again)
        self._num_taken += len(new)
        return np.concatenate([self._released[self._top : self._top + num_again], new])

    def release(self, indices: CellIndices) -> None:
        """Give indices back."""
        self._released[self._top : self._top + len(indices)] = indices
        self._top += len(indices)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of zeros; on a CPU it takes memory only where it is written, as NumPy's zeros do."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = dtype.itemsize * math.prod(shape)
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)


class SitePool:
    """The cells and tables of one site; a cell holds the rows of `config.cell` neighbouring slots.

    fields: each [physical cells, …], as the kind's `RowLayout` says. physical_cells: int32 [S + 1, cells], the tables
    on the host, which then need not be read from the device. tables: the same on the device. session_scalars:
    [S + 1, 3, R + 1]. row_counts: [S + 1], the rows that each session holds, apart from drafts. backend: the kernels
    that read and write the fields.
    """

    def __init__(
        self,
        config: SiteConfig,
        *,
        rows: int,
        sessions: int,
        device: torch.device,
        make_room: Callable[[], bool],
        backend: MemoryBackend,
    ) -> None:
        self.config, self.device, self.backend = config, device, backend
        cells = -(-rows // config.cell)
        self.free = FreeList(cells, make_room)
        self.fields = [_zeros((cells + 1, *shape), dtype, device) for shape, dtype in config.layout.cell_fields(config)]
        self.physical_cells = np.zeros((sessions + 1, config.cells), np.int32)
        self.tables = torch.from_numpy(self.physical_cells).to(device)  # on a CPU, the same memory
        self.session_scalars = torch.zeros(sessions + 1, 3, len(NGRAM_SIZES) + 1, device=device)
        self.row_counts = np.zeros(sessions + 1, np.int64)

    def read(self, session: Tensor, cells: Tensor) -> list[Tensor]:
        """Return each field [n, k, …] of cells [n, k] long of sessions [n] long."""
        physical_cells = self.tables[session[:, None], cells]
        return [field[physical_cells] for field in self.fields]

    def load_rows(self, session: int, batch: SiteRows) -> None:
        """Give stored rows to a session. Raise PoolFullError, changing nothing."""
        # NumPy is used because it stays single-threaded.
        cell, row = np.divmod(batch.slots.numpy().astype(np.int64), self.config.cell)
        begins = np.diff(cell, prepend=-1) != 0
        physical_cells = self.free.allocate(int(begins.sum()))
        self.backend.load_rows(
            [self._by_row(field) for field in self.fields],
            torch.from_numpy(physical_cells),
            torch.from_numpy(begins.cumsum() - 1),
            torch.from_numpy(row),
            batch.data,
        )
        self.physical_cells[session, cell[begins]] = physical_cells
        self.row_counts[session] = self.count_rows(physical_cells)
        self.sync_table(session)

    def sync_table(self, session: int) -> None:
        """Copy a session's table from the host to the device."""
        if self.tables.data_ptr() != self.physical_cells.ctypes.data:
            self.tables[session] = upload(self.physical_cells[session], self.device)

    def release(self, physical_cells: CellIndices) -> None:
        """Free physical cells, and leave nothing of the rows that they held."""
        if not len(physical_cells):
            return
        for field in self.fields:
            field[upload(physical_cells, self.device)] = 0
        self.free.release(physical_cells)

    def count_rows(self, physical_cells: CellIndices) -> int:
        """Return the number of rows in physical cells."""
        occupied, first = physical_cells[physical_cells > 0], self._by_row(self.fields[0])
        if self.device.type == "cpu":  # NumPy takes a third of the time of torch for so few rows
            return int(first.numpy()[occupied].any(-1).sum())
        return int((first[upload(occupied, self.device)] != 0).any(-1).sum())

    def changed_rows(self, session: int, base_index: int, cells: CellMask) -> SiteRows:
        """Return the rows of a session, in the cells of a mask, that differ from the rows of session `base_index`."""
        physical_cells = np.stack([self.physical_cells[session, cells], self.physical_cells[base_index, cells]])
        # The host compares: comparing on the GPU costs one more synchronisation.
        data, before = self._bytes(physical_cells)
        cell, row = (data != before).any(-1).nonzero()
        slots = cells.nonzero()[0][cell] * self.config.cell + row
        return SiteRows(torch.from_numpy(slots.astype(np.int32)), torch.from_numpy(data[cell, row]))

    def _by_row(self, field: Tensor) -> Tensor:
        """Return a field by cell and row, [physical cells, P, numbers of a row]."""
        return field.view(len(field), self.config.cell, -1)

    def _bytes(self, physical_cells: CellIndices) -> NDArray[np.uint8]:
        """Return the rows of physical cells [...] as uint8 [..., P, row_bytes] on the host."""
        if self.device.type == "cpu":
            by_row = (self._by_row(field).view(torch.uint8).numpy() for field in self.fields)
            return np.concatenate([rows[physical_cells] for rows in by_row], axis=-1)
        cells = upload(physical_cells, self.device)
        rows = torch.cat([as_bytes(self._by_row(field)[cells]) for field in self.fields], dim=-1)
        return copy_to_host(rows).numpy()


class Pool:
    """The pools of all sites, and the sessions in them.

    rows: rows that a site may hold over all sessions. sessions: tables that a site may hold, those of drafts included.
    make_room: called when either runs short; it may `close` a session and return True to be called again. backend: the
    kernels of every site (`choose_backend`).
    """

    def __init__(
        self,
        config: MemoryConfig,
        *,
        rows: int,
        sessions: int,
        backend: MemoryBackend,
        device: torch.device | str = "cpu",
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.backend = backend
        self.sites = {
            site.name: SitePool(
                site,
                rows=max(2 * site.slots, rows // site.layout.rows_divisor) if site.layout.on_host else rows,
                sessions=sessions,
                device=HOST if site.layout.on_host else self.device,
                make_room=make_room,
                backend=choose_backend(HOST) if site.layout.on_host else self.backend,
            )
            for site in config.sites
        }
        self._sessions = FreeList(sessions, make_room)

    def open(self, stored: Mapping[str, SiteRows] | None = None) -> int:
        """Open a session with stored rows (None: an empty one) and return its index. Raise PoolFullError."""
        index = int(self._sessions.allocate(1)[0])
        try:
            for name, batch in (stored or {}).items():
                if name.endswith(SESSION_SCALARS_SUFFIX):
                    site = self.sites[name.removesuffix(SESSION_SCALARS_SUFFIX)]
                    session_scalars = batch.data[0].view(torch.float32).view_as(site.session_scalars[index])
                    site.session_scalars[index] = upload(session_scalars, site.device)
                else:
                    self.sites[name].load_rows(index, batch)
        except PoolFullError:
            self.close(index)
            raise
        return index

    def close(self, index: int) -> None:
        """Forget a session and free its rows."""
        for site in self.sites.values():
            physical_cells = site.physical_cells[index]
            site.release(physical_cells[physical_cells > 0])
        self._clear_session(index)

    @property
    def utilization(self) -> float:
        """Return the share of its cells that the fullest site has allocated."""
        return max(site.free.utilization for site in self.sites.values())

    def num_rows(self, index: int) -> dict[str, int]:
        """Return the number of rows that a session holds, by site."""
        return {name: site.count_rows(site.physical_cells[index]) for name, site in self.sites.items()}

    def dump(self, index: int) -> dict[str, SiteRows]:
        """Return the whole state of a session, as it is stored."""
        return self._changed_rows(index, 0, {name: site.physical_cells[index] > 0 for name, site in self.sites.items()})

    def draft(self, base_index: int) -> Draft:
        """Return a copy-on-write view of session `base_index` for one turn. Raise PoolFullError."""
        index = int(self._sessions.allocate(1)[0])
        for site in self.sites.values():
            site.physical_cells[index] = site.physical_cells[base_index]
            site.sync_table(index)
            site.session_scalars[index] = site.session_scalars[base_index]
        return Draft(self, base_index, index)

    def _changed_rows(self, index: int, base_index: int, masks: Mapping[str, CellMask]) -> dict[str, SiteRows]:
        """Return the rows in the masked cells and session scalars that differ from those of session `base_index`."""
        changed = {}
        for name, mask in masks.items():
            site = self.sites[name]
            if mask.any() and len((rows := site.changed_rows(index, base_index, mask)).slots):
                changed[name] = rows
            session_scalars = site.session_scalars[index].cpu().clone()
            if not torch.equal(session_scalars, site.session_scalars[base_index].cpu()):
                changed[name + SESSION_SCALARS_SUFFIX] = SiteRows(
                    torch.zeros(1, dtype=torch.int32), session_scalars.flatten().view(torch.uint8)[None]
                )
        return changed

    def _clear_session(self, index: int) -> None:
        for site in self.sites.values():
            site.physical_cells[index] = 0
            site.sync_table(index)
            site.session_scalars[index] = 0.0
            site.row_counts[index] = 0
        self._sessions.release(np.array([index]))


class Draft:
    """A copy-on-write view of one session that a turn reads and writes. End it with `commit` or `rollback`, once.

    index: the session under which the pool's sites read the draft.
    """

    def __init__(self, pool: Pool, base_index: int, index: int) -> None:
        self.pool = pool
        self.base_index = base_index
        self.index = index
        self._copied = {name: np.zeros(site.config.cells, np.bool_) for name, site in pool.sites.items()}
        self._row_counts: dict[str, int] | None = None

    def get(self, name: str, cells: Tensor) -> list[Tensor]:
        """Return each field [U, …] of the cells [U] of a site."""
        site = self.pool.sites[name]
        physical_cells = site.tables[self.index, cells]
        return [field[physical_cells] for field in site.fields]

    def put(self, name: str, cells: Tensor, fields: Iterable[Tensor]) -> None:
        """Replace the contents of distinct cells [U] by fields, each [U, …]. Raise PoolFullError, changing nothing."""
        _, physical_cells = self.copy_on_write(name, cells)
        for field, values in zip(self.pool.sites[name].fields, fields, strict=True):
            field[physical_cells] = values

    def copy_on_write(self, name: str, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Give the draft physical cells of its own for distinct cells [U] of a site, and return the physical cells [U]
        that hold the contents and the physical cells [U] to write.

        The caller must write the whole contents: a new physical cell is empty. Raise PoolFullError, changing nothing.
        """
        site, copied, requested = self.pool.sites[name], self._copied[name], copy_to_host(cells).numpy()
        self._row_counts = None
        old = site.tables[self.index, cells]
        fresh = requested[~copied[requested]]
        site.physical_cells[self.index, fresh] = site.free.allocate(len(fresh))
        copied[fresh] = True
        site.sync_table(self.index)
        return old, site.tables[self.index, cells]

    def touched(self) -> dict[str, SiteRows]:
        """Return the rows that this turn has changed, which a commit stores."""
        return self.pool._changed_rows(self.index, self.base_index, self._copied)

    def num_rows(self) -> dict[str, int]:
        """Return the number of rows that the draft holds, by site; counts only the cells that the turn has copied."""
        if self._row_counts is None:
            self._row_counts = {name: self._count_rows(name, copied) for name, copied in self._copied.items()}
        return self._row_counts

    def num_guards_closed(self) -> int:
        """Return the number of guards that this turn closed, minus the number of guards that the turn opened."""
        sites = self.pool.sites.values()
        return sum(
            int(
                (
                    site.session_scalars[self.index, GATE_CLOSED] - site.session_scalars[self.base_index, GATE_CLOSED]
                ).sum()
            )
            for site in sites
        )

    def _count_rows(self, name: str, copied: CellMask) -> int:
        site = self.pool.sites[name]
        before = int(site.row_counts[self.base_index])
        if not copied.any():
            return before
        new, old = (site.count_rows(site.physical_cells[index, copied]) for index in (self.index, self.base_index))
        return before + new - old

    def commit(self) -> None:
        """Make the draft the new state of the base session."""
        for name, number in self.num_rows().items():
            self.pool.sites[name].row_counts[self.base_index] = number
        for name, site in self.pool.sites.items():
            old_cells = site.physical_cells[self.base_index]
            site.release(old_cells[self._copied[name] & (old_cells > 0)])
            old_cells[:] = site.physical_cells[self.index]
            site.sync_table(self.base_index)
            site.session_scalars[self.base_index] = site.session_scalars[self.index]
        self.pool._clear_session(self.index)

    def rollback(self) -> None:
        """Drop the draft; the base session keeps its state."""
        for name, site in self.pool.sites.items():
            site.release(site.physical_cells[self.index, self._copied[name]])
        self.pool._clear_session(self.index)
