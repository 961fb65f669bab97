"""Law 2 for decode steps of fixed shapes over paged caches: they compute the results of `AdaptiveLM`.

Without a GPU the steps run operator by operator; a GPU replays captured graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.adaptive_lm import EMPTY_SESSION, AdaptiveLM, DecodeState
from model.base.backbone import Backbone
from model.base.kv_cache import KVCache
from model.decode.cuda_graphs import CudaGraphLM, wrap_for_serving
from model.decode.paged_cache import PAGE_SIZE, PagedCache, PagePool
from model.memory import Pool, PoolFullError
from model.memory.lexical.torch_backend import TorchBackend
from tests.model.tiny_lm import BLOCK, DEVICE, KINDS, build, learned, new_pool, rows_by_slot, text, tiny_backbone

pytestmark = pytest.mark.gpu
LENGTHS = [1, 7, 31, 32, 33, 60, 2, 40, 64, 5, 90, 3, 12]  # tokens before the first step; some end a page


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone().to(DEVICE)


@pytest.fixture(params=["lexical", "all"])
def lm(request: pytest.FixtureRequest, backbone: Backbone) -> AdaptiveLM:
    return build(backbone, *KINDS[request.param])


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def stepped(lm: AdaptiveLM, max_batch: int = 13) -> CudaGraphLM:
    return CudaGraphLM(lm, kv_tokens=13 * 128, max_batch=max_batch)


def prefilled(lm: AdaptiveLM, pool: Pool, index: Sequence[int]) -> tuple[list[KVCache], list[DecodeState]]:
    """Prefill one request of each session, each with its own length."""
    caches, decode_states = [], []
    for seed, (session, length) in enumerate(zip(index, LENGTHS, strict=False)):
        cache, decode_state, ids = lm.new_cache(length + 8), None, text(seed, length)
        for start in range(0, length, BLOCK):
            decode_state, _ = lm.block(ids[start : start + BLOCK], cache, pool, session, decode_state=decode_state)
        assert decode_state is not None
        caches.append(cache)
        decode_states.append(decode_state)
    return caches, decode_states


def generate(lm: AdaptiveLM, pool: Pool, index: Sequence[int], steps: int = 4) -> list[Tensor]:
    """Run greedy steps of one request of each session, and return predictions and states of each step."""
    caches, decode_states = prefilled(lm, pool, index)
    seen = []
    for _ in range(steps):
        scores = lm.predict(decode_states, pool, index)
        decode_states = lm.decode([int(token) for token in scores.argmax(-1)], caches, decode_states, pool, index)
        states = [
            torch.stack([decode_state.hidden for decode_state in decode_states]),
            torch.stack([decode_state.last_tokens for decode_state in decode_states]),
        ]
        inputs = [
            torch.stack([decode_state.inputs[layer] for decode_state in decode_states])
            for layer in decode_states[0].inputs
        ]
        seen += [lm.predict(decode_states, pool, index).log_softmax(-1), *states, *inputs]
    return seen


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compare bit for bit on a CPU; a GPU sums in no fixed order."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0 if DEVICE.type == "cpu" else 1e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 13])
def test_a_step_of_a_fixed_shape_equals_one_of_any_shape(lm: AdaptiveLM, size: int) -> None:
    """Batches are full or padded; sessions have rows, have no rows, or are the empty session; pages end on the way."""
    pool = new_pool(lm)
    sessions = [learned(lm, pool, seed=1), EMPTY_SESSION, learned(lm, pool, seed=2), pool.open()]
    index = [sessions[i % 4] for i in range(size)]
    for ours, reference in zip(generate(stepped(lm), pool, index), generate(lm, pool, index), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)


def test_rows_of_one_sequence_may_follow_one_another(lm: AdaptiveLM) -> None:
    pool, model = new_pool(lm), stepped(lm)
    session = learned(lm, pool, seed=1)
    (cache,), (decode_state,) = prefilled(model, pool, [session])
    tokens, rows = [5, 6, 7], []
    advanced = [cache.advanced(at) for at in range(3)]
    states = [decode_state.advanced(tokens[:at]) for at in range(3)]
    together = model.decode(tokens, advanced, states, pool, [session] * 3)
    for token in tokens:
        (decode_state,) = model.decode([token], [cache], [decode_state], pool, [session])
        rows.append(decode_state)
    for one, other in zip(together, rows, strict=True):
        torch.testing.assert_close(one.hidden, other.hidden, atol=1e-4, rtol=0)
        assert torch.equal(one.last_tokens, other.last_tokens)
    ours, reference = (
        model.predict(decode_states, pool, [session] * 3).log_softmax(-1) for decode_states in (together, rows)
    )
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)


def test_without_sessions_a_step_does_not_read_the_memory(lm: AdaptiveLM) -> None:
    pool, index = new_pool(lm), [EMPTY_SESSION] * 3
    for ours, reference in zip(generate(stepped(lm), pool, index), generate(lm, pool, index), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)


def test_padding_and_reused_pages_change_nothing(lm: AdaptiveLM) -> None:
    """A sequence gets pages that other sequences have freed, and computes the same results as alone."""
    pool, model = new_pool(lm), stepped(lm)
    index = [learned(lm, pool, seed=seed) for seed in (1, 2, 3)]
    alone = [generate(model, pool, [session]) for session in index[:1]]
    caches, decode_states = prefilled(model, pool, index)
    model.decode([1, 2, 3], caches, decode_states, pool, index)
    del caches, decode_states
    again = generate(model, pool, index[:1])
    assert_same(again, alone[0])


def test_freed_pages_hold_nothing(lm: AdaptiveLM) -> None:
    pool, model = new_pool(lm), stepped(lm)
    caches, decode_states = prefilled(model, pool, [learned(lm, pool, seed=1)])
    assert model.pages.keys[:, PAGE_SIZE:].any() and model.pages.values[:, PAGE_SIZE:].any()
    del caches, decode_states
    assert not model.pages.keys[:, PAGE_SIZE:].any() and not model.pages.values[:, PAGE_SIZE:].any()


class SyncDetector(TorchDispatchMode):
    """Records the operators that a CUDA graph cannot capture: reads of a tensor's values and copies from the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, parts = operator.__name__.split(".")[0], [x for arg in args if isinstance(arg, list) for x in arg]
        by_mask = name.startswith("index") and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in parts)
        if by_mask or name in WAITING:
            self.seen.append(name)
        return operator(*args, **(kwargs or {}))


WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
WAITING |= {"lift_fresh", "lift_fresh_copy", "equal", "is_nonzero"}


def test_nothing_of_a_step_waits_for_the_device_or_the_host(lm: AdaptiveLM) -> None:
    pool, model = new_pool(lm), stepped(lm)
    pool.sites["words"].backend = TorchBackend()  # a GPU reads with torch operators: these are watched
    for reads_memory in (True, False):
        step = model._step(pool, 4, reads_memory)
        with SyncDetector() as watched:
            step._compute()
        assert watched.seen == []
    with SyncDetector() as watched:
        x = torch.zeros(3, 4)
        bool(x[:, [1, 2]][x[:, :2] == 0].any())
    assert set(watched.seen) == {"lift_fresh", "index", "is_nonzero"}, "the detector sees operators that wait"


def test_all_steps_can_be_prepared_before_the_first_request(lm: AdaptiveLM) -> None:
    pool, model = new_pool(lm), stepped(lm, max_batch=5)
    assert model.sizes == [1, 2, 4, 8]
    model.prepare(pool)
    index = [learned(lm, pool, seed=1)] * 5
    for ours, reference in zip(generate(model, pool, index), generate(lm, pool, index), strict=True):
        torch.testing.assert_close(ours, reference, atol=5e-4, rtol=0)


def test_a_state_that_is_loaded_while_others_are_decoded_is_complete(lm: AdaptiveLM) -> None:
    pool, model = new_pool(lm), stepped(lm)
    first, second = (learned(lm, pool, seed=seed) for seed in (1, 2))
    states = [pool.dump(session) for session in (first, second)]
    expected = [*generate(model, pool, [first]), *generate(model, pool, [second])]
    other = new_pool(lm)
    sessions = [other.open(states[0])]
    found = generate(model, other, sessions)
    caches, decode_states = prefilled(model, other, sessions)
    model.decode([1], caches, decode_states, other, sessions)
    sessions.append(other.open(states[1]))
    found += generate(model, other, sessions[1:])
    assert_same(found, expected)
    assert [rows_by_slot(other.dump(session)) for session in sessions] == [rows_by_slot(state) for state in states]


