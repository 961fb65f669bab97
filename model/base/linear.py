"""Frozen affine maps, in which the base spends nearly all of its time: in the dtype of the base, and in fp16."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """An affine map `[..., in] -> [..., out]`. Its weights `[out, in]` are undefined until a checkpoint fills them.

    `pack` replaces plain weights by oneDNN's blocked layout, which gradients cannot pass. On two AVX-512 cores, the
    blocked layout is 2.4 times as fast as `F.linear` at 64 rows and at least 4 times at 4 rows. With this layout, the
    bits of a row's result do not depend on the number of other rows or of threads.
    """

    bias: Tensor | None

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device, dtype=dtype))
        offset = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", offset)

    def pack(self) -> None:
        """Switch to blocked weights if they are in fp32 on an x86 processor; otherwise do nothing."""
        weight = self.weight.detach()
        x86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
        if x86 and weight.device.type == "cpu" and weight.dtype == torch.float32:
            # oneDNN chooses the layout for a number of rows; the layout for 64 is fast for all numbers.
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
            self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Raises `RuntimeError` if a gradient would have to pass packed weights."""
        if not self.weight.is_mkldnn:
            return F.linear(x, self.weight, self.bias)
        if x.requires_grad:
            raise RuntimeError("packed weights pass no gradient: load the base as trainable")
        if x.numel() > x.shape[-1]:
            return self._packed_linear(x)
        # oneDNN rounds a single row differently from the same row among others, and two rows take the same time.
        twice = x.reshape(1, -1).expand(2, -1)
        return self._packed_linear(twice)[0].view(*x.shape[:-1], -1)

    def _packed_linear(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class Fp16Linear(nn.Module):
    """An affine map with weights in fp16; inputs, sums and results are in fp32.

    fp16 halves the weights that a step reads from main memory. FBGEMM's kernels need no more than AVX2. The bits of a
    row's result do not depend on the number of other rows.
    """

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        dense = weight.to_dense() if weight.is_mkldnn else weight
        self._packed = torch.ops.quantized.linear_prepack_fp16(dense, linear.bias)

    @staticmethod
    def supports(weight: Tensor) -> bool:
        """Return whether this machine has kernels that replace these weights: in fp32 on a CPU, with FBGEMM."""
        engines = torch.backends.quantized.supported_engines
        return weight.device.type == "cpu" and weight.dtype == torch.float32 and "fbgemm" in engines

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in] -> [..., out]`, both fp32."""
        rows = x.numel() // x.shape[-1]
        if (remainder := rows % 6) in (1, 2) and not _small_batches_round_alike():
            padded = F.pad(x.reshape(rows, -1), (0, 0, 0, 3 - remainder))
            return _fp16_linear(padded, self._packed)[:rows].view(*x.shape[:-1], -1)
        return _fp16_linear(x, self._packed)


def _fp16_linear(x: Tensor, packed: Any) -> Tensor:
    y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, packed)
    return y


@cache
def _small_batches_round_alike() -> bool:
    """Return whether FBGEMM's kernels for one and two rows round as its kernels for more rows do.

    FBGEMM uses the small kernels for the rows that remain after blocks of six. The kernels for AVX-512 round alike,
    those for AVX2 do not.
    """
    g = torch.Generator().manual_seed(0)
    packed = torch.ops.quantized.linear_prepack_fp16(torch.randn(256, 256, generator=g), None)
    x = torch.randn(3, 256, generator=g)
    in_parts = torch.cat([_fp16_linear(x[:1], packed), _fp16_linear(x[1:], packed)])
    return torch.equal(in_parts, _fp16_linear(x, packed))
