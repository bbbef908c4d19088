"""An objective of my own: the generator learns where the teacher's ODE leads each latent. Change it into your idea.

    deepspeed example.py --teacher TEACHER --data my-images.zip
    IPFM_OBJECTIVES=example.py ipfm plan --objective example --model TEACHER

Calls, shapes and free numbers of streams: docs/own-objective.md of ipfm. Settings are those of distill_ipfm.py, but for
those that the class below declares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipfm.engine.checks import at_least
from ipfm.engine.experiments import run_command
from ipfm.engine.objectives import (
    Distillation, LossSum, ObjectiveStream, Role, StepContext, StepMetrics, along, draw_labels, finite_samples,
    generator_network, initial_weights, mark, per_sample, sample_generator, seed_dropout, setting,
)  # fmt: skip
from ipfm.kernels import perturb
from ipfm.models import NetworkConfig, Precond
from ipfm.recipes import distill_ipfm


class ExampleStream(ObjectiveStream):
    """A number for each use of random numbers, any from 1000 to 65535."""

    LATENT = 1000
    LABEL = 1001
    DROPOUT = 1002


@dataclass(frozen=True, kw_only=True)
class ExampleConfig(Distillation):
    """Settings: each field is an option of the recipe, and its docstring the option's help."""

    kind: ClassVar[str] = "example"
    method: ClassVar[str] = "regression on the teacher's ODE"
    readings: ClassVar[Mapping[str, str]] = {"generator_loss": "generator_loss is a squared error: it falls."}
    planned: ClassVar[Mapping[str, str]] = {"points": "Of example: steps of the teacher's ODE. Default: 8."}

    lr: float = setting(2e-4, memory=False)
    """Learning rate."""
    points: int = setting(8, memory=False)
    """Steps of the teacher's ODE from each latent, an evaluation each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("points", self.points, 1)

    def objective(self, network: NetworkConfig) -> ExampleObjective:
        return ExampleObjective(self, network)

    def name(self) -> str:
        return f"points{self.points}"  # ends the name of the run's folder

    @classmethod
    def report_words(cls, settings: Mapping[str, Any]) -> str:
        return f"{cls.method} in {settings.get('points')} steps"


class ExampleObjective:
    """What is trained, from which weights, how the result is sampled: see Objective. `network`: the teacher's."""

    generator, nfe = "generator", 1

    def __init__(self, config: ExampleConfig, network: NetworkConfig) -> None:
        self.config, self.network, self.level = config, network, config.noise.sigma_max
        self.title = f"distil D={network.D:g} example points={config.points}"
        self.summary = f"by {config.method} in {config.points} steps"
        self.facts = {"sigmas": [self.level]}  # stored with the generator: where `ipfm sample` evaluates it
        narrowed, start = generator_network(network, config.width), initial_weights(config.init, config.width)
        self.roles: tuple[Role, ...] = (Role("generator", narrowed, start, config.lr, beta1=0.9, averaged=True),)

    def steps(self, context: StepContext) -> ExampleSteps:
        return ExampleSteps(self.config, context, self.network)

    def forwards(self, *, phased: bool, checkpointed: bool) -> int:
        return self.config.points + 3 + checkpointed  # a backward pass counts as two forward passes

    def sample(self, net: Precond, first: int, count: int, *, seed: int) -> Tensor:
        return sample_generator(net, first, count, D=net.D, sigmas=(self.level,), seed=seed)


class ExampleSteps:
    """One update of every network. Nothing here may wait for the device, or keep state between steps."""

    def __init__(self, config: ExampleConfig, context: StepContext, network: NetworkConfig) -> None:
        self.config, self.network, self.world = config, network, context.world
        self.generator, self.teacher = context.trained["generator"], context.teacher
        self.micro_batch, self.local_batch = context.micro_batch, config.batch // context.world.size
        self.grid: list[float] = config.noise.karras(config.points).tolist()  # from sigma_max to 0
        self.generator.module.train()  # for dropout, where there is any

    def iteration(self, step: int) -> StepMetrics:
        config, tally = self.config, LossSum("generator", self.world)
        for first in self.world.micro_batches(config.batch, self.micro_batch):
            tally.add(*self._micro_step(step, first))
        mark("generator: optimiser")
        scale, decay = tally.grad_scale(config.batch), config.ema_decay(step)
        return tally.measured(self.generator.step(lr=config.lr_at(step), ema_decay=decay, grad_scale=scale))

    def _micro_step(self, step: int, first: int) -> tuple[Tensor, Tensor]:
        """Forward and backward of samples `first` to `first` + micro_batch: loss (B,), whether each counts (B,)."""
        mark("generator: samples")
        seed, network = self.config.seed, self.network
        index = torch.arange(first, first + self.micro_batch, device=self.world.device)
        labels = draw_labels(network.label_dim, index, seed=seed, stream=ExampleStream.LABEL, step=step)
        zeros = torch.zeros(len(index), *network.image_shape, device=index.device)
        top = torch.full((len(index),), self.grid[0], device=index.device)
        z = perturb(zeros, top, network.D, seed=seed, stream=ExampleStream.LATENT, step=step, sample_index=index)
        finite = finite_samples(z)  # at small D a latent may overflow: it must not meet the weights
        z = z.masked_fill(per_sample(~finite, z), 0.0)
        target = self._ode(z, labels)
        mark("generator: forward and backward")
        seed_dropout(seed, ExampleStream.DROPOUT, step, first)
        y = self.generator(z, top, labels)
        error = (y - target).detach()
        loss = error.square().sum((1, 2, 3))
        valid = finite & torch.isfinite(loss)
        # Of the loss by y, and 0 where it does not count.
        gradient = (2 * error).masked_fill(per_sample(~valid, error), 0.0)
        self.generator.backward(along(y, gradient / self.local_batch))
        return loss.masked_fill(~valid, 0.0), valid

    @torch.no_grad()
    def _ode(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Euler's steps of dx/dsigma = (x - T(x, sigma)) / sigma, at every D."""
        for here, there in pairwise(self.grid):
            sigma = torch.full((len(x),), here, device=x.device)
            x = x + (there - here) / here * (x - self.teacher(x, sigma, labels))
        return x


RECIPE = distill_ipfm.RECIPE.by(ExampleConfig, __file__, __doc__)
main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
