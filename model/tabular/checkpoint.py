"""The parts that all learners share: slow weights in a file, their identity, and the limits of the input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from model import weights
from model.memory import Pool
from model.numba_support import Array
from model.tabular.config import SESSION, TabularConfig, TabularError
from model.tabular.memory import StreamMemory, read_memory
from model.tabular.mixer import Mixer, MixerWeights

FORMAT = "imprint-tabular-1"


class TabularModel:
    """The configuration and the mixer of a learner. The mixer must not change afterwards."""

    def __init__(self, config: TabularConfig, mixer: Mixer) -> None:
        self.config, self.mixer = config, mixer
        self.mixer_weights = MixerWeights.of(mixer)

    def fingerprint(self) -> str:
        """Return the identity of the slow weights; see `Learner.fingerprint`."""
        return weights.fingerprint(self.config.to_dict(), self.mixer)

    def check_columns(self, columns: int) -> None:
        """Raise TabularError for an example of so many columns if that is too many."""
        if columns > self.config.columns:
            raise TabularError(f"x must have at most {self.config.columns} columns, got {columns}")

    def wide_memory(self, pool: Pool, session: int, columns: int, readers: int) -> StreamMemory:
        """Return the memory of a session, with so many columns at least. Raises TabularError for too many."""
        self.check_columns(columns)
        memory = read_memory(pool, session, readers)
        memory.widen(columns)
        return memory

    @staticmethod
    def session_row(pool: Pool, session: int) -> Array:
        """Return the session's row; see `memory`."""
        site = pool.sites[SESSION]
        row: Array = site.fields[0].numpy()[int(site.physical_cells[session, 0])]
        return row


def save_tabular(model: TabularModel, path: Path) -> None:
    """Write the slow weights as safetensors, with the configuration in the file's metadata."""
    weights.write(model.mixer, path, {"format": FORMAT, "tabular": json.dumps(model.config.to_dict())})


def read_tabular(path: Path) -> tuple[TabularConfig, Mixer]:
    """Read a file of `save_tabular`. Raises TabularError."""
    try:
        metadata, tensors = weights.read(path)
    except (OSError, SafetensorError) as error:
        raise TabularError(f"cannot read the learner {path.name}: {error}") from error
    if metadata.get("format") != FORMAT or "tabular" not in metadata:
        raise TabularError(f"{path.name}: format must be {FORMAT}, got {metadata.get('format')!r}")
    try:
        data: dict[str, Any] = json.loads(metadata["tabular"])
        config, mixer = TabularConfig.from_dict(data), Mixer(len(tensors["embedding"]))
        mixer.load_state_dict(tensors)
    except (ValueError, KeyError, RuntimeError) as error:
        raise TabularError(f"{path.name} is no learner: {error}") from error
    return config, mixer
