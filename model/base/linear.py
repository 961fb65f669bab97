"""The frozen affine map in which the base spends nearly all of its time."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """`[..., in] -> [..., out]`. The weights `[out, in]` are undefined until something fills them.

    `pack` trades plain weights (and autograd) for oneDNN's blocked layout. Measured on two AVX-512 cores, it
    is 2.4 times as fast as `F.linear` at 64 rows and at least 4 times at 4; and each row's result is then,
    bit for bit, independent of how many other rows and threads take part.
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
        """Switch to blocked weights where that pays, in fp32 on an x86 processor; elsewhere do nothing."""
        weight = self.weight.detach()
        x86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
        if x86 and weight.device.type == "cpu" and weight.dtype == torch.float32:
            # The layout is chosen for the given number of rows, and that for 64 serves all numbers well.
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
            self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Raises `RuntimeError` where a gradient would have to pass packed weights."""
        if not self.weight.is_mkldnn:
            return F.linear(x, self.weight, self.bias)
        if x.requires_grad:
            raise RuntimeError("packed weights pass no gradient: load the base as trainable")
        if x.numel() > x.shape[-1]:
            return self._packed_linear(x)
        # oneDNN rounds a lone row differently from the same row in company, and two rows cost it the same.
        twice = x.reshape(1, -1).expand(2, -1)
        return self._packed_linear(twice)[0].view(*x.shape[:-1], -1)

    def _packed_linear(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class Fp16Linear(nn.Module):
    """The same map with weights in fp16, twice as many a second out of main memory; inputs, sums and results are fp32.

    FBGEMM's kernels need AVX2, no more. Each row's result is, bit for bit, independent of how many others take part.
    """

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        dense = weight.to_dense() if weight.is_mkldnn else weight
        self._packed = torch.ops.quantized.linear_prepack_fp16(dense, linear.bias)

    @staticmethod
    def supports(weight: Tensor) -> bool:
        """Whether this machine has kernels for what the weights are."""
        engines = torch.backends.quantized.supported_engines
        return weight.device.type == "cpu" and weight.dtype == torch.float32 and "fbgemm" in engines

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in] -> [..., out]`, both fp32."""
        rows = x.numel() // x.shape[-1]
        if (left := rows % 6) in (1, 2) and not _small_batches_round_alike():
            padded = F.pad(x.reshape(rows, -1), (0, 0, 0, 3 - left))
            return _fp16_linear(padded, self._packed)[:rows].view(*x.shape[:-1], -1)
        return _fp16_linear(x, self._packed)


def _fp16_linear(x: Tensor, packed: Any) -> Tensor:
    y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, packed)
    return y


@cache
def _small_batches_round_alike() -> bool:
    """Whether FBGEMM's kernels for one and two rows, which it takes for what six leave over, round as the others do.

    Those for AVX-512 do, those for AVX2 do not.
    """
    g = torch.Generator().manual_seed(0)
    packed = torch.ops.quantized.linear_prepack_fp16(torch.randn(256, 256, generator=g), None)
    x = torch.randn(3, 256, generator=g)
    few = torch.cat([_fp16_linear(x[:1], packed), _fp16_linear(x[1:], packed)])
    return torch.equal(few, _fp16_linear(x, packed))
