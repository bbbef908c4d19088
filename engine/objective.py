"""What a distillation trains, and how: the frame that every objective fills in, and that the trainer knows.

An objective is made by its settings, `Distillation.objective`. Its file has both, and nothing else needs to know of it:
networks, optimisers, ZeRO, memory plans, checkpoints, evaluation and export follow from what it says of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from ipfm.engine.measure import Measured
from ipfm.engine.report import PaperResult
from ipfm.engine.world import World
from ipfm.models import NetworkConfig, Precond

Start = Literal["teacher", "random"]


@dataclass(frozen=True)
class Role:
    """A network that an objective trains."""

    name: str
    """In logs and checkpoints."""
    network: NetworkConfig
    """Its architecture."""
    start: Start
    """Its first weights: the teacher's, or as an untrained network has them."""
    lr: float
    """Adam's learning rate before the first step; each step says its own."""
    beta1: float
    """Adam's first decay; 0 needs no first moment."""
    rectified: bool = False
    """Rectified Adam [Liu et al. 2020]."""
    averaged: bool = False
    """The optimiser keeps a moving average of the weights."""

    def seed(self, run: int) -> int:
        """Seed of random first weights, for a run's seed: each role has its own."""
        return (run + sum(self.name.encode())) % 2**63

    @property
    def moments(self) -> int:
        """fp32 values that the optimiser keeps a parameter."""
        return 1 + (self.beta1 > 0) + self.averaged


class Trained(Protocol):
    """What the steps need of a network in training: see `TrainedNetwork`."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def loss_scale(self) -> float: ...

    def __call__(self, *args: Any, **keywords: Any) -> Tensor: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, *, lr: float, ema_decay: float = 0.0, grad_scale: Tensor | None = None) -> Tensor: ...

    def frozen(self) -> AbstractContextManager[nn.Module]: ...


@dataclass(frozen=True)
class Setting:
    """Where the steps of an objective run."""

    trained: Mapping[str, Trained]
    """The networks of its roles, by name."""
    teacher: Precond
    """The frozen denoiser."""
    micro_batch: int
    """Images this process handles at a time; divides its share of the batch."""
    phased: bool
    """One network's activations at a time."""
    world: World
    """The run's processes."""


class Steps(Protocol):
    """The training steps of an objective."""

    def iteration(self, step: int) -> Measured:
        """One update of every network; `step` counts from 0. Waits for nothing on the device."""
        ...


class Objective(Protocol):
    """A way to distil a teacher into a generator.

    It is made for a configuration with nothing left open but what memory decides, and for the teacher's architecture;
    for the sake of memory plans the rest may be open as long as nothing is trained.
    """

    @property
    def title(self) -> str:
        """In lines of the log, e.g. "distil D=128 alpha=1 K=1"."""
        ...

    @property
    def manner(self) -> str:
        """What it is besides D, in words, e.g. "at alpha = 1 and 1 step"."""
        ...

    @property
    def roles(self) -> tuple[Role, ...]:
        """The networks it trains."""
        ...

    @property
    def generator(self) -> str:
        """The role whose average is the result."""
        ...

    @property
    def nfe(self) -> int:
        """Network evaluations an image of the result takes."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """Plain JSON values that are stored with the result, and that `sample_model` reads: "sigmas", or another way to
        draw from it."""
        ...

    def steps(self, setting: Setting) -> Steps:
        """The steps, on networks that somebody else made: real ones, or those of a memory plan on the meta device."""
        ...

    def forwards(self, *, phased: bool, checkpointed: bool) -> int:
        """Forward passes, or as much arithmetic, of one image in an iteration."""
        ...

    def sample(self, net: Precond, first: int, count: int, *, seed: int) -> Tensor:
        """Images first..first + count - 1 of `seed` from the result, (count, C, H, W) in [-1, 1]."""
        ...

    def published(self, dataset: str) -> Mapping[float, PaperResult]:
        """The published figures for exactly this setting at every D that has one."""
        ...
