"""The torch backend of the lexical memory: the operators of `ops.py` behind the contract of `MemoryBackend`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from model.device import upload, upload_on_side_stream
from model.memory.lexical import ops
from model.memory.lexical.types import (
    AddressWeights,
    Candidates,
    GatedMixture,
    GateWeights,
    HeadParams,
    LexicalRows,
    RowMatches,
)
from model.memory.prediction import Prediction, base_prediction
from model.memory.rows import as_bytes


class TorchBackend:
    """The memory's kernels in torch operators, on any device. `MemoryBackend` states the contract of each method."""

    name = "torch"

    def load_rows(
        self, fields: Sequence[Tensor], physical_cells: Tensor, cell: Tensor, row: Tensor, data: Tensor
    ) -> None:
        P, device = fields[0].shape[1], fields[0].device
        rows = data.new_zeros(len(physical_cells) * P, data.shape[1])
        rows[cell * P + row] = data
        physical_cells = upload(physical_cells, device)
        parts = upload_on_side_stream(rows, device).split([field[0, 0].nbytes for field in fields], dim=1)
        for field, part in zip(fields, parts, strict=True):
            field[physical_cells] = as_bytes(part).view(field.dtype).view(len(physical_cells), *field.shape[1:])

    def match_rows(
        self,
        tables: Tensor,
        fields: Sequence[Tensor],
        session: Tensor,
        cells: Tensor,
        query: Tensor,
        context: Tensor,
    ) -> RowMatches:
        """Compare the rows in `cells` [n, k] of sessions [n] with a query [n, d_k] and n-gram hashes [n, R] (L3)."""
        physical_cells = tables[session[:, None], cells]
        return ops.match_rows(LexicalRows(*(field[physical_cells] for field in fields)), query, context)

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
        rows = self.match_rows(tables, fields, session, cells, query, context)
        return ops.score_row_matches(rows, prediction, head_params), rows.missing.view(*cells.shape, -1).sum(-1)

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
        return ops.gate_mixture(found, entropy, keys, gate, session_scalars, session, trust)

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
        prediction, context = base_prediction(logits), ops.hash_last_ngrams(last_tokens)
        keys = ops.context_keys(hidden, address.key_weight, address.key_bias)
        cells = ops.nearest_cells(keys, address.centres, k)
        found, _ = self.find_candidates(tables, fields, session, cells, keys, context, prediction, head_params)
        gated = self.gate_mixture(found, prediction.entropy, keys, gate, session_scalars, session, trust)
        return ops.mix(prediction, found.tokens, gated.shares, gated.gamma)

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
        written = ops.write_lexical(LexicalRows(*(field[old] for field in fields)), at, keys, ngram_hashes, targets)
        for field, values in zip(fields, written, strict=True):
            field[new] = values
