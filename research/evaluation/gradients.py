"""Arms that learn a stream by changing weights: dynamic evaluation and a dense fast-weight matrix.

Dynamic evaluation is from Krause et al. 2018 (arXiv 1709.07432) and 2019 (arXiv 1904.08378): a gradient step after each
scored segment. The weights are reset for each stream.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base.backbone import Backbone
from model.base.linear import Linear
from research.evaluation.arms import Arm, Outcome, Setting, Subject, log_prob
from research.evaluation.caches import Whitening
from research.evaluation.prequential import Clock, Progress, Trace

BLOCK = 64  # targets between two steps on a trace, as many as between two writes of the shipped memory
RANK = 8
CLIP = 1.0  # largest norm of a gradient through the base


def _blocks(trace: Trace, progress: Progress) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield states [m, d] and targets [m] of each block, and report each request to `progress`."""
    for passage in trace.passages():
        yield from zip(passage.states.split(BLOCK), passage.targets.split(BLOCK), strict=True)
        progress(1)


def _prediction_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Return onehot(target) − p [m, V], the negative gradient of the loss with respect to the logits [m, V]."""
    error = -torch.softmax(logits, -1)
    error[torch.arange(len(targets)), targets] += 1
    return error


class DynamicHead(Arm):
    """Dynamic evaluation of the head: W ← W + η · Σ_t (onehot − p_t) h_tᵀ / E‖h‖² after each block, by plain SGD."""

    name, title = "dynamic-head", "dynamic evaluation, output layer"
    grid = tuple({"rate": rate} for rate in (0.01, 0.03, 0.1, 0.3))
    costly = True

    def __init__(self, backbone: Backbone, whitening: Whitening) -> None:
        self.head, self.norm = backbone.head_matrix.float(), whitening.norm

    def identity(self, subject: Subject) -> list[str]:
        return [str(self.norm)]

    @torch.inference_mode()
    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        weight, found, clock = self.head.clone(), [], Clock()
        for states, targets in _blocks(subject.trace, progress):
            logits = states @ weight.T
            found.append(log_prob(logits, targets))
            weight.addmm_(_prediction_error(logits, targets).T, states, alpha=setting["rate"] / self.norm)
        return Outcome({"log_probs": torch.cat(found)}, clock.seconds, weight.nbytes)


class DenseDelta(Arm):
    """One dense matrix M [d_k, d] at the output, as large as the memory: h ← h + M ᵀk, then M ← M + η/c · k εᵀ.

    k = norm(relu(R·whiten(h) − 1)) with R random. ε = e(x) − E_p[e] is the prediction error in embedding space, with p
    after the read: the delta rule through the softmax. c is the load of a key by the tokens of a block, as in
    `write_delta`.
    """

    name, title = "dense", "dense delta memory, equal bytes"
    grid = tuple({"rate": rate} for rate in (1.0, 3.0, 10.0, 30.0))
    costly = True
    equal_bytes = True
    requires = ("memory",)

    def __init__(self, backbone: Backbone, whitening: Whitening) -> None:
        self.head, self.whitening = backbone.head_matrix.float(), whitening
        self.norm = float(self.head.square().sum(-1).mean())

    def identity(self, subject: Subject) -> list[str]:
        return [*super().identity(subject), self.whitening.fingerprint()]

    @torch.inference_mode()
    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        found, clock, d = [], Clock(), subject.trace.states.shape[1]
        width = max(1, subject.outcomes["memory"].state_bytes // (4 * d))
        random = torch.randn(d, width, generator=torch.Generator().manual_seed(0)) / math.sqrt(d)
        matrix = torch.zeros(width, d)
        for states, targets in _blocks(subject.trace, progress):
            white = F.normalize(self.whitening(states), dim=-1) * math.sqrt(d)
            keys = F.normalize(F.relu(white @ random - 1), dim=-1)
            logits = (states + keys @ matrix) @ self.head.T
            found.append(log_prob(logits, targets))
            load = (keys @ keys.sum(0)).clamp_min(1.0)
            steps = setting["rate"] / self.norm / load
            matrix += (keys * steps[:, None]).T @ (_prediction_error(logits, targets) @ self.head)
        return Outcome({"log_probs": torch.cat(found)}, clock.seconds, matrix.nbytes)


class DynamicEvaluation(Arm):
    """Dynamic evaluation of weights inside the base: one clipped step on the mean loss of each scored request."""

    own_base = True
    costly = True

    def __init__(self, load: Callable[[], Backbone], bos: int) -> None:
        self._load, self.bos = load, bos
        self._loaded: tuple[Backbone, list[nn.Parameter], list[Tensor]] | None = None

    @abstractmethod
    def prepare(self, backbone: Backbone) -> list[nn.Parameter]:
        """Return the weights that learn; create them if necessary."""

    def optimizer(self, weights: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """Return the optimiser of the weights."""
        return torch.optim.SGD(weights, lr=rate)

    @torch.enable_grad()
    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        if self._loaded is None:
            backbone = self._load()
            weights = self.prepare(backbone)
            self._loaded = backbone, weights, [weight.detach().clone() for weight in weights]
        backbone, weights, initial = self._loaded
        with torch.no_grad():
            for weight, start in zip(weights, initial, strict=True):
                weight.copy_(start).requires_grad_()
        optimizer, found, clock = self.optimizer(weights, setting["rate"]), [], Clock()
        for request in subject.stream.requests:
            targets = torch.tensor(request)
            inputs = torch.cat([torch.tensor([self.bos]), targets[:-1]])
            log_probs = log_prob(backbone.logits(backbone(inputs[None])[0]), targets)
            found.append(log_probs.detach())
            optimizer.zero_grad()
            (-log_probs.mean()).backward()
            nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            progress(1)
        return Outcome({"log_probs": torch.cat(found)}, clock.seconds, sum(weight.nbytes for weight in weights))


class DynamicAll(DynamicEvaluation):
    """Dynamic evaluation of every weight of the base, by plain SGD."""

    name, title = "dynamic-all", "dynamic evaluation, all weights"
    grid = tuple({"rate": rate} for rate in (0.01, 0.03, 0.1))

    def prepare(self, backbone: Backbone) -> list[nn.Parameter]:
        return list(backbone.parameters())


class DynamicLoRA(DynamicEvaluation):
    """Dynamic evaluation of low-rank corrections of every linear map (Hu et al. 2021, arXiv 2106.09685), by Adam.

    Plain SGD would hardly move from B = 0.
    """

    name, title = "dynamic-lora", f"dynamic evaluation, LoRA of rank {RANK}"
    grid = tuple({"rate": rate} for rate in (1e-3, 3e-3, 1e-2))

    def prepare(self, backbone: Backbone) -> list[nn.Parameter]:
        torch.manual_seed(0)
        corrected = [
            LoRA(linear, layer, name)
            for layer in backbone.layers
            for name, linear in list(layer.named_children())
            if isinstance(linear, Linear)
        ]
        return list(chain.from_iterable((lora.down, lora.up) for lora in corrected))

    def optimizer(self, weights: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(weights, lr=rate)


class LoRA(nn.Module):
    """A linear map with a low-rank correction: y = Wx + (x·down)·up, with down [in, r] random and up [r, out] zero."""

    def __init__(self, linear: Linear, layer: nn.Module, name: str) -> None:
        super().__init__()
        outputs, inputs = linear.weight.shape
        self.linear = linear
        self.down = nn.Parameter(torch.randn(inputs, RANK) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(RANK, outputs))
        setattr(layer, name, self)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs [..., in] to outputs [..., out]."""
        y: Tensor = self.linear(x)
        return y + (x @ self.down) @ self.up
