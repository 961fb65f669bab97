"""The bodies of requests to policies and learners of tables: acting, rewards and predictions."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from model.tabular.limits import MAX_ARMS, MAX_BATCH
from service.errors import BadRequest
from service.http import field_rules
from service.http.schemas import (
    FEATURES,
    MODEL,
    ON_DISCONNECT,
    Body,
    CompletionId,
    Features,
    Name,
    Number,
    OnDisconnect,
    Seed,
    Text,
    text_or_object,
)

REGRET = Field(None, description="The regret of that action, if it is known; only counted in the metrics, not learned.")
Observation = Annotated[
    list[Annotated[float, Field(ge=-1e6, le=1e6)]], Field(min_length=1, max_length=65_536, fail_fast=True)
]
ActionId = Annotated[str, StringConstraints(pattern=r"^act-[1-9][0-9]{0,14}(-[0-9a-f]{12})?$")]
ACTIONS = Field(None, description="The actions to choose from: names, or objects with an `id` and `features`.")
Temperature = Annotated[float, Field(ge=0, le=10)]


class FeaturesBody(Body):
    """An example to predict."""

    features: Features


class PredictRequest(Body):
    """The body of `POST /v1/sessions/{id}/predict`: `features`, or `examples`, a list of objects with `features`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "labels", "features": {"age": 41, "city": "Ulm"}}],
            **field_rules.PREDICT,
        }
    )

    features: Features | None = FEATURES
    examples: Annotated[list[FeaturesBody], Field(min_length=1, max_length=MAX_BATCH, fail_fast=True)] | None = None
    model: str | None = MODEL

    @model_validator(mode="after")
    def _one_of(self) -> "PredictRequest":
        if (self.features is None) == (self.examples is None):
            raise BadRequest("Give 'features' or 'examples'.", param="features")
        return self

    @property
    def batch(self) -> list[Features]:
        """The examples to predict."""
        return [self.features] if self.features is not None else [each.features for each in self.examples or []]


class Arm(Body):
    """An action with features of its own."""

    id: Name
    features: Features


Arms = Annotated[
    list[
        Annotated[
            Annotated[Name, Tag("<text>")] | Annotated[Arm, Tag("<object>")],
            Discriminator(
                text_or_object,
                custom_error_type="arm_type",
                custom_error_message="should be a name, or an object with an id and features",
            ),
        ]
    ],
    Field(min_length=1, max_length=MAX_ARMS, fail_fast=True),
]


