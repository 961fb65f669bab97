"""Where fast weights live while they are hot: one pool of cells a site, and for each session a table cell → place.

Place 0 of a pool is the empty cell and session 0 is the empty session, so a batch may mix sessions, empty sessions and
requests without one. A turn writes to a `Draft`: the cells it touches are copied first, so rolling back is dropping
them; what is stored are the rows in them that changed.

A lexical site also has numbers of the session's own, three for each number of runs that a match may repeat: the trust
that experience adds to the read gate, and the balance and the state of its guard. They are stored like a site of one
slot, named `<site>_copied`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.device import copy_to_host, memory_backend_for, upload
from model.memory.config import GATE_CLOSED, NGRAM_SIZES, SESSION_SCALARS_SUFFIX, MemoryConfig, SiteConfig
from model.memory.lexical import torch_backend

CellIndices = NDArray[np.integer[Any]]  # cells or places, on the host
CellMask = NDArray[np.bool_]  # by cell


class PoolFullError(RuntimeError):
    """No free rows (or sessions); nothing was changed."""


@dataclass(frozen=True)
class SiteRows:
    """Rows as they are stored and moved: slots int32 [n] ascending, data uint8 [n, row_bytes]."""

    slots: Tensor
    data: Tensor


class FreeList:
    """A stack of free indices. When it runs short, `make_room` is asked to give some back, until it returns False."""

    def __init__(self, capacity: int, make_room: Callable[[], bool] = lambda: False) -> None:
        self._stack = np.arange(capacity, 0, -1)
        self._top = capacity
        self._make_room = make_room

    @property
    def utilization(self) -> float:
        """The share that is not free."""
        return 1.0 - self._top / len(self._stack)

    def allocate(self, n: int) -> CellIndices:
        while n > self._top and self._make_room():
            pass
        if n > self._top:
            raise PoolFullError(f"{n} needed, {self._top} of {len(self._stack)} free")
        self._top -= n
        return self._stack[self._top : self._top + n].copy()

    def release(self, indices: CellIndices) -> None:
        self._stack[self._top : self._top + len(indices)] = indices
        self._top += len(indices)


class SitePool:
    """The cells and tables of one site; a cell holds the rows of `config.cell` neighbouring slots.

    fields: each [C + 1, …] cells; a lexical site has ages, tokens [C + 1, P], prints [C + 1, P, R] and keys
    [C + 1, P, d_k], a hidden site values [C + 1, d_v]. places [S + 1, cells] are the tables as the host knows them, who
    then need not ask the device; tables are the device's. own [S + 1, 3, R + 1].
    """

    def __init__(
        self, config: SiteConfig, *, rows: int, sessions: int, device: torch.device, make_room: Callable[[], bool]
    ) -> None:
        self.config, self.device = config, device
        cells = -(-rows // config.cell)
        self.free = FreeList(cells, make_room)
        if config.kind == "lexical":
            pairs = (cells + 1, config.cell)
            ngram_hashes, keys = (*pairs, len(NGRAM_SIZES)), (*pairs, config.width)
            shapes = [(pairs, torch.int32), (pairs, torch.int32), (ngram_hashes, torch.int16), (keys, torch.int8)]
        else:
            shapes = [((cells + 1, config.width), torch.float32)]
        self.fields = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        self.physical_cells = np.zeros((sessions + 1, config.cells), np.int32)
        self.tables = torch.from_numpy(self.physical_cells).to(device)  # on a CPU, the same memory
        self.session_scalars = torch.zeros(sessions + 1, 3, len(NGRAM_SIZES) + 1, device=device)
        self.kernels = memory_backend_for(device)

    def read(self, session: Tensor, cells: Tensor) -> list[Tensor]:
        """session [n] long, cells [n, k] long → each field [n, k, …]."""
        physical_cells = self.tables[session[:, None], cells]
        return [field[physical_cells] for field in self.fields]

    def find_candidates(
        self,
        session: Tensor,
        cells: Tensor,
        query: Tensor,
        context: Tensor,
        base: torch_backend.Prediction,
        head_params: torch_backend.HeadParams,
    ) -> tuple[torch_backend.Candidates, Tensor]:
        """What a lexical read makes of the rows in cells [n, k] long of sessions [n] long, for a query [n, d_k], the
        fingerprints of a context [n, R] and what the base predicts; and how many empty rows the cells have [n, k]."""
        if self.kernels is None:
            rows = torch_backend.match_rows(torch_backend.LexicalRows(*self.read(session, cells)), query, context)
            return torch_backend.score_row_matches(rows, base, head_params), rows.missing.view(*cells.shape, -1).sum(-1)
        found: tuple[torch_backend.Candidates, Tensor] = self.kernels.find_candidates(
            self.tables, self.fields, session, cells, query, context, base, head_params
        )
        return found

    def load_rows(self, session: int, batch: SiteRows) -> None:
        """Gives a session the rows of `batch`. Raises PoolFullError, changing nothing."""
        # By numpy, which keeps to one thread: a session is loaded while the other cores have work.
        cell, row = np.divmod(batch.slots.numpy().astype(np.int64), self.config.cell)
        begins = np.diff(cell, prepend=-1) != 0
        physical_cells = self.free.allocate(int(begins.sum()))
        where = map(torch.from_numpy, (physical_cells, begins.cumsum() - 1, row))
        (self.kernels or torch_backend).load_rows([self._rows(field) for field in self.fields], *where, batch.data)
        self.physical_cells[session, cell[begins]] = physical_cells
        self.sync_table(session)

    def sync_table(self, session: int) -> None:
        """The device's table of a session becomes the host's."""
        if self.tables.data_ptr() != self.physical_cells.ctypes.data:
            self.tables[session] = upload(self.physical_cells[session], self.device)

    def num_rows(self, session: int) -> int:
        """How many rows a session holds."""
        physical_cells = self.physical_cells[session]
        return int(
            (self._rows(self.fields[0])[upload(physical_cells[physical_cells > 0], self.device)] != 0).any(-1).sum()
        )

    def changed_rows(self, session: int, base: int, cells: CellMask) -> SiteRows:
        """The rows of a session that differ from those of session `base`, of the cells that the mask chooses."""
        physical_cells = np.stack([self.physical_cells[session, cells], self.physical_cells[base, cells]])
        # The host compares: a GPU would be waited for once more.
        data, before = copy_to_host(self._bytes(upload(physical_cells, self.device))).numpy()
        cell, row = (data != before).any(-1).nonzero()
        slots = cells.nonzero()[0][cell] * self.config.cell + row
        return SiteRows(torch.from_numpy(slots.astype(np.int32)), torch.from_numpy(data[cell, row]))

    def _rows(self, field: Tensor) -> Tensor:
        """A field by cell and row: [C + 1, P, …] of a lexical site's, [C + 1, 1, d_v] of a hidden site's."""
        return field.view(len(field), self.config.cell, -1)

    def _bytes(self, physical_cells: Tensor) -> Tensor:
        """The rows at some places [...] as uint8 [..., P, row_bytes]."""
        return torch.cat([torch_backend.as_bytes(self._rows(field)[physical_cells]) for field in self.fields], dim=-1)


class Pool:
    """All sites' pools, and the sessions that are in them.

    rows: rows a site may hold over all sessions. sessions: tables a site may hold, those of drafts included.
    make_room: called when either runs short; it may `close` a session and return True to be asked again.
    """

    def __init__(
        self,
        config: MemoryConfig,
        *,
        rows: int,
        sessions: int,
        device: torch.device | str = "cpu",
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.sites = {
            site.name: SitePool(site, rows=rows, sessions=sessions, device=self.device, make_room=make_room)
            for site in config.sites
        }
        self._sessions = FreeList(sessions, make_room)

    def open(self, stored: Mapping[str, SiteRows] | None = None) -> int:
        """A session with the given rows (none: an empty one); returns its index. Raises PoolFullError."""
        index = int(self._sessions.allocate(1)[0])
        try:
            for name, batch in (stored or {}).items():
                if name.endswith(SESSION_SCALARS_SUFFIX):
                    site = self.sites[name.removesuffix(SESSION_SCALARS_SUFFIX)]
                    session_scalars = batch.data[0].view(torch.float32).view_as(site.session_scalars[index])
                    site.session_scalars[index] = upload(session_scalars, self.device)
                else:
                    self.sites[name].load_rows(index, batch)
        except PoolFullError:
            self.close(index)
            raise
        return index

    def close(self, index: int) -> None:
        """Forgets a session and frees its rows."""
        for site in self.sites.values():
            physical_cells = site.physical_cells[index]
            site.free.release(physical_cells[physical_cells > 0])
        self._clear_session(index)

    @property
    def utilization(self) -> float:
        """The share of the room for rows that sessions and drafts have taken, of the fullest site."""
        return max(site.free.utilization for site in self.sites.values())

    def rows(self, index: int) -> dict[str, int]:
        """How many rows a session holds, by site."""
        return {name: site.num_rows(index) for name, site in self.sites.items()}

    def dump(self, index: int) -> dict[str, SiteRows]:
        """A session's whole state, as it is stored."""
        return self._changed_rows(index, 0, {name: site.physical_cells[index] > 0 for name, site in self.sites.items()})

    def draft(self, base: int) -> Draft:
        """A turn's own copy-on-write view of session `base`. Raises PoolFullError."""
        index = int(self._sessions.allocate(1)[0])
        for site in self.sites.values():
            site.physical_cells[index] = site.physical_cells[base]
            site.sync_table(index)
            site.session_scalars[index] = site.session_scalars[base]
        return Draft(self, base, index)

    def _changed_rows(self, index: int, base: int, masks: Mapping[str, CellMask]) -> dict[str, SiteRows]:
        """What differs from session `base` in the cells that the masks choose, and the session's own numbers."""
        packed = {}
        for name, mask in masks.items():
            site = self.sites[name]
            rows = site.changed_rows(index, base, mask)
            if len(rows.slots):
                packed[name] = rows
            session_scalars = site.session_scalars[index].cpu().clone()
            if not torch.equal(session_scalars, site.session_scalars[base].cpu()):
                packed[name + SESSION_SCALARS_SUFFIX] = SiteRows(
                    torch.zeros(1, dtype=torch.int32), session_scalars.flatten().view(torch.uint8)[None]
                )
        return packed

    def _clear_session(self, index: int) -> None:
        for site in self.sites.values():
            site.physical_cells[index] = 0
            site.sync_table(index)
            site.session_scalars[index] = 0.0
        self._sessions.release(np.array([index]))


