"""Where fast weights live while they are hot: one pool of rows a site, and for each session a table slot → row.

Row 0 of a pool is the empty row and session 0 is the empty session, so a batch may mix sessions, empty sessions and
requests without one. A turn writes to a `Draft`: the rows it touches are copied first, so rolling back is dropping
them.

A lexical site also has one number a session, its trust: what the session's own experience adds to the read gate. It is
stored like a site of one slot, named `<site>_trust`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.memory.config import TRUST, MemoryConfig, SiteConfig


class PoolFullError(RuntimeError):
    """No free rows (or sessions); nothing was changed."""


@dataclass(frozen=True)
class SiteRows:
    """Rows as they are stored and moved: slots int32 [n] ascending, data uint8 [n, row_bytes]."""

    slots: Tensor
    data: Tensor


class _Free:
    """A stack of free indices. When it runs short, `make_room` is asked to give some back, until it returns False."""

    def __init__(self, capacity: int, make_room: Callable[[], bool]) -> None:
        self._stack = torch.arange(capacity, 0, -1)
        self._top = capacity
        self._make_room = make_room

    def take(self, n: int) -> Tensor:
        while n > self._top and self._make_room():
            pass
        if n > self._top:
            raise PoolFullError(f"{n} needed, {self._top} of {len(self._stack)} free")
        self._top -= n
        return self._stack[self._top : self._top + n].clone()

    def give(self, indices: Tensor) -> None:
        self._stack[self._top : self._top + len(indices)] = indices.cpu()
        self._top += len(indices)


class SitePool:
    """The rows and tables of one site. fields: each [R + 1, …]; a lexical site has tokens and strengths, a hidden
    site values."""

    def __init__(
        self, config: SiteConfig, *, rows: int, sessions: int, device: torch.device, make_room: Callable[[], bool]
    ) -> None:
        self.config = config
        self.free = _Free(rows, make_room)
        sizes: list[tuple[int, torch.dtype]]
        if config.kind == "lexical":
            sizes = [(config.pairs, torch.int32), (config.pairs, torch.float32)]
        else:
            sizes = [(config.width, torch.float32)]
        self.fields = [torch.zeros(rows + 1, size, dtype=dtype, device=device) for size, dtype in sizes]
        self.tables = torch.zeros(sessions + 1, config.slots, dtype=torch.int32, device=device)
        self.trust = torch.zeros(sessions + 1, device=device)

    def read(self, session: Tensor, slots: Tensor) -> list[Tensor]:
        """session [n] long, slots [n, k] long → each field [n, k, …]."""
        rows = self.tables[session[:, None], slots]
        return [field[rows] for field in self.fields]

    def fill(self, session: int, batch: SiteRows) -> None:
        """Gives a session the rows of `batch`. Raises PoolFullError, changing nothing."""
        rows = self.free.take(len(batch.slots))
        for field, values in zip(self.fields, self.unpack(batch.data), strict=True):
            field[rows] = values
        self.tables[session, batch.slots.long()] = rows.int().to(self.tables.device)

    def pack(self, rows: Tensor) -> Tensor:
        """Row indices [n] → uint8 [n, row_bytes], on the CPU."""
        parts = [field[rows].contiguous().view(torch.uint8) for field in self.fields]
        return torch.cat(parts, dim=1).cpu()

    def unpack(self, data: Tensor) -> list[Tensor]:
        """uint8 [n, row_bytes] → each field [n, …]."""
        sizes = [field.shape[1] * field.element_size() for field in self.fields]
        parts = data.split(sizes, dim=1)
        return [part.contiguous().view(f.dtype).to(f.device) for part, f in zip(parts, self.fields, strict=True)]


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
        self._sessions = _Free(sessions, make_room)

    def open(self, stored: Mapping[str, SiteRows] | None = None) -> int:
        """A session with the given rows (none: an empty one); returns its index. Raises PoolFullError."""
        index = int(self._sessions.take(1))
        try:
            for name, batch in (stored or {}).items():
                if name.endswith(TRUST):
                    self.sites[name.removesuffix(TRUST)].trust[index] = float(batch.data.view(torch.float32))
                else:
                    self.sites[name].fill(index, batch)
        except PoolFullError:
            self.close(index)
            raise
        return index

    def close(self, index: int) -> None:
        """Forgets a session and frees its rows."""
        for site in self.sites.values():
            table = site.tables[index]
            site.free.give(table[table > 0])
        self._drop(index)

    def rows(self, index: int) -> dict[str, int]:
        """How many rows a session holds, by site."""
        return {name: int((site.tables[index] > 0).sum()) for name, site in self.sites.items()}

    def dump(self, index: int) -> dict[str, SiteRows]:
        """A session's whole state, as it is stored."""
        return self._pack(index, 0, {name: site.tables[index] > 0 for name, site in self.sites.items()})

    def draft(self, base: int) -> Draft:
        """A turn's own copy-on-write view of session `base`. Raises PoolFullError."""
        index = int(self._sessions.take(1))
        for site in self.sites.values():
            site.tables[index] = site.tables[base]
            site.trust[index] = site.trust[base]
        return Draft(self, base, index)

    def _pack(self, index: int, base: int, masks: Mapping[str, Tensor]) -> dict[str, SiteRows]:
        """The rows of session `index` that the masks [N] choose, and its trust where session `base` has another."""
        packed = {}
        for name, mask in masks.items():
            site, slots = self.sites[name], mask.nonzero()[:, 0]
            if len(slots):
                packed[name] = SiteRows(slots.int().cpu(), site.pack(site.tables[index, slots]))
            trust = site.trust[index : index + 1].cpu()
            if len(slots) and bool(trust != site.trust[base].cpu()):
                packed[name + TRUST] = SiteRows(torch.zeros(1, dtype=torch.int32), trust.view(torch.uint8)[None])
        return packed

    def _drop(self, index: int) -> None:
        for site in self.sites.values():
            site.tables[index].zero_()
            site.trust[index] = 0.0
        self._sessions.give(torch.tensor([index]))


