"""The frozen decoder: embedding, layers, final norm and head, and the forward pass over them.

`model.base.config` describes what is computed; files are read by `model.base.checkpoint` and `model.base.families`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base.attention import AttentionFn, CausalAttention
from model.base.config import ConfigError, ModelConfig
from model.base.kv_cache import DenseCache, Device, KVCache
from model.base.layer import DecoderLayer
from model.base.linear import Fp16Linear, Linear
from model.base.rotary import apply_rotary, rotation_tables

# Replaces the residual stream [B, T, d] after a layer.
LayerHook = Callable[[Tensor], Tensor]


class DecodeStepBackend(Protocol):
    """One decode step: the next token of each of B sequences, each over a dense cache of its own.

    `model.decode.torch_step` is the reference and `model.decode.numba_step` the fast path;
    `model.decode.backend.choose_decode_step` chooses. `Backbone.fp16_decoder` takes the chosen backend.
    """

    def __call__(
        self,
        backbone: Backbone,
        token_ids: Tensor,
        caches: Sequence[DenseCache],
        layer_hooks: Mapping[int, LayerHook] | None = None,
    ) -> Tensor:
        """Return the hidden states `[B, d]` after the final norm, in the dtype of the backbone.

        token_ids: `[B]`; row b is the token at position `caches[b].length`.
        caches: one per row, each with room for one more token (the caller has checked). The step writes the token's
            keys and values of every layer at slot `caches[b].length`, and changes no other slot and no `length`. Rows
            on caches `advanced` from one another are one sequence: a row attends to the slots that earlier rows of
            this step write.
        layer_hooks: as in `Backbone.forward`; a hook gets `[B, 1, d]`.

        The bits of row b depend on `token_ids[b]`, the content of `caches[b]` and the hooks only, not on B, the other
        rows or the number of threads. Two backends agree up to rounding.
        """
        ...


class Backbone(nn.Module):
    """The frozen decoder of a base. Its weights are undefined until `load_backbone` fills them from a checkpoint.

    cos, sin: `[R, max_context, hd]`, one table for each different rotation among the layers.
    layer_rotations: index of each layer's table.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: Device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self._decode_step: DecodeStepBackend | None = None  # without one, a decode step is an ordinary forward pass
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embedding = nn.Parameter(torch.empty(vocabulary, device=device, dtype=dtype))
        self.layers = nn.ModuleList(
            DecoderLayer(index, config, device=device, dtype=dtype) for index in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
        if config.tie_embeddings:
            self.head.weight = self.embedding
        self.embedding_scale = float(torch.tensor(config.embedding_scale).to(dtype))  # rounded as the embedding is
        rotations = list(dict.fromkeys(layer.rotary for layer in config.layers))
        self.layer_rotations = [rotations.index(layer.rotary) for layer in config.layers]
        tables = [rotation_tables(rotary, config.head_dim, config.max_context) for rotary in rotations]
        cos, sin = (torch.stack(each) for each in zip(*tables, strict=True))
        self.register_buffer("cos", cos.to(device, dtype), persistent=False)
        self.register_buffer("sin", sin.to(device, dtype), persistent=False)
        self.requires_grad_(False).eval()

    def fold(self) -> None:
        """Bring the weights of a checkpoint into the form that `forward` computes with; call once, before `pack`."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.fold()
        if self.config.logit_scale != 1.0:
            self.norm.weight.mul_(self.config.logit_scale)

    def pack(self) -> None:
        """Bring the linear maps into their fastest layout. On a CPU, no gradient passes them afterwards."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()

    def fp16_decoder(self, decode_step: DecodeStepBackend) -> Backbone:
        """Return this decoder with its linear maps in fp16 and with the given decode step.

        All other weights are shared with this decoder. Returns this decoder itself, unchanged, if the machine has no
        kernels for fp16 weights: they need a CPU and a decoder in fp32.
        """
        if not Fp16Linear.supports(self.embedding):
            return self
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        decoder = copy.deepcopy(self, shared)
        for parent in list(decoder.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear):
                    setattr(parent, name, Fp16Linear(child))
        decoder._decode_step = decode_step
        return decoder

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters; an embedding that is the head too counts once."""
        shared = self.embedding.numel() if self.config.tie_embeddings and self.head.weight is not self.embedding else 0
        return sum(parameter.numel() for parameter in self.parameters()) - shared

    @property
    def head_matrix(self) -> Tensor:
        """Return the head as a plain matrix `[V, d]`, whatever layout holds it.

        Raises `ConfigError` if the logits are not this matrix times the hidden states.
        """
        if self.config.logit_softcap is not None:
            raise ConfigError(
                f"logits with the soft cap {self.config.logit_softcap} are not linear in the hidden states"
            )
        if self.config.tie_embeddings:
            return self.embedding
        return self.head.weight.to_dense() if self.head.weight.is_mkldnn else self.head.weight

    def new_cache(self, capacity: int) -> DenseCache:
        """Return an empty cache for one sequence of at most `capacity` tokens."""
        return DenseCache(self.config, capacity, device=self.embedding.device, dtype=self.embedding.dtype)

    def forward(
        self,
        token_ids: Tensor,
        caches: Sequence[KVCache] | None = None,
        layer_hooks: Mapping[int, LayerHook] | None = None,
    ) -> Tensor:
        """Return the hidden states `[B, T, d]` after the final norm, for token ids `[B, T]`.

        Without caches, rows are independent sequences under a causal mask. With caches (one per row, extended in
        place), either one row prefills a chunk of any `T`, or each of `B` rows decodes one token at its own length.
        Rows on caches `advanced` from one another are one sequence. `layer_hooks[l]` replaces the residual stream
        `[B, T, d]` after layer `l`. Raises `ValueError` for other shapes and for sequences longer than the context or
        the cache; the caches then stay as they were.
        """
        B, T = token_ids.shape
        starts = [0] if caches is None else [cache.length for cache in caches]
        self._check_shape(B, T, None if caches is None else len(caches), longest=max(starts, default=0) + T)
        dense = [cache for cache in caches or () if isinstance(cache, DenseCache)]
        if self._decode_step is not None and T == 1 and len(dense) == B:
            for cache in dense:
                cache.check_capacity(T)
            final = self._decode_step(self, token_ids[:, 0], dense, layer_hooks)[:, None]
        else:
            positions = (torch.tensor(starts)[:, None] + torch.arange(T)).to(self.cos.device)
            attend = CausalAttention(self.config) if caches is None else caches[0].attention(caches, T)
            final = self.forward_at(token_ids, positions, attend, layer_hooks)
        for extended in caches or ():
            extended.length += T
        return final

    def forward_at(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: AttentionFn,
        layer_hooks: Mapping[int, LayerHook] | None = None,
    ) -> Tensor:
        """Return `forward` of token ids `[B, T]` at given positions `[B, T]`, with an attention of the caller's."""
        tables = (table[:, positions].unsqueeze(3).unbind() for table in (self.cos, self.sin))
        rotations = list(zip(*tables, strict=True))
        hidden = F.embedding(token_ids, self.embedding)
        if self.embedding_scale != 1.0:
            hidden = hidden * self.embedding_scale
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, *rotations[self.layer_rotations[index]], attend)
            if layer_hooks is not None and index in layer_hooks:
                hidden = layer_hooks[index](hidden)
        final: Tensor = self.norm(hidden)
        return final

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token logits `[..., V]` for hidden states `[..., d]`, in fp32, or in fp64 if the model is."""
        logits: Tensor = self.head(hidden)
        if (cap := self.config.logit_softcap) is not None:
            logits = (logits / cap).tanh() * cap
        return logits if logits.dtype == torch.float64 else logits.float()

    def moved_keys(self, keys: Tensor, shift: int) -> Tensor:
        """Return rotated keys `[L, H_kv, T, hd]` as they would be `shift` positions later (earlier if negative)."""
        cos, sin = (table[self.layer_rotations, abs(shift)][:, None, None] for table in (self.cos, self.sin))
        return apply_rotary(keys, cos, sin if shift >= 0 else -sin)

    def _check_shape(self, B: int, T: int, num_caches: int | None, longest: int) -> None:
        if B < 1 or T < 1:
            raise ValueError(f"token_ids must hold at least one token, got shape [{B}, {T}]")
        if num_caches is not None and num_caches != B:
            raise ValueError(f"caches must be one per row, got {num_caches} for {B} rows")
        if num_caches is not None and B > 1 and T > 1:
            raise ValueError(f"a cached step is one row, or one token per row, got shape [{B}, {T}]")
        if longest > self.config.max_context:
            raise ValueError(f"sequence of {longest} tokens exceeds the context of {self.config.max_context}")
