"""The policies that `imprint train --policy NAME` makes: a scenario, a shape for its memory, and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from model.memory import MemoryConfig, SiteConfig
from model.policies.change_point import change_point_site
from model.policies.config import NUM_HISTORY_INPUTS, PolicyConfig
from model.policies.journal import journal_site
from research.scenarios.bandits import BernoulliBandit, Choices, LinearBandit
from research.scenarios.card_sorting import CardSorting
from research.scenarios.core import Tasks
from research.scenarios.streams import FunctionStream, LabelStream
from research.training.policy_loop import PolicyTrainConfig

MEMORY = "memory"


@dataclass(frozen=True)
class Recipe:
    """tasks, options: the scenario; training: options that differ while training. width: of a row (acting) or of a key
    (labelling). steps: of a task, where it is measured. The rest is as in `PolicyConfig`, `SiteConfig`,
    `PolicyTrainConfig`."""

    tasks: type[Tasks]
    train_config: PolicyTrainConfig
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    slots: int = 1024
    k: int = 1
    cell: int = 1
    width: int = 32
    layer: int = 64
    decay: float = 1.0
    identity: bool = False
    by_features: bool = False
    by_action: bool = False
    product: bool = False
    address_by_context: bool = False
    detects_changes: bool = False
    greedy: bool = True

    def make(self, batch: int, rng: np.random.Generator, *, training: bool = False, **options: Any) -> Tasks:
        """B tasks; options go before the recipe's own."""
        return self.tasks(batch, rng, **{**self.options, **(self.training if training else {}), **options})

    def config(self, name: str) -> PolicyConfig:
        """What a policy of this recipe is made of."""
        tasks = self.make(1, np.random.default_rng(0))
        shape: dict[str, Any] = {"context": tasks.context, "actions": tasks.actions, "width": self.layer}
        if self.cell > 1:
            site = SiteConfig(MEMORY, "lexical", slots=self.slots, cell=self.cell, k=self.k, width=self.width)
            sites = (site, change_point_site()) if self.detects_changes else (site,)
            return PolicyConfig(name, "label", memory=MemoryConfig(self.layer, sites), **shape)
        shape |= {
            "features": tasks.features,
            "identity": self.identity,
            "by_action": self.by_action,
            "by_features": self.by_features,
            "product": self.product,
        }
        shape |= {"cue": tasks.context if self.address_by_context else 0, "greedy": self.greedy}
        inputs = tasks.context + tasks.features + self.identity * tasks.actions + NUM_HISTORY_INPUTS
        site = SiteConfig(MEMORY, "hidden", slots=self.slots, k=self.k, width=self.width, decay=self.decay)
        num_address_inputs = shape["cue"] + self.by_features * tasks.features + self.by_action * tasks.actions
        state = num_address_inputs + self.layer
        return PolicyConfig(name, "act", memory=MemoryConfig(state, (site, journal_site(inputs))), **shape)

    def with_train_config(self, **changes: Any) -> Recipe:
        """The same with other lessons."""
        return replace(self, train_config=replace(self.train_config, **changes))


CARDS = Recipe(CardSorting, PolicyTrainConfig(rounds=150, batch=128, steps=60, span=20, lr=6e-3, led=0.5), steps=300)
BANDIT = Recipe(
    BernoulliBandit,
    PolicyTrainConfig(rounds=40, batch=64, steps=500, span=25, lr=5e-3, keen=100.0, led=0.5),
    steps=500,
    width=16,
    decay=0.0,
    identity=True,
    by_action=True,
)
RECIPES: dict[str, Recipe] = {
    "card-sorting": CARDS,
    "card-sorting-6": replace(CARDS, options={"dims": 6}).with_train_config(rounds=200),
    "card-sorting-8": replace(CARDS, options={"dims": 8}).with_train_config(rounds=300),
    "card-sorting-pairs": replace(
        CARDS, options={"dims": 8, "together": 2}, slots=16, width=64, layer=96, product=True
    ).with_train_config(rounds=1000, lr=3e-3),
    "card-sorting-decks": replace(
        CARDS, options={"dims": 8, "decks": 16}, training={"bout": 20.0}, address_by_context=True, product=True
    ).with_train_config(rounds=500, lr=5e-3),
    "bandit": BANDIT,
    "bandit-5": replace(BANDIT, options={"arms": 5}),
    "bandit-linear": Recipe(
        LinearBandit,
        PolicyTrainConfig(rounds=200, batch=64, steps=100, span=25, lr=5e-3, imitate=False),
        steps=500,
        slots=256,
        decay=0.0,
        identity=True,
        by_action=True,
        product=True,
    ),
    "choices": Recipe(
        Choices,
        PolicyTrainConfig(rounds=250, batch=32, steps=80, span=20, lr=5e-3, imitate=False),
        steps=100,
        slots=256,
        k=8,
        width=16,
        decay=0.0,
        identity=True,
        by_features=True,
        by_action=True,
        product=True,
    ),
    "digits": Recipe(
        LabelStream,
        PolicyTrainConfig(rounds=1500, batch=16, steps=120, span=120, lr=2e-3),
        steps=200,
        options={"drift": 0.01},
        training={"held_out": False, "turned": 0.5},
        slots=1024,
        cell=256,
        k=4,
        width=64,
        layer=96,
    ),
    "functions": Recipe(
        FunctionStream,
        PolicyTrainConfig(rounds=1500, batch=8, steps=400, span=400, lr=5e-3),
        steps=400,
        options={"bins": 8},
        slots=1024,
        cell=1024,
        width=32,
        detects_changes=True,
    ),
}
