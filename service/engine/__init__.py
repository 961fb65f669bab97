"""The engine: the one thread that owns the device, and what it needs to share it between sessions."""

from service.engine.engine import Engine
from service.engine.job import (
    Event,
    Failed,
    Finished,
    Generate,
    Job,
    MemoryUse,
    Segment,
    Stamp,
    Stats,
    Token,
    TokenScores,
)

__all__ = [
    "Engine",
    "Event",
    "Failed",
    "Finished",
    "Generate",
    "Job",
    "MemoryUse",
    "Segment",
    "Stamp",
    "Stats",
    "Token",
    "TokenScores",
]
