"""The memory before training, for any base: keys are whitened hidden states, projected at random.

Without whitening, all hidden states of a language model are similar, and so are their keys.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.memory.config import MemoryConfig, SiteConfig
from model.memory.lexical.site import LexicalSite
from model.memory.memory import Memory

WHITENING_POWER = 0.75
WHITENING_FLOOR = 1e-3  # share of the largest variance
SHARPNESS = (20.0, 7.0)
PRIOR = 0.2
NGRAM_BONUS = (1.0, 1.0, 3.0)  # one for each n-gram size: the longest must outvote many rows that repeat less
INITIAL_GATE_LOGIT = -2.0
TRUST_RATE = 0.02
REQUEST_TRUST, REQUEST_TRUST_RATE = -0.5, 0.3
KMEANS_STEPS = 10
MAX_KMEANS_STATES = 65_536


def default_config(hidden_size: int) -> MemoryConfig:
    """Return a configuration of one lexical site, whose sizes were chosen by measurement (docs/log.md)."""
    width = min(64, hidden_size // 2 * 2)
    site = SiteConfig("lexical", "lexical", slots=1024 * 50, cell=50, k=32, width=width, surprise=0.1)
    return MemoryConfig(hidden_size, (site,), block=64)


def random_memory(config: MemoryConfig, *, seed: int, states: Tensor | None = None) -> Memory:
    """Return a memory of one lexical site with a random projection.

    states: hidden states [n, d] of some text, for which the projection is whitened, or None. Raise ValueError if the
    configuration has other sites, or if there are at most d states.
    """
    memory = Memory(config)
    site = memory.lexical
    if site is None or len(config.sites) != 1:
        raise ValueError("a random memory has exactly one site, of kind lexical")
    if states is not None and len(states) <= config.hidden_size:
        raise ValueError(f"at least {config.hidden_size + 1} tokens of text are needed, got {len(states)}")
    generator = torch.Generator().manual_seed(seed)
    weight, bias = random_projection(states, config.hidden_size, site.config.width, generator)
    with torch.no_grad():
        site.key_weight.copy_(weight)
        site.key_bias.copy_(bias)
        site.sharpness.copy_(torch.tensor(SHARPNESS))
        site.prior.fill_(PRIOR)
        site.bonus.copy_(torch.tensor(NGRAM_BONUS).expand_as(site.bonus))
        site.gate_in.copy_(torch.randn(site.gate_in.shape, generator=generator) / math.sqrt(len(site.gate_in)))
        site.gate_out_bias.copy_(torch.tensor([INITIAL_GATE_LOGIT, 0.0, 0.0]))
        site.trust_rate.fill_(TRUST_RATE)
        site.request_trust.fill_(REQUEST_TRUST)
        site.request_trust_rate.fill_(REQUEST_TRUST_RATE)
        if states is None:
            states = torch.randn(4096, config.hidden_size, generator=generator)
        fit_centres(site, states, generator)
    return memory


def random_projection(
    states: Tensor | None, hidden_size: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return W [d, d_k] and b [d_k] with h W + b = whiten(h) R, R random with orthonormal columns.

    states: hidden states [n, d] to whiten for, or None: h W + b = h R.
    """
    random = torch.randn(hidden_size, hidden_size, generator=generator, dtype=torch.float64)
    columns = torch.linalg.qr(random).Q[:, :width]
    if states is None:
        return columns.float(), torch.zeros(width)
    mean = states.double().mean(0).cpu()
    variances, axes = torch.linalg.eigh(torch.cov((states.double().cpu() - mean).T))
    variances = variances.clamp_min(WHITENING_FLOOR * float(variances.max()))
    weight = axes @ torch.diag(variances ** (-WHITENING_POWER / 2)) @ axes.T @ columns
    return weight.float(), (-mean @ weight).float()


@torch.no_grad()
def fit_centres(site: LexicalSite, states: Tensor, generator: torch.Generator) -> None:
    """Fit the centres of a site's cells to the keys of hidden states [n, d] by spherical k-means."""
    chosen = torch.randperm(len(states), generator=generator)[:MAX_KMEANS_STATES]
    keys = F.normalize(states[chosen].float().to(site.key_weight.device) @ site.key_weight + site.key_bias, dim=-1)
    centres = keys[torch.arange(len(site.centres)) % len(keys)]
    for _ in range(KMEANS_STEPS):
        assignments = torch.cat([(part @ centres.T).argmax(1) for part in keys.split(8192)])
        sums = torch.zeros_like(centres).index_add_(0, assignments, keys)
        # A centre without keys stays where it is.
        centres = torch.where(sums.any(1, keepdim=True), F.normalize(sums, dim=-1), centres)
    site.centres.copy_(centres)
