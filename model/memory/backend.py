"""The contract of the memory's kernels, and the choice of the backend that implements them on a device.

Every backend implements the whole contract: `lexical/torch_backend.py` (any device), `lexical/numba_backend.py` (CPUs)
and `lexical/triton_backend.py` (NVIDIA GPUs); `lexical/reference.py` defines the equations. A backend has no state. A
`Pool` gets one backend and hands the backend to its sites; nothing else asks which backend runs. Equations and letters
are those of README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from model.memory.lexical.numba_backend import NumbaBackend
from model.memory.lexical.torch_backend import TorchBackend
from model.memory.lexical.types import AddressWeights, Candidates, GatedMixture, GateWeights, HeadParams
from model.memory.prediction import Prediction
from model.triton_check import has_triton, passes_check


class MemoryBackend(Protocol):
    """The kernels of the memory.

    Arguments that several methods share:
    tables: int32 [S + 1, C], the physical cell of each cell of each session; 0 is the empty cell.
    fields: the contents of the physical cells, each [physical cells, P, …], as `LexicalRows` has them.
    session_scalars: [S + 1, 3, R + 1], trust, balance and state of the guard of each session.
    session: long [n], the session of each batch entry; 0 is the empty session.

    A batch entry has the same bits whichever other entries are in the batch (law 4). All backends agree on integers
    (tokens, n-gram matches, empty rows, written rows) and similarities bit for bit, and elsewhere up to the rounding of
    fp32.
    """

    @property
    def name(self) -> str:
        """Return the name of the backend: "torch", "numba" or "triton"."""

    def load_rows(
        self, fields: Sequence[Tensor], physical_cells: Tensor, cell: Tensor, row: Tensor, data: Tensor
    ) -> None:
        """Put stored rows into cells of any kind of memory, bit for bit. Mutates `fields` at `physical_cells`.

        fields: each [physical cells, P, w]. physical_cells: [m], on the host as all other arguments. cell and row: [n];
        stored row i goes to row `row[i]` of the cell `physical_cells[cell[i]]`. data: uint8 [n, row_bytes]. All other
        rows of these cells become 0.
        """

    def find_candidates(
        self,
        tables: Tensor,
        fields: Sequence[Tensor],
        session: Tensor,
        cells: Tensor,
        query: Tensor,
        context: Tensor,
        prediction: Prediction,
        head_params: HeadParams,
    ) -> tuple[Candidates, Tensor]:
        """Return the candidates in the cells of n contexts (L3, L4), and the empty rows of these cells [n, k] long.

        cells: long [n, k]. query: [n, d_k], keys of the contexts, of unit length. context: int16 [n, R], n-gram hashes
        of the contexts. prediction: the base's, of n tokens. Mutates nothing.
        """

    def gate_mixture(
        self,
        found: Candidates,
        entropy: Tensor,
        keys: Tensor,
        gate: GateWeights,
        session_scalars: Tensor,
        session: Tensor,
        trust: Tensor,
    ) -> GatedMixture:
        """Return p_mem of n contexts and its weight γ (L5); γ is exactly 0 where nothing was found or the guard is
        closed.

        entropy: [n] of the base. keys: [n, d_k]. trust: [n, R + 1] of the requests. Mutates nothing.
        """

    def mixture(
        self,
        tables: Tensor,
        fields: Sequence[Tensor],
        session_scalars: Tensor,
        address: AddressWeights,
        k: int,
        head_params: HeadParams,
        gate: GateWeights,
        session: Tensor,
        hidden: Tensor,
        last_tokens: Tensor,
        trust: Tensor,
        logits: Tensor,
    ) -> Tensor:
        """Return log p [n, V] up to a constant per entry: a whole read, from hidden states to the mixture (L1–L6).

        An entry with γ = 0 keeps the bits of its logits (law 1). No shape depends on what is found and nothing waits
        for the device, so that a CUDA graph can capture the call.

        k: cells per token. hidden: final hidden states [n, d]. last_tokens: long [n, 8], −1 before the start of the
        request. trust: [n, R + 1] of the requests. logits: [n, V] of the base; they may be overwritten, and the result
        may share their memory. Mutates nothing else.
        """

    def write(
        self,
        fields: Sequence[Tensor],
        old: Tensor,
        new: Tensor,
        at: Tensor,
        keys: Tensor,
        ngram_hashes: Tensor,
        targets: Tensor,
    ) -> None:
        """Write one block of n tokens (L7), bit for bit as the reference. Mutates `fields` at `new`, and nothing else.

        old: int32 [U], physical cells with the contents before the block, 0 for a cell that has none. new: int32 [U],
        distinct physical cells that take the contents after the block; new[u] is old[u] or a free cell. at: [n], index
        into these of each token's cell, in the order of the tokens. keys: int8 [n, d_k]. ngram_hashes: int16 [n, R].
        targets: long [n].
        """


@cache
def choose_backend(device: torch.device) -> MemoryBackend:
    """Return the fastest backend that works on a device: Numba on a CPU; Triton on a GPU if Triton is installed and its
    kernels pass their check; torch elsewhere. A failed check is logged with its reason."""
    if device.type == "cpu":
        return NumbaBackend()
    if has_triton(device):
        # Triton is installed on GPU machines only: elsewhere these modules cannot be imported.
        from model.memory.lexical.triton_backend import TritonBackend
        from model.memory.lexical.triton_check import check_memory_kernels

        if passes_check(check_memory_kernels, device):
            return TritonBackend()
    return TorchBackend()
