"""The fast-weight memory: its configuration, pure operations and their twins, slow weights, and the pool of fast
weights."""

from model.memory.config import MemoryConfig, MemoryConfigError, SiteConfig
from model.memory.pool import Draft, Pool, PoolFullError, SiteRows
from model.memory.sites import HiddenSite, LexicalSite, Memory, Reading, load_memory, save_memory

__all__ = [
    "Draft",
    "HiddenSite",
    "LexicalSite",
    "Memory",
    "MemoryConfig",
    "MemoryConfigError",
    "Pool",
    "PoolFullError",
    "Reading",
    "SiteConfig",
    "SiteRows",
    "load_memory",
    "save_memory",
]