class Draft:
    """What a turn reads and writes. End it with `commit` or `rollback`, once."""

    def __init__(self, pool: Pool, base: int, index: int) -> None:
        self.pool = pool
        self.base = base
        self.index = index
        self._copied = {name: np.zeros(site.config.cells, np.bool_) for name, site in pool.sites.items()}

    def get(self, name: str, cells: Tensor) -> list[Tensor]:
        """The contents of `cells` [U]: each field [U, …]."""
        site = self.pool.sites[name]
        physical_cells = site.tables[self.index, cells]
        return [field[physical_cells] for field in site.fields]

    def put(self, name: str, cells: Tensor, fields: Iterable[Tensor]) -> None:
        """Replaces the contents of `cells` [U] (distinct) by `fields`, each [U, …]. Raises PoolFullError, changing
        nothing."""
        physical_cells = self._copy_on_write(name, cells)
        for field, values in zip(self.pool.sites[name].fields, fields, strict=True):
            field[physical_cells] = values

    def write(self, name: str, cells: Tensor, at: Tensor, keys: Tensor, ngram_hashes: Tensor, targets: Tensor) -> None:
        """Writes one block into `cells` [U] (distinct) of a lexical site; the rest as in `ops.write_lexical`. Raises
        PoolFullError, changing nothing."""
        site = self.pool.sites[name]
        if site.kernels is None:
            self.put(
                name,
                cells,
                torch_backend.write_lexical(
                    torch_backend.LexicalRows(*self.get(name, cells)), at, keys, ngram_hashes, targets
                ),
            )
            return
        before = site.tables[self.index, cells]
        site.kernels.write(site.fields, before, self._copy_on_write(name, cells), at, keys, ngram_hashes, targets)

    def _copy_on_write(self, name: str, cells: Tensor) -> Tensor:
        """The draft's copied places [U] of `cells` [U], new ones for those that it had not touched yet."""
        site, copied, requested = self.pool.sites[name], self._copied[name], copy_to_host(cells).numpy()
        fresh = requested[~copied[requested]]
        site.physical_cells[self.index, fresh] = site.free.allocate(len(fresh))
        copied[fresh] = True
        site.sync_table(self.index)
        return site.tables[self.index, cells]

    def touched(self) -> dict[str, SiteRows]:
        """The rows that this turn changed: what a commit stores."""
        return self.pool._changed_rows(self.index, self.base, self._copied)

    def num_guards_shut(self) -> int:
        """How many read gates this turn shut, less those that it opened."""
        sites = self.pool.sites.values()
        return sum(
            int((site.session_scalars[self.index, GATE_CLOSED] - site.session_scalars[self.base, GATE_CLOSED]).sum())
            for site in sites
        )

    def commit(self) -> None:
        """The base session becomes what the draft is."""
        for name, site in self.pool.sites.items():
            base = site.physical_cells[self.base]
            site.free.release(base[self._copied[name] & (base > 0)])
            base[:] = site.physical_cells[self.index]
            site.sync_table(self.base)
            site.session_scalars[self.base] = site.session_scalars[self.index]
        self.pool._clear_session(self.index)

    def rollback(self) -> None:
        """The base session stays what it was."""
        for name, site in self.pool.sites.items():
            site.free.release(site.physical_cells[self.index, self._copied[name]])
        self.pool._clear_session(self.index)
