"""The laws of the design on the whole model: a tiny random base with sites of every kind and random weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from model.adaptive_lm import EMPTY_SESSION, AdaptiveLM
from model.base.backbone import Backbone
from model.decode.backend import choose_decode_step
from model.memory import LexicalSite
from tests.model.tiny_lm import (
    BLOCK,
    KINDS,
    LEXICAL,
    MIDDLE,
    WIDTH,
    RequestReader,
    build,
    decode_state_of,
    learn,
    learned,
    new_pool,
    read,
    rows_by_slot,
    text,
    tiny_backbone,
)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture(params=KINDS)
def lm(request: pytest.FixtureRequest, backbone: Backbone) -> AdaptiveLM:
    return build(backbone, *KINDS[request.param])


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def base_log_probs(backbone: Backbone, ids: Sequence[int]) -> Tensor:
    """Return the base's log-probability of each token but the first, without cache, blocks and memory."""
    logits = backbone.logits(backbone(torch.tensor([ids])))[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]


# Law 1: empty is base.


@pytest.mark.parametrize("opened", [False, True])
def test_an_empty_session_predicts_as_the_base_bit_for_bit(lm: AdaptiveLM, opened: bool) -> None:
    pool, ids = new_pool(lm), text(0, BLOCK)
    index = pool.open() if opened else EMPTY_SESSION
    alone = lm.backbone(torch.tensor([ids]), [lm.backbone.new_cache(99)])[0]
    decode_state, _ = lm.block(ids, lm.backbone.new_cache(99), pool, index)
    assert torch.equal(decode_state.hidden, alone[-1])
    assert torch.equal(lm.predict([decode_state], pool, [index]), lm.backbone.logits(alone[-1:]))
    scored = read(lm, pool, index, text(0))
    assert torch.equal(scored.adapted, scored.frozen)


def test_an_empty_session_stays_the_base_in_a_batch_with_full_ones(lm: AdaptiveLM) -> None:
    pool = new_pool(lm)
    index = [pool.open(), learned(lm, pool, seed=1), EMPTY_SESSION, learned(lm, pool, seed=2)]
    requests = [RequestReader(lm, text(seed, BLOCK)) for seed in range(4)]
    for request, session in zip(requests, index, strict=True):
        request.step(pool, session)
    last, plain = [7, 8, 9, 10], [lm.backbone.new_cache(99) for _ in requests]
    for request, cache in zip(requests, plain, strict=True):
        lm.backbone(torch.tensor([request.ids]), [cache])
    alone = lm.backbone.logits(lm.backbone(torch.tensor(last)[:, None], plain)[:, 0])
    decode_states = lm.decode(last, [r.cache for r in requests], [decode_state_of(r) for r in requests], pool, index)
    predicted = lm.predict(decode_states, pool, index)
    same = [torch.equal(predicted[b], alone[b]) for b in range(4)]
    assert same == [True, False, True, False]


