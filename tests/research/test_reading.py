"""The training of a reading prefix: what is trained is what is served, and a run that stops goes on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.base.checkpoint import load_backbone
from model.base.config import tiny_config
from model.episodes import Episode
from model.recall import UNTOLD
from model.text.tokenizer import Tokenizer
from research.evaluation.recall.changes import TOPICS
from research.evaluation.recall.people import ATTRIBUTES
from research.evaluation.recall.scenes import Split
from research.training import reading
from research.training.reading import PrefixTrainer, run, validate
from research.training.reading_chats import NOT_TOLD, OF_THE_SPEAKER, ReadingChat, ReadingChats
from service.errors import CommandError
from tests.tiny import build_tiny_base

MEASURED: tuple[Split, ...] = ("dev", "review")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("reading") / "base", tiny_config(max_context=4096))


@pytest.fixture
def trainer(base: Path, monkeypatch: pytest.MonkeyPatch) -> PrefixTrainer:
    monkeypatch.setattr(reading, "BATCH", 2)
    return new_trainer(base)


def new_trainer(base: Path) -> PrefixTrainer:
    return PrefixTrainer(load_backbone(base, trainable=True), Tokenizer.load(base))


@torch.no_grad()
def served_loss(trainer: PrefixTrainer, chat: ReadingChat, reply: list[int]) -> float:
    """Return the mean loss of a reply in the layout of a server: one cache, token by token behind its prompt."""
    ids, request = trainer._prompt([*chat.history, chat.message])
    request = type(request)(**{**vars(request), "prefix": trainer.prefix().num_tokens})
    found = [Episode(tuple(trainer._tokenizer.encode_inside(text)), 0, 0, 0, 0.0) for text in chat.episodes]
    cache = trainer._base.new_cache(len(ids) + len(reply) + request.cached_tokens(found))
    trainer._episodes.prefix = trainer.prefix()
    hidden = None
    for start, stop in pairwise([0, request.at, len(ids)]):
        if start == request.at and found:
            trainer._episodes.append(cache, None, found, request)
        hidden = trainer._base(torch.tensor([ids[start:stop]]), [cache])
    trainer._episodes.prefix = None
    losses = []
    for token in reply:
        assert hidden is not None
        losses.append(F.cross_entropy(trainer._base.logits(hidden[0, -1])[None], torch.tensor([token])))
        hidden = trainer._base(torch.tensor([[token]]), [cache])
    return float(torch.stack(losses).mean())


def test_the_loss_is_that_of_the_reply_as_it_is_served(trainer: PrefixTrainer) -> None:
    """Chats of several lengths are in one batch, with and without episodes, and with a reply of the base itself."""
    chats = [
        ReadingChat(("The fox is red.", "The dog is old."), (), "What is the fox?", "The fox is red."),
        ReadingChat((), (), "Hello", None),
        ReadingChat(("The fox learns.",), ("Is the dog lazy?", "Yes, the dog is lazy."), "Who learns?", "The fox."),
    ]
    with torch.no_grad():
        trainer.keys += 0.3 * torch.randn_like(trainer.keys)
    replies = [trainer._example(chat).reply for chat in chats]
    served = [served_loss(trainer, chat, reply) for chat, reply in zip(chats, replies, strict=True)]
    for chat, loss in zip(chats, served, strict=True):
        assert float(trainer.loss([chat]).detach()) == pytest.approx(loss, rel=1e-4)
    together = sum(loss * len(reply) for loss, reply in zip(served, replies, strict=True)) / sum(map(len, replies))
    assert float(trainer.loss(chats).detach()) == pytest.approx(together, rel=1e-4)


def test_a_run_learns_and_one_that_stops_goes_on_to_the_same_prefix(
    trainer: PrefixTrainer, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "SAVE_EVERY", 3)
    valid = ReadingChats(1).draw(4)
    before = validate(trainer, valid)
    run(trainer, ReadingChats(0), 8, tmp_path / "whole.pt")
    assert validate(trainer, valid) < before

    class Stopped(Exception):
        pass

    stopping, losses = new_trainer(base), iter(range(5))
    loss = stopping.loss

    def loss_or_stop(chats: list[ReadingChat]) -> torch.Tensor:
        if next(losses, None) is None:
            raise Stopped
        return loss(chats)

    monkeypatch.setattr(stopping, "loss", loss_or_stop)
    with pytest.raises(Stopped):
        run(stopping, ReadingChats(0), 8, tmp_path / "parts.pt")
    going_on = new_trainer(base)
    run(going_on, ReadingChats(0), 8, tmp_path / "parts.pt")
    assert torch.equal(going_on.keys, trainer.keys) and torch.equal(going_on.values, trainer.values)


def test_chats_come_again_and_share_no_wording_with_what_is_measured() -> None:
    chats = ReadingChats(5).draw(1000)
    assert chats == ReadingChats(5).draw(1000)
    assert chats[:20] != ReadingChats(6).draw(20)
    wordings = [one.wordings[split] for one in ATTRIBUTES for split in MEASURED]
    measured = [text for one in wordings for text in (one.statement, one.correction, *one.questions)]
    measured += [line for topic in TOPICS for lines in topic.lines[1:] for line in (lines[0], lines[3])]
    chats += ReadingChats(5, untold=True).draw(200)
    drawn = " ".join(text for chat in chats for text in (*chat.episodes, *chat.history, chat.message))
    filled = [text.format(P="My", p="my", v="{v}").split("{v}")[0] for text in measured]
    assert not [text for text in filled if text and text in drawn]


def test_chats_in_which_nothing_was_found_say_so_or_have_the_bases_own_reply() -> None:
    chats = ReadingChats(5, untold=True).draw(200)
    assert {chat.episodes for chat in chats} == {(UNTOLD,)}
    assert {chat.reply for chat in chats} == {NOT_TOLD, None}
    assert all((chat.message in OF_THE_SPEAKER) == (chat.reply is None) for chat in chats)


def test_a_base_without_a_chat_template_has_no_reading_prefix(tiny_base: Path) -> None:
    tokenizer = Tokenizer.load(tiny_base)
    tokenizer._chat_template = None
    with pytest.raises(CommandError, match="chat template"):
        PrefixTrainer(load_backbone(tiny_base), tokenizer)
