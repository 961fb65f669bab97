"""A decoder layer as its description says: `model.base.config.LayerConfig`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base.attention import AttentionFn
from model.base.config import ModelConfig
from model.base.kv_cache import Device
from model.base.linear import Linear
from model.base.rotary import apply_rotary, rotated_order

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
}


class DecoderLayer(nn.Module):
    """One layer: attention with grouped queries, and a gated MLP. q, k and v share one matrix, and so do the gate and
    the up projection.

    A norm that the description does not have is None.
    """

    def __init__(self, index: int, config: ModelConfig, *, device: Device, dtype: torch.dtype) -> None:
        super().__init__()
        layer = config.layers[index]

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        def norm(size: int, exists: bool) -> nn.RMSNorm | None:
            return nn.RMSNorm(size, config.rms_norm_eps, device=device, dtype=dtype) if exists else None

        d, heads, kv_heads, hd = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.index, self.heads, self.kv_heads, self.head_dim = index, heads, kv_heads, hd
        self.config, self.activation = layer, ACTIVATIONS[layer.activation]
        self.attention_norm = norm(d, layer.norm_before)
        self.qkv = linear(d, (heads + 2 * kv_heads) * hd, layer.qkv_bias)
        has_qk_norm, normed_heads = layer.qk_norm is not None, (heads, kv_heads) if layer.qk_norm == "all" else (1, 1)
        self.q_norm, self.k_norm = (norm(n * hd, has_qk_norm) for n in normed_heads)
        self.out = linear(heads * hd, d, layer.out_bias)
        self.attention_out_norm = norm(d, layer.norm_after)
        self.mlp_norm = norm(d, layer.norm_before)
        self.gate_up = linear(d, 2 * config.intermediate_size, layer.mlp_bias)
        self.down = linear(config.intermediate_size, d, layer.mlp_bias)
        self.mlp_out_norm = norm(d, layer.norm_after)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: AttentionFn) -> Tensor:
        """Return the residual stream `[B, T, d]` after the layer.

        hidden: residual stream `[B, T, d]` before the layer.
        cos, sin: rotation `[B, T, 1, hd]` of each token's position in this layer.
        attend: attention over the tokens of this pass and of the caches, called once with `self.index`.
        """
        B, T, _ = hidden.shape
        qkv: Tensor = self.qkv(_normed(hidden, self.attention_norm)).view(B, T, -1, self.head_dim)
        qk, v = qkv.split_with_sizes([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split_with_sizes([self.heads, self.kv_heads], dim=2)
            qk = torch.cat([_normed_heads(q, self.q_norm), _normed_heads(k, self.k_norm)], dim=2)
        q, k = apply_rotary(qk, cos, sin).split_with_sizes([self.heads, self.kv_heads], dim=2)
        attended = attend(self.index, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        update = self.out(attended.transpose(1, 2).reshape(B, T, -1))
        hidden = hidden + _normed(update, self.attention_out_norm)
        gate, up = self.gate_up(_normed(hidden, self.mlp_norm)).chunk(2, dim=-1)
        return torch.add(hidden, _normed(self.down(self.activation(gate) * up), self.mlp_out_norm))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each weight and bias, and the tensor or the part of a tensor that holds it.

        A matrix of several parts is yielded as a whole too (`qkv`, `gate_up`): a family names the whole or the parts.
        """
        for name in ("attention_norm", "q_norm", "k_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm"):
            if (norm := getattr(self, name)) is not None:
                yield f"{name}.weight", norm.weight
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        inner = self.gate_up.weight.shape[0] // 2
        for name, parts in (
            ("qkv", {"q": q, "k": kv, "v": kv}),
            ("out", {}),
            ("gate_up", {"gate": inner, "up": inner}),
            ("down", {}),
        ):
            for kind, parameter in getattr(self, name).named_parameters():
                yield f"{name}.{kind}", parameter
                start = 0
                for part, rows in parts.items():
                    yield f"{part}.{kind}", parameter[start : start + rows]
                    start += rows

    def fold(self) -> None:
        """Fold into the weights, as a checkpoint has them, what `forward` and the fast paths do not compute.

        That is the order of a head's dimensions if only some are rotated, the scale of the scores, the magnitude of the
        rotation and the scale of what the layer adds.
        """
        layer, rotary, hd = self.config, self.config.rotary, self.head_dim
        weights = dict(self.weights())
        queries, keys = ([weights[k] for k in _weights_of(name) if k in weights] for name in "qk")
        if (order := rotated_order(rotary, hd)) is not None:
            for weight in (*queries, *keys):
                by_head = weight.unflatten(0, (-1, hd))
                by_head.copy_(by_head[:, order.to(weight.device)])
        scale = torch.full((hd,), layer.score_scale)
        if rotary is not None:
            rotated = torch.arange(hd) % (hd // 2) < rotary.dims // 2
            scale[rotated] *= rotary.magnitude**2
        if (scale != 1.0).any():
            for weight in queries if self.q_norm is None else [self.q_norm.weight]:
                by_head = weight.unflatten(0, (-1, hd))
                by_head.mul_(scale.to(weight).view(hd, *[1] * (by_head.dim() - 2)))
        if layer.residual_scale != 1.0:
            for part, norm in ((self.out, self.attention_out_norm), (self.down, self.mlp_out_norm)):
                for weight in part.parameters() if norm is None else [norm.weight]:
                    weight.mul_(layer.residual_scale)


def _weights_of(part: str) -> tuple[str, ...]:
    return f"{part}.weight", f"{part}.bias", f"{part}_norm.weight"


def _normed(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    if norm is None:
        return x
    normed: Tensor = norm(x)
    return normed


def _normed_heads(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Return queries or keys `[B, T, H, hd]`, normed by head or all together, as the size of the norm says."""
    normed: Tensor = norm(x.reshape(*x.shape[:2], -1, *norm.normalized_shape))
    return normed.view(x.shape)
