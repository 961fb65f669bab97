"""The arm to beat at equal parameters: what is common to all streams, learned by a plain adapter without any memory.

A bottleneck adapter in the residual form of Houlsby et al. 2019 (arXiv 1902.00751), at the one place where the
memory's output site is: between the base's last state and its head.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from research.training.features import Chunk

ROWS = 512  # of logits at a time


class OutputAdapter(nn.Module):
    """h + gelu(rmsnorm(h) @ down) @ up, with down [d, r] and up [r, d]; up is zero at first, so nothing changes."""

    def __init__(self, hidden_size: int, rank: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(hidden_size, rank, generator=generator) / math.sqrt(hidden_size))
        self.up = nn.Parameter(torch.zeros(rank, hidden_size))

    def forward(self, states: Tensor) -> Tensor:
        """Final hidden states [n, d] → [n, d], in fp32."""
        states = states.float()
        return states + F.gelu(F.rms_norm(states, states.shape[-1:]) @ self.down) @ self.up


def rank_of(parameters: int, hidden_size: int) -> int:
    """The rank with which an adapter has about so many parameters."""
    return max(1, round(parameters / (2 * hidden_size)))


def save_adapter(adapter: OutputAdapter, path: Path) -> None:
    """Writes `down` and `up` as safetensors."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()}, path)


def load_adapter(path: Path, hidden_size: int) -> OutputAdapter:
    """Reads what `save_adapter` wrote. Raises ValueError if it is none, or made for another hidden size."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the adapter {path.name}: {error}") from error
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    rank = tensors["down"].shape[-1] if "down" in tensors else 0
    if shapes != {"down": [hidden_size, rank], "up": [rank, hidden_size]}:
        raise ValueError(f"{path.name}: must hold down [{hidden_size}, r] and up [r, {hidden_size}], got {shapes}")
    adapter = OutputAdapter(hidden_size, rank)
    adapter.load_state_dict(tensors)
    return adapter.requires_grad_(False)


class AdapterObjective:
    """Trains an adapter on cached states, through the base's head [V, d]. Nothing is carried along a stream."""

    def __init__(self, adapter: OutputAdapter, head: Tensor) -> None:
        self.module = adapter
        self._head = head.float()

    def start(self) -> None:
        return None

    def step(self, state: Any, chunk: Chunk) -> tuple[Tensor, int, Any]:
        """The summed cross entropy of the targets, in nats; with gradients, an estimate of it from a sample of them."""
        sampled, n = chunk.sampled(), len(chunk.targets)
        states, targets = self.module(chunk.states[sampled]), chunk.targets[sampled]
        loss: Tensor = _HeadLoss.apply(states, self._head, targets)  # type: ignore[no-untyped-call]
        return loss / len(sampled) * n, n, state

    def detach(self, state: Any) -> Any:
        return state

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "factor": 1.0, "weight_decay": 0.0}]


class _HeadLoss(torch.autograd.Function):
    """Summed softmax cross entropy of (states [n, d], head [V, d], targets [n]) with a gradient for the states alone.

    It is computed on the way, a few rows at a time: no more than `ROWS` × V logits are ever held.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        loss, gradients = states.new_zeros(()), []
        for rows, ids in zip(states.split(ROWS), targets.split(ROWS), strict=True):
            log_probs = (rows @ head.T).log_softmax(-1)
            loss -= log_probs.gather(-1, ids[:, None]).sum()
            if ctx.needs_input_grad[0]:
                gradients.append(log_probs.exp_() @ head - head[ids])
        ctx.gradient = torch.cat(gradients) if gradients else None
        return loss

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None]:
        return above[0] * ctx.gradient, None, None
