"""What a decoding step does between the base's linear maps, compiled for CPUs by Numba.

torch takes a dozen operators a layer for it, and attention one more for each sequence: half of a step. The twin is
`Backbone.forward`; each row is computed alone and in one order, so neither its neighbours nor threads change a bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from model.numba_support import Array, as_arrays, cached_njit, exp, parallel_ranges, row_max

PREFETCH_KEYS = 16  # keys that are asked for before they are needed
CACHE_LINE_BYTES = 64  # bytes that come from memory at once
MIN_TOKENS_PER_THREAD = 3000  # of one head's keys and values: fewer are attended to before another thread has woken up

if TYPE_CHECKING:
    from model.base.backbone import Backbone, DenseCache, Layer, LayerHook


def decode(
    base: Backbone, token_ids: Tensor, caches: Sequence[DenseCache], layer_hooks: Mapping[int, LayerHook] | None = None
) -> Tensor:
    """Hidden states `[B, d]` after the final norm, for the next token `[B]` of each of B sequences. Their caches get
    its keys and values, and stay as long as they were. sites: as in `Backbone.forward`."""
    config, B = base.config, len(token_ids)
    addresses = [(cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape[2]) for cache in caches]
    cache_positions = (np.array(addresses), at := np.array([cache.length for cache in caches]))
    rotation = [table[at] for table in as_arrays(base.cos, base.sin)]
    parts = _balanced_bounds(np.repeat(at + 1, config.num_kv_heads))
    hidden = F.embedding(token_ids, base.embedding)
    normed, added = torch.empty_like(hidden), torch.zeros_like(hidden)
    attended = hidden.new_empty(B, config.num_heads, config.head_dim)
    inner = hidden.new_empty(B, config.intermediate_size)

    def add_and_norm(more: Tensor, weight: Tensor) -> Tensor:
        _add_and_norm(*as_arrays(hidden, more, weight, normed), config.rms_norm_eps)
        return normed

    for index, layer in enumerate(cast("Iterable[Layer]", base.layers)):
        qkv = layer.qkv(add_and_norm(added, layer.attention_norm.weight)).numpy().reshape(B, -1, config.head_dim)
        _rotate_and_append(index, config.num_heads, qkv, *rotation, *cache_positions)
        parallel_ranges(partial(_attend, index), parts, qkv, *cache_positions, attended.numpy())
        _swiglu(*as_arrays(layer.gate_up(add_and_norm(layer.out(attended.flatten(1)), layer.mlp_norm.weight)), inner))
        added = layer.down(inner)
        if layer_hooks is not None and index in layer_hooks:
            hidden = layer_hooks[index]((hidden + added)[:, None])[:, 0].contiguous()
            added = torch.zeros_like(hidden)
    return add_and_norm(added, base.norm.weight)


def _balanced_bounds(tokens: Array) -> list[int]:
    """Where to cut units of so many tokens each [n], so that all threads have as many tokens."""
    done = tokens.cumsum()
    threads = max(1, min(torch.get_num_threads(), int(done[-1]) // MIN_TOKENS_PER_THREAD))
    return [0, *np.searchsorted(done, done[-1] * np.arange(1, threads) / threads), len(tokens)]


@intrinsic
def _pointer(_: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), build  # type: ignore[no-untyped-call]


@intrinsic
def _prefetch(_: Any, address: Any) -> Any:
    """Has the memory's line at an address fetched while other things are done; there need be nothing."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        line, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [line, number, number, number])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
        builder.call(fetch, [builder.inttoptr(given[0], line), number(0), number(3), number(1)])  # data, to be kept
        return context.get_dummy_value()

    return types.void(address), build


@cached_njit
def _array_at(address: int, n: int, hd: int) -> Array:
    """What lies at an address, as [n, hd]: each sequence's cache is a tensor of its own."""
    found: Array = numba.carray(_pointer(address), (n, hd))  # type: ignore[attr-defined, call-arg]
    return found


