"""A kind of memory is a package and one line of each registry: nothing else knows which kinds there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from model.memory import Draft, MemoryConfig, MemoryConfigError, Pool, SiteConfig
from model.memory.delta.layout import VectorLayout
from model.memory.kinds import SITES
from model.memory.layouts import LAYOUTS
from model.memory.site import ResidualSite
from model.site_kind import SiteKind
from tests.model.tiny_lm import BLOCK, WIDTH, build, learned, new_pool, read, rows_by_slot, text, tiny_backbone

MEAN: Any = "mean"  # not in `SiteKind`
UNKNOWN: Any = "median"


class MeanSite(ResidualSite):
    """A toy kind for this test: one row, the decayed sum of the errors, added to the residual stream."""

    def __init__(self, config: SiteConfig, hidden_size: int) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.zeros(hidden_size))

    def read(self, pool: Pool, session: Tensor, hidden: Tensor) -> Tensor:
        (rows,) = pool.sites[self.config.name].read(session, torch.zeros_like(session)[:, None])
        return torch.where(rows[:, 0].any(-1, keepdim=True), hidden + self.scale * rows[:, 0], hidden)

    def learn(self, draft: Draft, hidden: Tensor, following: Tensor, error: Tensor, adapted: Tensor) -> None:
        slot = torch.zeros(1, dtype=torch.long)
        (row,) = draft.get(self.config.name, slot)
        draft.put(self.config.name, slot, [self.config.decay * row + error.mean(0, keepdim=True)])


@pytest.fixture
def mean_site(monkeypatch: pytest.MonkeyPatch) -> Iterator[SiteConfig]:
    monkeypatch.setitem(LAYOUTS, MEAN, VectorLayout())
    monkeypatch.setitem(SITES, MEAN, MeanSite)
    with torch.inference_mode():
        yield SiteConfig("mean", MEAN, slots=1, k=1, width=WIDTH, layer=1, decay=0.9)


def test_the_api_knows_every_kind() -> None:
    assert get_args(SiteKind) == tuple(LAYOUTS) == tuple(SITES)


def test_a_kind_of_another_package_is_learned_stored_and_read(mean_site: SiteConfig) -> None:
    lm = build(tiny_backbone(), mean_site)
    pool = new_pool(lm)
    session, ids = learned(lm, pool, seed=1), text(1, BLOCK)
    state = pool.dump(session)
    assert [rows.data.shape for rows in state.values()] == [(1, 4 * WIDTH)]
    again = new_pool(lm)
    reopened = again.open(state)
    assert rows_by_slot(again.dump(reopened)) == rows_by_slot(state)
    request, empty = read(lm, pool, session, ids), read(lm, pool, pool.open(), ids)
    assert torch.equal(request.adapted, read(lm, again, reopened, ids).adapted)
    assert torch.equal(empty.adapted, empty.frozen)
    assert torch.equal(request.frozen, empty.frozen)
    assert not torch.allclose(request.adapted, request.frozen, atol=1e-3)


def test_the_rules_of_a_kind_are_those_of_its_layout(mean_site: SiteConfig) -> None:
    assert MemoryConfig.from_dict(MemoryConfig(WIDTH, (mean_site,)).to_dict()).sites == (mean_site,)
    with pytest.raises(MemoryConfigError, match=r"mean\.cell must divide slots"):
        SiteConfig("mean", MEAN, slots=2, k=1, width=WIDTH, cell=2)
    with pytest.raises(
        MemoryConfigError,
        match="kind must be 'lexical', 'hidden', 'episodic', 'meaning', 'journal', 'names' or 'mean', got 'median'",
    ):
        replace(mean_site, kind=UNKNOWN)
