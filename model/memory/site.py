"""The base classes of sites: the slow weights with which every session reads and writes one part of the memory."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from model.memory.config import SiteConfig
from model.memory.pool import Draft, Pool


class MemorySite(nn.Module):
    """The slow weights of one site. Serving never changes them."""

    def __init__(self, config: SiteConfig) -> None:
        super().__init__()
        self.config = config


class ResidualSite(MemorySite, ABC):
    """A site that is read into the residual stream, after the decoder layer `config.layer` (−1: after the last)."""

    @abstractmethod
    def read(self, pool: Pool, session: Tensor, hidden: Tensor) -> Tensor:
        """Return the residual stream [n, d] with the memory of sessions [n] added; an empty session changes no bit."""

    @abstractmethod
    def learn(self, draft: Draft, hidden: Tensor, following: Tensor, error: Tensor, adapted: Tensor) -> None:
        """Write one block of n tokens to the draft.

        hidden: residual stream [n, d] at the position that predicts each token. following: residual stream [n, d] one
        position later. error: ε_t [n, d], the token's embedding less the embedding that was expected. adapted:
        log-probabilities [n] of the tokens. Raises PoolFullError: roll the draft back.
        """