class Draft:
    """What a turn reads and writes. End it with `commit` or `rollback`, once."""

    def __init__(self, pool: Pool, base: int, index: int) -> None:
        self.pool = pool
        self.base = base
        self.index = index
        self._own = {
            name: torch.zeros(site.config.slots, dtype=torch.bool, device=pool.device)
            for name, site in pool.sites.items()
        }

    def get(self, name: str, slots: Tensor) -> list[Tensor]:
        """The rows of `slots` [U]: each field [U, …]."""
        site = self.pool.sites[name]
        rows = site.tables[self.index, slots]
        return [field[rows] for field in site.fields]

    def put(self, name: str, slots: Tensor, fields: Iterable[Tensor]) -> None:
        """Replaces the rows of `slots` [U] (distinct) by `fields`, each [U, …]. Raises PoolFullError, changing
        nothing."""
        site, own = self.pool.sites[name], self._own[name]
        fresh = slots[~own[slots]]
        site.tables[self.index, fresh] = site.free.take(len(fresh)).int().to(self.pool.device)
        own[fresh] = True
        rows = site.tables[self.index, slots]
        for field, values in zip(site.fields, fields, strict=True):
            field[rows] = values

    def touched(self) -> dict[str, SiteRows]:
        """The rows written in this turn: what a commit stores."""
        return self.pool._pack(self.index, self.base, self._own)

    def commit(self) -> None:
        """The base session becomes what the draft is."""
        for name, site in self.pool.sites.items():
            base, own = site.tables[self.base], self._own[name]
            site.free.give(base[own & (base > 0)])
            base.copy_(site.tables[self.index])
            site.trust[self.base] = site.trust[self.index]
        self.pool._drop(self.index)

    def rollback(self) -> None:
        """The base session stays what it was."""
        for name, site in self.pool.sites.items():
            site.free.give(site.tables[self.index, self._own[name]])
        self.pool._drop(self.index)
