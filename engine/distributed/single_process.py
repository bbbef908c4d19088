"""What DeepSpeed's engine is here, for a single process that shares nothing: a network and its optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class UnshardedEngine:
    """The part of `deepspeed.DeepSpeedEngine` that `TrainedNetwork` uses, without its bookkeeping.

    Args:
        model: the network; its forward and backward passes are its own.
        optimizer: takes every gradient as it is.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = model, optimizer

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.module(*args, **keywords)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        # What zero_grad() does, which takes three times as long to find out what it should do.
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = None

    def was_step_applied(self) -> bool:
        return True

    def destroy(self) -> None:
        """Nothing was set up."""
