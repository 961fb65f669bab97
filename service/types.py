"""Types that requests, turns and answers share. The client imports them, so this module must not import torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

AdaptMode = Literal["both", "observe", "predict"]
LearnMode = Literal["prompt", "completion", "all"]
StoreStatus = Literal["ok", "read_only", "away"]  # read_only: what was learned can be used, nothing can be learned


@dataclass(frozen=True)
class Recalled:
    """An episode that a reply has read.

    Attributes:
        version: the version that learned the episode.
        offset: number of tokens of its request before the episode.
        score: how well its words match the question's; comparable within one reply only.
        text: the episode.
        time: unix time in seconds at which the version was made; None if the session's log has it no longer.
    """

    version: int
    offset: int
    score: float
    text: str
    time: float | None = None


@dataclass(frozen=True)
class Sampling:
    """Options of sampling, by OpenAI's names."""

    temperature: float
    top_p: float
    frequency_penalty: float


OPENAI_SAMPLING = Sampling(temperature=1.0, top_p=1.0, frequency_penalty=0.0)
# What Imprint's own clients send unless the user says otherwise, and the default of chats that name no temperature;
# docs/decisions/clients.md has the measurement. With OpenAI's defaults a small model soon writes nonsense.
SUGGESTED_SAMPLING = Sampling(temperature=0.4, top_p=0.9, frequency_penalty=0.5)


@dataclass(frozen=True)
class Adaptation:
    """The effect of a turn on its session.

    Attributes:
        tokens_learned: number of tokens learned.
        rows_written: number of memory rows written.
        loss: nats per learned token, before the token was learned; None if no token was learned.
        version_from: the session's version before the turn.
        version_to: the session's version after the turn.
        recalled: the episodes of the session that the reply has read, the oldest first.
    """

    tokens_learned: int
    rows_written: int
    loss: float | None
    version_from: int
    version_to: int
    recalled: list[Recalled] = field(default_factory=list)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Adaptation":
        """Return the adaptation of which `asdict` made a record; a record of an earlier release has no episodes."""
        return cls(**record | {"recalled": [Recalled(**entry) for entry in record.get("recalled", [])]})
