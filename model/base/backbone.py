"""The base: a frozen decoder of the Llama family, with one key-value cache per sequence.

Architecture: Touvron et al. 2023, "LLaMA" (arXiv 2302.13971). Its naive twin is `transformers`, in the tests.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base.config import LinearScaling, Llama3Scaling, ModelConfig
from model.base.linear import Fp16Linear, Linear
from model.device import decode_step_backend

Device = torch.device | str
LayerHook = Callable[[Tensor], Tensor]
# Layer index, q [B, H, T, hd], k and v [B, H_kv, T, hd] -> attended values, shaped like q.
AttentionFn = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class KVCache(ABC):
    """Keys and values of one sequence, of which `length` tokens are there; `capacity` is how many fit."""

    capacity: int
    length: int

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Reserved memory in bytes."""

    @abstractmethod
    def fork(self, capacity: int) -> KVCache:
        """An independent copy of the used prefix; raises `ValueError` if it does not fit into `capacity`."""

    @abstractmethod
    def attention(self, caches: Sequence[Any], T: int) -> AttentionFn:
        """Attention of one forward pass over each row's own cache, all of them of this kind, which it extends by `T`
        tokens. Raises `ValueError` where one has no room."""

    def advanced(self, tokens: int) -> Self:
        """This very cache as it will be so many tokens on: a row of a decoding step that follows other rows of it."""
        later = copy.copy(self)
        later.length += tokens
        return later

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; raises `ValueError` if there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be between 0 and the {self.length} cached tokens, got {length}")
        self.length = length

    def _check_fork(self, capacity: int) -> None:
        if capacity < self.length:
            raise ValueError(f"capacity must be at least the {self.length} cached tokens, got {capacity}")

    def check_capacity(self, T: int) -> None:
        """Raises `ValueError` where `T` more tokens do not fit."""
        if self.length + T > self.capacity:
            raise ValueError(f"cache must have room for {self.length + T} tokens, its capacity is {self.capacity}")