class ChoiceFields(Body):
    """The fields of a decision besides its actions."""

    context: Features | None = Field(None, description="What is known before the decision, as in `features`.")
    allowed: Annotated[list[Name], Field(min_length=1, max_length=MAX_ARMS, fail_fast=True)] | None = Field(
        None, description="The actions that may be taken; default: all."
    )
    forced: Name | None = Field(None, description="The action that is taken, whatever the policy says.")
    propensity: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="With `forced`: the probability with which the caller took the action. Default: 1."
    )
    temperature: Temperature | None = Field(
        None, description="0 = the likeliest action, 1 = by the policy's probabilities; default: 1, or the policy's."
    )
    seed: Seed | None = None

    @field_validator("propensity")
    @classmethod
    def _belongs_to_forced(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("forced") is None:
            raise PydanticCustomError("belongs_to_forced", "is only allowed with 'forced'")
        return value


class ChoiceBody(ChoiceFields):
    """A decision to take among actions."""

    model_config = ConfigDict(json_schema_extra=field_rules.CHOICE)

    actions: Arms = Field(description="The actions to choose from: names, or objects with an `id` and `features`.")


class ActRequest(ChoiceFields):
    """The body of `POST /v1/sessions/{id}/act`: `actions` with a `context`; or `examples`, a list of such decisions; or
    `observation`, for a policy of fixed shapes."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "bandit", "context": {"hour": 20, "device": "phone"}, "actions": ["news", "sports"]},
                {"model": "bandit-10", "observation": [0.0]},
            ],
            **field_rules.ACT,
        }
    )

    actions: Arms | None = ACTIONS
    observation: Observation | None = Field(
        None, description="For a policy of fixed shapes: the numbers of the context, then those of each action."
    )
    examples: Annotated[list[ChoiceBody], Field(min_length=1, max_length=MAX_BATCH, fail_fast=True)] | None = None
    reward: Number | None = Field(None, description="The reward of the last action, or of `action_id`.")
    action_id: ActionId | None = Field(None, description="The action that the reward belongs to.")
    regret: Annotated[float, Field(ge=0)] | None = REGRET
    model: str | None = MODEL
    on_disconnect: OnDisconnect | None = ON_DISCONNECT

    @model_validator(mode="after")
    def _one_of(self) -> "ActRequest":
        given = [name for name in ("actions", "observation", "examples") if getattr(self, name) is not None]
        if len(given) != 1:
            fault = "neither" if not given else " and ".join(given)
            raise BadRequest(f"Give one of 'actions', 'observation' and 'examples', got {fault}.", param="actions")
        alone = () if given == ["actions"] else ("context", "allowed", "forced")
        if given == ["examples"]:
            alone = (*alone, "temperature", "seed")
        for name in alone:
            if getattr(self, name) is not None:
                raise BadRequest(f"'{name}' does not go with '{given[0]}'.", param=name)
        for name in ("action_id", "regret"):
            if self.reward is None and getattr(self, name) is not None:
                raise BadRequest(f"'{name}' is only allowed with 'reward'.", param=name)
        return self

    @property
    def batch(self) -> "Sequence[ChoiceBody | ActRequest]":
        """The decisions to take; none for a policy of fixed shapes."""
        return self.examples if self.examples is not None else [] if self.actions is None else [self]


class RewardBody(Body):
    """The reward of an action."""

    action_id: ActionId
    reward: Number
    regret: Annotated[float, Field(ge=0)] | None = REGRET


class FeedbackRequest(Body):
    """The body of `POST /v1/sessions/{id}/feedback`: an action and its reward; or `examples`, a list of those, which
    become one version; or a completion and the kept text."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"action_id": "act-1-5f2b9c04d1e7", "reward": 1.0}], **field_rules.FEEDBACK}
    )

    action_id: ActionId | None = None
    reward: Number | None = None
    regret: Annotated[float, Field(ge=0)] | None = REGRET
    examples: Annotated[list[RewardBody], Field(min_length=1, max_length=MAX_BATCH, fail_fast=True)] | None = None
    completion_id: CompletionId | None = Field(
        None, description="The `id` of a completion, a message or a response of this session."
    )
    text: Annotated[Text, Field(min_length=1)] | None = Field(None, description="The text that the user kept instead.")
    on_disconnect: OnDisconnect | None = ON_DISCONNECT

    @model_validator(mode="after")
    def _one_of(self) -> "FeedbackRequest":
        action_fields, text_fields = ("action_id", "reward", "regret"), ("completion_id", "text")
        if self.examples is not None:
            for name in (*action_fields, *text_fields):
                if getattr(self, name) is not None:
                    raise BadRequest(f"'{name}' does not go with 'examples'.", param=name)
            return self
        text_given = [name for name in text_fields if getattr(self, name) is not None]
        if text_given and any(getattr(self, name) is not None for name in action_fields):
            message = f"{text_given[0]!r} is of text and does not go with a reward of an action."
            raise BadRequest(message, param=text_given[0])
        for name in text_fields if text_given else action_fields[:2]:
            if getattr(self, name) is None:
                raise BadRequest(f"{name!r} is required with the other one of its pair.", param=name)
        return self

    @property
    def batch(self) -> "Sequence[RewardBody]":
        """The rewards to learn."""
        if self.examples is not None:
            return self.examples
        assert self.action_id is not None and self.reward is not None  # `_one_of` says so
        return [RewardBody.model_construct(action_id=self.action_id, reward=self.reward, regret=self.regret)]
