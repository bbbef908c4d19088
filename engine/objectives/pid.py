"""Physics informed distillation [Tee et al., PID]: a network that solves the teacher's ODE for every latent at once.

The network x_theta(z, t) of `ipfm.engine.sampling.trajectory` stands for the whole trajectory of the latent z. On two
neighbouring levels of a grid of N its difference quotient has to be the slope that the teacher sees there,
dx/dt = (x - T(x, t)) / t, at every D in this parametrisation. One evaluation at the smallest level makes an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from ipfm.engine.checks import at_least, number
from ipfm.engine.config import setting
from ipfm.engine.distributed.pieces import Number, whole
from ipfm.engine.objectives.base import TEACHER, Objective, Passes, StepContext, lora_title
from ipfm.engine.objectives.generator_alone import GeneratorAlone, GeneratorAloneConfig
from ipfm.engine.objectives.losses import along, finite_samples, held, per_sample
from ipfm.engine.objectives.lpips import (
    check_distance,
    check_lpips_images,
    load_lpips,
    lpips_flops,
    lpips_gradient,
)
from ipfm.engine.objectives.lpips_weights import read_weights
from ipfm.engine.objectives.phases import mark
from ipfm.engine.objectives.published import Conditions, PaperResult, plain_name
from ipfm.engine.objectives.step_metrics import LossSum, StepMetrics, measured_as
from ipfm.engine.random_streams import ObjectiveStream, class_shares, draw_labels, seed_dropout
from ipfm.engine.sampling.batches import sample_trajectory
from ipfm.kernels import perturb, philox
from ipfm.models import EDMPrecond, NetworkConfig, Precond

Difference = Literal["first", "central"]

SOURCE = "Tee et al., Physics Informed Distillation"
# The side that images are resized to before VGG: the paper's, and that of the settings published beside it.
PAPER_SIDE, SCRIPT_SIDE = 244, 224


def _published(
    fid: float,
    distance: str,
    *,
    preset: str = "cifar10-ddpmpp",
    teacher: tuple[float, int | None] = (2.04, None),
    **precision: tuple[Any, ...],
) -> PaperResult:
    settings = {"lpips_side": (PAPER_SIDE, SCRIPT_SIDE)} if distance == "lpips" else {}
    required = {"clip_grad": "gradient clipping"} if precision else {}
    return PaperResult(fid, *teacher, SOURCE, Conditions(preset, {**settings, **precision}, required))


# Figures of the paper, EDM teachers: (data set, difference, distance, width) -> FID. CIFAR-10's network is that of the
# settings published beside it and of the parameters that the paper counts, ddpm++; its text says ncsn++.
_PUBLISHED = {
    ("cifar10", "first", "lpips", 1.0): _published(3.92, "lpips"),
    ("cifar10", "central", "lpips", 1.0): _published(3.68, "lpips"),
    ("cifar10", "first", "l2", 1.0): _published(5.85, "l2"),
    ("cifar10", "first", "lpips", 0.5): _published(8.29, "lpips"),
    ("imagenet64cond", "first", "lpips", 1.0): _published(
        9.49, "lpips", preset="imagenet64-adm", teacher=(2.44, 79), precision=("fp16",)
    ),
}


class PidStream(ObjectiveStream):
    """Random streams of this objective; the numbers are those that its runs have always had."""

    LATENT = 22
    LEVEL = 23
    LABEL = 24
    DROPOUT = 25


@dataclass(frozen=True, kw_only=True)
class PidConfig(GeneratorAloneConfig):
    """Physics informed distillation of a teacher into a one-step generator [PID]."""

    kind: ClassVar[str] = "pid"
    planned: ClassVar[Mapping[str, str]] = {
        "distance": "Of PID: l2, lpips. Default: l2.",
        "lpips_side": "Of PID with lpips: side that images are resized to. Default: as they are.",
    }
    method: ClassVar[str] = "physics informed distillation"
    readings: ClassVar[Mapping[str, str]] = {
        "generator_loss": "generator_loss is the residual of the teacher's ODE on the trajectories that the network "
        "has learned: it falls.",
    }

    points: int = setting(250, memory=False, planned_as=2)
    """N: noise levels of the grid on which the trajectory is differentiated."""
    difference: Difference = setting("first", memory=False)
    """first: the slope at a level by the difference to the next one; central: at the middle between the two, this
    project's reading of the paper's second order."""
    distance: Literal["l2", "lpips"] = "l2"
    """What measures the residual: l2, its square summed over the elements; lpips, the distance of the two images in the
    features of VGG-16 (1 or 3 channels)."""
    lpips: Path | None = setting(None, identity=False, place=True, memory=False)
    """With --distance lpips: its weights, the state dict of lpips.LPIPS(net="vgg") or a folder with the two files that
    it is made of. Default: those of the installed package lpips and of torch's hub folder."""
    lpips_side: int | None = None
    """With --distance lpips: resize images to this side first, bilinearly; 244 in the paper, 224 in the settings
    published beside it. Default: as they are, at least 16; 244 in the recipes of CIFAR-10 and ImageNet."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("points", self.points, 2)
        if self.difference not in ("first", "central"):
            raise ValueError(f"difference must be first or central, got {self.difference!r}")
        check_distance(self.distance, self.lpips, self.lpips_side)

    def completed(self, network: NetworkConfig) -> Self:
        """See `Distillation.completed`."""
        self.check_network(network)
        if self.distance == "lpips":
            # They are looked for before anything expensive begins.
            read_weights(self.lpips)
        return self

    def check_network(self, network: NetworkConfig) -> None:
        """See `Distillation.check_network`."""
        if network.precond != EDMPrecond.PRECOND:
            raise ValueError(
                f"a trajectory needs a teacher with EDM's preconditioning ({EDMPrecond.PRECOND}), "
                f"got {network.precond}; IPFM and SiD take any"
            )
        super().check_network(network)
        if self.distance == "lpips":
            check_lpips_images(network, self.lpips_side)

    def objective(self, network: NetworkConfig) -> Objective:
        """See `Distillation.objective`."""
        return PhysicsInformedDistillation(self, network)

    def further_flops(self, network: NetworkConfig) -> int:
        """See `Distillation.further_flops`: VGG's, of both images, and back to one of them."""
        return 0 if self.distance == "l2" else lpips_flops(network.image_shape, self.lpips_side)

    def name(self) -> str:
        """See `Distillation.name`."""
        return f"pid-{self.difference}-{self.distance}-N{self.points}"

    @classmethod
    def recognises(cls, settings: Mapping[str, Any]) -> bool:
        """See `Distillation.recognises`."""
        return "points" in settings or settings.get("parametrisation") == "trajectory"

    @classmethod
    def figures(cls, dataset: str, settings: Mapping[str, Any]) -> Mapping[float, PaperResult]:
        """See `Distillation.figures`."""
        if settings.get("points") != 250:
            return {}
        difference, distance = (str(settings.get(name)) for name in ("difference", "distance"))
        found = _PUBLISHED.get((plain_name(dataset), difference, distance, number(settings.get("width"))))
        return {} if found is None else {math.inf: found}

    @classmethod
    def report_words(cls, settings: Mapping[str, Any]) -> str:
        """See `Distillation.report_words`."""
        points, difference, distance = (settings.get(name) for name in ("points", "difference", "distance"))
        return f"{cls.method} ({difference} difference, {distance}, {points} levels)"

    @classmethod
    def info_words(cls, settings: Mapping[str, Any]) -> str:
        """See `Distillation.info_words`."""
        points, difference, distance = (settings.get(name) for name in ("points", "difference", "distance"))
        return f"{cls.method}, {difference} difference, {distance}, N = {points}"