@cached_njit
def _add_and_norm(hidden: Array, added: Array, weight: Array, normed: Array, eps: float) -> None:
    """The residual stream grows; its root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467)."""
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
def _swiglu(gate_up: Array, inner: Array) -> None:
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""
    wide = inner.shape[1]
    for b in range(len(inner)):
        for i in range(wide):
            gate = gate_up[b, i]
            inner[b, i] = gate / (np.float32(1.0) + exp(min(-gate, np.float32(80.0)))) * gate_up[b, wide + i]


@cached_njit
def _rotate_and_append(layer: int, heads: int, qkv: Array, cos: Array, sin: Array, caches: Array, at: Array) -> None:
    """Rotates queries and keys in place, and puts keys and values behind what their sequences' caches hold."""
    shared, hd = (qkv.shape[1] - heads) // 2, qkv.shape[2]
    half = hd // 2
    for b in range(len(qkv)):
        for h in range(heads + shared):
            part = qkv[b, h]
            for i in range(half):
                x, y = part[i], part[i + half]
                part[i] = x * cos[b, i] + y * sin[b, i]
                part[i + half] = y * cos[b, i + half] + x * sin[b, i + half]
        for field in range(2):
            for g in range(shared):
                there = (layer * shared + g) * caches[b, 2] + at[b]
                _array_at(caches[b, field] + 4 * hd * there, 1, hd)[0] = qkv[b, heads + field * shared + g]


@cached_njit
def _attend(layer: int, first: int, last: int, qkv: Array, caches: Array, at: Array, out: Array) -> None:
    """Attention of heads in groups that share keys and values (Ainslie et al. 2023, arXiv 2305.13245): of some of the
    groups of all sequences."""
    heads, hd = out.shape[1:]
    shared = (qkv.shape[1] - heads) // 2
    group = heads // shared
    attention_weights = np.empty((group, at.max() + 1), np.float32)
    for unit in range(first, last):
        b, g = unit // shared, unit % shared
        S, there, mine = at[b] + 1, 4 * hd * (layer * shared + g) * caches[b, 2], slice(g * group, (g + 1) * group)
        keys, values = caches[b, 0] + there, caches[b, 1] + there
        _attention_scores(qkv[b, mine], S, keys, values, attention_weights)
        for h in range(group):
            _softmax(attention_weights[h, :S])
        _weighted_values(attention_weights, _array_at(values, S, hd), out[b, mine])


@cached_njit
def _attention_scores(q: Array, S: int, keys_at: int, values_at: int, scores: Array) -> None:
    """The first S keys; asks for those to come and for the values, since a page of memory ends every few of them."""
    hd, size = q.shape[1], 4 * q.shape[1]
    keys, scale = _array_at(keys_at, S, hd), np.float32(1.0 / math.sqrt(hd))
    for s in range(S):
        for line in range(s * size, (s + 1) * size, CACHE_LINE_BYTES):
            _prefetch(keys_at + PREFETCH_KEYS * size + line)  # type: ignore[call-arg]
            _prefetch(values_at + line)
        for h in range(len(q)):
            score = np.float32(0.0)
            for d in range(hd):
                score += q[h, d] * keys[s, d]
            scores[h, s] = score * scale


@cached_njit
def _softmax(row: Array) -> None:
    top, total = row_max(row), np.float32(0.0)
    for s in range(len(row)):
        row[s] = exp(row[s] - top)
        total += row[s]
    for s in range(len(row)):
        row[s] /= total


@cached_njit
def _weighted_values(attention_weights: Array, values: Array, out: Array) -> None:
    S, (group, hd) = len(values), out.shape
    out[:] = 0.0
    fours = S - S % 4  # at once: the sums are fetched and put back once for them
    for s in range(0, fours, 4):
        for h in range(group):
            w, x, y, z = (
                attention_weights[h, s],
                attention_weights[h, s + 1],
                attention_weights[h, s + 2],
                attention_weights[h, s + 3],
            )
            for d in range(hd):
                two = w * values[s, d] + x * values[s + 1, d]
                out[h, d] += two + (y * values[s + 2, d] + z * values[s + 3, d])
    for s in range(fours, S):
        for h in range(group):
            for d in range(hd):
                out[h, d] += attention_weights[h, s] * values[s, d]
