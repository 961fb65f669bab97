"""The configuration of a policy: what the policy observes, what it decides and the memory that it decides from.

The configuration is part of the checkpoint, so the fields keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from model.memory import MemoryConfig, MemoryConfigError
from model.policies.change_point import NAME as CHANGE_POINT_SITE

NUM_HISTORY_INPUTS = 3  # an action's inputs about the last action: was it this one, its reward, is the reward known
NUM_OUTCOME_INPUTS = 4  # a reward's inputs: 1, the reward, its excess above and its shortfall below the expectation


class PolicyError(ValueError):
    """A policy that cannot be built or read; the message names the field, the limit and the value."""


@dataclass(frozen=True)
class PolicyConfig:
    """The shape of a policy.

    name: the model name that clients send.
    task: "act" (choose one of `actions`, learn from the reward) or "label" (predict which of `actions` labels an
        example has, learn from the correct label).
    context: number of observed values that all actions share.
    actions: number of actions or labels, A.
    memory: the sites of the session's memory.
    features: number of observed values of each action.
    identity: whether an action's input contains the one-hot index of the action.
    cue: number of leading context values that are part of the memory address.
    by_features, by_action: whether an action's features or its one-hot index are part of the memory address.
    product: whether the memory readout also multiplies the state elementwise.
    width: units of a hidden layer, W.
    lowest, highest: the range of rewards.
    greedy: whether the policy takes the best action unless the request sets a temperature.
    """

    name: str
    task: Literal["act", "label"]
    context: int
    actions: int
    memory: MemoryConfig
    features: int = 0
    identity: bool = True
    cue: int = 0
    by_features: bool = False
    by_action: bool = False
    product: bool = False
    width: int = 64
    lowest: float = 0.0
    highest: float = 1.0
    greedy: bool = True

    def __post_init__(self) -> None:
        if self.task not in ("act", "label"):
            raise PolicyError(f"task must be 'act' or 'label', got {self.task!r}")
        if self.actions < 2:
            raise PolicyError(f"actions must be at least 2, got {self.actions}")
        if not 0 <= self.cue <= self.context:
            raise PolicyError(f"cue must be in 0..{self.context} (context), got {self.cue}")
        if self.observation_size < 1 and self.task == "label":
            raise PolicyError(f"context must be at least 1, got {self.context}")
        if not self.lowest < self.highest:
            raise PolicyError(f"lowest must be below highest ({self.highest}), got {self.lowest}")
        if self.detects_changes and any(site.kind == "lexical" and site.cells > 1 for site in self.memory.sites):
            raise PolicyError(
                f"cells must be 1 where the memory has a site {CHANGE_POINT_SITE!r}: its order is over all labels"
            )
        if self.memory.hidden_size != self.state_size:
            raise PolicyError(f"memory.hidden_size must be {self.state_size}, got {self.memory.hidden_size}")

    @property
    def observation_size(self) -> int:
        """Return the length of an observation: the context, then the features of each action."""
        return self.context + self.actions * self.features

    @property
    def input_size(self) -> int:
        """Return F, the length of the input of an action or of an example."""
        if self.task == "label":
            return self.context
        return self.context + self.features + self.identity * self.actions + NUM_HISTORY_INPUTS

    @property
    def num_address_inputs(self) -> int:
        """Return the number of inputs that are copied into the state to address the memory."""
        return self.cue + self.by_features * self.features + self.by_action * self.actions

    @property
    def state_size(self) -> int:
        """Return D, the length of the state that the memory sees: the address inputs, then a hidden layer."""
        return self.num_address_inputs + self.width

    @property
    def detects_changes(self) -> bool:
        """Return whether sessions keep hypotheses about the last change of the labels."""
        return self.task == "label" and any(site.name == CHANGE_POINT_SITE for site in self.memory.sites)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PolicyConfig:
        """Build a configuration from `to_dict`'s keys. Raises PolicyError on an unknown or a missing key."""
        try:
            return cls(**{**data, "memory": MemoryConfig.from_dict(data["memory"])})
        except (TypeError, KeyError, MemoryConfigError) as error:
            raise PolicyError(f"not a policy's configuration: {error}") from error