class PhysicsInformedDistillation(GeneratorAlone[PidConfig]):
    """See `Objective`."""

    nfe = 1

    def __init__(self, config: PidConfig, network: NetworkConfig) -> None:
        super().__init__(config, network)
        self.title = f"distil D={self.D:g} PID {config.difference} N={config.points}" + lora_title(config)
        self.summary = f"by physics informed distillation, {config.difference} difference and {config.distance}"

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Objective.facts`."""
        noise = self.config.noise
        return {"parametrisation": "trajectory", "sigma_max": noise.sigma_max, "sigma_min": noise.sigma_min}

    def steps(self, context: StepContext) -> PidSteps:
        """See `Objective.steps`."""
        return PidSteps(self.config, context, self.network)

    def passes(self, *, phased: bool) -> Mapping[str, Passes]:
        """See `Objective.forwards`: two evaluations with their backward passes, and one of the teacher.

        With dropout two more, for the point at which the teacher is asked.
        """
        without = self.config.dropout > 0 and not self.config.samples_have_dropout
        return {"generator": Passes.of(2 + 2 * phased + 2 * without, to_weights=2), TEACHER: Passes.of(1)}

    def sample(self, net: Precond, first: int, count: int, *, seed: int) -> Tensor:
        """See `Objective.sample`."""
        return sample_trajectory(net, first, count, D=self.D, noise=self.config.noise, seed=seed)


class Stencil(NamedTuple):
    """The residual at one level by two neighbouring ones; each (B,) float32.

    With x_i = (t_i / T) z + o_i F_i, o_i = (T - t_i) / T, the slope m at the level t, where the point x is,

        x - t m,   m = (x_i - x_{i+1}) / (t_i - t_{i+1}),   first: x = x_i, t = t_i;   central: the means of the two

    has no part along z, as x and t m have the same: it is a F_i + b F_{i+1}, without the cancellation.
    """

    here: Tensor
    """t_i."""
    there: Tensor
    """t_{i+1}, the smaller one."""
    level: Tensor
    """t, where the teacher is asked."""
    a: Tensor
    b: Tensor
    point: tuple[Tensor, Tensor, Tensor]
    """x = p_z z + p_i F_i + p_{i+1} F_{i+1}."""


def stencil(grid: Tensor, index: Tensor, difference: Difference) -> Stencil:
    """The two levels `index` and `index` + 1 of the falling grid, and how the residual is made there.

    Source: PID, sections 4.2 and 4.3, eq. 10 and 11, with the first difference. For the second order, section 6.1, the
    paper prints no stencil: "central" is this project's reading.

    Args:
        grid: (N,) float64 noise levels from T on.
        index: (B,) int64 in [0, N - 2], so that both levels are on the grid: this project's reading of algorithm 1,
            which draws from 0 … N.
        difference: see `PidConfig`.
    """
    T, here, there = grid[0], grid[index], grid[index + 1]
    o_here, o_there = (T - here) / T, (T - there) / T
    if difference == "first":
        level, share = here, torch.ones_like(here)
    else:
        level, share = (here + there) / 2, torch.full_like(here, 0.5)
    slope = level / (here - there)
    parts = (
        here,
        there,
        level,
        o_here * (share - slope),
        o_there * (1 - share + slope),
        level / T,
        o_here * share,
        o_there * (1 - share),
    )
    here, there, level, a, b, *point = (part.float() for part in parts)
    return Stencil(here, there, level, a, b, (point[0], point[1], point[2]))


class PidSteps:
    """The step of physics informed distillation.

    Args:
        config: settings with nothing left open but what memory decides.
        context: the network "generator", and where it runs.
        network: the teacher's architecture.
    """

    def __init__(self, config: PidConfig, context: StepContext, network: NetworkConfig) -> None:
        self.config, self.network, self.D = config, network, context.settings.D
        self.generator, self.teacher = context.trained["generator"], context.teacher
        self.phased, self.world = context.settings.phased, context.world
        self.local_batch, self.micro_batch = config.batch // context.world.size, context.micro_batch
        self._pieces, self._tally = context.pieces, LossSum("generator", context.world, self.local_batch)
        device = context.world.device
        # Once, as it is a walk over all modules: only evaluations without dropout change it for a while.
        self.generator.module.train(config.dropout > 0)
        self._lpips = None if config.distance == "l2" else load_lpips(config.lpips, device, resize=config.lpips_side)
        self._grid = config.noise.karras(config.points)[:-1].to(device)
        self._zeros = torch.zeros(context.micro_batch, *network.image_shape, device=device)
        self._start = torch.full((context.micro_batch,), config.noise.sigma_max, device=device)
        self._offsets = torch.arange(context.micro_batch, device=device)
        self._shares = class_shares(config.class_counts, network.label_dim, device)
        self._c_in = (config.noise.sigma_data**2 + config.noise.sigma_max**2) ** -0.5

    def iteration(self, step: int) -> StepMetrics:
        """One update of the generator and its EMA; `step` counts from 0."""
        for first in self.world.micro_batches(self.config.batch, self.micro_batch):
            self._pieces.run(("the generator's step",), self._micro_step, step=step, first=first)
        mark("generator: optimiser")
        rates = {"lr": self.config.lr_at(step), "ema_decay": self.config.ema_decay(step)}
        found = self._pieces.run(("the generator's update",), self._update, **rates)
        assert found is not None
        return measured_as("generator", found)

    def _update(self, numbers: Mapping[str, Any]) -> Tensor:
        scale = self._tally.grad_scale(self.config.batch)
        return self._tally.taken(self.generator.step(grad_scale=scale, **numbers))

    def _micro_step(self, numbers: Mapping[str, Number]) -> None:
        """Forward and backward of the micro-batch that begins with the sample "first", in the update "step".

        Joint evaluates the network at both levels at once and keeps the graph while the teacher is asked. Phased asks
        first, and runs the network once more at each level, for its graph alone. With dropout, which acts in what is
        trained alone, the point at which the teacher is asked takes two more evaluations.
        """
        config = self.config
        step, first = whole(numbers["step"]), whole(numbers["first"])
        index = self._offsets + first
        seed = config.seed
        mark("generator: samples")
        labels = draw_labels(
            self.network.label_dim, index, seed=seed, stream=PidStream.LABEL, step=step, shares=self._shares
        )
        z = perturb(self._zeros, self._start, self.D, seed=seed, stream=PidStream.LATENT, step=step, sample_index=index)
        u = philox.uniform(index, 1, seed=seed, stream=PidStream.LEVEL, step=step)[:, 0]
        # u lies in (0, 1]: 1 belongs to the last pair of levels.
        pair = (u.double() * (config.points - 1)).long().clamp_(max=config.points - 2)
        at = stencil(self._grid, pair, config.difference)
        # A latent that overflowed, or would within the network, must not meet the weights, not even under a zero
        # gradient. At small D there are such.
        scaled = (self._c_in * z).to(self.teacher.input_dtype)
        finite = torch.isfinite(z.square().sum((1, 2, 3))) & finite_samples(scaled)
        z, scaled = (values.masked_fill(per_sample(~finite, z), 0.0) for values in (z, scaled))

        def forward(net: Callable[..., Tensor], *levels: Tensor) -> Tensor:
            """F at each of the levels, one after the other."""
            many = len(levels)
            repeated = None if labels is None else labels.repeat(many, 1)
            return held(net(scaled.repeat(many, 1, 1, 1), torch.cat(levels), repeated, None, raw=True))

        def alone(net: Callable[..., Tensor], level: Tensor) -> Tensor:
            # The same elements are dropped at both levels: the network is one and the same.
            self._seed_dropout(step, first)
            return forward(net, level)

        graph = None
        if self.phased:
            with torch.no_grad():
                f_here, f_there = (alone(self.generator.module, level).float() for level in (at.here, at.there))
        else:
            if config.dropout > 0:
                graph = torch.cat([alone(self.generator, level) for level in (at.here, at.there)])
            else:
                graph = forward(self.generator, at.here, at.there)
            f_here, f_there = graph.detach().float().chunk(2)
        mark("generator: teacher")
        made = self._without_dropout(forward, at) if config.dropout > 0 and not config.samples_have_dropout else None
        with torch.no_grad():
            p_z, p_here, p_there = (per_sample(p, z) for p in at.point)
            x_here, x_there = made or (f_here, f_there)
            x = p_z * z + p_here * x_here + p_there * x_there
            sound = finite & torch.isfinite(x.square().sum((1, 2, 3)))
            target = self.teacher(x.masked_fill(per_sample(~sound, z), 0.0), at.level, labels)
            prediction = per_sample(at.a, z) * f_here + per_sample(at.b, z) * f_there
            loss, gradient, fits = self._distance(prediction, target)
            valid = sound & fits
            gradient = gradient.masked_fill(per_sample(~valid, z), 0.0) / self.local_batch
        mark("generator: backward")
        if graph is not None:
            both = torch.cat([per_sample(at.a, z) * gradient, per_sample(at.b, z) * gradient])
            self.generator.backward(along(graph, both.to(graph.dtype)))
        else:
            for level, factor in ((at.here, at.a), (at.there, at.b)):
                out = alone(self.generator, level)
                self.generator.backward(along(out, (per_sample(factor, z) * gradient).to(out.dtype)))
                del out
        self._tally.add(loss.masked_fill(~valid, 0.0), valid)

    @torch.no_grad()
    def _without_dropout(self, forward: Callable[..., Tensor], at: Stencil) -> tuple[Tensor, Tensor]:
        """F at both levels, for the point at which the teacher is asked: dropout acts in what is trained alone."""
        module = self.generator.module.eval()
        made = forward(module, at.here).float(), forward(module, at.there).float()
        module.train()
        return made

    def _distance(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """d (B,), its gradient with respect to the prediction, and whether both are finite (B,)."""
        if self._lpips is not None:
            return lpips_gradient(self._lpips, prediction, target)
        residual = prediction - target
        loss = residual.square().sum((1, 2, 3))
        return loss, 2 * residual, torch.isfinite(loss)

    def _seed_dropout(self, step: int | Tensor, first: int | Tensor) -> None:
        if self.config.dropout > 0:
            # With dropout nothing is captured, and the numbers are those of the host.
            seed_dropout(self.config.seed, PidStream.DROPOUT, int(step), int(first))
