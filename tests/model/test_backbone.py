"""The base computes the results of `transformers`, whatever the chunks and the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from model.base.backbone import Backbone
from model.base.checkpoint import load_backbone
from model.base.config import tiny_config
from model.base.kv_cache import DenseCache, KVCache
from model.base.linear import Linear
from model.decode.backend import choose_decode_step
from model.text.tokenizer import Tokenizer
from tests.model.random_models import random_llama, tokens

PROSE = (
    "The lighthouse stands on a rock four leagues west of the harbour. Nothing grows there but sea-pink and a grey "
    "lichen, and nobody lives there but the keeper, who trims the lamp at every bell and writes the log before she "
    "sleeps. On clear nights the light can be seen from the town: two flashes, a dark of nine seconds, two flashes. "
    "On foggy nights there is only the bell, one stroke to the minute, and the fishermen count the strokes home."
)
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa-1": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa-2-tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gqa-3-odd": {"hidden_size": 45, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    random_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(folder)


def cut(backbone: Backbone, ids: Tensor, cuts: list[int], cache: KVCache) -> Tensor:
    """Return the hidden states `[1, T, d]` of ids `[1, T]`, computed in chunks that end at `cuts`."""
    bounds = [0, *cuts, ids.shape[1]]
    chunks = [backbone(ids[:, a:b], [cache]) for a, b in pairwise(bounds) if a < b]
    return torch.cat(chunks, dim=1)


@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("config", CONFIGS)
def test_logits_equal_those_of_transformers(config: str, max_shard_size: str, tmp_path: Path) -> None:
    original = random_llama(**CONFIGS[config])
    original.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_size == "1GB"
    backbone = load_backbone(tmp_path)
    ids = tokens(2, 70)
    with torch.inference_mode():
        torch.testing.assert_close(backbone.logits(backbone(ids)), original(ids).logits, atol=1e-4, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("cuts", [[], [1], [16, 32, 48], [7, 8, 9, 50], list(range(1, 60))], ids=str)
def test_chunks_of_any_size_give_what_one_pass_gives(
    folder: Path, cuts: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    backbone = load_backbone(folder, dtype=dtype)
    ids = tokens(1, 60)
    hidden = cut(backbone, ids, cuts, backbone.new_cache(64))
    torch.testing.assert_close(hidden, backbone(ids), atol=tolerance, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_sequences_of_different_lengths_decode_together(folder: Path, dtype: torch.dtype, tolerance: float) -> None:
    backbone = load_backbone(folder, dtype=dtype)
    ids, starts, steps = tokens(5, 60), [1, 9, 23, 24, 40], 12
    caches = [backbone.new_cache(start + steps) for start in starts]
    for row, cache, start in zip(ids, caches, starts, strict=True):
        backbone(row[None, :start], [cache])
    decoded = [
        backbone(torch.stack([row[c.length] for row, c in zip(ids, caches, strict=True)])[:, None], caches)
        for _ in range(steps)
    ]
    expected = torch.stack([h[start:][:steps] for h, start in zip(backbone(ids), starts, strict=True)])
    torch.testing.assert_close(torch.cat(decoded, dim=1), expected, atol=tolerance, rtol=0)
    assert [cache.length for cache in caches] == [start + steps for start in starts]


@torch.inference_mode()
def test_fp32_is_close_to_fp64(folder: Path) -> None:
    single, double = load_backbone(folder), load_backbone(folder, dtype=torch.float64)
    ids = tokens(2, 60)
    assert double.logits(double(ids)).dtype == torch.float64
    torch.testing.assert_close(single(ids).double(), double(ids), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_half_precision_still_gives_fp32_logits(folder: Path) -> None:
    backbone = load_backbone(folder, dtype=torch.bfloat16)
    assert backbone.logits(backbone(tokens(1, 5))).dtype == torch.float32


@torch.inference_mode()
def test_packed_weights_compute_what_plain_ones_do(folder: Path) -> None:
    plain, packed = load_backbone(folder, trainable=True), load_backbone(folder)
    ids = tokens(1, 60)
    for part in (ids, ids[:, :1]):
        torch.testing.assert_close(packed(part), plain(part), atol=1e-4, rtol=0)
        torch.testing.assert_close(packed.logits(packed(part)), plain.logits(plain(part)), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_logits_take_hidden_states_of_any_shape(backbone: Backbone) -> None:
    hidden = backbone(tokens(1, 3))
    expected = backbone.logits(hidden)
    torch.testing.assert_close(backbone.logits(hidden[0, 2]), expected[0, 2])
    torch.testing.assert_close(backbone.logits(hidden[0]), expected[0])


@torch.inference_mode()
def test_a_prefill_repeats_bit_for_bit_whatever_else_is_served(backbone: Backbone) -> None:
    ids, other = tokens(1, 48), tokens(3, 48).flip(0)
    alone = cut(backbone, ids, [16, 32], backbone.new_cache(48))
    cache, neighbours = backbone.new_cache(97), [backbone.new_cache(64) for _ in other]
    again = []
    for start in (0, 16, 32):
        for row, neighbour in zip(other, neighbours, strict=True):
            backbone(row[None, start : start + 5], [neighbour])
        again.append(backbone(ids[:, start : start + 16], [cache]))
        backbone(other[:, :1], neighbours)
    assert torch.equal(torch.cat(again, dim=1), alone)


@torch.inference_mode()
@pytest.mark.parametrize("B", [2, 3, 5, 16, 37])
@pytest.mark.parametrize("fp16_decoder", [False, True])
def test_a_row_of_a_packed_decode_step_is_bit_identical_in_any_batch(
    backbone: Backbone, B: int, fp16_decoder: bool
) -> None:
    ids = tokens(B, 64)
    backbone = backbone.fp16_decoder(choose_decode_step(backbone)) if fp16_decoder else backbone
    caches = [backbone.new_cache(64) for _ in range(B)]
    for i, cache in enumerate(caches):
        backbone(ids[i : i + 1, : 7 + i], [cache])
    alone = [backbone(ids[i : i + 1, -1:], [cache.fork(cache.length + 1)]) for i, cache in enumerate(caches)]
    together = backbone(ids[:, -1:], caches)
    assert torch.equal(together, torch.cat(alone))
    logits = torch.cat([backbone.logits(hidden) for hidden in alone])
    assert torch.equal(backbone.logits(together), logits)


@torch.inference_mode()
def test_an_fp16_decoder_has_fp16_weights_and_shares_the_rest(folder: Path) -> None:
    plain, packed = load_backbone(folder, trainable=True), load_backbone(folder)
    fp16_decoder, ids = packed.fp16_decoder(choose_decode_step(packed)), tokens(2, 30)
    rounded = load_backbone(folder, trainable=True)
    for module in rounded.modules():
        if isinstance(module, Linear):
            module.weight = torch.nn.Parameter(module.weight.half().float(), requires_grad=False)
    torch.testing.assert_close(fp16_decoder(ids), rounded(ids), atol=2e-5, rtol=0)
    torch.testing.assert_close(fp16_decoder.logits(fp16_decoder(ids)), rounded.logits(rounded(ids)), atol=2e-5, rtol=0)
    assert not torch.equal(rounded(ids), plain(ids))
    assert fp16_decoder.embedding is packed.embedding and fp16_decoder.cos is packed.cos
    assert {name for name, _ in fp16_decoder.named_parameters()} < {name for name, _ in packed.named_parameters()}


def test_fp16_maps_round_each_row_alone_on_older_processors_too() -> None:
    """A process of its own, for FBGEMM reads its environment once. After blocks of six, 128 rows leave two, 127 one."""
    program = """if True:
        import torch
        from model.base.linear import Fp16Linear, Linear
        linear = Linear(576, 192, bias=True, device="cpu", dtype=torch.float32).requires_grad_(False)
        for parameter in linear.parameters():
            parameter.normal_()
        fp16, x = Fp16Linear(linear), torch.randn(128, 576)
        together = fp16(x)
        for n in (*range(1, 34), 65, 127):
            assert torch.equal(fp16(x[:n]), together[:n]), n
            assert torch.equal(fp16(x[None, -1]), together[None, -1]), n
    """
    environment = {**os.environ, "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=Path(__file__).parents[2])


@torch.inference_mode()
def test_a_fork_and_its_origin_go_separate_ways(backbone: Backbone) -> None:
    ids, other = tokens(1, 40), tokens(1, 40).flip(1)
    cache = backbone.new_cache(40)
    backbone(ids[:, :20], [cache])
    fork = cache.fork(64)
    assert (fork.length, fork.capacity, cache.capacity) == (20, 64, 40)
    backbone(other[:, 20:], [fork])
    hidden = backbone(ids[:, 20:], [cache])
    torch.testing.assert_close(hidden, backbone(ids)[:, 20:], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="capacity must be at least the 40 cached tokens, got 39"):
        cache.fork(39)


@torch.inference_mode()
def test_truncated_tokens_are_forgotten_bit_for_bit(backbone: Backbone) -> None:
    ids, other = tokens(1, 40), tokens(1, 40).flip(1)
    cache, fresh = backbone.new_cache(40), backbone.new_cache(40)
    backbone(ids[:, :20], [fresh])
    backbone(ids[:, :20], [cache])
    backbone(other[:, 20:35], [cache])
    cache.truncate(20)
    assert torch.equal(backbone(ids[:, 20:], [cache]), backbone(ids[:, 20:], [fresh]))
    with pytest.raises(ValueError, match="length must be between 0 and the 40 cached tokens, got 41"):
        cache.truncate(41)


def test_a_cache_costs_keys_and_values_of_every_layer() -> None:
    config = tiny_config(num_layers=3, num_kv_heads=2, head_dim=16)
    cache = DenseCache(config, 96, device="cpu", dtype=torch.float32)
    assert cache.nbytes == 2 * 3 * 2 * 96 * 16 * 4


@torch.inference_mode()
def test_hooks_see_and_replace_the_residual_stream(backbone: Backbone) -> None:
    ids, seen = tokens(2, 6), {}

    def watch(layer: int) -> Callable[[Tensor], Tensor]:
        def hook(hidden: Tensor) -> Tensor:
            seen[layer] = hidden
            return hidden

        return hook

    last = backbone.config.num_layers - 1
    plain = backbone(ids)
    assert torch.equal(backbone(ids, layer_hooks={0: watch(0), last: watch(last)}), plain)
    assert seen[0].shape == (2, 6, backbone.config.hidden_size)
    assert torch.equal(backbone.norm(seen[last]), plain)
    assert torch.equal(backbone(ids, layer_hooks={last: lambda hidden: seen[last] * 2}), backbone.norm(seen[last] * 2))


def test_gradients_pass_the_frozen_layers_to_what_is_trained(folder: Path) -> None:
    backbone, ids = load_backbone(folder, trainable=True), tokens(2, 6)
    shift = torch.zeros(backbone.config.hidden_size, requires_grad=True)

    def loss(amount: Tensor) -> Tensor:
        return backbone.logits(backbone(ids, layer_hooks={0: lambda hidden: hidden + amount}))[..., 0].sum()

    loss(shift).backward()
    assert shift.grad is not None
    assert all(weight.grad is None and not weight.requires_grad for weight in backbone.parameters())
    step = torch.zeros_like(shift)
    step[3] = 1e-2
    slope = (loss(step) - loss(-step)) / 2e-2
    torch.testing.assert_close(shift.grad[3], slope.detach(), rtol=1e-2, atol=1e-2)


def test_packed_weights_refuse_gradients(backbone: Backbone) -> None:
    shift = torch.zeros(backbone.config.hidden_size, requires_grad=True)
    with pytest.raises(RuntimeError, match="load the base as trainable"):
        backbone(tokens(1, 3), layer_hooks={0: lambda hidden: hidden + shift})


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((1, 0), [0], r"at least one token, got shape \[1, 0\]"),
        ((2, 1), [0], "caches must be one per row, got 1 for 2 rows"),
        ((2, 3), [0, 0], r"one row, or one token per row, got shape \[2, 3\]"),
        ((2, 1), [3, 64], "cache must have room for 65 tokens, its capacity is 64"),
        ((1, 129), [0], "sequence of 129 tokens exceeds the context of 128"),
        ((1, 129), None, "sequence of 129 tokens exceeds the context of 128"),
    ],
)
def test_a_step_that_cannot_be_done_changes_nothing(
    backbone: Backbone, shape: tuple[int, int], lengths: list[int] | None, message: str
) -> None:
    caches = None if lengths is None else [backbone.new_cache(64) for _ in lengths]
    for cache, length in zip(caches or [], lengths or [], strict=True):
        cache.length = length
    with torch.inference_mode(), pytest.raises(ValueError, match=message):
        backbone(tokens(*shape), caches)
    assert [cache.length for cache in caches or []] == (lengths or [])


@torch.inference_mode()
def test_a_failing_hook_leaves_the_caches_as_they_were(backbone: Backbone) -> None:
    def fail(hidden: Tensor) -> Tensor:
        raise ZeroDivisionError

    cache = backbone.new_cache(8)
    with pytest.raises(ZeroDivisionError):
        backbone(tokens(1, 4), [cache], layer_hooks={1: fail})
    assert cache.length == 0


@pytest.mark.real
@torch.inference_mode()
def test_the_real_base_equals_transformers_and_itself_in_pieces(base_folder: Path) -> None:
    backbone = load_backbone(base_folder)
    # In fp64: on some tokens the fp32 rounding of either side alone passes 1e-4.
    original = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float64)
    ids = torch.tensor([Tokenizer.load(base_folder).encode(PROSE)])
    assert ids.shape[1] > 92
    expected = original(ids).logits.float()
    pieces = cut(backbone, ids, [64, 90, 91, 92], backbone.new_cache(ids.shape[1]))
    for hidden in (backbone(ids), pieces):
        logits = backbone.logits(hidden)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
