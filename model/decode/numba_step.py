"""The fast path of a decode step on CPUs: Numba kernels for all that lies between the linear maps of a layer.

torch takes a dozen operators a layer for the same, and attention one more for each sequence: half of a step. The
reference is `model.decode.torch_step`. Each row is computed alone and in one order, so neither its neighbours nor the
number of threads change a bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor, nn

from model.base.backbone import Backbone, LayerHook
from model.base.kv_cache import DenseCache
from model.base.layer import DecoderLayer
from model.numba_support import Array, as_arrays, cached_njit, exp, parallel_ranges, row_max

PREFETCH_DISTANCE = 16  # keys between the key that is read and the key that is prefetched
CACHE_LINE_BYTES = 64
NO_WINDOW = 2**30  # tokens
MIN_TOKENS_PER_THREAD = 3000  # cached tokens of one KV head: with fewer, waking up a thread takes longer than the work


def supports(backbone: Backbone) -> bool:
    """Return whether `decode` computes this backbone: one in fp32 on a CPU, with activations that have a kernel."""
    weight = backbone.embedding
    has_kernels = all(layer.activation in _GATES for layer in backbone.config.layers)
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and has_kernels


def decode(
    backbone: Backbone,
    token_ids: Tensor,
    caches: Sequence[DenseCache],
    layer_hooks: Mapping[int, LayerHook] | None = None,
) -> Tensor:
    """Run one step with the kernels of this module: see `model.base.backbone.DecodeStepBackend`."""
    config, B = backbone.config, len(token_ids)
    addresses = [(cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape[2]) for cache in caches]
    lengths = np.array([cache.length for cache in caches])
    cache_positions = (np.array(addresses), lengths)
    cos, sin = (table[:, lengths] for table in as_arrays(backbone.cos, backbone.sin))
    parts = {window: _parts(lengths, config.num_kv_heads, window) for window in {each.window for each in config.layers}}
    hidden = F.embedding(token_ids, backbone.embedding)
    if backbone.embedding_scale != 1.0:
        hidden *= backbone.embedding_scale
    normed, added = torch.empty_like(hidden), torch.zeros_like(hidden)
    attended = hidden.new_empty(B, config.num_heads, config.head_dim)
    inner = hidden.new_empty(B, config.intermediate_size)

    def add_and_norm(update: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        if norm is None:
            return hidden.add_(update)
        _add_and_norm(*as_arrays(hidden, update, norm.weight, normed), config.rms_norm_eps)
        return normed

    for index, layer in enumerate(cast("Iterable[DecoderLayer]", backbone.layers)):
        window, rotation = layer.config.window, backbone.layer_rotations[index]
        qkv = layer.qkv(add_and_norm(added, layer.attention_norm))
        q_size = config.num_heads * config.head_dim
        _norm_parts(qkv, layer.q_norm, 0, q_size)
        _norm_parts(qkv, layer.k_norm, q_size, q_size + config.num_kv_heads * config.head_dim)
        heads = qkv.numpy().reshape(B, -1, config.head_dim)
        _rotate_and_append(index, config.num_heads, heads, cos[rotation], sin[rotation], *cache_positions)
        attend = partial(_attend, index, window or NO_WINDOW)
        parallel_ranges(attend, parts[window], heads, *cache_positions, attended.numpy())
        update = _norm_parts(layer.out(attended.flatten(1)), layer.attention_out_norm)
        mlp_input = add_and_norm(update, layer.mlp_norm)
        _GATES[layer.config.activation](*as_arrays(layer.gate_up(mlp_input), inner))
        added = _norm_parts(layer.down(inner), layer.mlp_out_norm)
        if layer_hooks is not None and index in layer_hooks:
            hidden = layer_hooks[index]((hidden + added)[:, None])[:, 0].contiguous()
            added = torch.zeros_like(hidden)
    return add_and_norm(added, backbone.norm)


def _parts(lengths: Array, kv_heads: int, window: int | None) -> list[int]:
    """Return the bounds of each thread's units of attention: pairs of a row and one of its key heads."""
    return _balanced_bounds(np.repeat(np.minimum(lengths + 1, window or NO_WINDOW), kv_heads))


