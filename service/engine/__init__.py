"""The engine: the one thread that owns the device, and what it needs to share it between sessions."""

from service.engine.engine import Engine
from service.engine.types import (
    Event,
    GenerationParams,
    Job,
    JobFailed,
    JobFinished,
    JobStats,
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
    "Job",
    "JobFailed",
    "JobFinished",
    "JobStats",
    "MemoryAccess",
    "PolicyDecision",
    "PolicyRequest",
    "Segment",
    "StateId",
    "TokenOutput",
    "TokenScores",
]
