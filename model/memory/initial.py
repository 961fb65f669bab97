"""The memory before training, for any base, without gradients.

A random memory's keys are hidden states, whitened if a text is given, projected at random. Without whitening, all
hidden states of a language model are similar, and so are their keys. A fitted memory's keys are the directions that
tell best which token comes next (linear discriminant analysis, Fisher 1936, Rao 1948), and its gate begins as a trained
memory's.
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
FITTED_SHARPNESS = (12.0, 3.0)
PRIOR = 0.2
NGRAM_BONUS = (1.0, 1.0, 3.0)  # one for each n-gram size: the longest must outvote many rows that repeat less
INITIAL_GATE_LOGIT = -2.0
TRUST_RATE = 0.02
REQUEST_TRUST, REQUEST_TRUST_RATE = -0.5, 0.3
KMEANS_STEPS = 10
MAX_KMEANS_STATES = 65_536
WITHIN_RIDGE = 0.05  # share of the mean variance
ROWS = 8192  # states whose products are summed together, in fp64


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


def fitted_memory(config: MemoryConfig, states: Tensor, targets: Tensor, trained: Memory, *, seed: int) -> Memory:
    """Return a memory of one lexical site for a base whose hidden states [n, d] were followed by targets [n] in a text.

    trained: a memory of any base. Its bonuses, gate and trust are taken over. What its gate reads of a key is left out,
    because another base's keys mean something else; the other inputs mean much the same in every base.
    Raise ValueError if one of the memories has other sites, or if too few tokens occur twice.
    """
    memory = random_memory(config, seed=seed)
    site, source = memory.lexical, trained.lexical
    if site is None or source is None:
        raise ValueError("a fitted memory and the memory that it takes its gate from have a lexical site")
    weight, bias = discriminant_projection(states, targets, site.config.width)
    own = {"key_weight", "key_bias", "centres", "sharpness", "gate_in"}
    with torch.no_grad():
        for name, parameter in site.named_parameters():
            if name not in own:
                parameter.copy_(source.get_parameter(name))
        site.gate_in.zero_()
        shared_inputs = len(site.gate_in) - site.config.width
        site.gate_in[:shared_inputs] = source.gate_in[:shared_inputs]
        site.sharpness.copy_(torch.tensor(FITTED_SHARPNESS))
        site.key_weight.copy_(weight)
        site.key_bias.copy_(bias)
        fit_centres(site, states, torch.Generator().manual_seed(seed))
    return memory


def discriminant_projection(states: Tensor, targets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return W [d, width] and b [width]: the directions in which states [n, d] of different targets [n] differ most,
    relative to how much states of the same target differ. The mean state has no direction.

    Raise ValueError if fewer than `width` states have a target that occurs twice.
    """
    tokens, number, counts = torch.unique(targets, return_inverse=True, return_counts=True)
    repeated = (counts > 1)[number]
    if int(repeated.sum()) < width:
        raise ValueError(f"a text with at least {width} repeated tokens is needed, got {int(repeated.sum())}")
    size, mean = states.shape[1], states.mean(0, dtype=torch.float64)
    total, within = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    sums = torch.zeros(len(tokens), size, dtype=torch.float64)
    for rows, token, is_repeated in zip(states.split(ROWS), number.split(ROWS), repeated.split(ROWS), strict=True):
        centred = rows.double() - mean
        total += centred.T @ centred / len(states)
        sums.index_add_(0, token, centred)
        within += centred[is_repeated].T @ centred[is_repeated] / int(repeated.sum())
    means = sums[counts > 1] / counts[counts > 1, None].sqrt()
    within -= means.T @ means / int(repeated.sum())
    within += WITHIN_RIDGE * total.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    unmixed = torch.linalg.inv(torch.linalg.cholesky(within))
    weight = unmixed.T @ torch.linalg.eigh(unmixed @ total @ unmixed.T).eigenvectors[:, -width:]
    return weight.float(), (-mean @ weight).float()


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
