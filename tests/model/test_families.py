"""Every family computes its own model on every path, and refuses by name what it does not compute."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from model.adaptive_lm import EMPTY_SESSION, AdaptiveLM
from model.base.attention import CausalAttention
from model.base.backbone import Backbone
from model.base.checkpoint import CheckpointError, load_backbone
from model.base.config import ConfigError, tiny_config
from model.base.families import FAMILIES, family_of, parse_config
from model.base.kv_cache import DenseCache
from model.decode import numba_step, torch_step
from model.decode.backend import choose_decode_step
from model.decode.cuda_graphs import CudaGraphLM
from model.decode.paged_cache import PagedCache, PagePool
from tests.model.random_models import FAMILY_MODELS, VOCAB_SIZE, random_family_model, tokens
from tests.model.tiny_lm import build, new_pool

CASES = list(FAMILY_MODELS)
LENGTHS = [40, 1, 3, 8, 9, 10, 33]  # of cached sequences, around the windows of the cases
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@functools.cache
def original(case: str) -> PreTrainedModel:
    return random_family_model(case)


@pytest.fixture
def base(request: pytest.FixtureRequest, folders: Path) -> Backbone:
    return loaded(request.param, folders)


@functools.cache
def loaded(case: str, folders: Path) -> Backbone:
    """Return a case's base, from a checkpoint in several files."""
    original(case).save_pretrained(folders / case, max_shard_size="40KB")
    assert len(list((folders / case).glob("*.safetensors"))) > 1
    return load_backbone(folders / case)


every_case = pytest.mark.parametrize("base", CASES, indirect=True)


def test_every_family_has_a_case() -> None:
    assert {family for family, _ in FAMILY_MODELS.values()} == {family.name for family in FAMILIES}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, folders: Path) -> None:
    base, ids = loaded(case, folders), tokens(2, 70)
    expected = original(case)(ids).logits
    assert expected.std() > 0.1 and not torch.allclose(expected, expected[:, :1], atol=0.1)
    torch.testing.assert_close(base.logits(base(ids)), expected, atol=1e-4, rtol=0)
    assert base.config.family == original(case).config.model_type


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_in_bf16_has_the_logits_that_transformers_computes_from_it(case: str, tmp_path: Path) -> None:
    random_family_model(case).bfloat16().save_pretrained(tmp_path)
    reread = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    base, ids = load_backbone(tmp_path), tokens(1, 30)
    torch.testing.assert_close(base.logits(base(ids)), reread(ids).logits, atol=1e-4, rtol=0)


@every_case
def test_chunks_of_any_size_give_what_one_pass_gives(base: Backbone) -> None:
    ids, cache, chunks = tokens(1, 60), base.new_cache(60), []
    for size in (1, 6, 13, 1, 2, 30, 7):
        chunks.append(base(ids[:, cache.length : cache.length + size], [cache]))
    torch.testing.assert_close(torch.cat(chunks, dim=1), base(ids), **CLOSE)


@every_case
def test_the_compiled_step_equals_the_reference_at_any_length(base: Backbone) -> None:
    assert choose_decode_step(base) is numba_step.decode
    ids = tokens(len(LENGTHS), 64)
    caches, ref_caches = (
        [DenseCache(base.config, 64, device="cpu", dtype=torch.float32) for _ in LENGTHS] for _ in range(2)
    )
    for row, length in enumerate(LENGTHS):
        base(ids[row, None, :length], [caches[row]]), base(ids[row, None, :length], [ref_caches[row]])
    whole = base(ids)
    for step in range(4):
        next_ids = torch.stack([ids[row, cache.length] for row, cache in enumerate(caches)])
        found, expected = numba_step.decode(base, next_ids, caches), torch_step.decode(base, next_ids, ref_caches)
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(found, torch.stack([whole[i, n + step] for i, n in enumerate(LENGTHS)]), **CLOSE)
        for cache in (*caches, *ref_caches):
            cache.length += 1
    for one, other in zip(caches, ref_caches, strict=True):
        torch.testing.assert_close(one.keys[:, :, : one.length], other.keys[:, :, : other.length], **CLOSE)


@every_case
def test_a_row_of_a_step_is_bit_identical_in_any_batch(base: Backbone) -> None:
    decoder, ids = base.fp16_decoder(choose_decode_step(base)), tokens(5, 20)
    caches = [base.new_cache(20) for _ in ids]
    for row, cache in enumerate(caches):
        base(ids[row, None, : 3 + 3 * row], [cache])
    alone = [decoder(row[None, -1:], [cache.fork(20)]) for row, cache in zip(ids, caches, strict=True)]
    assert torch.equal(decoder(ids[:, -1:], caches), torch.cat(alone))


@every_case
def test_paged_caches_give_what_dense_ones_give(base: Backbone) -> None:
    pages = PagePool(base.config, tokens=512, sequences=4, device="cpu", dtype=torch.float32)
    ids, caches = tokens(3, 64), [PagedCache(pages, 64) for _ in range(3)]
    for row, (cache, length) in enumerate(zip(caches, (40, 5, 33), strict=True)):
        base(ids[row, None, :3], [cache]), base(ids[row, None, 3:length], [cache])
    whole = base(ids)
    for _ in range(3):
        starts = [cache.length for cache in caches]
        found = base(torch.stack([ids[row, start] for row, start in enumerate(starts)])[:, None], caches)
        torch.testing.assert_close(found[:, 0], torch.stack([whole[i, n] for i, n in enumerate(starts)]), **CLOSE)


