"""A third objective, as anyone would add it: one file with the settings, the objective, and its step.

Nothing in the project names it. Put into engine/objectives/ it is an objective like the others; tests import it, or
lend the package the folder of a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipfm.engine.checks import positive
from ipfm.engine.objectives.base import Distillation, Objective, Role, StepContext
from ipfm.engine.objectives.initial_networks import generator_network
from ipfm.engine.objectives.losses import along
from ipfm.engine.objectives.phases import mark
from ipfm.engine.objectives.step_metrics import LossSum, StepMetrics
from ipfm.engine.random_streams import ObjectiveStream
from ipfm.engine.sampling.batches import sample_generator
from ipfm.kernels import perturb
from ipfm.models import NetworkConfig, Precond


class RegressionStream(ObjectiveStream):
    LATENT = 100


@dataclass(frozen=True, kw_only=True)
class RegressionConfig(Distillation):
    """The generator learns the teacher's own denoising at one level."""

    kind: ClassVar[str] = "regression"
    planned: ClassVar[Mapping[str, str]] = {"level": "Of regression: its noise level. Default: 2.5."}
    method: ClassVar[str] = "regression on the teacher's denoising"
    unused: ClassVar[tuple[str, ...]] = ("ema_kimg", "ema_rampup")
    readings: ClassVar[Mapping[str, str]] = {"pupil_loss": "pupil_loss is a squared error: it falls."}

    level: float = 2.5
    """Noise level at which the generator learns the teacher's denoising."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("level", self.level)

    def objective(self, network: NetworkConfig) -> Objective:
        return Regression(self, network)

    def name(self) -> str:
        return f"regression-{self.level:g}"

    @classmethod
    def report_words(cls, settings: Mapping[str, Any]) -> str:
        return f"{cls.method} at σ = {settings.get('level')}"

    @classmethod
    def card_rows(cls, settings: Mapping[str, Any]) -> Mapping[str, object]:
        return {"level of the regression": settings.get("level")}


class Regression:
    generator, nfe, title, summary = "pupil", 1, "regression", "by regression"

    def __init__(self, config: RegressionConfig, network: NetworkConfig) -> None:
        self.config, self.network = config, network
        narrow = generator_network(network, config.width)
        self.roles: tuple[Role, ...] = (Role("pupil", narrow, "random", config.lr, 0.5, averaged=True),)
        self.facts: Mapping[str, object] = {"sigmas": [config.level]}

    def steps(self, context: StepContext) -> RegressionStep:
        return RegressionStep(self.config, context, self.network)

    def forwards(self, *, phased: bool, checkpointed: bool) -> int:
        return 4 + checkpointed

    def sample(self, net: Precond, first: int, count: int, *, seed: int) -> Tensor:
        return sample_generator(net, first, count, D=net.D, sigmas=(self.config.level,), seed=seed)


class RegressionStep:
    def __init__(self, config: RegressionConfig, context: StepContext, network: NetworkConfig) -> None:
        self.config, self.context, self.network = config, context, network

    def iteration(self, step: int) -> StepMetrics:
        config, context, network = self.config, self.context, self.network
        tally, pupil = LossSum("pupil", context.world), context.trained["pupil"]
        local, device = config.batch // context.world.size, context.world.device
        shape = network.img_channels, network.img_resolution, network.img_resolution
        for first in context.world.micro_batches(config.batch, context.micro_batch):
            mark("pupil: forward and backward")
            index = torch.arange(first, first + context.micro_batch, device=device)
            sigma = torch.full((len(index),), config.level, device=device)
            zeros = torch.zeros(len(index), *shape, device=device)
            at = {"seed": config.seed, "stream": RegressionStream.LATENT, "step": step}
            x = perturb(zeros, sigma, network.D, sample_index=index, **at)
            with torch.no_grad():
                target = context.teacher(x, sigma)
            y = pupil(x, sigma)
            error = (y - target).detach()
            pupil.backward(along(y, 2 * error / local))
            tally.add(error.square().sum((1, 2, 3)), torch.ones(len(index), dtype=torch.bool, device=device))
        mark("pupil: optimiser")
        applied = pupil.step(lr=config.lr, ema_decay=0.5, grad_scale=tally.grad_scale(config.batch))
        return tally.measured(applied)
