"""The meta-training of the lexical site: keys and gates learn, across streams, to make the writes of the site useful.

The inner loop is the rule of the site, read and write block by block, in the limit of enough slots: every earlier token
of the stream is a written pair, and a read scores all pairs. The inner loop is thus attention over the past of the
stream with learned keys. Cells, rounding and forgetting, which have no gradient, are left out. The outer loop minimises
the loss of the served mixture.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.memory import LexicalSite, Memory
from model.memory.lexical import ops
from model.memory.lexical.types import NGRAM_SIZES
from model.memory.numerics import TINY
from research.training.features import BOS_PLACEHOLDER, QUERIES, Chunk


class WrittenPairs(NamedTuple):
    """The pairs that a stream has written: keys fp16 [m, d_k], n-gram hashes int16 [m, R] and tokens int32 [m]."""

    keys: Tensor
    ngram_hashes: Tensor
    tokens: Tensor


class LexicalObjective:
    """The objective of a memory with one lexical site on cached states; head [V, d] is the base's.

    The constructor raises ValueError for another memory.
    """

    def __init__(self, memory: Memory, head: Tensor) -> None:
        site = memory.lexical
        if site is None or len(memory.sites) != 1:
            raise ValueError("only a memory of exactly one lexical site is trained")
        self.module: nn.Module = memory
        self._site: LexicalSite = site
        self._block = memory.config.block
        self._head = head
        for name, parameter in site.named_parameters():
            parameter.requires_grad_(name != "centres" and "trust" not in name)

    def start(self) -> WrittenPairs:
        """Return the state of a new session: no pairs."""
        device = self._site.key_weight.device
        width = self._site.config.width
        return WrittenPairs(
            torch.empty(0, width, dtype=torch.float16, device=device),
            torch.empty(0, len(NGRAM_SIZES), dtype=torch.int16, device=device),
            torch.empty(0, dtype=torch.int32, device=device),
        )

    def step(self, state: Any, chunk: Chunk) -> tuple[Tensor, int, Any]:
        """Return the summed loss of the targets (nats), their number, and the state with the pairs of the chunk.

        A target sees the pairs of all blocks before its own. With gradients enabled, the sum is estimated from a random
        sample of the targets.
        """
        site, num_before, n = self._site, len(state.keys), len(chunk.targets)
        new = site.keys(chunk.states)
        context = torch.cat(
            [ops.hash_request_ngrams(part, BOS_PLACEHOLDER) for part in chunk.targets.split(chunk.lengths)]
        )
        keys, ngram_hashes = torch.cat([state.keys.float(), new]), torch.cat([state.ngram_hashes, context])
        tokens = torch.cat([state.tokens.long(), chunk.targets])
        num_visible = num_before + torch.tensor(self._num_written(chunk.lengths), device=new.device)
        losses = [
            self._losses(
                chunk,
                part,
                new[part],
                keys,
                ops.count_ngram_matches(ngram_hashes, context[part, None]),
                tokens,
                num_visible[part],
            )
            for part in chunk.sampled().split(QUERIES)
        ]
        return torch.cat(losses).mean() * n, n, WrittenPairs(keys.half(), ngram_hashes, tokens.int())

    def detach(self, state: Any) -> Any:
        """Return the state without gradients."""
        return WrittenPairs(state.keys.detach(), state.ngram_hashes, state.tokens)

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups: gates and scales learn faster than keys, without weight decay."""
        named = [(name, p) for name, p in self._site.named_parameters() if p.requires_grad]
        keys = [p for name, p in named if name.startswith("key_")]
        rest = [p for name, p in named if not name.startswith("key_")]
        return [
            {"params": keys, "factor": 1.0, "weight_decay": 0.0},
            {"params": rest, "factor": 4.0, "weight_decay": 0.0},
        ]

    def _num_written(self, lengths: list[int]) -> list[int]:
        """Return for each token the number of tokens of the requests that are written before the token's block."""
        starts = itertools.accumulate(lengths, initial=0)
        return [
            start + t // self._block * self._block for start, n in zip(starts, lengths, strict=False) for t in range(n)
        ]

    def _losses(
        self,
        chunk: Chunk,
        sampled: Tensor,
        queries: Tensor,
        keys: Tensor,
        ngram_matches: Tensor,
        tokens: Tensor,
        num_visible: Tensor,
    ) -> Tensor:
        """Return −log p [q] of the sampled targets.

        queries [q, d_k], keys [m, d_k], ngram_matches [q, m], tokens [m], num_visible [q]
        """
        site, targets, frozen = self._site, chunk.targets[sampled], chunk.log_probs[sampled]
        with torch.no_grad():
            states = chunk.states[sampled].to(self._head.dtype)
            log_z = (states * self._head[targets]).sum(-1).float() - frozen
            prior = (states @ self._head[tokens].T).float() - log_z[:, None]
        unwritten = torch.arange(len(tokens), device=num_visible.device) >= num_visible[:, None]
        cosines = queries @ keys.T
        found = ops.score_candidates(
            tokens[None], cosines, ngram_matches, prior, unwritten, site.sharpness, site.prior, site.bonus
        )
        logit, shares = site.gate(found, chunk.entropy[sampled], queries)
        gamma = torch.sigmoid(logit) * (num_visible > 0)
        p = (1 - gamma) * frozen.exp() + gamma * ops.memory_prob(targets, tokens[None], shares)
        return -(p + TINY).log()
