"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its scalings for longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.base.config import LinearScaling, Llama3Scaling, ModelConfig


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys `[B, T, H, hd]`.

    cos, sin: rows `[B, T, 1, hd]` of `rotation_tables`; the first half of the sines is negative.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def rotation_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return the cosines and the signed sines of all positions, each `[max_context, hd]` in fp32.

    The angles are computed in fp32, as they were in training.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = _scale_frequencies(1.0 / config.rope_theta**exponents, config)
    angles = torch.arange(config.max_context, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _scale_frequencies(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Slow the frequencies `[hd / 2]`, in radians per token, for contexts longer than the original one."""
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling(factor, low_freq_factor, high_freq_factor, original_context):
            turns = original_context * frequencies / (2 * math.pi)
            kept_share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
            return kept_share * frequencies + (1 - kept_share) * frequencies / factor
