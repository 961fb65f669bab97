"""The memory's slow weights: projections and gates that every session shares. Read-only when serving."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.memory import ops
from model.memory.config import MemoryConfig, MemoryConfigError, SiteConfig
from model.memory.pool import Draft, Pool, SitePool

FORMAT = "1"
TRUST_LIMITS = (-4.0, 2.0)  # the upper one keeps what was read over and over from drowning the base


class Site(nn.Module):
    """What both kinds of site share: the address s = Norm(W_a h + b_a) and the write gate β = σ(b_0 + b_1·surprise)."""

    def __init__(self, config: SiteConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        side = math.isqrt(config.slots)
        self.address_weight = nn.Parameter(torch.zeros(hidden_size, 2 * side))
        self.address_bias = nn.Parameter(torch.zeros(2 * side))
        self.temperature = nn.Parameter(torch.ones(()))
        self.write_gate = nn.Parameter(torch.zeros(2))

    def address(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [n, d] → slots [n, k] long, w [n, k]."""
        s = ops.rowwise(hidden.float(), self.address_weight) + self.address_bias
        s = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-12)
        return ops.address(s.unflatten(1, (2, -1)), self.config.k, self.temperature)

    def rows(self, pool: Pool) -> SitePool:
        """This site's rows in a pool."""
        return pool.sites[self.config.name]

    def beta(self, surprise: Tensor) -> Tensor:
        """surprise [n] (nats) → β [n], below 1."""
        return torch.sigmoid(self.write_gate[0] + self.write_gate[1] * surprise)


class LexicalSite(Site):
    """Rows over the vocabulary, read into the output distribution.

    gate [3] and gate_hidden [d] make γ (`ops.mixing_weight`); trust_rate is the step of the session's own part of it.
    """

    def __init__(self, config: SiteConfig, hidden_size: int) -> None:
        super().__init__(config, hidden_size)
        self.gate = nn.Parameter(torch.zeros(3))
        self.gate_hidden = nn.Parameter(torch.zeros(hidden_size))
        self.trust_rate = nn.Parameter(torch.zeros(()))

    def find(self, pool: Pool, session: Tensor, hidden: Tensor) -> tuple[ops.Candidates, Tensor]:
        """What sessions [n] know about final hidden states [n, d]: candidates, and γ [n]."""
        return self._find_at(pool, session, hidden, *self.address(hidden))

    def learn(self, draft: Draft, hidden: Tensor, targets: Tensor, frozen: Tensor, adapted: Tensor) -> None:
        """Writes one block: targets [n] after final hidden states [n, d], with their log-probabilities [n] before this
        site's read (frozen) and after it (adapted). Trust takes one gradient step on the same tokens."""
        fast = self.rows(draft.pool)
        session = torch.full((len(targets),), draft.index, device=targets.device)
        slots, w = self.address(hidden)
        found, gamma = self._find_at(draft.pool, session, hidden, slots, w)
        step = ops.trust_step(frozen, adapted, targets, found, gamma)
        trust = fast.trust[draft.index] + self.trust_rate * step
        fast.trust[draft.index] = trust.clamp(*TRUST_LIMITS)
        touched, at = torch.unique(slots, return_inverse=True)
        old = ops.Rows(*draft.get(self.config.name, touched))
        new = ops.write_lexical(old, at, w, self.beta(-adapted), targets, decay=self.config.decay, cap=self.config.cap)
        draft.put(self.config.name, touched, new)

    def _find_at(
        self, pool: Pool, session: Tensor, hidden: Tensor, slots: Tensor, w: Tensor
    ) -> tuple[ops.Candidates, Tensor]:
        fast = self.rows(pool)
        found = ops.read_lexical(ops.Rows(*fast.read(session, slots)), w)
        bias = (hidden.float() * self.gate_hidden).sum(-1) + fast.trust[session]
        return found, ops.mixing_weight(found, self.gate, bias)


class HiddenSite(Site):
    """Rows of d_v numbers, read into the residual stream: h ← h + g·W_o·norm(o), g = σ(g_0 + u·h)."""

    def __init__(self, config: SiteConfig, hidden_size: int) -> None:
        super().__init__(config, hidden_size)
        self.value_hidden = nn.Parameter(torch.zeros(hidden_size, config.width))
        self.value_error = nn.Parameter(torch.zeros(hidden_size, config.width))
        self.out = nn.Parameter(torch.zeros(config.width, hidden_size))
        self.gate = nn.Parameter(torch.zeros(1))
        self.gate_hidden = nn.Parameter(torch.zeros(hidden_size))

    def value(self, following: Tensor, error: Tensor) -> Tensor:
        """v_t = W_v [h_{t+1} ; ε_t]; both [n, d] → [n, d_v]."""
        return following.float() @ self.value_hidden + error @ self.value_error

    def read(self, pool: Pool, session: Tensor, hidden: Tensor) -> Tensor:
        """The stream [n, d] of sessions [n] with their memory read into it; an empty read changes no bit."""
        slots, w = self.address(hidden)
        (rows,) = self.rows(pool).read(session, slots)
        o = ops.read_hidden(rows, w)
        g = torch.sigmoid((hidden.float() * self.gate_hidden).sum(-1) + self.gate)
        changed = hidden + (g[:, None] * ops.rowwise(o, self.out)).to(hidden.dtype)
        return torch.where(o.any(-1, keepdim=True), changed, hidden)

    def learn(self, draft: Draft, hidden: Tensor, following: Tensor, error: Tensor, adapted: Tensor) -> None:
        """Writes one block: stream [n, d] at each predictor, one token later (following), ε [n, d] and log p [n]."""
        slots, w = self.address(hidden)
        touched, at = torch.unique(slots, return_inverse=True)
        (old,) = draft.get(self.config.name, touched)
        values, beta = self.value(following, error), self.beta(-adapted)
        new = ops.write_hidden(old, at, w, beta, values, decay=self.config.decay, cap=self.config.cap)
        draft.put(self.config.name, touched, [new])


class Memory(nn.Module):
    """All sites of one memory, by name; `sites` keeps the order of the configuration."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        kinds = {"lexical": LexicalSite, "hidden": HiddenSite}
        self.sites = nn.ModuleDict({s.name: kinds[s.kind](s, config.hidden_size) for s in config.sites})
        self.requires_grad_(False)

    @property
    def lexical(self) -> LexicalSite | None:
        """The lexical site, if there is one."""
        return next((site for site in self.sites.values() if isinstance(site, LexicalSite)), None)

    @property
    def hidden(self) -> dict[int, HiddenSite]:
        """The hidden sites by layer; -1 is the output."""
        return {site.config.layer: site for site in self.sites.values() if isinstance(site, HiddenSite)}

    def fingerprint(self) -> str:
        """sha256 over the configuration and every tensor: the identity that a stored state is bound to."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"


def save_memory(memory: Memory, path: Path) -> None:
    """Writes the slow weights as safetensors with the configuration in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in memory.state_dict().items()}
    metadata = {"format": FORMAT, "memory": json.dumps(memory.config.to_dict())}
    save_file(tensors, path, metadata=metadata)


def load_memory(path: Path, *, hidden_size: int) -> Memory:
    """Reads what `save_memory` wrote. Raises MemoryConfigError if it is none, or made for another hidden size."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise MemoryConfigError(f"cannot read the memory checkpoint {path.name}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise MemoryConfigError(f"{path.name}: format must be {FORMAT}, got {metadata.get('format')!r}")
    try:
        config = MemoryConfig.from_dict(json.loads(metadata["memory"]))
    except (KeyError, ValueError) as error:
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
