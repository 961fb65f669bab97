"""Meta-training of the lexical site: across streams, its keys and gates learn to make its writes help most.

The inner loop is the site's own rule, read and write block by block, in the limit of enough slots: every earlier token
of the stream is a pair, and a read weighs them all. That makes it attention over the stream's past, whose keys are
learned, and leaves out only what no gradient passes: cells, rounding and forgetting. The outer loop minimises the loss
of the mixture that is served.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.memory import LexicalSite, Memory
from model.memory.config import NGRAM_SIZES
from model.memory.lexical import torch_backend
from model.memory.numerics import TINY
from research.training.features import BOS_PLACEHOLDER, QUERIES, Chunk


class WrittenPairs(NamedTuple):
    """What a stream has written: keys fp16 [m, d_k], fingerprints int16 [m, R] and tokens int32 [m]."""

    keys: Tensor
    ngram_hashes: Tensor
    tokens: Tensor


class LexicalObjective:
    """Trains the one lexical site of a memory on cached states; head [V, d] is the base's."""

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
        device = self._site.key_weight.device
        width = self._site.config.width
        return WrittenPairs(
            torch.empty(0, width, dtype=torch.float16, device=device),
            torch.empty(0, len(NGRAM_SIZES), dtype=torch.int16, device=device),
            torch.empty(0, dtype=torch.int32, device=device),
        )

    def step(self, state: Any, chunk: Chunk) -> tuple[Tensor, int, Any]:
        """The summed loss (nats) of the targets, each read before its block is written; with gradients, an estimate of
        it from a sample of them."""
        site, before, n = self._site, len(state.keys), len(chunk.targets)
        new = site.keys(chunk.states)
        context = torch.cat(
            [torch_backend.hash_request_ngrams(part, BOS_PLACEHOLDER) for part in chunk.targets.split(chunk.lengths)]
        )
        keys, ngram_hashes = torch.cat([state.keys.float(), new]), torch.cat([state.ngram_hashes, context])
        tokens = torch.cat([state.tokens.long(), chunk.targets])
        num_visible = before + torch.tensor(self._num_written(chunk.lengths), device=new.device)
        losses = [
            self._losses(
                chunk,
                part,
                new[part],
                keys,
                torch_backend.count_ngram_matches(ngram_hashes, context[part, None]),
                tokens,
                num_visible[part],
            )
            for part in chunk.sampled().split(QUERIES)
        ]
        return torch.cat(losses).mean() * n, n, WrittenPairs(keys.half(), ngram_hashes, tokens.int())

    def detach(self, state: Any) -> Any:
        return WrittenPairs(state.keys.detach(), state.ngram_hashes, state.tokens)

    def groups(self) -> list[dict[str, Any]]:
        """Gates and scales learn faster than the keys; nothing decays."""
        named = [(name, p) for name, p in self._site.named_parameters() if p.requires_grad]
        keys = [p for name, p in named if name.startswith("key_")]
        rest = [p for name, p in named if not name.startswith("key_")]
        return [
            {"params": keys, "factor": 1.0, "weight_decay": 0.0},
            {"params": rest, "factor": 4.0, "weight_decay": 0.0},
        ]

    def _num_written(self, lengths: list[int]) -> list[int]:
        """For each token of the requests, how many of them are written when it is predicted: all before its block."""
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
        """−log p [q] of the picked targets; queries [q, d_k], keys [m, d_k], repeats [q, m], tokens [m], seen [q]."""
        site, targets, frozen = self._site, chunk.targets[sampled], chunk.log_probs[sampled]
        with torch.no_grad():
            states = chunk.states[sampled].to(self._head.dtype)
            log_z = (states * self._head[targets]).sum(-1).float() - frozen
            prior = (states @ self._head[tokens].T).float() - log_z[:, None]
        unwritten = torch.arange(len(tokens), device=num_visible.device) >= num_visible[:, None]
        cosines = queries @ keys.T
        found = torch_backend.score_candidates(
            tokens[None], cosines, ngram_matches, prior, unwritten, site.sharpness, site.prior, site.bonus
        )
        logit, shares = site.gate(found, chunk.entropy[sampled], queries)
        gamma = torch.sigmoid(logit) * (num_visible > 0)
        p = (1 - gamma) * frozen.exp() + gamma * torch_backend.memory_prob(targets, tokens[None], shares)
        return -(p + TINY).log()
