"""The bodies of replies of policies and learners of tables, which the Python client reads as well: no torch here."""

from typing import Literal

from pydantic import BaseModel, Field

from service.types import Adaptation


class Vote(BaseModel):
    """A learned example that spoke for a prediction."""

    version: int | None = Field(description="The version that learned the example; null if the session has lost it.")
    example: int = Field(description="Number of the example in the session, from 1.")
    weight: float = Field(description="Its share of all votes.")


class LabelPrediction(BaseModel):
    """A prediction of a label."""

    label: str | int | None = Field(description="The likeliest label; null if the session has learned none.")
    probabilities: dict[str, float] | list[float] = Field(
        description="Of each label that the session has learned, by name; of a policy of fixed shapes, by number."
    )
    unknown: float | None = Field(None, description="Probability of a label that the session has never seen.")
    why: list[Vote] | None = Field(None, description="The nearest examples, the heaviest first.")


class ValuePrediction(BaseModel):
    """A prediction of a number."""

    value: float | None = Field(description="The mean; null if the session has learned too little.")
    interval: list[float] | None = Field(description="Lower and upper end: the number is between with probability 0.9.")
    why: list[Vote] | None = Field(None, description="The nearest examples, the heaviest first.")


class Action(BaseModel):
    """A chosen action."""

    object: Literal["action"]
    action: int | str
    action_id: str | None = Field(description="Names the action for its reward; null if the session only predicts.")
    probability: float = Field(description="Probability with which the action was chosen; 1 at temperature 0.")
    probabilities: list[float] | dict[str, float] = Field(
        description="Of the policy, under the session's rules; the holdout is not in them."
    )
    expected: list[float] | dict[str, float] = Field(description="Expected mean reward of each action.")
    propensity: float | None = Field(
        None, description="`probability` by the name that logs use; the holdout is in it. Null for fixed shapes."
    )
    holdout: bool | None = Field(None, description="Whether the control policy decided.")
    why: list[Vote] | None = Field(None, description="The nearest examples, the heaviest first.")


class Acted(Action):
    """The reply of `POST /v1/sessions/{id}/act`; `adaptation` counts learned rewards as tokens."""

    adaptation: Adaptation


class ActedList(BaseModel):
    """The reply of `POST /v1/sessions/{id}/act` to a list of decisions."""

    object: Literal["list"]
    data: list[Action]
    adaptation: Adaptation


class Labelled(LabelPrediction):
    """The reply of `POST /v1/sessions/{id}/predict` for labels."""

    object: Literal["label"]
    version: int


class Valued(ValuePrediction):
    """The reply of `POST /v1/sessions/{id}/predict` for numbers."""

    object: Literal["value"]
    version: int


class LabelItem(LabelPrediction):
    """One of several predictions of labels."""

    object: Literal["label"]


class ValueItem(ValuePrediction):
    """One of several predictions of numbers."""

    object: Literal["value"]


class PredictedList(BaseModel):
    """The reply of `POST /v1/sessions/{id}/predict` to a list of examples."""

    object: Literal["list"]
    data: list[LabelItem | ValueItem]
    version: int
