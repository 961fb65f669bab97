"""The twins of `ops.py`: the same names and arguments, one token and one slot at a time, in plain Python loops.

Slow on purpose, and the definition: where `ops.py` and this file disagree, this file is right.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from model.memory.config import NGRAM_SIZES
from model.memory.lexical.torch_backend import (
    HASH_MULTIPLIER,
    SIMILARITY_STEP,
    Candidates,
    LexicalRows,
    Prediction,
    scale_query,
)


def product_key_topk(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores all N slots of each token; keys [n, 2, √N] → slots [n, k], scores [n, k]."""
    best = [(s1[:, None] + s2[None, :]).flatten().topk(k) for s1, s2 in keys]
    return torch.stack([b.indices for b in best]), torch.stack([b.values for b in best])


def read_lexical(
    rows: LexicalRows, query: Tensor, context: Tensor, base: Prediction, sharpness: Tensor, prior: Tensor, bonus: Tensor
) -> Candidates:
    """Row by row; arguments and result as in `ops.compare` and `ops.score_candidates`."""
    n, k, P = rows.tokens.shape
    heads, log_probs = len(sharpness), base.logits.log_softmax(-1)
    tokens, shares = rows.tokens.flatten(1).long(), torch.zeros(n, heads, k * P, dtype=query.dtype)
    num_ngrams, ngram_matches = context.shape[1], torch.zeros(n, dtype=torch.long)
    gate_features = torch.zeros(n, heads, 4 + num_ngrams, dtype=query.dtype)
    gate_features[:, :, 3] = math.log(1e-4) / 3
    for t, h in itertools.product(range(n), range(heads)):
        found = []
        for candidate in range(k * P):
            i, row = divmod(candidate, P)
            if rows.ages[t, i, row] > 0:
                cosine = float(scale_query(query[t]) @ rows.keys[t, i, row].float()) * SIMILARITY_STEP
                pairs = zip(rows.ngram_hashes[t, i, row].tolist(), context[t].tolist(), strict=True)
                same = sum(mine == asked and asked != 0 for mine, asked in pairs)
                score = float(sharpness[h]) * cosine + float(prior[h]) * float(log_probs[t, tokens[t, candidate]])
                score += float(bonus[h, :same].sum())
                found.append((score, cosine, same, candidate))
        if not found:
            continue
        total = math.log(sum(math.exp(score) for score, *_ in found))
        for score, *_, candidate in found:
            shares[t, h, candidate] = math.exp(score - total)
        _, cosine, same, best = max(found, key=lambda item: item[0])
        agreement = float(
            sum(shares[t, h, candidate] for *_, candidate in found if tokens[t, candidate] == tokens[t, best])
        )
        matched_ngrams = [float(same > j) for j in range(num_ngrams)]
        gate_features[t, h] = torch.tensor(
            [total / 10, cosine, agreement, math.log(agreement + 1e-4) / 3, *matched_ngrams]
        )
        if h == 0:
            ngram_matches[t] = same
    return Candidates(tokens, shares, gate_features.flatten(1), ngram_matches)


def mix(base: Prediction, tokens: Tensor, shares: Tensor, gamma: Tensor) -> Tensor:
    """The mixture over the whole vocabulary, one token at a time; log-probabilities [n, V]."""
    out = base.logits.clone()
    for t in range(len(out)):
        if gamma[t] > 0:
            memory = torch.zeros_like(out[t])
            for token, share in zip(tokens[t].tolist(), shares[t], strict=True):
                memory[token] += share
            out[t] = ((1 - gamma[t]) * torch.softmax(base.logits[t], -1) + gamma[t] * memory).log()
    return out