def test_without_a_gpu_the_model_serves_as_it_is(lm: AdaptiveLM) -> None:
    served = wrap_for_serving(lm, kv_tokens=512, max_batch=4)
    assert (served is lm) == (not torch.cuda.is_available())


@pytest.mark.parametrize("kind", ["plain", "stepped"])
def test_a_base_in_bf16_has_fast_weights_in_fp32_and_similar_predictions(lm: AdaptiveLM, kind: str) -> None:
    """A GPU serves a base in bf16: nothing of the memory may be rounded to the base's precision."""
    half = build(tiny_backbone(torch.bfloat16).to(DEVICE), *lm.memory.config.sites)
    served = stepped(half) if kind == "stepped" else half
    predictions = []
    for model in (served, lm):
        pool = new_pool(model)
        index = [learned(model, pool, seed=1), EMPTY_SESSION]
        site = pool.sites["words"]
        assert site.session_scalars.dtype == torch.float32 and site.session_scalars[index[0]].any()
        assert pool.num_rows(index[0])["words"] > 0
        caches, decode_states = prefilled(model, pool, index)
        decode_states = model.decode([3, 4], caches, decode_states, pool, index)
        assert {decode_state.hidden.dtype for decode_state in decode_states} == {model.backbone.embedding.dtype}
        scores = model.predict(decode_states, pool, index)
        assert scores.dtype == torch.float32
        predictions.append(scores.log_softmax(-1).exp())
    assert float((predictions[0] - predictions[1]).abs().sum(-1).max()) < 0.2, "of 2, in total variation"


def test_a_request_that_does_not_fit_is_refused_before_the_device_runs(lm: AdaptiveLM) -> None:
    pool, model, context = new_pool(lm), stepped(lm), lm.backbone.config.max_context
    with pytest.raises(ValueError, match=f"at most the {context} tokens"):
        model.new_cache(context + 1)
    cache = model.new_cache(context)
    decode_state, _ = model.block(text(1, context), cache, pool)
    with pytest.raises(ValueError, match=f"room for {context + 1} tokens"):
        model.decode([1], [cache], [decode_state], pool, [EMPTY_SESSION])
    short = model.new_cache(5)
    decode_state, _ = model.block(text(1, 5), short, pool)
    with pytest.raises(ValueError, match="room for 6 tokens, its capacity is 5"):
        model.decode([1], [short], [decode_state], pool, [EMPTY_SESSION])
    assert short.length == 5


# Pages.


def pages_of(backbone: Backbone, tokens: int = 5 * PAGE_SIZE, sequences: int = 3) -> PagePool:
    return PagePool(backbone.config, tokens=tokens, sequences=sequences, device=DEVICE, dtype=torch.float32)


def test_a_fork_is_a_copy_and_truncated_tokens_are_forgotten(backbone: Backbone) -> None:
    ids, pages = torch.tensor([text(1, 80)], device=DEVICE), pages_of(backbone, tokens=4 * 128, sequences=4)
    cache = PagedCache(pages, 128)
    backbone(ids[:, :50], [cache])
    fork = cache.fork(100)
    after = backbone(ids[:, 50:80], [fork])
    backbone(ids[:, :30], [cache])
    cache.truncate(50)
    torch.testing.assert_close(backbone(ids[:, 50:80], [cache]), after, atol=1e-5, rtol=0)
    torch.testing.assert_close(after, backbone(ids)[:, 50:], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="capacity must be at least the 80"):
        cache.fork(79)
    with pytest.raises(ValueError, match="room for 101 tokens"):
        backbone(ids[:, :21], [fork])


def test_pages_are_reserved_by_capacity_and_freed_with_their_cache(backbone: Backbone) -> None:
    pages = pages_of(backbone)
    caches = [PagedCache(pages, capacity) for capacity in (1, PAGE_SIZE + 1, 3 * PAGE_SIZE)]
    assert [cache.nbytes for cache in caches] == [n * PAGE_SIZE * pages.token_bytes for n in (1, 2, 3)]
    assert len({cache.sequence for cache in caches}) == 3
    with pytest.raises(PoolFullError):
        PagedCache(pages, 1)
    del caches[1]
    again = PagedCache(pages, 2 * PAGE_SIZE)
    assert pages.utilization == 6 / 8
    with pytest.raises(PoolFullError):
        PagedCache(pages, 3 * PAGE_SIZE)
    assert pages.utilization == 6 / 8 and again.length == 0
