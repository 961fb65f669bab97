"""The reference of a decode step: torch's operators, for every family, device and dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model.base.backbone import Backbone, LayerHook
from model.base.kv_cache import DenseCache


def decode(
    backbone: Backbone,
    token_ids: Tensor,
    caches: Sequence[DenseCache],
    layer_hooks: Mapping[int, LayerHook] | None = None,
) -> Tensor:
    """Run one step as an ordinary forward pass: see `model.base.backbone.DecodeStepBackend`."""
    positions = torch.tensor([[cache.length] for cache in caches]).to(backbone.cos.device)
    attend = caches[0].attention(caches, 1)
    return backbone.forward_at(token_ids[:, None], positions, attend, layer_hooks)[:, 0]