def hash_ngrams(token_ids: Tensor) -> Tensor:
    """Place by place, in Python's own integers; argument and result as in `ops.hash_ngrams`."""
    out = []
    for end in range(max(NGRAM_SIZES), len(token_ids) + 1):
        ngram_hashes = []
        for ngram_size in NGRAM_SIZES:
            last = token_ids[end - ngram_size : end].tolist()[::-1]
            total = sum((token + 1) * pow(HASH_MULTIPLIER, j + 1) for j, token in enumerate(last)) % 2**64
            signed = total - 2**64 if total >= 2**63 else total
            high = ((signed ^ (signed >> 29)) * HASH_MULTIPLIER) % 2**64 >> 48
            ngram_hash = high - 2**16 if high >= 2**15 else high
            ngram_hashes.append(0 if -1 in last else ngram_hash or 1)
        out.append(ngram_hashes)
    return torch.tensor(out, dtype=torch.int16).view(-1, len(NGRAM_SIZES))


def assign_cells(cells: Tensor, num_empty_rows: Tensor) -> Tensor:
    """Token by token; arguments and result as in `ops.assign_cells`."""
    chosen: list[int] = []
    for mine, num_empty in zip(cells.tolist(), num_empty_rows.tolist(), strict=True):
        empty = [cell for cell, rows in zip(mine, num_empty, strict=True) if chosen.count(cell) < rows]
        chosen.append(empty[0] if empty else mine[0])
    return torch.tensor(chosen, dtype=torch.long)


def write_lexical(old: LexicalRows, at: Tensor, keys: Tensor, ngram_hashes: Tensor, targets: Tensor) -> LexicalRows:
    """Token by token; arguments and result as in `ops.write_lexical`."""
    new = LexicalRows(*(part.clone() for part in old))
    for t in range(len(at)):
        ages = new.ages[at[t]].tolist()
        row = ages.index(min(ages))
        new.ages[at[t], row] = max(ages) + 1
        new.tokens[at[t], row] = int(targets[t])
        new.ngram_hashes[at[t], row] = ngram_hashes[t]
        new.keys[at[t], row] = keys[t]
    return new


def read_delta(rows: Tensor, w: Tensor) -> Tensor:
    """norm(Σ_i w_i·M_i), one token at a time; rows [n, k, d_v], w [n, k] → [n, d_v]."""
    out = torch.zeros(len(rows), rows.shape[-1], dtype=rows.dtype)
    for t in range(len(rows)):
        o = sum((w[t, i] * rows[t, i] for i in range(w.shape[1])), start=torch.zeros_like(out[t]))
        size = math.sqrt((o @ o).item() / len(o))
        out[t] = o / max(size, 1e-6) if size > 0 else o
    return out


def delta_read_magnitude(rows: Tensor, w: Tensor) -> Tensor:
    """log(1 + rms(Σ_i w_i·M_i)), one token at a time; rows [n, k, d_v], w [n, k] → [n]."""
    out = torch.zeros(len(rows), dtype=rows.dtype)
    for t in range(len(rows)):
        o = [sum(float(w[t, i] * rows[t, i, v]) for i in range(w.shape[1])) for v in range(rows.shape[2])]
        out[t] = math.log1p(math.sqrt(sum(number**2 for number in o) / len(o)))
    return out


def write_delta(
    old: Tensor, at: Tensor, w: Tensor, beta: Tensor, values: Tensor, *, decay: float, cap: float
) -> Tensor:
    """The delta rule token by token from the block's start; arguments and result as in `ops.write_delta`."""
    spread = torch.zeros(len(at), len(old), dtype=old.dtype)
    for t in range(len(at)):
        spread[t, at[t]] = w[t]
    new = old.clone()
    for t in range(len(at)):
        read = sum((w[t, j] * old[at[t, j]] for j in range(at.shape[1])), start=torch.zeros_like(old[0]))
        collisions = max(1.0, sum((spread[t] @ spread[u]).item() for u in range(len(at))))
        for i in range(at.shape[1]):
            new[at[t, i]] += beta[t] / collisions * w[t, i] * (values[t] - decay * read)
    for u in range(len(old)):
        size = new[u].norm().item()
        if size > cap:
            new[u] *= cap / size
    return new
