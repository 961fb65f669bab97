"""Words that requests, turns and answers share; the client needs them without torch."""

from dataclasses import dataclass
from typing import Literal

AdaptMode = Literal["both", "observe", "predict"]
LearnMode = Literal["prompt", "completion", "all"]


@dataclass(frozen=True)
class Adaptation:
    """What a turn did to its session. loss: nats per learned token, before it was learned."""

    tokens_learned: int
    rows_written: int
    loss: float | None
    version_from: int
    version_to: int
