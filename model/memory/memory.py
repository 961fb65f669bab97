"""The slow weights of a whole memory, and their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from model import weights
from model.memory.config import MemoryConfig
from model.memory.delta.site import DeltaSite
from model.memory.kinds import SITES
from model.memory.lexical.site import LexicalSite
from model.memory.row_layout import MemoryConfigError
from model.memory.site import ResidualSite

FORMAT = "3"


class Memory(nn.Module):
    """The sites of one memory, by name, in the order of the configuration. Sites without slow weights are left out."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.sites = nn.ModuleDict()
        for site in config.sites:
            if (constructor := SITES[site.kind]) is not None:
                self.sites[site.name] = constructor(site, config.hidden_size)
        self.requires_grad_(False)

    @property
    def lexical(self) -> LexicalSite | None:
        """Return the lexical site, or None."""
        return next((site for site in self.sites.values() if isinstance(site, LexicalSite)), None)

    @property
    def delta(self) -> dict[int, DeltaSite]:
        """Return the delta sites by layer; −1 is the output."""
        return {layer: site for layer, site in self.residual.items() if isinstance(site, DeltaSite)}

    @property
    def residual(self) -> dict[int, ResidualSite]:
        """Return the sites of all kinds that are read into the residual stream, by layer; −1 is the output."""
        return {site.config.layer: site for site in self.sites.values() if isinstance(site, ResidualSite)}

    def fingerprint(self) -> str:
        """Return the sha256 of the configuration and every tensor: the identity to which a stored state is bound."""
        return weights.fingerprint(self.config.to_dict(), self)


def save_memory(memory: Memory, path: Path) -> None:
    """Write the slow weights as safetensors, with the configuration in the metadata."""
    weights.write(memory, path, {"format": FORMAT, "memory": json.dumps(memory.config.to_dict())})


def load_memory(path: Path, *, hidden_size: int) -> Memory:
    """Return the memory that `save_memory` has written to a file.

    Raise MemoryConfigError if the file is no memory checkpoint, or is made for another hidden size.
    """
    try:
        metadata, tensors = weights.read(path)
    except (OSError, SafetensorError) as error:
        raise MemoryConfigError(f"cannot read the memory checkpoint {path.name}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise MemoryConfigError(f"{path.name}: format must be {FORMAT}, got {metadata.get('format')!r}")
    try:
        config = MemoryConfig.from_dict(json.loads(metadata["memory"]))
    except (KeyError, ValueError, RecursionError) as error:
        raise MemoryConfigError(f"{path.name}: not a memory configuration: {error}") from error
    if config.hidden_size != hidden_size:
        raise MemoryConfigError(
            f"{path.name} is made for a base of hidden size {config.hidden_size}, this base has {hidden_size}"
        )
    memory = Memory(config)
    try:
        memory.load_state_dict(tensors)
    except RuntimeError as error:
        raise MemoryConfigError(f"{path.name} does not fit its own configuration: {error}") from error
    return memory.requires_grad_(False)
