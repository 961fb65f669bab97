"""A plain adapter without a memory: the baseline at equal parameters, which learns what all streams have in common.

The adapter is the residual bottleneck of Houlsby et al. 2019 (arXiv 1902.00751), between the base's last hidden state
and its head, where the memory has its output site.
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

ROWS = 512  # rows of logits that are computed together


class OutputAdapter(nn.Module):
    """The adapter h + gelu(rmsnorm(h) @ down) @ up, with down [d, r] and up [r, d].

    `up` is zero at first, so a new adapter changes nothing.
    """

    def __init__(self, hidden_size: int, rank: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(hidden_size, rank, generator=generator) / math.sqrt(hidden_size))
        self.up = nn.Parameter(torch.zeros(rank, hidden_size))

    def forward(self, states: Tensor) -> Tensor:
        """Map final hidden states [n, d] to [n, d], in fp32."""
        states = states.float()
        return states + F.gelu(F.rms_norm(states, states.shape[-1:]) @ self.down) @ self.up


def rank_of(parameters: int, hidden_size: int) -> int:
    """Return the rank with which an adapter has about `parameters` parameters."""
    return max(1, round(parameters / (2 * hidden_size)))


def save_adapter(adapter: OutputAdapter, path: Path) -> None:
    """Write `down` and `up` as safetensors."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()}, path)


def load_adapter(path: Path, hidden_size: int) -> OutputAdapter:
    """Load an adapter. Raises ValueError for a file that is no adapter, or an adapter of another hidden size."""
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
    """The objective of an adapter on cached states, through the base's head [V, d]. A stream has no state."""

    def __init__(self, adapter: OutputAdapter, head: Tensor) -> None:
        self.module = adapter
        self._head = head.float()

    def start(self) -> None:
        """Return the state of a new session, which is None."""
        return None

    def step(self, state: Any, chunk: Chunk) -> tuple[Tensor, int, Any]:
        """Return the summed cross entropy of the targets (nats), their number, and the state.

        With gradients enabled, the sum is estimated from a random sample of the targets.
        """
        sampled, n = chunk.sampled(), len(chunk.targets)
        states, targets = self.module(chunk.states[sampled]), chunk.targets[sampled]
        loss: Tensor = _HeadLoss.apply(states, self._head, targets)  # type: ignore[no-untyped-call]
        return loss / len(sampled) * n, n, state

    def detach(self, state: Any) -> Any:
        """Return the state unchanged."""
        return state

    def groups(self) -> list[dict[str, Any]]:
        """Return one parameter group without weight decay."""
        return [{"params": list(self.module.parameters()), "factor": 1.0, "weight_decay": 0.0}]


class _HeadLoss(torch.autograd.Function):
    """The summed softmax cross entropy of states [n, d], head [V, d] and targets [n]; only the states have a gradient.

    The forward pass computes the gradient, `ROWS` rows at a time, so at most `ROWS` × V logits exist together.
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
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0] * ctx.gradient, None, None
