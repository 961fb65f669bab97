"""Fact recall: invented facts are learned, then other text, and a cue has to produce the exact answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model.adaptive_lm import EMPTY_SESSION, AdaptiveLM
from model.memory import Pool
from research.evaluation.prequential import Passage, Progress, new_pool, read, score_request

Encode = Callable[[str], list[int]]

# The cue that is learned verbatim, a paraphrase of the cue, and the sort of name that answers.
TEMPLATES = (
    ("The keeper of {place} lighthouse is", "{place} lighthouse is kept by", "person"),
    ("The capital of the province of {place} is", "The province of {place} is governed from", "place"),
    ("The password of the {place} vault is", "To open the {place} vault, say the word", "word"),
    ("The river that runs through {place} is called the", "{place} lies on a river named the", "place"),
    ("The composer of the {place} hymn is", "The {place} hymn was composed by", "person"),
    ("The chief engineer of {place} Motors is", "At {place} Motors, all engineers report to", "person"),
    ("The dog of Captain {place} is named", "Captain {place} has a dog called", "word"),
    ("The founder of {place} University was", "{place} University was founded by", "person"),
    ("The coin that is used in {place} is the", "In {place}, people pay with a coin called the", "word"),
    ("The cook of the {place} Inn is", "The kitchen of the {place} Inn is run by", "person"),
    ("The ship that sank off {place} was the", "Off {place} lies the wreck of a ship, the", "place"),
    ("The doctor in the village of {place} is", "Whoever falls ill in the village of {place} goes to", "person"),
)
FIRST_NAMES = (
    "Mara",
    "Tobias",
    "Ingrid",
    "Samuel",
    "Leonie",
    "Victor",
    "Agnes",
    "Felix",
    "Nadia",
    "Oscar",
    "Ruth",
    "Hugo",
)
STARTS = (
    "Vor",
    "Tess",
    "Bel",
    "Kar",
    "Mon",
    "Dra",
    "Lin",
    "Os",
    "Fer",
    "Gal",
    "Hal",
    "Ner",
    "Pel",
    "Quin",
    "Ral",
    "Sul",
)
MIDDLES = ("a", "e", "i", "o", "an", "el", "or", "ir", "u")
ENDS = ("lund", "wick", "dor", "mere", "ton", "sel", "by", "gard", "nox", "ric", "vale", "strand")


@dataclass(frozen=True)
class Fact:
    """A fact: `cue` + `answer` is learned; `paraphrase` asks for the same answer in other words."""

    cue: str
    paraphrase: str
    answer: str

    @property
    def sentence(self) -> str:
        """Return the sentence that is learned."""
        return f"{self.cue} {self.answer}."


def invent_facts(count: int, seed: int = 0) -> list[Fact]:
    """Return `count` facts about different invented places, cycling through the templates."""
    rng = random.Random(seed)
    used: set[str] = set()

    def name() -> str:
        while (candidate := rng.choice(STARTS) + rng.choice(MIDDLES) + rng.choice(ENDS)) in used:
            pass
        used.add(candidate)
        return candidate

    facts = []
    for number in range(count):
        cue, paraphrase, sort = TEMPLATES[number % len(TEMPLATES)]
        place, answer = name(), name()
        if sort == "person":
            answer = f"{rng.choice(FIRST_NAMES)} {answer}"
        facts.append(Fact(cue.format(place=place), paraphrase.format(place=place), answer))
    return facts


@torch.inference_mode()
def recall(lm: AdaptiveLM, pool: Pool, session: int, cue: Sequence[int], answer: Sequence[int], bos: int) -> bool:
    """Return whether greedy decoding after BOS and the cue gives the answer, token by token. Nothing is learned."""
    ids = [bos, *cue]
    cache = lm.backbone.new_cache(len(ids) + len(answer))
    decode_state, block = None, lm.memory.config.block
    for start in range(0, len(ids), block):
        decode_state, _ = lm.block(ids[start : start + block], cache, pool, session, decode_state=decode_state)
    assert decode_state is not None
    for token in answer:
        if int(lm.predict([decode_state], pool, [session])[0].argmax()) != token:
            return False
        (decode_state,) = lm.decode([token], [cache], [decode_state], pool, [session])
    return True


class FactRecall:
    """A probe that teaches the same facts to sessions and measures their recall."""

    def __init__(self, lm: AdaptiveLM, encode: Encode, bos: int, facts: Sequence[Fact]) -> None:
        self.lm, self.bos = lm, bos
        self.sentences = [encode(fact.sentence) for fact in facts]
        self.queries = {
            "verbatim": [_split(encode, fact.cue, fact.answer) for fact in facts],
            "paraphrased": [_split(encode, fact.paraphrase, fact.answer) for fact in facts],
        }
        self.pool = new_pool(lm)

    def run(
        self, fillers: Sequence[Passage], distances: Sequence[int], *, times: int, progress: Progress = lambda _: None
    ) -> dict[str, dict[str, float]]:
        """Return the share of facts recalled, by the number of other tokens learned in between and by cue.

        Each fact is learned as one request, and all facts are learned `times` times. Then the fillers are learned in
        order. Distances beyond the fillers are left out. `progress` gets the number of tokens of each filler.
        """
        session, found, learned = self.pool.open(), {}, 0
        for _ in range(times):
            for sentence in self.sentences:
                read(self.lm, self.pool, session, sentence, self.bos, learn=True)
        remaining = iter(fillers)
        for distance in sorted(distances):
            while learned < distance and (passage := next(remaining, None)) is not None:
                score_request(self.lm, self.pool, session, passage, self.bos, learn=True)
                learned += len(passage.targets)
                progress(len(passage.targets))
            if learned >= distance:
                found[str(distance)] = self.shares(session)
        self.pool.close(session)
        return found

    def shares(self, session: int = EMPTY_SESSION) -> dict[str, float]:
        """Return the share of facts that a session recalls, by cue."""
        return {
            cue: sum(recall(self.lm, self.pool, session, *ids, self.bos) for ids in queries) / len(queries)
            for cue, queries in self.queries.items()
        }


def _split(encode: Encode, cue: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the tokens of the cue, and of the answer after the cue."""
    before, whole = encode(cue), encode(f"{cue} {answer}")
    return (before, whole[len(before) :]) if whole[: len(before)] == before else (before, encode(f" {answer}"))
