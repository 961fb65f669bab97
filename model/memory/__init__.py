"""The fast-weight memory: its configuration, pure operations and their twins, slow weights, and the pool of fast
weights."""

from model.memory.config import MemoryConfig, MemoryConfigError, SiteConfig
from model.memory.pool import Draft, Pool, PoolFullError, SiteRows
from model.memory.sites import DeltaSite, LexicalReadout, LexicalSite, Memory, load_memory, save_memory

__all__ = [
    "DeltaSite",
    "Draft",
    "LexicalReadout",
    "LexicalSite",
    "Memory",
    "MemoryConfig",
    "MemoryConfigError",
    "Pool",
    "PoolFullError",
    "SiteConfig",
    "SiteRows",
    "load_memory",
    "save_memory",
]