class DenseCache(KVCache):
    """Keys and values each `[L, H_kv, rows, hd]`, of which `length` rows are in use.

    The memory is reserved, not touched: on a CPU, pages become real as the sequence grows into them.
    """

    def __init__(self, config: ModelConfig, capacity: int, *, device: Device, dtype: torch.dtype) -> None:
        # Kernels round by how memory is aligned: every head starts at a cache line, whatever the capacity.
        rows = -(-capacity // 32) * 32
        shape = (config.num_layers, config.num_kv_heads, rows, config.head_dim)
        self._config = config
        self.capacity = capacity
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def fork(self, capacity: int) -> DenseCache:
        self._check_fork(capacity)
        twin = DenseCache(self._config, capacity, device=self.keys.device, dtype=self.keys.dtype)
        twin.keys[:, :, : self.length] = self.keys[:, :, : self.length]
        twin.values[:, :, : self.length] = self.values[:, :, : self.length]
        twin.length = self.length
        return twin

    def attention(self, caches: Sequence[DenseCache], T: int) -> AttentionFn:
        return _CachedAttention(caches, T)


class Layer(nn.Module):
    """One decoder layer; q, k, v share one matrix and so do the gate and the up projection."""

    def __init__(self, index: int, config: ModelConfig, *, device: Device, dtype: torch.dtype) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        d, heads, kv_heads, hd = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.index, self.heads, self.kv_heads, self.head_dim = index, heads, kv_heads, hd
        self.attention_norm = nn.RMSNorm(d, config.rms_norm_eps, device=device, dtype=dtype)
        self.qkv = linear(d, (heads + 2 * kv_heads) * hd, config.attention_bias)
        self.out = linear(heads * hd, d, config.attention_bias)
        self.mlp_norm = nn.RMSNorm(d, config.rms_norm_eps, device=device, dtype=dtype)
        self.gate_up = linear(d, 2 * config.intermediate_size, config.mlp_bias)
        self.down = linear(config.intermediate_size, d, config.mlp_bias)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: AttentionFn) -> Tensor:
        """`[B, T, d] -> [B, T, d]`, given the rotation `[B, T, 1, hd]` of each token's position."""
        B, T, _ = hidden.shape
        qkv: Tensor = self.qkv(self.attention_norm(hidden)).view(B, T, -1, self.head_dim)
        qk, v = qkv.split_with_sizes([self.heads + self.kv_heads, self.kv_heads], dim=2)
        q, k = _apply_rotary(qk, cos, sin).split_with_sizes([self.heads, self.kv_heads], dim=2)
        attended = attend(self.index, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return torch.add(hidden, self.down(F.silu(gate) * up))


class Backbone(nn.Module):
    """The frozen decoder. Its weights are undefined until a checkpoint fills them: see `load_backbone`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, *, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embedding = nn.Parameter(torch.empty(vocabulary, device=device, dtype=dtype))
        self.layers = nn.ModuleList(
            Layer(index, config, device=device, dtype=dtype) for index in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
        if config.tie_embeddings:
            self.head.weight = self.embedding
        cos, sin = _rotation_tables(config)
        self.register_buffer("cos", cos.to(device, dtype), persistent=False)
        self.register_buffer("sin", sin.to(device, dtype), persistent=False)
        self.requires_grad_(False).eval()
        self._decode_step: ModuleType | None = None

    def pack(self) -> None:
        """Make the linear maps as fast as they get; on a CPU, no gradient passes them afterwards."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()

    def fp16_decoder(self) -> Backbone:
        """This model as it decodes on CPUs: its linear maps in fp16, all other weights shared, and what a step does
        between them compiled; itself where there are no fast kernels for that."""
        if not Fp16Linear.supports(self.embedding):
            return self
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        twin = copy.deepcopy(self, shared)
        for parent in list(twin.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear):
                    setattr(parent, name, Fp16Linear(child))
        twin._decode_step = decode_step_backend()
        return twin

    @property
    def head_matrix(self) -> Tensor:
        """The head as a plain matrix `[V, d]`, whichever layout it is kept in."""
        if self.config.tie_embeddings:
            return self.embedding
        return self.head.weight.to_dense() if self.head.weight.is_mkldnn else self.head.weight

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for one sequence of at most `capacity` tokens."""
        return DenseCache(self.config, capacity, device=self.embedding.device, dtype=self.embedding.dtype)

    def forward(
        self,
        token_ids: Tensor,
        caches: Sequence[KVCache] | None = None,
        layer_hooks: Mapping[int, LayerHook] | None = None,
    ) -> Tensor:
        """Hidden states `[B, T, d]` after the final norm, for token ids `[B, T]`.

        Without caches, rows are independent sequences under a causal mask. With caches (one per row,
        extended in place), either one row prefills a chunk of any `T`, or each of `B` rows decodes one token
        at its own length. `layer_hooks[l]` replaces the residual stream `[B, T, d]` after layer `l`. Raises
        `ValueError` for other shapes and for sequences longer than the context or the cache; the caches then
        stay as they were. Several rows that decode may be one sequence, each on the cache `advanced` of the one before.
        """
        B, T = token_ids.shape
        starts = [0] if caches is None else [cache.length for cache in caches]
        self._check_shape(B, T, None if caches is None else len(caches), longest=max(starts, default=0) + T)
        dense = [cache for cache in caches or () if isinstance(cache, DenseCache)]
        if self._decode_step is not None and T == 1 and len(dense) == B:
            for each in dense:
                each.check_capacity(T)
            final: Tensor = self._decode_step.decode(self, token_ids[:, 0], dense, layer_hooks)[:, None]
        else:
            positions = (torch.tensor(starts)[:, None] + torch.arange(T)).to(self.cos.device)
            attend = _causal_attention if caches is None else caches[0].attention(caches, T)
            final = self.forward_at(token_ids, positions, attend, layer_hooks)
        for cache in caches or ():
            cache.length += T
        return final

    def forward_at(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: AttentionFn,
        layer_hooks: Mapping[int, LayerHook] | None = None,
    ) -> Tensor:
        """`forward` of token ids `[B, T]` at given positions `[B, T]`, with an attention of the caller's."""
        cos, sin = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)
        hidden = F.embedding(token_ids, self.embedding)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, cos, sin, attend)
            if layer_hooks is not None and index in layer_hooks:
                hidden = layer_hooks[index](hidden)
        final: Tensor = self.norm(hidden)
        return final

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits `[..., V]` for hidden states `[..., d]`, in fp32 (in fp64 if the model is)."""
        logits: Tensor = self.head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _check_shape(self, B: int, T: int, caches: int | None, longest: int) -> None:
        if B < 1 or T < 1:
            raise ValueError(f"token_ids must hold at least one token, got shape [{B}, {T}]")
        if caches is not None and caches != B:
            raise ValueError(f"caches must be one per row, got {caches} for {B} rows")
        if caches is not None and B > 1 and T > 1:
            raise ValueError(f"a cached step is one row, or one token per row, got shape [{B}, {T}]")
        if longest > self.config.max_context:
            raise ValueError(f"sequence of {longest} tokens exceeds the context of {self.config.max_context}")


class _CachedAttention:
    """Attention over dense caches.

    The views into a cache are cut for all layers at once, which is cheaper than layer by layer.
    """

    def __init__(self, caches: Sequence[DenseCache], T: int) -> None:
        self._prefixes, self._tails = [], []
        for cache in caches:
            cache.check_capacity(T)
            end = cache.length + T
            keys, values = cache.keys[:, None, :, :end], cache.values[:, None, :, :end]
            self._prefixes.append((keys.unbind(), values.unbind()))
            self._tails.append((keys[:, 0, :, -T:].unbind(), values[:, 0, :, -T:].unbind()))
        self._mask = causal_mask(self._prefixes[0][0][0], T) if T > 1 else None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new = [end[layer] for ends in self._tails for end in ends]
        torch._foreach_copy_(new, [part for row in zip(k.unbind(), v.unbind(), strict=True) for part in row])
        attended = [
            F.scaled_dot_product_attention(row, keys[layer], values[layer], attn_mask=self._mask, enable_gqa=True)
            for row, (keys, values) in zip(q[:, None].unbind(), self._prefixes, strict=True)
        ]
        return attended[0] if len(attended) == 1 else torch.cat(attended)


def causal_mask(keys: Tensor, T: int) -> Tensor:
    """`[T, S]` to add to the scores of the last `T` of the `S` positions in `keys`: -inf for those future."""
    S = keys.shape[2]
    future = torch.ones(T, S, dtype=torch.bool, device=keys.device).triu(S - T + 1)
    return keys.new_zeros(T, S).masked_fill(future, -math.inf)


def _causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[B, T, H, hd]` (Su et al. 2021, arXiv 2104.09864), given signed sines."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _rotation_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine `[max_context, hd]`; the angles are in fp32, as they were in training."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = _scale_frequencies(1.0 / config.rope_theta**half, config)
    angles = torch.arange(config.max_context, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _scale_frequencies(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Rotary frequencies `[hd / 2]` in radians per token, slowed for contexts longer than the original."""
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling(factor, low_freq_factor, high_freq_factor, original_context):
            turns = original_context * frequencies / (2 * math.pi)
            keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
            return keep * frequencies + (1 - keep) * frequencies / factor
