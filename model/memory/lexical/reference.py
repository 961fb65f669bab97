"""The twins of `ops.py`: the same names and arguments, one token and one slot at a time, in plain Python loops.

Slow on purpose, and the definition: where `ops.py` and this file disagree, this file is right.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from model.memory.config import RUNS
from model.memory.lexical.torch_backend import LIKENESS_STEP, MIXER, Candidates, Prediction, Rows, query_steps


def nearest(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores all N slots of each token; keys [n, 2, √N] → slots [n, k], scores [n, k]."""
    best = [(s1[:, None] + s2[None, :]).flatten().topk(k) for s1, s2 in keys]
    return torch.stack([b.indices for b in best]), torch.stack([b.values for b in best])


def read_lexical(
    rows: Rows, query: Tensor, context: Tensor, base: Prediction, sharpness: Tensor, prior: Tensor, bonus: Tensor
) -> Candidates:
    """Row by row; arguments and result as in `ops.compare` and `ops.weigh`."""
    n, k, P = rows.tokens.shape
    heads, log_probs = len(sharpness), base.logits.log_softmax(-1)
    tokens, shares = rows.tokens.flatten(1).long(), torch.zeros(n, heads, k * P, dtype=query.dtype)
    runs, repeats = context.shape[1], torch.zeros(n, dtype=torch.long)
    evidence = torch.zeros(n, heads, 4 + runs, dtype=query.dtype)
    evidence[:, :, 3] = math.log(1e-4) / 3
    for t, h in itertools.product(range(n), range(heads)):
        found = []
        for place in range(k * P):
            i, row = divmod(place, P)
            if rows.ages[t, i, row] > 0:
                cosine = float(query_steps(query[t]) @ rows.keys[t, i, row].float()) * LIKENESS_STEP
                pairs = zip(rows.prints[t, i, row].tolist(), context[t].tolist(), strict=True)
                same = sum(mine == asked and asked != 0 for mine, asked in pairs)
                score = float(sharpness[h]) * cosine + float(prior[h]) * float(log_probs[t, tokens[t, place]])
                score += float(bonus[h, :same].sum())
                found.append((score, cosine, same, place))
        if not found:
            continue
        total = math.log(sum(math.exp(score) for score, *_ in found))
        for score, *_, place in found:
            shares[t, h, place] = math.exp(score - total)
        _, cosine, same, best = max(found, key=lambda item: item[0])
        agreement = float(sum(shares[t, h, place] for *_, place in found if tokens[t, place] == tokens[t, best]))
        found_runs = [float(same > run) for run in range(runs)]
        evidence[t, h] = torch.tensor([total / 10, cosine, agreement, math.log(agreement + 1e-4) / 3, *found_runs])
        if h == 0:
            repeats[t] = same
    return Candidates(tokens, shares, evidence.flatten(1), repeats)


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


def fingerprints(token_ids: Tensor) -> Tensor:
    """Place by place, in Python's own integers; argument and result as in `ops.fingerprints`."""
    out = []
    for end in range(max(RUNS), len(token_ids) + 1):
        prints = []
        for run in RUNS:
            last = token_ids[end - run : end].tolist()[::-1]
            total = sum((token + 1) * pow(MIXER, j + 1) for j, token in enumerate(last)) % 2**64
            signed = total - 2**64 if total >= 2**63 else total
            high = ((signed ^ (signed >> 29)) * MIXER) % 2**64 >> 48
            print_ = high - 2**16 if high >= 2**15 else high
            prints.append(0 if -1 in last else print_ or 1)
        out.append(prints)
    return torch.tensor(out, dtype=torch.int16).view(-1, len(RUNS))


def place(cells: Tensor, room: Tensor) -> Tensor:
    """Token by token; arguments and result as in `ops.place`."""
    chosen: list[int] = []
    for mine, rooms in zip(cells.tolist(), room.tolist(), strict=True):
        empty = [cell for cell, rows in zip(mine, rooms, strict=True) if chosen.count(cell) < rows]
        chosen.append(empty[0] if empty else mine[0])
    return torch.tensor(chosen, dtype=torch.long)


def write_lexical(old: Rows, at: Tensor, keys: Tensor, prints: Tensor, targets: Tensor) -> Rows:
    """Token by token; arguments and result as in `ops.write_lexical`."""
    new = Rows(*(part.clone() for part in old))
    for t in range(len(at)):
        ages = new.ages[at[t]].tolist()
        place = ages.index(min(ages))
        new.ages[at[t], place] = max(ages) + 1
        new.tokens[at[t], place] = int(targets[t])
        new.prints[at[t], place] = prints[t]
        new.keys[at[t], place] = keys[t]
    return new


def read_hidden(rows: Tensor, w: Tensor) -> Tensor:
    """norm(Σ_i w_i·M_i), one token at a time; rows [n, k, d_v], w [n, k] → [n, d_v]."""
    out = torch.zeros(len(rows), rows.shape[-1], dtype=rows.dtype)
    for t in range(len(rows)):
        o = sum((w[t, i] * rows[t, i] for i in range(w.shape[1])), start=torch.zeros_like(out[t]))
        size = math.sqrt((o @ o).item() / len(o))
        out[t] = o / max(size, 1e-6) if size > 0 else o
    return out


def amount_hidden(rows: Tensor, w: Tensor) -> Tensor:
    """log(1 + rms(Σ_i w_i·M_i)), one token at a time; rows [n, k, d_v], w [n, k] → [n]."""
    out = torch.zeros(len(rows), dtype=rows.dtype)
    for t in range(len(rows)):
        o = [sum(float(w[t, i] * rows[t, i, v]) for i in range(w.shape[1])) for v in range(rows.shape[2])]
        out[t] = math.log1p(math.sqrt(sum(number**2 for number in o) / len(o)))
    return out


def write_hidden(
    old: Tensor, at: Tensor, w: Tensor, beta: Tensor, values: Tensor, *, decay: float, cap: float
) -> Tensor:
    """The delta rule token by token from the block's start; arguments and result as in `ops.write_hidden`."""
    spread = torch.zeros(len(at), len(old), dtype=old.dtype)
    for t in range(len(at)):
        spread[t, at[t]] = w[t]
    new = old.clone()
    for t in range(len(at)):
        read = sum((w[t, j] * old[at[t, j]] for j in range(at.shape[1])), start=torch.zeros_like(old[0]))
        crowd = max(1.0, sum((spread[t] @ spread[u]).item() for u in range(len(at))))
        for i in range(at.shape[1]):
            new[at[t, i]] += beta[t] / crowd * w[t, i] * (values[t] - decay * read)
    for u in range(len(old)):
        size = new[u].norm().item()
        if size > cap:
            new[u] *= cap / size
    return new
