"""An initial memory for any base: random product keys over whitened hidden states, and a read gate of three numbers.

Nothing here is meta-trained. The keys are drawn from a seed; the text only supplies the mean and the covariance that
whiten hidden states (without whitening all states of a language model look alike, and addresses collide), and the
odds with which a memory of that sharpness is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.backbone import Backbone
from model.memory import LexicalSite, Memory, MemoryConfig, Pool, SiteConfig, ops

WHITENING_POWER = 0.75
WHITENING_FLOOR = 1e-3  # of the largest variance
TEMPERATURE = 2.0
WRITE_GATE = (3.0, 0.0)  # β = σ(3): nearly every write lands whole, whatever the surprise
GATE = (-3.5, 0.6, 2.6)
CAUTION = 1.0  # a new session's gate opens later than the fitted one by this much; its trust earns the rest
TRUST_RATE = 0.1


@dataclass(frozen=True)
class Passage:
    """What the frozen base makes of one request of n targets: final states before them [n, d], targets and log p
    [n]."""

    states: Tensor
    targets: Tensor
    log_probs: Tensor


Stream = list[Passage]


def default_config(hidden_size: int) -> MemoryConfig:
    """One lexical site; the sizes are chosen by measurement (docs/experiments.md)."""
    site = SiteConfig("lexical", "lexical", slots=256 * 256, k=16, pairs=8)
    return MemoryConfig(hidden_size, (site,), block=64)


@torch.inference_mode()
def read_passage(backbone: Backbone, token_ids: Sequence[int], bos: int) -> Passage:
    """Runs the base over one request; every token is a target, the first one predicted from BOS."""
    targets = torch.tensor(token_ids, device=backbone.embedding.device)
    inputs = torch.cat([targets.new_tensor([bos]), targets[:-1]])
    states = backbone(inputs[None])[0]
    logits = backbone.logits(states)
    log_probs = logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    return Passage(states.float(), targets, log_probs)


def random_keys(states: Tensor | None, hidden_size: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """W_a [d, 2·side] and b_a [2·side] with W_a h + b_a = R·whiten(h), R random from the seed; states [n, d] or
    None."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(hidden_size, 2 * side, generator=generator, dtype=torch.float64) / math.sqrt(hidden_size)
    if states is None:
        return keys.float(), torch.zeros(2 * side)
    mean = states.double().mean(0).cpu()
    variances, axes = torch.linalg.eigh(torch.cov((states.double().cpu() - mean).T))
    variances = variances.clamp_min(WHITENING_FLOOR * float(variances.max()))
    weight = axes @ torch.diag(variances ** (-WHITENING_POWER / 2)) @ axes.T @ keys
    return weight.float(), (-mean @ weight).float()


def random_memory(config: MemoryConfig, *, seed: int, states: Tensor | None = None) -> Memory:
    """A memory with one lexical site: random keys, whitened for the states [n, d] of some text if there is one.

    Raises ValueError for other sites, and for fewer states than their dimension.
    """
    memory = Memory(config)
    site = memory.lexical
    if site is None or len(config.sites) != 1:
        raise ValueError("a random memory has exactly one site, of kind lexical")
    if states is not None and len(states) <= config.hidden_size:
        raise ValueError(f"at least {config.hidden_size + 1} tokens of text are needed, got {len(states)}")
    weight, bias = random_keys(states, config.hidden_size, math.isqrt(site.config.slots), seed)
    with torch.no_grad():
        site.address_weight.copy_(weight)
        site.address_bias.copy_(bias)
        site.temperature.fill_(TEMPERATURE)
        site.write_gate.copy_(torch.tensor(WRITE_GATE))
        site.gate.copy_(_cautious(torch.tensor(GATE)))
        site.trust_rate.fill_(TRUST_RATE)
    return memory


def fitted_memory(
    config: MemoryConfig, streams: Sequence[Stream], *, seed: int, progress: Callable[[int], None] = lambda _: None
) -> Memory:
    """A random memory whitened for the streams, with the gate that would have served them best.

    progress is told how many streams have been replayed. Raises ValueError as `random_memory` does.
    """
    states = torch.cat([passage.states for stream in streams for passage in stream])
    memory = random_memory(config, seed=seed, states=states)
    site = memory.lexical
    assert site is not None
    features = []
    with torch.no_grad():
        for number, stream in enumerate(streams, 1):
            features.append(torch.cat(list(_replay(memory, site, stream))))
            progress(number)
        site.gate.copy_(_cautious(_fit_gate(features)))
    return memory


def _cautious(gate: Tensor) -> Tensor:
    return gate - torch.tensor([CAUTION, 0.0, 0.0])


def _replay(memory: Memory, site: LexicalSite, stream: Stream) -> Iterator[Tensor]:
    """Reads and writes a stream block by block; yields [n, 4]: log S, agreement, p_mem and log p_LM of each target."""
    slots, block = site.config.slots, memory.config.block
    pool = Pool(memory.config, rows=2 * slots, sessions=2)
    draft = pool.draft(pool.open())
    for passage in stream:
        for start in range(0, len(passage.targets), block):
            part = slice(start, start + block)
            states, targets, frozen = passage.states[part], passage.targets[part], passage.log_probs[part]
            session = torch.full((len(targets),), draft.index)
            found, gamma = site.find(pool, session, states)
            total = found.scores.sum(-1)
            agreement = found.scores.amax(-1) / total.clamp_min(1e-30)
            yield torch.stack([total.log(), agreement, ops.memory_prob(targets, found), frozen], dim=1)
            site.learn(draft, states, targets, frozen, ops.target_log_prob(frozen, targets, found, gamma))


@torch.enable_grad()
def _fit_gate(features: Sequence[Tensor]) -> Tensor:
    """The gate [3] of least mean loss, every stream counting alike."""
    data = torch.cat(list(features)).double()
    weights = torch.cat([torch.full((len(f),), 1.0 / len(f), dtype=torch.float64) for f in features])
    known = data[:, 0].isfinite()
    log_total, agreement, memory_prob, frozen = data[known].T
    weights = weights[known] / len(features)
    gate = torch.tensor([-2.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([gate], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        gamma = torch.sigmoid(gate[0] + gate[1] * log_total + gate[2] * agreement)
        value: Tensor = -(weights * ((1 - gamma) * frozen.exp() + gamma * memory_prob).log()).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return gate.detach().float()
