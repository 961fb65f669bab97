"""Arms that store the history as it is and mix its statistics into the base's distribution: strong baselines.

The neural cache is Grave et al. 2016 (arXiv 1612.04426); n-grams of the history are mixed as in Jelinek and Mercer
1980.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.memory.initial import WHITENING_FLOOR, WHITENING_POWER
from research.evaluation.arms import Arm, Outcome, Setting, Subject
from research.evaluation.prequential import Clock, Progress

FEATURES = ("log_total", "agreement", "entropy")  # inputs of a gate besides its bias
ORDERS = 3  # unigrams, bigrams, trigrams
MIN_MASS = 1e-30  # a smaller sum of matches counts as no match
NGRAM_BYTES = (8, 12, 16)  # of an entry of each order: token ids and a count


@dataclass(frozen=True)
class Whitening:
    """The whitening x → (x − mean) @ weight, with mean [d] and weight [d, d].

    norm: mean of ‖x‖² over the states that the whitening was fitted to
    """

    mean: Tensor
    weight: Tensor
    norm: float

    @classmethod
    def of(cls, states: Sequence[Tensor]) -> Whitening:
        """Fit a whitening to the states [n, d] of streams, as for the addresses of an initial memory."""
        n = sum(map(len, states))
        mean = torch.stack([part.double().sum(0) for part in states]).sum(0) / n
        covariance = torch.stack([(part.double() - mean).T @ (part.double() - mean) for part in states]).sum(0) / n
        variances, axes = torch.linalg.eigh(covariance)
        variances = variances.clamp_min(WHITENING_FLOOR * float(variances.max()))
        weight = axes @ torch.diag(variances ** (-WHITENING_POWER / 2)) @ axes.T
        norm = float(covariance.trace() + mean.square().sum())
        return cls(mean.float(), weight.float(), norm)

    def fingerprint(self) -> str:
        """Return the hash of the mean and the weight."""
        return hashlib.sha256(self.mean.numpy().tobytes() + self.weight.numpy().tobytes()).hexdigest()

    def __call__(self, states: Tensor) -> Tensor:
        return (states - self.mean) @ self.weight


class NeuralCache(Arm):
    """p = (1 − γ)·p_LM + γ·p_cache with p_cache(x) ∝ Σ_{i<t, x_{i+1}=x} exp(θ·cos(h_t, h_i)).

    whitening: applied to the states before the cosine
    limited: whether only the last entries are kept, as many as fit in the bytes of the memory
    gated: whether γ = σ(b + w·(log S, agreement, entropy)), with S the sum above, agreement the share of the likeliest
        token in S, and the entropy of the base; otherwise γ is one number. θ and γ are tuned.
    """

    needs_fit = True

    def __init__(self, *, whitening: Whitening | None, limited: bool, gated: bool) -> None:
        self.whitening, self.limited, self.gated = whitening, limited, gated
        self.equal_bytes = limited
        self.requires = ("memory",) if limited else ()
        self.name = self.shared + ("" if gated else "-fixed")
        self.title = "neural cache" + (", equal bytes" if limited else ", unbounded")
        self.title += (", raw states" if whitening is None else "") + (", gated" if gated else ", fixed λ")
        self.grid = [{"theta": theta} for theta in ((10, 20, 40, 80) if whitening is None else (5, 10, 20, 40))]

    @property
    def shared(self) -> str:
        return "cache" + ("-raw" if self.whitening is None else "") + ("-bytes" if self.limited else "")

    def identity(self, subject: Subject) -> list[str]:
        return super().identity(subject) + ([] if self.whitening is None else [self.whitening.fingerprint()])

    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        trace, clock = subject.trace, Clock()
        entry_bytes = 2 * trace.states.shape[1] + 4  # an fp16 state and a token id
        limit = subject.outcomes["memory"].state_bytes // entry_bytes if self.limited else len(trace.targets)
        keys = trace.states if self.whitening is None else self.whitening(trace.states)
        keys = torch.nn.functional.normalize(keys, dim=-1)
        found = []
        for part in trace.parts():
            found.append(_look_up(keys, trace.targets, part, limit, setting["theta"]))
            progress(1)
        names = ("prob", "log_total", "agreement")
        values = dict(zip(names, (torch.cat(parts) for parts in zip(*found, strict=True)), strict=True))
        values["entropy"] = trace.entropy
        return Outcome(values, clock.seconds, entry_bytes * min(limit, len(trace.targets)))

    def fit(self, examples: Sequence[tuple[Subject, Outcome]], weights: Sequence[float]) -> dict[str, float]:
        base = [subject.trace.log_probs for subject, _ in examples]
        return fit_gate(base, [outcome for _, outcome in examples], weights, gated=self.gated)

    def finish(self, subject: Subject, outcome: Outcome, fitted: Mapping[str, float]) -> Tensor:
        return mix_gated(subject.trace.log_probs, outcome, fitted)


class Combined(Arm):
    """The mixture of the memory and the unbounded cache: the gain that the memory leaves to a cache."""

    name, title = "memory+cache", "memory + neural cache"
    requires = ("memory", "cache")
    needs_fit = True
    cached = False

    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        progress(self.requests(subject))
        memory, cache = (subject.outcomes[name] for name in self.requires)
        return Outcome(cache.values, memory.seconds + cache.seconds, memory.state_bytes + cache.state_bytes)

    def fit(self, examples: Sequence[tuple[Subject, Outcome]], weights: Sequence[float]) -> dict[str, float]:
        base = [subject.outcomes["memory"].values["log_probs"] for subject, _ in examples]
        return fit_gate(base, [outcome for _, outcome in examples], weights, gated=True)

    def finish(self, subject: Subject, outcome: Outcome, fitted: Mapping[str, float]) -> Tensor:
        return mix_gated(subject.outcomes["memory"].values["log_probs"], outcome, fitted)


class NGrams(Arm):
    """The mixture of the base with the unigrams, bigrams and trigrams of the history.

    The mixture weights are fitted, one set for each length of the longest context that the history contains, so the
    weights never depend on the target.
    """

    name, title = "ngrams", "n-gram cache"
    needs_fit = True

    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        clock = Clock()
        counts: list[defaultdict[tuple[int, ...], Counter[int]]] = [defaultdict(Counter) for _ in range(ORDERS)]
        totals: Counter[tuple[int, ...]] = Counter()
        probs, seen = [], []
        for request in subject.stream.requests:
            for position, token in enumerate(request):
                orders = range(min(position + 1, ORDERS))
                contexts = [tuple(request[position - order : position]) for order in orders]
                known = [context for context in contexts if totals[context]]
                found = [counts[len(context)][context][token] / totals[context] for context in known]
                probs.append(found + [0.0] * (ORDERS - len(found)))
                seen.append(len(known))
                for context in contexts:
                    counts[len(context)][context][token] += 1
                    totals[context] += 1
            progress(1)
        sizes = [sum(map(len, order.values())) * size for order, size in zip(counts, NGRAM_BYTES, strict=True)]
        return Outcome({"probs": torch.tensor(probs), "seen": torch.tensor(seen)}, clock.seconds, sum(sizes))

    def fit(self, examples: Sequence[tuple[Subject, Outcome]], weights: Sequence[float]) -> dict[str, float]:
        probs = torch.cat([self._with_base(subject, outcome) for subject, outcome in examples])
        seen = torch.cat([outcome.values["seen"] for _, outcome in examples])
        lengths = [len(outcome.values["seen"]) for _, outcome in examples]
        counted = torch.cat([torch.full((n,), weight) for n, weight in zip(lengths, weights, strict=True)])
        fitted: dict[str, float] = {}
        for case in range(1, ORDERS + 1):
            in_case = seen == case
            shares = mixture_weights(probs[in_case, : case + 1], counted[in_case])
            fitted |= {f"w{case}{order}": share for order, share in enumerate(shares)}
        return fitted

    def finish(self, subject: Subject, outcome: Outcome, fitted: Mapping[str, float]) -> Tensor:
        table = torch.zeros(ORDERS + 1, ORDERS + 1, dtype=torch.float64)
        table[0, 0] = 1.0
        for case in range(1, ORDERS + 1):
            table[case, : case + 1] = torch.tensor([fitted[f"w{case}{order}"] for order in range(case + 1)])
        return (self._with_base(subject, outcome) * table[outcome.values["seen"]]).sum(-1).log().float()

    def _with_base(self, subject: Subject, outcome: Outcome) -> Tensor:
        """Return [n, 1 + ORDERS]: the probability of each target under the base, then under each order."""
        return torch.cat([subject.trace.log_probs.double().exp()[:, None], outcome.values["probs"].double()], dim=1)


def mixture_weights(probs: Tensor, weights: Tensor, steps: int = 200) -> list[float]:
    """Return the shares [m] with Σ = 1 that maximise Σ_t weights_t · log Σ_j share_j · probs_tj.

    probs [n, m], weights [n]. The optimiser is EM, whose optimum is global here. Without examples the first model (the
    base) gets all the weight.
    """
    m = probs.shape[1]
    if not len(probs):
        return [1.0] + [0.0] * (m - 1)
    shares = torch.full((m,), 1 / m, dtype=torch.float64)
    for _ in range(steps):
        joint = shares * probs
        parts = weights.double()[:, None] * joint / joint.sum(-1, keepdim=True).clamp_min(1e-300)
        shares = parts.sum(0) / parts.sum()
    total = float(shares.sum())
    return [float(share) / total for share in shares]


def _look_up(keys: Tensor, targets: Tensor, part: slice, limit: int, theta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return p_cache [m], log Σ exp(θ(cos − 1)) [m] (−inf without entries) and the largest share [m] for `part`.

    keys [n, d] have length 1. Entry i is the token targets[i] under keys[i]. Target t sees the `limit` entries before
    position t.
    """
    start = max(0, part.start - limit)
    visible = slice(start, part.stop)
    scores = (theta * (keys[visible] @ keys[part].T - 1)).exp_()  # [entries, m]
    entry = torch.arange(visible.start, visible.stop)[:, None]
    query = torch.arange(part.start, part.stop)[None]
    scores.masked_fill_((entry >= query) | (entry < query - limit), 0.0)
    tokens, token_index = torch.unique(targets[visible], return_inverse=True)
    mass = torch.zeros(len(tokens), scores.shape[1]).index_add_(0, token_index, scores)
    total = mass.sum(0)
    hit = mass.gather(0, token_index[part.start - start :][None])[0]
    total = total.where(total > MIN_MASS, 0.0)
    safe = total.clamp_min(MIN_MASS)
    return hit / safe, total.log(), mass.amax(0) / safe


