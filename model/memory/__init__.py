"""The fast-weight memory: what every session writes (fast weights, in a pool) and how (slow weights, in sites).

README.md has the equations, the symbols and the laws.
"""

from model.memory.backend import MemoryBackend, choose_backend
from model.memory.config import MemoryConfig, SiteConfig
from model.memory.delta.site import DeltaSite
from model.memory.lexical.site import FoundCandidates, LexicalReadout, LexicalSite
from model.memory.memory import Memory, load_memory, save_memory
from model.memory.pool import Draft, Pool, PoolFullError
from model.memory.row_layout import MemoryConfigError
from model.memory.rows import SiteRows

__all__ = [
    "DeltaSite",
    "Draft",
    "FoundCandidates",
    "LexicalReadout",
    "LexicalSite",
    "Memory",
    "MemoryBackend",
    "MemoryConfig",
    "MemoryConfigError",
    "Pool",
    "PoolFullError",
    "SiteConfig",
    "SiteRows",
    "choose_backend",
    "load_memory",
    "save_memory",
]
