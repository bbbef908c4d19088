"""A generator that is trained alone, in plain PyTorch: torch's Rectified Adam, an average, and the engine beside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import equivalence
import torch
from torch import Tensor

from ipfm.engine.objectives.generator_alone import GeneratorAloneConfig
from ipfm.models import Precond


class PlainGenerator:
    """The network, which begins as the teacher, its average, and the loss of each step."""

    def __init__(self, teacher: Precond, config: GeneratorAloneConfig) -> None:
        self.config, self.losses = config, list[float]()
        self.net = copy.deepcopy(teacher).requires_grad_(True).train()
        for module in self.net.modules():
            if hasattr(module, "dropout"):
                module.dropout = config.dropout
        self.average = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        betas = (config.beta1, 0.999)
        self.radam = torch.optim.RAdam(self.net.parameters(), lr=config.lr, betas=betas, eps=config.eps)

    def update(self, loss: Tensor, step: int, *, lr: float | None = None) -> None:
        for group in self.radam.param_groups:
            group["lr"] = self.config.lr if lr is None else lr
        self.radam.zero_grad()
        loss.backward()
        self.radam.step()
        self.losses.append(loss.item())
        for name, p in self.net.named_parameters():
            self.average[name].lerp_(p.detach(), 1 - self.config.ema_decay(step))

    def check(self, found: Mapping[str, Tensor], losses: Tensor) -> None:
        """That the engine's tensors and losses are these."""
        torch.testing.assert_close(losses.double(), torch.tensor(self.losses).double(), rtol=1e-4, atol=1e-5)
        kept = {f"generator/weight/{n}": p.detach() for n, p in self.net.named_parameters()}
        kept |= {f"generator/ema/{n}": p for n, p in self.average.items()}
        assert max(float((found[n] - p).norm() / p.norm()) for n, p in kept.items()) <= 2 * equivalence.LIMIT
