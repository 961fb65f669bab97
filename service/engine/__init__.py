"""The engine: the one thread that owns the device, and what it needs to share it between sessions."""

from service.engine.engine import Engine
from service.engine.types import (
    Decided,
    Deed,
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
    "Decided",
    "Deed",
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
