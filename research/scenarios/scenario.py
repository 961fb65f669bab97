"""The description of a scenario: a world, its environment, the recipes of its policies and how they are measured.

The module defines the types; each scenario's file fills in one `Scenario`, and `research.scenarios.registry` lists all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from model.memory import MemoryConfig, SiteConfig
from model.policies.change_point import change_point_site
from model.policies.config import NUM_HISTORY_INPUTS, PolicyConfig
from model.policies.journal import journal_site
from research.scenarios.core import Tasks
from research.scenarios.measures import ActingEvaluation, LabellingEvaluation

MEMORY = "memory"


@dataclass(frozen=True)
class PolicyTrainConfig:
    """The training of a policy: `rounds` rounds of `batch` new tasks with `steps` steps each.

    span: steps that gradients pass through. lr: peak learning rate. keen: inverse temperature of the teacher's
    preferences. imitate: whether the targets are the teacher's, or the true means of the tasks. led: share of the tasks
    in which the teacher chooses the actions. seed: of the tasks and of exploration.
    """

    rounds: int
    batch: int = 256
    steps: int = 120
    span: int = 40
    lr: float = 3e-3
    keen: float = 20.0
    imitate: bool = True
    led: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """A policy that `imprint train --policy NAME` makes: a world, the shape of the policy, and the training.

    tasks: the world. steps: steps of a task when the policy is measured. options: options of the world. training:
    options of the world that differ in training. slots, k, cell: the memory site, as in `SiteConfig`; cell > 1 makes a
    policy that labels. width: width of a row (acting) or of a key (labelling). layer: units of a hidden layer.
    address_by_context: whether the context is part of the memory address. detects_changes: whether sessions keep
    change-point hypotheses. The other fields are those of `PolicyConfig` and `SiteConfig`.
    """

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
        """Draw `batch` tasks; `options` take precedence over the recipe's own."""
        return self.tasks(batch, rng, **{**self.options, **(self.training if training else {}), **options})

    def config(self, name: str) -> PolicyConfig:
        """Return the configuration of a policy of this recipe."""
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
        state_size = num_address_inputs + self.layer
        return PolicyConfig(name, "act", memory=MemoryConfig(state_size, (site, journal_site(inputs))), **shape)

    def with_train_config(self, **changes: Any) -> Recipe:
        """Return the recipe with some fields of the training changed."""
        return replace(self, train_config=replace(self.train_config, **changes))


@dataclass(frozen=True)
class Scenario:
    """The description of one scenario.

    tasks: the world; its class name is the environment's id. env_steps: steps of a task as an environment. recipes:
    policies by name, all of this world. evaluation: how these policies are measured, and beside which baselines.
    """

    tasks: type[Tasks]
    env_steps: int
    recipes: Mapping[str, Recipe]
    evaluation: ActingEvaluation | LabellingEvaluation

    @property
    def env_id(self) -> str:
        """Return the id that `gymnasium.make` takes."""
        return f"imprint/{self.tasks.__name__}-v0"