def fit_gate(
    base: Sequence[Tensor], outcomes: Sequence[Outcome], weights: Sequence[float], *, gated: bool
) -> dict[str, float]:
    """Return the gate of least loss: a bias, and with `gated` a weight for each of FEATURES.

    base: log p [n] of each stream under the base; weights: weight of each stream
    """
    counted = [torch.full((len(b),), w / len(b), dtype=torch.float64) for b, w in zip(base, weights, strict=True)]
    features = torch.cat([_features(outcome) for outcome in outcomes])
    known = features[:, 1].isfinite()
    features, weight = features[known], torch.cat(counted)[known]
    base_log_probs = torch.cat(list(base)).double()[known]
    cache_probs = torch.cat([outcome.values["prob"] for outcome in outcomes]).double()[known]
    gate = torch.tensor([-2.0, *[0.0] * len(FEATURES)], dtype=torch.float64, requires_grad=True)
    free = torch.tensor([1.0, *[float(gated)] * len(FEATURES)], dtype=torch.float64)
    optimizer = torch.optim.LBFGS([gate], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        gamma = torch.sigmoid(features @ (gate * free))
        mixture = (1 - gamma) * base_log_probs.exp() + gamma * cache_probs
        value: Tensor = -(weight * mixture.clamp_min(1e-300).log()).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return dict(zip(("bias", *FEATURES), (gate * free).tolist(), strict=True))


def mix_gated(base: Tensor, outcome: Outcome, gate: Mapping[str, float]) -> Tensor:
    """Return log((1 − γ)·p + γ·p_cache) [n] for base = log p [n]. γ is 0 where the cache has no entry."""
    features = _features(outcome)
    known = features[:, 1].isfinite()
    weights = torch.tensor([gate[name] for name in ("bias", *FEATURES)], dtype=torch.float64)
    gamma = torch.sigmoid(features.where(known[:, None], 0.0) @ weights).clamp_max(1 - 1e-12)
    base_part = base.double() + torch.log1p(-gamma)
    mixed = torch.logaddexp(base_part, (gamma * outcome.values["prob"].double()).log())
    return torch.where(known, mixed, base.double()).float()


def _features(outcome: Outcome) -> Tensor:
    """Return the inputs [n, 1 + len(FEATURES)] of a gate, of which the first is 1."""
    columns = [outcome.values[name].double() for name in FEATURES]
    return torch.stack([torch.ones_like(columns[0]), *columns], dim=1)
