"""`imprint train --reading`: the reading prefix of a base, trained on invented chats.

The base, and the keys and values that it makes of episodes, stay as they are: gradients go to the prefix alone. A chat
is laid out as the server lays it out, by the server's own code. Where a chat asks for nothing that its episodes say,
the reply to learn is the base's own, so that the prefix changes no other reply.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base.backbone import Backbone
from model.base.checkpoint import CheckpointError, fingerprint, load_backbone
from model.base.config import ConfigError
from model.episodes import Episode, Episodes, RecallRequest
from model.memory.episodic.lexicon import shipped_lexicon
from model.memory.episodic.word_tables import build_tables
from model.memory.row_layout import MemoryConfigError
from model.reading_prefix import ReadingPrefix, load_prefix, save_prefix
from model.recall import RecallPlan
from model.text.tokenizer import Tokenizer
from research.corpus import base_folder, console, progress_bar
from research.training.reading_chats import ReadingChat, ReadingChats
from service.errors import CommandError
from service.settings import Settings

INSTRUCTION = "Above is what I told you before. Answer from it in one short sentence.\n\n"  # as which the prefix begins
MAX_EPISODE_TOKENS = 256
OWN_REPLY_TOKENS = 32
VALID_CHATS = 64
STEPS, BATCH, PEAK_LR, WARM_UP_STEPS, MAX_NORM = 200, 8, 0.01, 20, 1.0
SAVE_EVERY = 25  # steps


@dataclass(frozen=True)
class _Example:
    """The part of a chat that gradients pass: keys and values [L, H_kv, S, hd] that stand before its tokens.

    reads: whether episodes stand before it. reply: the last targets; the token before the first is in `token_ids`.
    """

    keys: Tensor
    values: Tensor
    reads: bool
    token_ids: list[int]
    reply: list[int]


class _AfterRows:
    """Attention of tokens [B, T] to keys and values [L, B, H_kv, S, hd] before them and to one another.

    present: whether a key before the tokens is there, [B, S]. It is an `AttentionFn`.
    """

    def __init__(self, keys: Tensor, values: Tensor, present: Tensor, T: int) -> None:
        self._keys, self._values = keys, values
        causal = torch.ones(T, T, dtype=torch.bool, device=present.device).tril()
        B, S = present.shape
        self._mask = torch.cat([present[:, None].expand(B, T, S), causal.expand(B, T, T)], 2)[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = torch.cat([self._keys[layer], k], 2), torch.cat([self._values[layer], v], 2)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask, enable_gqa=True)


class PrefixTrainer:
    """A reading prefix that is trained. Its losses are means over the tokens of replies, in nats.

    keys, values: of the prefix, `[L, H_kv, P, hd]`; at first those of `begin`, or of `INSTRUCTION`.
    """

    def __init__(self, backbone: Backbone, tokenizer: Tokenizer, begin: ReadingPrefix | None = None) -> None:
        if not tokenizer.has_chat_template:
            raise CommandError("a reading prefix needs a base with a chat template")
        self._base, self._tokenizer = backbone, tokenizer
        self._plan = RecallPlan.of(tokenizer, MAX_EPISODE_TOKENS)
        lexicon, tables = shipped_lexicon(), build_tables([])
        self._episodes = Episodes(backbone, tables, lexicon, tokenizer.decode, None, hot_bytes=0)
        self._own_reply = cache(self._make_own_reply)
        self.start = len(self._plan.chat_header)
        if begin is None:
            keys, values = self._rows_of(self._tokenizer.encode_inside(INSTRUCTION))
        else:
            keys, values = backbone.moved_keys(begin.keys, self.start - begin.start), begin.values.clone()
        self.keys, self.values = keys.requires_grad_(), values.requires_grad_()

    def prefix(self) -> ReadingPrefix:
        """Return the prefix as it is now."""
        return ReadingPrefix(self.keys.detach(), self.values.detach(), self.start)

    def loss(self, chats: Sequence[ReadingChat]) -> Tensor:
        """Return the mean loss of the replies of chats."""
        examples = [self._example(chat) for chat in chats]
        hidden = self._hidden(examples)
        asked = [
            hidden[row, len(each.token_ids) - len(each.reply) : len(each.token_ids)]
            for row, each in enumerate(examples)
        ]
        targets = torch.tensor([token for each in examples for token in each.reply], device=hidden.device)
        return F.cross_entropy(self._base.logits(torch.cat(asked)), targets)

    def _hidden(self, examples: Sequence[_Example]) -> Tensor:
        """Return the hidden states [B, T, d] of examples, which read the prefix after their episodes."""
        rows = [self._with_prefix(each) for each in examples]
        lengths = [keys.shape[2] for keys, _ in rows]
        S, T = max(lengths), max(len(each.token_ids) for each in examples)
        keys, values = (
            torch.stack([F.pad(x, (0, 0, 0, S - x.shape[2])) for x in each], 1) for each in zip(*rows, strict=True)
        )
        device = keys.device
        starts = torch.tensor(lengths, device=device)[:, None]
        ids = torch.tensor([each.token_ids + [0] * (T - len(each.token_ids)) for each in examples], device=device)
        present = torch.arange(S, device=device) < starts
        positions = starts + torch.arange(T, device=device)
        return self._base.forward_at(ids, positions, _AfterRows(keys, values, present, T))

    def _with_prefix(self, example: _Example) -> tuple[Tensor, Tensor]:
        if not example.reads:
            return example.keys, example.values
        keys = self._base.moved_keys(self.keys, example.keys.shape[2] - self.start)
        return torch.cat([example.keys, keys], 2), torch.cat([example.values, self.values], 2)

    @torch.no_grad()
    def _example(self, chat: ReadingChat) -> _Example:
        ids, request = self._prompt([*chat.history, chat.message])
        own = ids[request.at :]
        episodes = [Episode(tuple(self._tokenizer.encode_inside(text)), 0, 0, 0, 0.0) for text in chat.episodes]
        cache = self._base.new_cache(request.at + request.cached_tokens(episodes))
        self._base(self._tensor(ids[: request.at]), [cache])
        self._episodes.append(cache, None, episodes, request)
        reply = (
            self._own_reply(chat.message)
            if chat.reply is None
            else (*self._tokenizer.encode_inside(chat.reply), self._end)
        )
        keys, values = (rows[:, :, : cache.length].clone() for rows in (cache.keys, cache.values))
        return _Example(keys, values, bool(episodes), [*own, *reply[:-1]], list(reply))

    def _prompt(self, said: Sequence[str]) -> tuple[list[int], RecallRequest]:
        """Return the tokens of a chat of user and assistant in turn, and what the reply recalls."""
        roles = [("user", "assistant")[index % 2] for index in range(len(said))]
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        chat = self._tokenizer.encode_chat(messages)
        request = self._plan.request(chat.token_ids, chat.spans[-1], chat=True)
        assert request is not None
        return list(chat.token_ids), request

    @torch.no_grad()
    def _make_own_reply(self, message: str) -> tuple[int, ...]:
        """Return the base's own greedy reply to a message, cut at `OWN_REPLY_TOKENS`."""
        ids, _ = self._prompt([message])
        cache, found = self._base.new_cache(len(ids) + OWN_REPLY_TOKENS), list[int]()
        while len(found) < OWN_REPLY_TOKENS and found[-1:] != [self._end]:
            hidden = self._base(self._tensor(found[-1:] or ids), [cache])
            found.append(int(self._base.logits(hidden[0, -1]).argmax()))
        return tuple(found)

    @torch.no_grad()
    def _rows_of(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the keys and values [L, H_kv, T, hd] of tokens after the header of a chat."""
        header = self._plan.chat_header
        cache = self._base.new_cache(len(header) + len(token_ids))
        self._base(self._tensor([*header, *token_ids]), [cache])
        keys, values = (rows[:, :, len(header) : cache.length].clone() for rows in (cache.keys, cache.values))
        return keys, values

    @property
    def _end(self) -> int:
        return min(self._tokenizer.eos_token_ids)

    def _tensor(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(token_ids)], device=self._base.embedding.device)


def train_prefix(
    settings: Settings, out: Path, work: Path, *, steps: int, seed: int, untold_of: Path | None = None
) -> None:
    """Train the reading prefix of the settings' base and write it to `out`. Raises CommandError.

    untold_of: the file of a prefix, to which the rows are trained that a reply reads where nothing was found. The work
    folder keeps an unfinished run, which the same command continues.
    """
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    folder = base_folder(settings)
    try:
        backbone, tokenizer = load_backbone(folder, trainable=True), Tokenizer.load(folder)
        device, dtype = backbone.embedding.device, backbone.embedding.dtype
        reading = None if untold_of is None else load_prefix(untold_of, backbone.config, device=device, dtype=dtype)
    except (CheckpointError, ConfigError, MemoryConfigError) as error:
        raise CommandError(str(error)) from error
    trainer = PrefixTrainer(backbone, tokenizer, reading)
    valid = ReadingChats(seed + 1, untold=reading is not None).draw(VALID_CHATS)
    before = validate(trainer, valid)
    begin = "" if untold_of is None else hashlib.sha256(untold_of.read_bytes()).hexdigest()
    run_of = f"{fingerprint(folder)} {steps} {seed} {BATCH} {PEAK_LR} {begin}"
    identity = hashlib.sha256(run_of.encode()).hexdigest()[:12]
    run(trainer, ReadingChats(seed, untold=reading is not None), steps, work / f"reading-{identity}.pt")
    out.parent.mkdir(parents=True, exist_ok=True)
    made = trainer.prefix()
    if reading is not None:
        made = replace(reading, untold_keys=made.keys, untold_values=made.values)
    save_prefix(made, out)
    after = validate(trainer, valid)
    console.print(
        f"Loss of replies, {VALID_CHATS} chats held out: {before:.3f} nats a token before, {after:.3f} after."
    )
    console.print(f"{out}: {trainer.prefix().num_tokens} tokens, {out.stat().st_size:,} bytes")


def run(trainer: PrefixTrainer, chats: ReadingChats, steps: int, saved: Path) -> None:
    """Take all steps, from where a run that was saved stands."""
    optimiser = torch.optim.Adam([trainer.keys, trainer.values], betas=(0.9, 0.98))
    first = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        with torch.no_grad():
            trainer.keys.copy_(state["keys"])
            trainer.values.copy_(state["values"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
    with progress_bar() as bar:
        task = bar.add_task("training the reading prefix", total=steps, completed=first)
        for step in range(steps):
            batch = chats.draw(BATCH)  # those of steps that were taken are drawn again, to come to the next ones
            if step < first:
                continue
            for group in optimiser.param_groups:
                group["lr"] = PEAK_LR * min(1, (step + 1) / WARM_UP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
            optimiser.zero_grad()
            loss = trainer.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_([trainer.keys, trainer.values], MAX_NORM)
            optimiser.step()
            bar.update(task, completed=step + 1, description=f"reading prefix, loss {loss.item():.2f}")
            if (step + 1) % SAVE_EVERY == 0:
                saved.parent.mkdir(parents=True, exist_ok=True)
                state = {"keys": trainer.keys, "values": trainer.values, "step": step + 1}
                torch.save(state | {"optimiser": optimiser.state_dict()}, saved)


@torch.no_grad()
def validate(trainer: PrefixTrainer, chats: Sequence[ReadingChat]) -> float:
    """Return the mean loss of chats."""
    losses = [float(trainer.loss(chats[start : start + BATCH])) for start in range(0, len(chats), BATCH)]
    return sum(losses) / len(losses)
