"""A whole model for tests: a tiny random base, memories of every kind, and requests that read and learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.adaptive_lm import AdaptiveLM, DecodeState, Scores
from model.base.backbone import Backbone
from model.base.config import tiny_config
from model.memory import Draft, Memory, MemoryConfig, Pool, SiteConfig, SiteRows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of tests that need a GPU if there is one
VOCAB, WIDTH, BLOCK = 96, 32, 8
LEXICAL = SiteConfig("words", "lexical", slots=64, k=4, width=16, cell=8)
MIDDLE = SiteConfig("middle", "hidden", slots=36, k=3, layer=1, width=5, decay=1.0, cap=10.0)
OUTPUT = SiteConfig("output", "hidden", slots=36, k=2, layer=-1, width=6, decay=0.5, cap=10.0)
# A sharp and a broad head, a gate that opens to similar rows that agree, and no trust yet.
LEXICAL_WEIGHTS = {"sharpness": (30.0, 9.0), "prior": 0.2, "trust_rate": 0.1, "gate_out_bias": (-1.0, 0.0, 0.0)}
KINDS = {"lexical": (LEXICAL,), "middle": (MIDDLE,), "output": (OUTPUT,), "all": (LEXICAL, MIDDLE, OUTPUT)}


def tiny_backbone(dtype: torch.dtype = torch.float32) -> Backbone:
    """Return a base of three layers with random weights, the same weights in any precision."""
    config = tiny_config(
        vocab_size=VOCAB, hidden_size=WIDTH, num_layers=3, head_dim=8, intermediate_size=48, max_context=256
    )
    base, g = Backbone(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2, generator=g)
    base = base.to(dtype)
    base.pack()
    return base


def build(backbone: Backbone, *sites: SiteConfig) -> AdaptiveLM:
    """Return a model whose memory has random slow weights and open gates."""
    memory, g = Memory(MemoryConfig(WIDTH, sites, block=BLOCK)), torch.Generator().manual_seed(1)
    for name, tensor in memory.state_dict().items():
        tensor.normal_(0.0, 0.3, generator=g)
        if name.endswith(("temperature", "write_gate")):
            tensor.copy_(torch.tensor([2.0, 0.1]) if tensor.dim() else torch.tensor(2.0))
        for ending, value in LEXICAL_WEIGHTS.items():
            if name.endswith(ending):
                tensor.copy_(torch.tensor(value))
    return AdaptiveLM(backbone, memory.to(backbone.embedding.device))


def text(seed: int, length: int = 3 * BLOCK + 3) -> list[int]:
    """Return random tokens of a few kinds, so that addresses and targets repeat."""
    return torch.randint(0, 24, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def new_pool(lm: AdaptiveLM) -> Pool:
    return lm.new_pool(rows=600, sessions=8)


class RequestReader:
    """A request in progress, and its scores so far."""

    def __init__(self, lm: AdaptiveLM, ids: Sequence[int]) -> None:
        self.lm, self.ids, self.position = lm, ids, 0
        self.cache, self.frozen_cache = lm.backbone.new_cache(200), lm.backbone.new_cache(200)
        self.decode_state: DecodeState | None = None
        self.scores: list[Scores] = []

    def step(self, pool: Pool, index: int, draft: Draft | None = None, *, frozen: bool = True, top: int = 0) -> bool:
        """Score one block and, given a draft, learn it; return False at the end of the request."""
        part = self.ids[self.position : self.position + BLOCK]
        mask = [True] * len(part)
        learn = mask if draft is not None else None
        self.decode_state, scores = self.lm.block(
            part,
            self.cache,
            pool,
            index,
            decode_state=self.decode_state,
            score=mask,
            learn=learn,
            draft=draft,
            score_frozen=frozen,
            frozen_cache=self.frozen_cache,
            top=top,
        )
        assert scores is not None
        self.scores.append(scores)
        self.position += len(part)
        return self.position < len(self.ids)

    @property
    def adapted(self) -> Tensor:
        return torch.cat([scores.adapted for scores in self.scores])

    @property
    def frozen(self) -> Tensor:
        return torch.cat([scores.frozen for scores in self.scores if scores.frozen is not None])


def read(lm: AdaptiveLM, pool: Pool, index: int, ids: Sequence[int], draft: Draft | None = None) -> RequestReader:
    request = RequestReader(lm, ids)
    while request.step(pool, index, draft):
        pass
    return request


def decode_state_of(request: RequestReader) -> DecodeState:
    """Return the decode state of a request that has begun."""
    assert request.decode_state is not None
    return request.decode_state


def learn(lm: AdaptiveLM, pool: Pool, session: int, ids: Sequence[int]) -> RequestReader:
    """Let a session learn a text in one turn."""
    draft = pool.draft(session)
    request = read(lm, pool, draft.index, ids, draft)
    draft.commit()
    return request


def learned(lm: AdaptiveLM, pool: Pool, seed: int) -> int:
    """Return a session that has learned the text of a seed."""
    session = pool.open()
    learn(lm, pool, session, text(seed))
    return session


def rows_by_slot(state: dict[str, SiteRows]) -> dict[tuple[str, int], bytes]:
    return {
        (name, int(slot)): row.numpy().tobytes()
        for name, rows in state.items()
        for slot, row in zip(rows.slots, rows.data, strict=True)
    }
