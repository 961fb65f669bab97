"""The choice of a decode step for a backbone. The contract is `model.base.backbone.DecodeStepBackend`."""

from __future__ import annotations

from model.base.backbone import Backbone, DecodeStepBackend
from model.decode import numba_step, torch_step


def choose_decode_step(backbone: Backbone) -> DecodeStepBackend:
    """Return the fastest decode step that supports the device, dtype and layers of `backbone`."""
    return numba_step.decode if numba_step.supports(backbone) else torch_step.decode