def test_without_a_session_the_lexical_memory_is_not_read(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adaptation off the memory costs nothing (law 1)."""

    def fail(*_: object) -> None:
        raise AssertionError("the memory was addressed")

    lm = build(backbone, LEXICAL)
    pool = new_pool(lm)
    monkeypatch.setattr(LexicalSite, "address", fail)
    request = read(lm, pool, EMPTY_SESSION, text(0))
    lm.predict(
        lm.decode([1], [request.cache], [decode_state_of(request)], pool, [EMPTY_SESSION]), pool, [EMPTY_SESSION]
    )


def test_the_frozen_scores_are_those_of_the_base_whatever_the_memory_holds(lm: AdaptiveLM) -> None:
    pool = new_pool(lm)
    session, ids = learned(lm, pool, seed=1), text(1)
    request = read(lm, pool, session, ids)
    torch.testing.assert_close(request.frozen, base_log_probs(lm.backbone, ids), atol=1e-4, rtol=0)
    assert not torch.allclose(request.adapted, request.frozen, atol=1e-2), "the memory changes the scores"


def test_blocks_chained_by_their_decode_state_are_one_text(lm: AdaptiveLM) -> None:
    ids = text(3)
    request = read(lm, new_pool(lm), EMPTY_SESSION, ids)
    assert len(request.adapted) == len(ids) - 1, "only the first token has no predictor"
    torch.testing.assert_close(request.adapted, base_log_probs(lm.backbone, ids), atol=1e-4, rtol=0)


def test_a_memory_below_the_output_needs_a_second_cache_for_the_frozen_scores(backbone: Backbone) -> None:
    for kind, needed in [("lexical", False), ("output", False), ("middle", True), ("all", True)]:
        lm = build(backbone, *KINDS[kind])
        assert lm.needs_frozen_cache == needed
    with pytest.raises(ValueError, match="frozen_cache is needed"):
        lm.block(text(0, 3), backbone.new_cache(9), new_pool(lm), score_frozen=True)


# Law 3: one stream, one state.


def run_stream(
    lm: AdaptiveLM, *, reopen: bool = False, with_neighbours: bool = False, frozen: bool = True
) -> dict[tuple[str, int], bytes]:
    """Run two requests of one session in order and return the state that they leave.

    reopen: dump the session into another pool in between. with_neighbours: other sessions read, learn and decode after
    each block.
    """
    pool = new_pool(lm)
    others = [learned(lm, pool, seed=10 + i) for i in range(2)] if with_neighbours else []
    session = pool.open()
    for seed in (1, 2):
        draft, request = pool.draft(session), RequestReader(lm, text(seed))
        busy = pool.draft(others[0]) if with_neighbours else None
        guest, third = RequestReader(lm, text(20 + seed, 99)), RequestReader(lm, text(30, 5))
        if with_neighbours:
            third.step(pool, others[1])
        more = True
        while more:
            more = request.step(pool, draft.index, draft, frozen=frozen)
            if busy is not None:
                guest.step(pool, busy.index, busy)
                decode_states = [decode_state_of(guest), decode_state_of(third)]
                lm.decode([3, 4], [guest.cache.fork(200), third.cache], decode_states, pool, [busy.index, others[1]])
        draft.commit()
        if busy is not None:
            busy.rollback()
        if reopen:
            state, pool = pool.dump(session), new_pool(lm)
            learned(lm, pool, seed=40 + seed)
            session = pool.open(state)
    return rows_by_slot(pool.dump(session))


def test_the_same_requests_leave_the_same_bits(lm: AdaptiveLM) -> None:
    state = run_stream(lm)
    assert state
    assert run_stream(lm, reopen=True, frozen=False) == state, (
        "before or after a restart, with or without frozen scores"
    )
    assert run_stream(lm, with_neighbours=True) == state, "with other sessions on the device"


def test_the_order_of_turns_matters(lm: AdaptiveLM) -> None:
    pool = new_pool(lm)
    states = []
    for order in ((1, 2), (2, 1)):
        session = pool.open()
        for seed in order:
            learn(lm, pool, session, text(seed))
        states.append(rows_by_slot(pool.dump(session)))
    assert states[0] != states[1]


def test_a_turn_reads_what_it_has_written_itself(lm: AdaptiveLM) -> None:
    pool = new_pool(lm)
    draft = pool.draft(pool.open())
    request = read(lm, pool, draft.index, text(1), draft)
    first, rest = slice(0, BLOCK - 1), slice(BLOCK - 1, None)
    assert torch.equal(request.adapted[first], request.frozen[first])
    assert not torch.equal(request.adapted[rest], request.frozen[rest])


# Law 4: no neighbours.


def test_the_other_rows_of_a_batch_change_no_bit(lm: AdaptiveLM) -> None:
    """In batches of one shape, row 1 is the same session at the same position of the same text."""
    pool = new_pool(lm)
    mine, others = learned(lm, pool, seed=1), [learned(lm, pool, seed=seed) for seed in (2, 3)]
    seen = []
    for index, seed in [
        ([mine, mine, mine], 4),
        ([others[0], mine, others[1]], 5),
        ([EMPTY_SESSION, mine, EMPTY_SESSION], 6),
    ]:
        requests = [RequestReader(lm, text(seed)), RequestReader(lm, text(1)), RequestReader(lm, text(seed + 10, 5))]
        for request, session in zip(requests, index, strict=True):
            request.step(pool, session)
        caches = [request.cache for request in requests]
        rows, decode_states = [], [decode_state_of(request) for request in requests]
        for _ in range(3):
            decode_states = lm.decode([seed, 4, 2 * seed], caches, decode_states, pool, index)
            rows += [
                lm.predict(decode_states, pool, index)[1],
                decode_states[1].hidden,
                *decode_states[1].inputs.values(),
            ]
        seen.append(torch.cat(rows))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("fp16_decoder", [False, True])
def test_a_sequence_decodes_to_the_same_bits_in_a_batch_of_any_size(lm: AdaptiveLM, fp16_decoder: bool) -> None:
    decoder = lm.backbone.fp16_decoder(choose_decode_step(lm.backbone)) if fp16_decoder else None
    lm = AdaptiveLM(lm.backbone, lm.memory, decoder=decoder)
    pool = new_pool(lm)
    sessions = [learned(lm, pool, seed=seed) for seed in (1, 2, 3)]
    index, seen = [*sessions, EMPTY_SESSION, sessions[0]], []
    for size in (1, 2, 3, 5):
        requests = [RequestReader(lm, text(seed, BLOCK - 1)) for seed in (1, 4, 5, 6, 7)[:size]]
        for request, session in zip(requests, index, strict=False):
            request.step(pool, session)
        caches, decode_states = [r.cache for r in requests], [decode_state_of(r) for r in requests]
        decode_states = lm.decode([4, 5, 6, 7, 8][:size], caches, decode_states, pool, index[:size])
        seen.append(
            (
                decode_states[0].hidden,
                *decode_states[0].inputs.values(),
                lm.predict(decode_states, pool, index[:size])[0],
            )
        )
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("fp16_decoder", [False, True])
def test_rows_that_follow_one_another_are_steps_of_their_own(lm: AdaptiveLM, fp16_decoder: bool) -> None:
    decoder = lm.backbone.fp16_decoder(choose_decode_step(lm.backbone)) if fp16_decoder else None
    lm = AdaptiveLM(lm.backbone, lm.memory, decoder=decoder)
    pool = new_pool(lm)
    session, neighbour = learned(lm, pool, seed=1), learned(lm, pool, seed=2)
    tokens, alone = [4, 5, 6, 7], list[Tensor]()
    request = RequestReader(lm, text(1, BLOCK - 1))
    request.step(pool, session)
    cache, decode_state = request.cache.fork(BLOCK + 9), decode_state_of(request)
    for token in tokens:
        (decode_state,) = lm.decode([token], [cache], [decode_state], pool, [session])
        alone += [
            decode_state.last_tokens,
            decode_state.hidden,
            *decode_state.inputs.values(),
            lm.predict([decode_state], pool, [session])[0],
        ]
    other = RequestReader(lm, text(3, 9))
    other.step(pool, neighbour)
    caches = [request.cache.advanced(at) for at in range(4)]
    decode_states = [decode_state_of(request).advanced(tokens[:at]) for at in range(4)]
    index = [session] * 4 + [neighbour]
    rows = lm.decode([*tokens, 9], [*caches, other.cache], [*decode_states, decode_state_of(other)], pool, index)
    together, scores = list[Tensor](), lm.predict(rows, pool, index)
    for row, score in zip(rows[:4], scores, strict=False):
        together += [row.last_tokens, row.hidden, *row.inputs.values(), score]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_decoder_changes_no_bit_of_scores_and_learned_rows(lm: AdaptiveLM) -> None:
    fp16_decoder = AdaptiveLM(lm.backbone, lm.memory, decoder=lm.backbone.fp16_decoder(choose_decode_step(lm.backbone)))
    pool, images, scores = new_pool(lm), [], []
    for one in (lm, fp16_decoder):
        session = pool.open()
        scores.append(learn(one, pool, session, text(1)).adapted)
        images.append(rows_by_slot(pool.dump(session)))
    assert images[0] == images[1] and torch.equal(*scores)


# Law 5: score, then update.


def test_scores_do_not_depend_on_whether_they_are_learned(lm: AdaptiveLM) -> None:
    pool = new_pool(lm)
    session, ids = learned(lm, pool, seed=1), text(2, BLOCK)
    draft = pool.draft(session)
    learning = read(lm, pool, draft.index, ids, draft)
    assert draft.touched()
    draft.rollback()
    assert torch.equal(learning.adapted, read(lm, pool, session, ids).adapted)


def test_scores_do_not_depend_on_what_comes_later(lm: AdaptiveLM) -> None:
    ids = text(2)
    adapted = []
    for end in ([1, 2], [3, 4]):
        pool = new_pool(lm)
        draft = pool.draft(learned(lm, pool, seed=1))
        adapted.append(read(lm, pool, draft.index, ids[:-2] + end, draft).adapted)
    assert torch.equal(adapted[0][:-2], adapted[1][:-2])
    assert not torch.equal(adapted[0][-2:], adapted[1][-2:])


def test_probabilities_sum_to_one_and_are_those_that_are_scored(lm: AdaptiveLM) -> None:
    """The scores and the likeliest tokens of `block` are those of `predict` after each token."""
    pool = new_pool(lm)
    session, ids = learned(lm, pool, seed=1), text(1, BLOCK)
    request = RequestReader(lm, ids)
    request.step(pool, session, top=3)
    scores = request.scores[0]
    assert scores.top is not None
    for t in range(1, BLOCK):
        decode_state, _ = lm.block(ids[:t], lm.backbone.new_cache(99), pool, session)
        predicted = lm.predict([decode_state], pool, [session])[0]
        log_p = predicted.log_softmax(-1)
        torch.testing.assert_close(scores.adapted[t - 1], log_p[ids[t]], atol=1e-4, rtol=0)
        values, tokens = log_p.topk(3)
        torch.testing.assert_close(scores.top[0][t - 1], values, atol=1e-4, rtol=0)
        assert torch.equal(scores.top[1][t - 1], tokens)


# Laws 6 and 7: sparse; predict never writes.


def test_a_block_touches_at_most_a_lexical_row_or_k_delta_rows_a_token_and_no_other_bit(lm: AdaptiveLM) -> None:
    pool = new_pool(lm)
    session, ids = learned(lm, pool, seed=1), text(2, 5)
    before = rows_by_slot(pool.dump(session))
    draft = pool.draft(session)
    read(lm, pool, draft.index, ids, draft)
    touched = draft.touched()
    draft.commit()
    after = rows_by_slot(pool.dump(session))
    for site in lm.memory.config.sites:
        assert 0 < len(touched[site.name].slots) <= (len(ids) - 1) * (1 if site.kind == "lexical" else site.k)
    changed = {at for at in after if after[at] != before.get(at)}
    assert changed <= rows_by_slot(touched).keys()
    assert before.keys() <= after.keys()


def test_only_what_is_learned_is_written(lm: AdaptiveLM) -> None:
    """Two masks that add up to all tokens write the rows that a mask of all tokens writes."""
    pool, ids = new_pool(lm), text(2, BLOCK)
    even = [t % 2 == 0 for t in range(BLOCK)]
    masks = {"none": [False] * BLOCK, "even": even, "odd": [not m for m in even], "all": [True] * BLOCK}
    written = {}
    for name, mask in masks.items():
        draft = pool.draft(pool.open())
        _, scores = lm.block(ids, lm.backbone.new_cache(99), pool, draft.index, learn=mask, draft=draft)
        assert (0 if scores is None else int(scores.learned.sum())) == sum(mask[1:])
        touched = rows_by_slot(draft.touched())
        # The slot and the age of a lexical row depend on the order of writes; the rest of the row does not.
        written[name] = {(site, row[4:] if site == "words" else slot) for (site, slot), row in touched.items()}
        draft.rollback()
    assert written["none"] == set()
    assert set() < written["even"] < written["all"]
    assert written["even"] | written["odd"] == written["all"]


def test_a_lexical_row_holds_learned_tokens_only(backbone: Backbone) -> None:
    lm = build(backbone, LEXICAL)
    pool, ids = new_pool(lm), [5, 6, 7, 8, 9, 10]
    draft = pool.draft(pool.open())
    lm.block(ids, backbone.new_cache(99), pool, draft.index, learn=[True, False, True, False, False, True], draft=draft)
    ages, tokens, *_ = draft.get("words", torch.arange(LEXICAL.cells))
    assert sorted(tokens[ages > 0].tolist()) == [7, 10]


def test_scores_are_of_what_is_scored_or_learned_in_order(lm: AdaptiveLM) -> None:
    pool, ids = new_pool(lm), text(2, 6)
    full = read(lm, pool, EMPTY_SESSION, ids).adapted
    score, mask = [True, True, False, False, True, False], [True, False, False, True, True, False]
    draft = pool.draft(pool.open())
    _, scores = lm.block(ids, lm.backbone.new_cache(99), pool, draft.index, score=score, learn=mask, draft=draft)
    assert scores is not None
    assert scores.frozen is None
    assert scores.top is None
    torch.testing.assert_close(scores.adapted, full[[0, 2, 3]], atol=1e-4, rtol=0)
    assert scores.learned.tolist() == [False, True, True]


def test_what_only_reads_leaves_every_bit_as_it_was(lm: AdaptiveLM) -> None:
    pool = new_pool(lm)
    session = learned(lm, pool, seed=1)
    before, fields = rows_by_slot(pool.dump(session)), [f.clone() for site in pool.sites.values() for f in site.fields]
    request = read(lm, pool, session, text(2))
    decode_states = [decode_state_of(request)]
    for token in (1, 2, 3):
        decode_states = lm.decode([token], [request.cache], decode_states, pool, [session])
        lm.predict(decode_states, pool, [session])
    lm.block([4, 5], request.cache, pool, session, decode_state=decode_states[0], learn=[True, True])
    assert rows_by_slot(pool.dump(session)) == before
    after = [f for site in pool.sites.values() for f in site.fields]
    assert all(torch.equal(a, b) for a, b in zip(fields, after, strict=True))


# Decoding, and the inputs of a delta site.


def test_decoding_after_a_block_is_the_block_of_the_same_tokens(lm: AdaptiveLM) -> None:
    pool = new_pool(lm)
    session, ids = learned(lm, pool, seed=1), text(1, BLOCK)
    cache = lm.backbone.new_cache(99)
    decode_state, _ = lm.block(ids[:3], cache, pool, session)
    for t in range(3, BLOCK):
        whole, _ = lm.block(ids[: t + 1], lm.backbone.new_cache(99), pool, session)
        (decode_state,) = lm.decode([ids[t]], [cache], [decode_state], pool, [session])
        torch.testing.assert_close(decode_state.hidden, whole.hidden, atol=1e-4, rtol=0)
        assert decode_state.inputs.keys() == whole.inputs.keys()
        for layer, state in decode_state.inputs.items():
            torch.testing.assert_close(state, whole.inputs[layer], atol=1e-4, rtol=0)
        torch.testing.assert_close(
            lm.predict([decode_state], pool, [session]), lm.predict([whole], pool, [session]), atol=1e-3, rtol=0
        )


def test_a_delta_site_learns_from_the_states_and_errors_of_its_own_tokens(backbone: Backbone) -> None:
    """The value is W_v [h_{t+1} ; ε_t] with ε = e(x) − Σ p·e; a read returns it after one write of full strength."""
    lm = build(backbone, MIDDLE)
    site = lm.memory.delta[1]
    site.write_gate.copy_(torch.tensor([100.0, 0.0]))
    ids, pool, states = [5, 6], new_pool(lm), torch.zeros(2, WIDTH)
    final = backbone(torch.tensor([ids]), layer_hooks={1: lambda h: states.copy_(h[0])[None]})[0]
    draft = pool.draft(pool.open())
    lm.block(ids, backbone.new_cache(9), pool, draft.index, learn=[False, True], draft=draft)
    p = backbone.logits(final[0]).softmax(-1)
    error = backbone.embedding[6] - p @ backbone.embedding
    value = states[1] @ site.value_hidden + error @ site.value_error
    slots, w = site.address(states[:1])
    (rows,) = draft.get("middle", slots[0])
    torch.testing.assert_close(w[0] @ rows, value, atol=1e-4, rtol=0)