@every_case
def test_a_step_of_a_fixed_shape_equals_the_base_and_an_empty_session_is_the_base(base: Backbone) -> None:
    lm = build(base)
    served, ids = CudaGraphLM(lm, kv_tokens=512, max_batch=4), tokens(2, 30)
    for model in (lm, served):
        pool = new_pool(model)
        caches = [model.new_cache(30) for _ in ids]
        states = [
            model.block(row[:length].tolist(), cache, pool)[0]
            for row, cache, length in zip(ids, caches, (20, 9), strict=True)
        ]
        states = model.decode([int(ids[0, 20]), int(ids[1, 9])], caches, states, pool, [EMPTY_SESSION] * 2)
        scores = model.predict(states, pool, [EMPTY_SESSION] * 2)
        expected = base.logits(torch.stack([base(ids[:1, :21])[0, -1], base(ids[1:, :10])[0, -1]]))
        torch.testing.assert_close(scores, expected, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_an_empty_session_has_the_logits_of_the_base_bit_for_bit(case: str, folders: Path) -> None:
    base, ids = loaded(case, folders), tokens(1, 21)
    lm: AdaptiveLM = build(base)
    pool, cache, plain = new_pool(lm), lm.new_cache(30), base.new_cache(30)
    state, _ = lm.block(ids[0, :20].tolist(), cache, pool)
    base(ids[:, :20], [plain])
    (state,) = lm.decode([int(ids[0, 20])], [cache], [state], pool, [EMPTY_SESSION])
    assert torch.equal(lm.predict([state], pool, [EMPTY_SESSION]), base.logits(base(ids[:, 20:], [plain]))[:, 0])


def keys_at(base: Backbone, ids: Tensor, start: int) -> Tensor:
    """Return the keys `[L, H_kv, T, hd]` of tokens `[1, T]` that stand at position `start` with nothing before them."""
    keys, causal = [], CausalAttention(base.config)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.append(k[0])
        return causal(layer, q, k, v)

    base.forward_at(ids, start + torch.arange(ids.shape[1])[None], attend)
    return torch.stack(keys)


@every_case
@pytest.mark.parametrize(("start", "end"), [(3, 57), (57, 3), (9, 9)])
def test_moved_keys_are_those_of_the_tokens_at_their_new_positions(base: Backbone, start: int, end: int) -> None:
    """Recall moves the keys of an episode to where a request reads it: at every layer, whatever it rotates."""
    ids = tokens(1, 20)
    moved = base.moved_keys(keys_at(base, ids, start), end - start)
    torch.testing.assert_close(moved, keys_at(base, ids, end), atol=5e-4, rtol=1e-4)


def test_longrope_ends_where_other_frequencies_would_begin(folders: Path) -> None:
    assert loaded("phi3-part", folders).config.max_context == 128
    same = original("phi3-part").config.to_dict()
    same["rope_parameters"] |= {"long_factor": same["rope_parameters"]["short_factor"]}
    assert parse_config(same).max_context == 256


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("qwen2", {"quantization_config": {"bits": 4}}, "quantization_config must be absent"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types must be .*, got chunked_attention"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must be a list of 3 names"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding_window must be an integer, got None"),
        ("qwen3", {"hidden_act": "relu2"}, "hidden_act must be silu or gelu_pytorch_tanh, got relu2"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types must be absent"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping must be absent, got 50\.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be absent"),
        ("phi3", {"partial_rotary_factor": 1.5, "rope_parameters": None}, "at most head_dim 16, got 24"),
        ("phi3-part", {"rope_parameters": {"rope_type": "longrope"}}, "short_factor must be a list of numbers"),
        ("olmo2", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor must be 1, got 0\.5"),
        ("granite", {"residual_multiplier": -1}, "residual_multiplier must be a positive number, got -1"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must be a list of 3 numbers 0 or 1"),
    ],
)
def test_what_a_family_does_not_compute_is_refused_by_name(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(original(case).config.to_dict() | changes)


def test_a_tensor_that_a_family_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    """A Llama checkpoint with biases is no Qwen2 checkpoint."""
    original("llama").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "Qwen2ForCausalLM"))
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.layers\.0\.\S+\.bias"):
        load_backbone(tmp_path)


def test_messages_name_all_families() -> None:
    with pytest.raises(ConfigError, match=r"must be LlamaForCausalLM or Qwen2ForCausalLM or .*, got GPT2LMHeadModel"):
        parse_config({"architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(ConfigError, match=r"family must be llama or qwen2 or .*, got gpt2"):
        family_of(tiny_config(family="gpt2"))


def test_a_head_with_a_soft_cap_is_no_matrix(folders: Path) -> None:
    base = loaded("gemma3-capped", folders)
    with pytest.raises(ConfigError, match=r"soft cap 3\.0"):
        _ = base.head_matrix
    plain = loaded("granite", folders)
    hidden = plain(tokens(1, 3))
    torch.testing.assert_close(hidden @ plain.head_matrix.T, plain.logits(hidden), **CLOSE)
    assert plain.head_matrix.shape == (VOCAB_SIZE, 64)