def _norm_parts(x: Tensor, norm: nn.RMSNorm | None, first: int = 0, last: int | None = None) -> Tensor:
    """Norm in place the columns `first` to `last` of `x` `[B, n]`, in parts of the norm's size, if there is a norm."""
    if norm is not None:
        _norm_columns(*as_arrays(x, norm.weight), first, x.shape[1] if last is None else last, norm.eps)
    return x


def _balanced_bounds(tokens: Array) -> list[int]:
    """Return the bounds of each thread's units, so that all threads get about the same number of tokens.

    tokens: number of tokens of each unit `[n]`.
    """
    totals = tokens.cumsum()
    threads = max(1, min(torch.get_num_threads(), int(totals[-1]) // MIN_TOKENS_PER_THREAD))
    return [0, *np.searchsorted(totals, totals[-1] * np.arange(1, threads) / threads), len(tokens)]


@intrinsic
def _pointer(_: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), build  # type: ignore[no-untyped-call]


@intrinsic
def _prefetch(_: Any, address: Any) -> Any:
    """Prefetch the cache line at an address, which need not be mapped."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        line, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [line, number, number, number])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
        read, keep_in_all_caches, data = number(0), number(3), number(1)
        builder.call(fetch, [builder.inttoptr(given[0], line), read, keep_in_all_caches, data])
        return context.get_dummy_value()

    return types.void(address), build


@cached_njit
def _array_at(address: int, n: int, hd: int) -> Array:
    """Return the fp32 memory at an address as an array `[n, hd]`."""
    array: Array = numba.carray(_pointer(address), (n, hd))  # type: ignore[attr-defined, call-arg]
    return array


@cached_njit
def _add_and_norm(hidden: Array, added: Array, weight: Array, normed: Array, eps: float) -> None:
    """Add to the residual stream `[B, d]` and write its root mean square norm (Zhang and Sennrich 2019, arXiv
    1910.07467) into `normed`."""
    d = hidden.shape[1]
    for b in range(len(hidden)):
        square = np.float32(0.0)
        for i in range(d):
            hidden[b, i] += added[b, i]
            square += hidden[b, i] * hidden[b, i]
        scale = np.float32(1.0) / np.sqrt(square / np.float32(d) + np.float32(eps))
        for i in range(d):
            normed[b, i] = hidden[b, i] * scale * weight[i]


@cached_njit
def _norm_columns(x: Array, weight: Array, first: int, last: int, eps: float) -> None:
    """Replace each part of the weight's size, of the columns `first` to `last` of `x` `[B, n]`, by its norm."""
    size = len(weight)
    for b in range(len(x)):
        for start in range(first, last, size):
            part = x[b, start : start + size]
            square = np.float32(0.0)
            for i in range(size):
                square += part[i] * part[i]
            scale = np.float32(1.0) / np.sqrt(square / np.float32(size) + np.float32(eps))
            for i in range(size):
                part[i] = part[i] * scale * weight[i]


@cached_njit
def _swiglu(gate_up: Array, inner: Array) -> None:
    """Write SwiGLU (Shazeer 2020, arXiv 2002.05202) of gate and up projections `[B, 2 w]` into `inner` `[B, w]`."""
    width = inner.shape[1]
    for b in range(len(inner)):
        for i in range(width):
            gate = gate_up[b, i]
            inner[b, i] = gate / (np.float32(1.0) + exp(min(-gate, np.float32(80.0)))) * gate_up[b, width + i]


@cached_njit
def _geglu(gate_up: Array, inner: Array) -> None:
    """Write GEGLU (Shazeer 2020, arXiv 2002.05202) with tanh's GELU, x / (1 + exp(−2 √(2/π) (x + 0.044715 x³)))."""
    width = inner.shape[1]
    for b in range(len(inner)):
        for i in range(width):
            gate = gate_up[b, i]
            exponent = np.float32(-1.5957691216) * (gate + np.float32(0.044715) * gate * gate * gate)
            inner[b, i] = gate / (np.float32(1.0) + exp(min(exponent, np.float32(80.0)))) * gate_up[b, width + i]


_GATES: dict[str, Callable[[Array, Array], None]] = {"silu": _swiglu, "gelu_pytorch_tanh": _geglu}


@cached_njit
def _rotate_and_append(
    layer: int, heads: int, qkv: Array, cos: Array, sin: Array, caches: Array, lengths: Array
) -> None:
    """Rotate queries and keys in place, and append keys and values to the caches.

    qkv: `[B, H + 2 H_kv, hd]`. cos, sin: `[B, hd]`. caches: addresses of keys and values and the number of slots of a
    head `[B, 3]`. lengths: tokens in each cache `[B]`.
    """
    kv_heads, hd = (qkv.shape[1] - heads) // 2, qkv.shape[2]
    half = hd // 2
    for b in range(len(qkv)):
        for h in range(heads + kv_heads):
            part = qkv[b, h]
            for i in range(half):
                x, y = part[i], part[i + half]
                part[i] = x * cos[b, i] + y * sin[b, i]
                part[i + half] = y * cos[b, i + half] + x * sin[b, i + half]
        for field in range(2):
            for g in range(kv_heads):
                slot = (layer * kv_heads + g) * caches[b, 2] + lengths[b]
                _array_at(caches[b, field] + 4 * hd * slot, 1, hd)[0] = qkv[b, heads + field * kv_heads + g]


@cached_njit
def _attend(
    layer: int, window: int, first: int, last: int, qkv: Array, caches: Array, lengths: Array, out: Array
) -> None:
    """Write grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) into `out` `[B, H, hd]`, for the groups
    from `first` to `last` of all `B * H_kv`, over the `window` newest tokens; the other arguments are those of
    `_rotate_and_append`."""
    heads, hd = out.shape[1:]
    kv_heads = (qkv.shape[1] - heads) // 2
    group = heads // kv_heads
    attention_weights = np.empty((group, lengths.max() + 1), np.float32)
    for unit in range(first, last):
        b, g = unit // kv_heads, unit % kv_heads
        S = min(lengths[b] + 1, window)
        offset = 4 * hd * ((layer * kv_heads + g) * caches[b, 2] + lengths[b] + 1 - S)
        query_heads = slice(g * group, (g + 1) * group)
        keys, values = caches[b, 0] + offset, caches[b, 1] + offset
        _attention_scores(qkv[b, query_heads], S, keys, values, attention_weights)
        for h in range(group):
            _softmax(attention_weights[h, :S])
        _weighted_values(attention_weights, _array_at(values, S, hd), out[b, query_heads])


@cached_njit
def _attention_scores(q: Array, S: int, keys_at: int, values_at: int, scores: Array) -> None:
    """Write the scores of S keys at an address `[H, S]`, and prefetch later keys and all values.

    The processor's own prefetching stops at the end of a memory page, which comes every few keys.
    """
    hd, size = q.shape[1], 4 * q.shape[1]
    keys, scale = _array_at(keys_at, S, hd), np.float32(1.0 / math.sqrt(hd))
    for s in range(S):
        for line in range(s * size, (s + 1) * size, CACHE_LINE_BYTES):
            _prefetch(keys_at + PREFETCH_DISTANCE * size + line)  # type: ignore[call-arg]
            _prefetch(values_at + line)
        for h in range(len(q)):
            score = np.float32(0.0)
            for d in range(hd):
                score += q[h, d] * keys[s, d]
            scores[h, s] = score * scale


@cached_njit
def _softmax(row: Array) -> None:
    """Replace the scores `[S]` by their softmax."""
    top, total = row_max(row), np.float32(0.0)
    for s in range(len(row)):
        row[s] = exp(row[s] - top)
        total += row[s]
    for s in range(len(row)):
        row[s] /= total


@cached_njit
def _weighted_values(weights: Array, values: Array, out: Array) -> None:
    """Write the sums of values `[S, hd]` by weights `[H, S]` into `out` `[H, hd]`."""
    S, (group, hd) = len(values), out.shape
    out[:] = 0.0
    fours = S - S % 4  # four values at a time, so that each sum is loaded and stored once for four
    for s in range(0, fours, 4):
        for h in range(group):
            w, x, y, z = weights[h, s], weights[h, s + 1], weights[h, s + 2], weights[h, s + 3]
            for d in range(hd):
                two = w * values[s, d] + x * values[s + 1, d]
                out[h, d] += two + (y * values[s + 2, d] + z * values[s + 3, d])
    for s in range(fours, S):
        for h in range(group):
            for d in range(hd):
                out[h, d] += weights[h, s] * values[s, d]
