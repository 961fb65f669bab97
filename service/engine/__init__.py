"""The engine: one thread that owns the device and shares it between sessions.

`engine.py` runs the thread's loop; `scheduler.py` says which job is next; `text_job.py` and `policy_job.py` are the two
kinds of jobs; `resident.py` keeps the sessions that are on the device; `types.py` has the values that go in and out.
"""

from service.engine.engine import Engine, JobStream
from service.engine.types import (
    Event,
    GenerationParams,
    JobFailed,
    JobFinished,
    JobRequest,
    JobStats,
    LearnedCompletion,
    MemoryAccess,
    PolicyDecision,
    PolicyRequest,
    Segment,
    StateId,
    TokenOutput,
    TokenScores,
)

__all__ = [
    "Engine",
    "Event",
    "GenerationParams",
    "JobFailed",
    "JobFinished",
    "JobRequest",
    "JobStats",
    "JobStream",
    "LearnedCompletion",
    "MemoryAccess",
    "PolicyDecision",
    "PolicyRequest",
    "Segment",
    "StateId",
    "TokenOutput",
    "TokenScores",
]
