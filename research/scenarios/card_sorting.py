"""Wisconsin card sorting: which of four piles a card belongs to follows a hidden rule, which changes unannounced."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from research.scenarios.core import FloatArray, IntArray, TeacherTasks

PILES = 4


class CardSorting(TeacherTasks):
    """Cards of `dims` dimensions with four values each.

    together = 1: pile i bears the key card whose values are all i, as in the clinic's test; the card belongs where the
    rule's dimension agrees. Any card of the full deck may come, ambiguous ones too. together = 2: the key cards are
    drawn anew for each card, each agrees with it in about half of the dimensions, and the right piles are those that
    agree in both dimensions of the rule; there may be none. decks > 1: each deck has a rule of its own, the context
    says which deck a card is of, and the deck changes with a chance of 1 / `bout` a card.

    After each card its deck's rule is replaced by another one with a chance of `hazard`. Reward 1 if right, else 0.
    An observation tells of each pile in which dimensions its key card agrees with the card.
    """

    actions = PILES

    def __init__(
        self,
        batch: int,
        rng: np.random.Generator,
        *,
        dims: int = 4,
        together: int = 1,
        decks: int = 1,
        hazard: float = 0.05,
        bout: float = 5.0,
    ) -> None:
        super().__init__(batch, rng)
        self.dims, self.together, self.decks, self.hazard, self.bout = dims, together, decks, hazard, bout
        self.features, self.context = dims, decks if decks > 1 else 0
        self.rules = np.array(list(itertools.combinations(range(dims), together)))
        self.rule = rng.integers(len(self.rules), size=(batch, decks))
        self.previous_rule = np.full((batch, decks), -1)
        self.deck = rng.integers(decks, size=batch)
        self.belief = np.full((batch, decks, len(self.rules)), 1.0 / len(self.rules))
        self.switched = np.zeros(batch, bool)
        self.switches = np.zeros(batch, np.int64)
        self._deal()

    def observe(self) -> FloatArray:
        context = np.eye(self.decks, dtype=np.float32)[self.deck][:, : self.context]
        return np.concatenate([context, self.matches.reshape(self.batch, -1).astype(np.float32)], axis=1)

    def step(self, actions: IntArray) -> FloatArray:
        here = np.arange(self.batch)
        correct = self.correct()
        reward = correct[here, :, actions][here, self.rule[here, self.deck]]
        belief = self.belief[here, self.deck] * (correct[here, :, actions] == reward[:, None])
        belief /= belief.sum(1, keepdims=True)
        spread = self.hazard / (len(self.rules) - 1)
        self.belief[here, self.deck] = (1 - self.hazard - spread) * belief + spread
        self.switched = self.rng.random(self.batch) < self.hazard
        jump = self.rng.integers(1, len(self.rules), self.batch)
        new = (self.rule[here, self.deck] + jump * self.switched) % len(self.rules)
        self.previous_rule[here, self.deck] = np.where(
            self.switched, self.rule[here, self.deck], self.previous_rule[here, self.deck]
        )
        self.rule[here, self.deck] = new
        self.switches += self.switched
        if self.decks > 1:
            deck_changes = self.rng.random(self.batch) < 1 / self.bout
            self.deck = np.where(deck_changes, self.rng.integers(self.decks, size=self.batch), self.deck)
        self._deal()
        return reward.astype(np.float32)

    def means(self) -> FloatArray:
        here = np.arange(self.batch)
        return self.correct()[here, self.rule[here, self.deck]].astype(np.float32)

    def teacher_scores(self) -> FloatArray:
        """The chance of each pile to be right: the ideal observer's, a Bayes filter that knows the hazard."""
        belief = self.belief[np.arange(self.batch), self.deck]
        chances: FloatArray = np.einsum("br,bra->ba", belief, self.correct()).astype(np.float32)
        return chances

    def correct(self) -> NDArray[np.bool_]:
        """Whether each pile is right under each rule [B, rules, piles]."""
        correct: NDArray[np.bool_] = self.matches[:, :, self.rules].all(-1).transpose(0, 2, 1)
        return correct

    def _deal(self) -> None:
        """A card for each task: in which dimensions each pile agrees with it [B, piles, dims]."""
        if self.together == 1:
            card = self.rng.integers(PILES, size=(self.batch, self.dims))
            self.matches = card[:, None] == np.arange(PILES)[:, None]
        else:
            self.matches = self.rng.random((self.batch, PILES, self.dims)) < 0.5
