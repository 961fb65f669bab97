"""The engine: one thread that owns the device and shares it between sessions.

`engine.py` runs the thread's loop; `scheduler.py` says which job is next; `text_job.py`, `policy_job.py` and
`tabular_job.py` are the kinds of jobs; `resident.py` keeps the sessions that are on the device; `types.py` has the
values that go in and out.
"""

from service.engine.engine import Engine, JobStream
from service.engine.tabular_job import AnyLearner
from service.engine.types import (
    ActionReward,
    ArmChoice,
    Event,
    Example,
    GenerationParams,
    JobFailed,
    JobFinished,
    JobRequest,
    JobStats,
    LearnedCompletion,
    MemoryAccess,
    PastActions,
    PastReward,
    PolicyDecision,
    PolicyRequest,
    Segment,
    StateId,
    Step,
    TabularAnswer,
    TabularRequest,
    TakenArm,
    TokenOutput,
    TokenScores,
)

__all__ = [
    "ActionReward",
    "AnyLearner",
    "ArmChoice",
    "Engine",
    "Event",
    "Example",
    "GenerationParams",
    "JobFailed",
    "JobFinished",
    "JobRequest",
    "JobStats",
    "JobStream",
    "LearnedCompletion",
    "MemoryAccess",
    "PastActions",
    "PastReward",
    "PolicyDecision",
    "PolicyRequest",
    "Segment",
    "StateId",
    "Step",
    "TabularAnswer",
    "TabularRequest",
    "TakenArm",
    "TokenOutput",
    "TokenScores",
]
