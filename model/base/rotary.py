"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its scalings for longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.base.config import FactorScaling, LinearScaling, Llama3Scaling, Rotary, YarnScaling


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys `[B, T, H, hd]`.

    cos, sin: rows `[B, T, 1, hd]` of `rotation_tables`; the first half of the sines is negative.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def rotated_order(rotary: Rotary | None, head_dim: int) -> Tensor | None:
    """Return the order `[hd]` of a head's dimensions in which each is rotated with the one half a head away.

    A checkpoint has the rotated dimensions first. Returns None where that is the same order.
    """
    if rotary is None or rotary.dims == head_dim:
        return None
    first, second = torch.arange(rotary.dims).chunk(2)
    left, right = torch.arange(rotary.dims, head_dim).chunk(2)
    return torch.cat([first, left, second, right])


def rotation_tables(rotary: Rotary | None, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and the signed sines of all positions, each `[positions, hd]` in fp32.

    Dimensions that are not rotated have cosine 1 and sine 0. The angles are computed in fp32, as they were in training.
    """
    frequencies = torch.zeros(head_dim // 2)
    if rotary is not None:
        exponents = torch.arange(0, rotary.dims, 2, dtype=torch.float32) / rotary.dims
        frequencies[: rotary.dims // 2] = _scale_frequencies(1.0 / rotary.theta**exponents, rotary)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _scale_frequencies(frequencies: Tensor, rotary: Rotary) -> Tensor:
    """Slow the frequencies `[dims / 2]`, in radians per token, for contexts longer than the original one."""
    match rotary.scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case FactorScaling(factors):
            return frequencies / torch.tensor(factors)
        case Llama3Scaling(factor, low_freq_factor, high_freq_factor, original_context):
            turns = original_context * frequencies / (2 * math.pi)
            kept_share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
        case YarnScaling(factor):
            kept_share = 1 - _yarn_ramp(rotary, rotary.scaling)
    return kept_share * frequencies + (1 - kept_share) * frequencies / factor


def _yarn_ramp(rotary: Rotary, scaling: YarnScaling) -> Tensor:
    """Return the share `[dims / 2]` by which each frequency is slowed."""

    def index_of(turns: float) -> float:
        """Return the index of the frequency that turns so often in the original context."""
        return rotary.dims * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dims - 1)
    width = high - low or 0.001
    return ((torch.arange(rotary.dims // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
