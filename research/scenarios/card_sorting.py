"""Wisconsin card sorting: a hidden rule, which changes unannounced, says which of four piles a card belongs to.

The file holds the world with its ideal observer (the teacher), the clinic's figures, and the scenario's description.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from research.scenarios.baselines import RandomActor, TeacherActor
from research.scenarios.core import FloatArray, IntArray, Tasks, TeacherTasks
from research.scenarios.measures import ActingEvaluation, ActingMetrics
from research.scenarios.scenario import PolicyTrainConfig, Recipe, Scenario

PILES = 4


class CardSorting(TeacherTasks):
    """Cards of `dims` dimensions with four values each; the reward is 1 for a correct pile, else 0.

    together = 1: pile i has the key card whose values are all i, as in the clinical test; the correct pile is the one
    whose key card agrees with the card in the rule's dimension. Cards are drawn from the full deck, ambiguous ones too.
    together = 2: the key cards are drawn anew for each card, each agrees with the card in about half of the dimensions,
    and the correct piles are those that agree in both dimensions of the rule; there may be none. decks > 1: each deck
    has a rule; the context is the one-hot index of the deck, and the deck is drawn anew with probability 1 / `bout`.

    After each card, the rule of the card's deck is replaced by another rule with probability `hazard`. The features of
    a pile tell in which dimensions its key card agrees with the card.
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
        task = np.arange(self.batch)
        correct = self.correct()
        reward = correct[task, :, actions][task, self.rule[task, self.deck]]
        belief = self.belief[task, self.deck] * (correct[task, :, actions] == reward[:, None])
        belief /= belief.sum(1, keepdims=True)
        to_other = self.hazard / (len(self.rules) - 1)
        self.belief[task, self.deck] = (1 - self.hazard - to_other) * belief + to_other
        self.switched = self.rng.random(self.batch) < self.hazard
        jump = self.rng.integers(1, len(self.rules), self.batch)
        new = (self.rule[task, self.deck] + jump * self.switched) % len(self.rules)
        self.previous_rule[task, self.deck] = np.where(
            self.switched, self.rule[task, self.deck], self.previous_rule[task, self.deck]
        )
        self.rule[task, self.deck] = new
        self.switches += self.switched
        if self.decks > 1:
            deck_changes = self.rng.random(self.batch) < 1 / self.bout
            self.deck = np.where(deck_changes, self.rng.integers(self.decks, size=self.batch), self.deck)
        self._deal()
        return reward.astype(np.float32)

    def means(self) -> FloatArray:
        task = np.arange(self.batch)
        return self.correct()[task, self.rule[task, self.deck]].astype(np.float32)

    def teacher_scores(self) -> FloatArray:
        """Return each pile's probability to be correct [B, A] for the ideal observer: Bayes with the true hazard."""
        belief = self.belief[np.arange(self.batch), self.deck]
        probs: FloatArray = np.einsum("br,bra->ba", belief, self.correct()).astype(np.float32)
        return probs

    def correct(self) -> NDArray[np.bool_]:
        """Return whether each pile is correct under each rule [B, rules, piles]."""
        correct: NDArray[np.bool_] = self.matches[:, :, self.rules].all(-1).transpose(0, 2, 1)
        return correct

    def _deal(self) -> None:
        """Draw a card for each task; `matches` [B, piles, dims]: whether each pile agrees with the card."""
        if self.together == 1:
            card = self.rng.integers(PILES, size=(self.batch, self.dims))
            self.matches = card[:, None] == np.arange(PILES)[:, None]
        else:
            self.matches = self.rng.random((self.batch, PILES, self.dims)) < 0.5


class CardSortingMetrics(ActingMetrics):
    """Errors per switch of the rule, and the share of perseverative errors.

    Counted are the trials after the first error that follows a switch, up to the next success. An error in such a trial
    is perseverative when it follows the previous rule and could follow no other rule.
    """

    main = "errors per switch"

    def __init__(self) -> None:
        self._trials, self._num_perseverative = 0, 0
        self._phase: IntArray | None = None  # [B] 0: no recent switch, 1: switched, no error yet, 2: counted trials

    def before_step(self, tasks: Tasks, actions: IntArray, wrong: NDArray[np.bool_]) -> None:
        assert isinstance(tasks, CardSorting)
        task = np.arange(tasks.batch)
        if self._phase is None:
            self._phase = np.zeros(tasks.batch, np.int64)
        previous_rule = tasks.previous_rule[task, tasks.deck]
        counted = self._phase == 2
        self._trials += int(counted.sum())
        correct = tasks.correct()[task, :, actions]
        perseverative = counted & wrong & correct[task, previous_rule] & (correct.sum(1) == 1)
        self._num_perseverative += int(perseverative.sum())
        self._phase = np.where((self._phase == 1) & wrong, 2, np.where(counted & ~wrong, 0, self._phase))

    def after_step(self, tasks: Tasks) -> None:
        assert isinstance(tasks, CardSorting) and self._phase is not None
        self._phase = np.where(tasks.switched, 1, self._phase)

    def figures(self, tasks: Tasks, regret: FloatArray, reward: FloatArray) -> dict[str, float]:
        assert isinstance(tasks, CardSorting)
        share = self._num_perseverative / max(1, self._trials)
        return {self.main: float(regret.sum() / tasks.switches.sum()), "perseverative": share}


CARDS = Recipe(CardSorting, PolicyTrainConfig(rounds=150, batch=128, steps=60, span=20, lr=6e-3, led=0.5), steps=300)
SCENARIO = Scenario(
    CardSorting,
    env_steps=300,
    recipes={
        "card-sorting": CARDS,
        "card-sorting-6": replace(CARDS, options={"dims": 6}).with_train_config(rounds=200),
        "card-sorting-8": replace(CARDS, options={"dims": 8}).with_train_config(rounds=300),
        "card-sorting-pairs": replace(
            CARDS, options={"dims": 8, "together": 2}, slots=16, width=64, layer=96, product=True
        ).with_train_config(rounds=1000, lr=3e-3),
        "card-sorting-decks": replace(
            CARDS, options={"dims": 8, "decks": 16}, training={"bout": 20.0}, address_by_context=True, product=True
        ).with_train_config(rounds=500, lr=5e-3),
    },
    evaluation=ActingEvaluation({"ideal observer": TeacherActor, "random": RandomActor}, CardSortingMetrics),
)
