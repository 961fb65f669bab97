"""Arms that put earlier tokens of the stream before the request, into the context of the base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.base.backbone import Backbone
from model.base.kv_cache import KVCache
from research.evaluation.arms import Arm, Outcome, Setting, Subject, log_prob
from research.evaluation.prequential import Clock, Progress

BYTES = 2  # of a cached key or value, as in bf16


class _Context(Arm):
    """The common part of both arms. The context is BOS, kept tokens of earlier requests, and the request."""

    own_base = True

    def __init__(self, backbone: Backbone, bos: int) -> None:
        self.backbone, self.bos = backbone, bos
        config = backbone.config
        self.token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * BYTES

    def _extend(self, cache: KVCache, ids: Sequence[int]) -> Tensor:
        """Return the final hidden states [m, d] of m more tokens."""
        states: Tensor = self.backbone(torch.tensor([ids]), [cache])[0]
        return states

    def _score(self, states: Tensor, request: Sequence[int]) -> Tensor:
        return log_prob(self.backbone.logits(states), torch.tensor(request))


class LastTokens(_Context):
    """The last tokens of the history, as many as have keys and values in the bytes of the memory."""

    name, title = "last-tokens", "last tokens in context, equal bytes"
    equal_bytes = True
    requires = ("memory",)

    @torch.inference_mode()
    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        kept = subject.outcomes["memory"].state_bytes // self.token_bytes
        longest = max(map(len, subject.stream.requests))
        kept = min(kept, self.backbone.config.max_context - 1 - longest)
        history: list[int] = []
        found, clock = [], Clock()
        for request in subject.stream.requests:
            ids = [self.bos, *history[max(0, len(history) - kept) :], *request]
            states = self._extend(self.backbone.new_cache(len(ids)), ids[:-1])
            found.append(self._score(states[-len(request) :], request))
            history += request
            progress(1)
        return Outcome({"log_probs": torch.cat(found)}, clock.seconds, kept * self.token_bytes)


class FullHistory(_Context):
    """The whole history as far as the context allows. A full context is refilled to half with the latest tokens.

    Keys and values are kept from request to request, as a server with a prefix cache keeps them.
    """

    name, title = "full-history", "full history in context"
    costly = True

    @torch.inference_mode()
    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        limit = self.backbone.config.max_context
        history: list[int] = []
        cache = self.backbone.new_cache(limit)
        unread, longest = [self.bos], 0  # unread: tokens of the history that the cache lacks
        found, clock = [], Clock()
        for request in subject.stream.requests:
            if cache.length + len(unread) + len(request) > limit:
                cache.truncate(0)
                kept = min(limit // 2, limit - 1 - len(request))
                unread = [self.bos, *history[len(history) - kept :]]
            states = self._extend(cache, [*unread, *request[:-1]])
            found.append(self._score(states[-len(request) :], request))
            unread = [request[-1]]
            history += request
            longest = max(longest, cache.length)
            progress(1)
        return Outcome({"log_probs": torch.cat(found)}, clock.seconds, longest * self.token_bytes)
