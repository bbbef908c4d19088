"""Consistency mid-training [CMT]: a network learns where the teacher's ODE leads each point of a trajectory.

From x ~ the prior at sigma_max a solver follows dx/dsigma = (x - T(x, sigma)) / sigma down to sigma_min, on levels that
are even in ln sigma. At every one of these points the generator G(x, sigma) has to give the last: one evaluation at
sigma_max makes an image, and noise of the kernel between two of them makes one of several steps. The ODE is the same at
every D; the prior, and the kernel of further steps, are those of D. No data, and no student.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from ipfm.engine.averages import LrSchedule
from ipfm.engine.checks import at_least, not_negative
from ipfm.engine.config import setting
from ipfm.engine.distributed.pieces import Number, whole
from ipfm.engine.objectives.base import TEACHER, Objective, Passes, StepContext, lora_title
from ipfm.engine.objectives.generator_alone import ConsistencyConfig, ConsistencyModel
from ipfm.engine.objectives.losses import along, finite_samples, per_sample
from ipfm.engine.objectives.lpips import (
    check_distance,
    check_lpips_images,
    load_lpips,
    lpips_flops,
    lpips_gradient,
)
from ipfm.engine.objectives.lpips_weights import read_weights
from ipfm.engine.objectives.phases import mark
from ipfm.engine.objectives.step_metrics import LossSum, StepMetrics, measured_as
from ipfm.engine.random_streams import ObjectiveStream, class_shares, draw_labels, seed_dropout
from ipfm.engine.runtime.wording import counted
from ipfm.kernels import perturb
from ipfm.models import NetworkConfig

# The constant of the pseudo-Huber loss for an image of 3 x 64 x 64; others by the root of their elements.
HUBER, HUBER_ELEMENTS = 0.06, 3 * 64 * 64


class CmtStream(ObjectiveStream):
    """Random streams of this objective."""

    LATENT = 28
    LABEL = 29
    DROPOUT = 30


@dataclass(frozen=True, kw_only=True)
class CmtConfig(ConsistencyConfig):
    """Consistency mid-training of a teacher into a generator of one or several steps [CMT]."""

    kind: ClassVar[str] = "cmt"
    planned: ClassVar[Mapping[str, str]] = {"distance": "Of CMT: l2, lpips. Default: l2."}
    method: ClassVar[str] = "consistency mid-training"
    measured: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}, "4 points": {"points": 4}}
    readings: ClassVar[Mapping[str, str]] = {
        "generator_loss": "generator_loss is the distance of the generator's images from the ends of the teacher's "
        "trajectories: it falls.",
    }

    points: int = setting(16, memory=False, planned_as=4)
    """Points of a trajectory, each an image of the batch: the teacher is evaluated one time less."""
    order: Literal[1, 2, 3] = setting(3, memory=False)
    """Order of the multistep solver that makes the trajectories."""
    distance: Literal["l2", "lpips"] = "l2"
    """What measures how far an image is from the trajectory's end: l2, see --huber; lpips, in the features of VGG-16 (1
    or 3 channels)."""
    huber: float | None = setting(None, memory=False)
    """With --distance l2: c of the loss (|a|^2 + c^2)^(1/2) - c, which heavy tails do not rule; 0 takes |a|^2. Default:
    0.06 (N / 12288)^(1/2), N the elements of an image."""
    lpips: Path | None = setting(None, identity=False, place=True, memory=False)
    """With --distance lpips: its weights, the state dict of lpips.LPIPS(net="vgg") or a folder with the two files that
    it is made of. Default: those of the installed package lpips and of torch's hub folder."""
    lpips_side: int | None = None
    """With --distance lpips: resize images to this side first, bilinearly. Default: as they are, at least 16."""
    lr_schedule: LrSchedule = setting("linear", memory=False, added=True)
    """How the learning rate falls: linear: to --lr-end at the end of the run; constant: not; rsqrt: as
    1 / sqrt(updates) after --lr-decay-batches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("points", self.points, 2)
        if self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {self.order!r}")
        check_distance(self.distance, self.lpips, self.lpips_side)
        if self.huber is not None:
            not_negative("huber", self.huber)
            if self.distance != "l2":
                raise ValueError("huber is a setting of --distance l2, got distance lpips")

    def completed(self, network: NetworkConfig) -> Self:
        """See `Distillation.completed`."""
        if self.batch % self.points:
            raise ValueError(
                f"batch must be a multiple of points, whole trajectories, got batch {self.batch} and "
                f"points {self.points}"
            )
        self.check_network(network)
        if self.distance == "lpips":
            # They are looked for before anything expensive begins.
            read_weights(self.lpips)
        return self

    def check_network(self, network: NetworkConfig) -> None:
        """See `Distillation.check_network`."""
        noise = self.noise
        if noise.sigma_max > network.sigma_max or noise.sigma_min < network.sigma_min:
            raise ValueError(
                f"the teacher knows noise levels between {network.sigma_min:g} and {network.sigma_max:g}, and its "
                f"trajectories go from {noise.sigma_max:g} to {noise.sigma_min:g}: give --noise.sigma-max and "
                "--noise.sigma-min"
            )
        super().check_network(network)
        if self.distance == "lpips":
            check_lpips_images(network, self.lpips_side)

    def objective(self, network: NetworkConfig) -> Objective:
        """See `Distillation.objective`."""
        return ConsistencyMidTraining(self, network)

    def further_flops(self, network: NetworkConfig) -> int:
        """See `Distillation.further_flops`: VGG's, of both images, and back to one of them."""
        return 0 if self.distance == "l2" else lpips_flops(network.image_shape, self.lpips_side)

    def held_bytes(self, network: NetworkConfig, images: int) -> int:
        """See `Distillation.held_bytes`: the trajectories that they belong to, and those of the steps to come."""
        _, trajectories = _trajectories(self, -(-self.batch // images))
        steps, blocks = solved_together(self, trajectories)
        kept = steps * (blocks * self.points + self.order)
        return 4 * trajectories * (kept * math.prod(network.image_shape) + steps * blocks * network.label_dim)

    @property
    def images_together(self) -> int:
        """See `RunConfig.images_together`: the points of a trajectory."""
        return self.points

    def name(self) -> str:
        """See `Distillation.name`."""
        return f"cmt-{self.distance}-N{self.points}"

    @classmethod
    def report_words(cls, settings: Mapping[str, Any]) -> str:
        """See `Distillation.report_words`."""
        points, order, distance = (settings.get(name) for name in ("points", "order", "distance"))
        return f"{cls.method} ({points} points of each trajectory, solver of order {order}, {distance})"

    @classmethod
    def info_words(cls, settings: Mapping[str, Any]) -> str:
        """See `Distillation.info_words`."""
        steps = counted(cls.nfe_of(settings), "step")
        return f"{cls.method}, {settings.get('points')} points, {settings.get('distance')}, {steps}"


class ConsistencyMidTraining(ConsistencyModel[CmtConfig]):
    """See `Objective`."""

    def __init__(self, config: CmtConfig, network: NetworkConfig) -> None:
        super().__init__(config, network)
        self.title = f"distil D={self.D:g} CMT N={config.points}" + lora_title(config)
        self.summary = f"by consistency mid-training on {config.points} points, {config.distance}"

    def steps(self, context: StepContext) -> CmtSteps:
        """See `Objective.steps`."""
        return CmtSteps(self.config, context, self.network)

    def passes(self, *, phased: bool) -> Mapping[str, Passes]:
        """See `Objective.forwards`: an evaluation of each, and the way back through the generator; phased is joint."""
        return {"generator": Passes.of(1, to_weights=1), TEACHER: Passes.of(1)}


class Advance(NamedTuple):
    """A step of the solver: x is multiplied by `kept`, and the last predictions are added, the newest first."""

    kept: float
    weights: tuple[float, ...]


def solver(ratio: float, steps: int, order: int) -> tuple[Advance, ...]:
    """The multistep solver on levels that fall by `ratio` < 1 from each to the next.

    In lambda = -ln sigma, with h = -ln ratio, the ODE is dx/dlambda = T - x, so that

        x(lambda + h) = e^-h x(lambda) + int_0^h e^-(h-u) T(u) du

    The polynomial through the last predictions, of a degree below `order`, is integrated exactly: a multistep method of
    that order, of the kind of DPM-Solver++ [Lu et al. 2022], whose first order it is. The first steps, which
    have fewer predictions behind them, are of lower order: there, at the largest levels, T hardly changes.

    Args:
        ratio: of one level to the one before it.
        steps: their number.
        order: 1, 2 or 3.
    """
    h = -math.log(ratio)
    # int_0^h e^-(h-u) (u/h)^k du.
    m0 = -math.expm1(-h)
    m1 = 1 - m0 / h
    m2 = 1 - 2 * m1 / h
    by_order = ((m0,), (m0 + m1, -m1), (m0 + 1.5 * m1 + 0.5 * m2, -2 * m1 - m2, 0.5 * (m1 + m2)))
    return tuple(Advance(ratio, by_order[min(step, order - 1)]) for step in range(steps))


# Trajectories that a pass of the teacher should have, above all on a GPU.
TRAJECTORIES_AT_ONCE = 128


class Solved(NamedTuple):
    """How trajectories are solved together."""

    steps: int
    """Those of so many steps, a block."""
    blocks: int
    """Blocks that are kept: that which is trained on and, of several steps, the next."""


def solved_together(config: CmtConfig, trajectories: int) -> Solved:
    """How a process solves so many trajectories of a step: by as few steps as make passes of the teacher large."""
    steps = min(config.points - 1, -(-TRAJECTORIES_AT_ONCE // trajectories))
    return Solved(steps, 1 + (steps > 1))


class CmtSteps:
    """The step of consistency mid-training.

    Image i of the batch is point i mod N of the trajectory i // N, whatever process or micro-batch has it: each process
    solves the trajectories that its images belong to, and then trains on their points.

    Those of one step are few for a pass of the teacher. Where they are, N - 1 steps make a block: the trajectories of
    the next one are solved together while this one's are trained on, by one evaluation of each in a step, so that the
    teacher has nearly as many images at a time as the generator. What a block is made of is drawn by the numbers of its
    steps: a run that goes on within one solves it anew.

    Args:
        config: settings with nothing left open but what memory decides.
        context: the network "generator", and where it runs.
        network: the teacher's architecture.
    """

    def __init__(self, config: CmtConfig, context: StepContext, network: NetworkConfig) -> None:
        self.config, self.network, self.D = config, network, context.settings.D
        self.generator, self.teacher, self.world = context.trained["generator"], context.teacher, context.world
        self.micro_batch, device = context.micro_batch, context.world.device
        self.local_batch = config.batch // context.world.size
        self._pieces, self._tally = context.pieces, LossSum("generator", context.world, self.local_batch)
        self.generator.module.train(config.dropout > 0)
        self._first, self._count = _trajectories(config, context.world.size, context.world.rank)
        self._solved = solved_together(config, self._count)
        # The trajectories of a block, and how many of them the teacher sees at a time.
        self._rows = self._solved.steps * self._count
        self._at_once = min(self.micro_batch, self._rows)
        noise, steps = config.noise, config.points - 1
        ratio = (noise.sigma_min / noise.sigma_max) ** (1 / steps)
        advances = solver(ratio, steps, config.order)
        self._kept = advances[0].kept
        weights = [[*advance.weights, *[0.0] * (config.order - len(advance.weights))] for advance in advances]
        self._weights = torch.tensor(weights, dtype=torch.float64).float().to(device)
        sigmas = [noise.sigma_max * ratio**i for i in range(steps)] + [noise.sigma_min]
        self._levels = torch.tensor(sigmas, dtype=torch.float64).float().to(device)
        shape, blocks = network.image_shape, self._solved.blocks
        # Point i of the trajectory in row j is image j N + i; a block begins at a row of its own.
        self._points = torch.zeros(blocks * self._rows * config.points, *shape, device=device)
        self._predicted = torch.zeros(config.order * self._rows, *shape, device=device)
        self._conditions = torch.zeros(blocks * self._rows, network.label_dim, device=device)
        # Block number and solver's steps done, of what lies at each place; whose predictions are kept.
        self._done = [(-1, 0)] * blocks
        self._in_flight = -1
        self._zeros = torch.zeros(self._count, *shape, device=device)
        self._start = torch.full((self._count,), sigmas[0], device=device)
        self._trajectories = torch.arange(self._rows, device=device)
        self._offsets = torch.arange(context.micro_batch, device=device)
        self._shares = class_shares(config.class_counts, network.label_dim, device)
        self._lpips = None if config.distance == "l2" else load_lpips(config.lpips, device, resize=config.lpips_side)
        usual = HUBER * math.sqrt(math.prod(shape) / HUBER_ELEMENTS)
        self._huber = usual if config.huber is None else config.huber

    def iteration(self, step: int) -> StepMetrics:
        """One update of the generator and its EMA; `step` counts from 0."""
        solver_steps, (steps, blocks) = self.config.points - 1, self._solved
        block, within = divmod(step, steps)
        mark("generator: trajectories")
        self._solve(block, solver_steps)
        if blocks > 1:
            self._solve(block + 1, (within + 1) * solver_steps // steps)
        row = (block % blocks) * self._rows + within * self._count
        for first in self.world.micro_batches(self.config.batch, self.micro_batch):
            self._pieces.run(("the generator's step",), self._micro_step, step=step, first=first, row=row)
        mark("generator: optimiser")
        rates = {"lr": self.config.lr_at(step), "ema_decay": self.config.ema_decay(step)}
        found = self._pieces.run(("the generator's update",), self._update, **rates)
        assert found is not None
        return measured_as("generator", found)

    def _update(self, numbers: Mapping[str, Any]) -> Tensor:
        scale = self._tally.grad_scale(self.config.batch)
        return self._tally.taken(self.generator.step(grad_scale=scale, **numbers))

    def _solve(self, block: int, upto: int) -> None:
        """Take the trajectories of a block as far as the step `upto` of the solver."""
        place = block % self._solved.blocks
        known, done = self._done[place]
        if known == block and done >= upto:
            return
        if known != block or self._in_flight != place:
            done, self._in_flight = 0, place
            self._predicted.zero_()
            for within in range(self._solved.steps):
                row, step = place * self._rows + within * self._count, block * self._solved.steps + within
                self._pieces.run(("the trajectories' beginnings",), self._begin, step=step, row=row)
        for i in range(done, upto):
            for first in range(0, self._rows, self._at_once):
                # The last ones may be advanced twice: each piece has the same number.
                first = min(first, self._rows - self._at_once)
                row = place * self._rows + first
                self._pieces.run(("the teacher's trajectories",), self._advance, i=i, first=first, row=row)
        self._done[place] = block, upto

    @torch.no_grad()
    def _begin(self, numbers: Mapping[str, Number]) -> None:
        """The first points of the trajectories of "step", from the row "row" on: NaN for one that overflowed."""
        step, rows = whole(numbers["step"]), self._trajectories[: self._count] + whole(numbers["row"])
        index = self._trajectories[: self._count] + self._first
        at: dict[str, Any] = {"seed": self.config.seed, "step": step}
        labels = draw_labels(self.network.label_dim, index, stream=CmtStream.LABEL, shares=self._shares, **at)
        if labels is not None:
            self._conditions.index_copy_(0, rows, labels)
        x = perturb(self._zeros, self._start, self.D, stream=CmtStream.LATENT, sample_index=index, **at)
        assert isinstance(x, Tensor)
        # At small D there are such, in float32 or within the network: they must not meet the weights.
        c_in = self.teacher.coefficients(self._start.to(self.teacher.wide_dtype))[2]
        finite = finite_samples((per_sample(c_in, x) * x).to(self.teacher.input_dtype)) & finite_samples(x)
        self._points.index_copy_(0, rows * self.config.points, x.masked_fill(per_sample(~finite, x), float("nan")))

    @torch.no_grad()
    def _advance(self, numbers: Mapping[str, Number]) -> None:
        """The step "i" of the solver for the trajectories from the row "row" on, the one "first" of their block."""
        i, first = whole(numbers["i"]), whole(numbers["first"])
        rows, order = self._trajectories[: self._at_once] + whole(numbers["row"]), self.config.order
        # Predictions of the last steps lie in turn in as many places.
        kept = (self._trajectories[: self._at_once] + first) * order
        at = torch.zeros_like(rows) + i
        x = self._points[rows * self.config.points + at]
        lost = per_sample(~finite_samples(x), x)
        x = x.masked_fill(lost, 0.0)
        labels = self._conditions[rows] if self.network.label_dim else None
        predicted = self.teacher(x, self._levels[at], labels).to(x.dtype)
        self._predicted.index_copy_(0, kept + at % order, predicted)
        weights = self._weights[at]
        x = self._kept * x
        for age in range(order):
            earlier = predicted if age == 0 else self._predicted[kept + (at - age) % order]
            x = x + per_sample(weights[:, age], x) * earlier
        self._points.index_copy_(0, rows * self.config.points + at + 1, x.masked_fill(lost, float("nan")))

    def _micro_step(self, numbers: Mapping[str, Number]) -> None:
        """Forward and backward of the micro-batch that begins with the image "first", in the update "step"."""
        step, first, N = whole(numbers["step"]), whole(numbers["first"]), self.config.points
        index = self._offsets + first
        row, point = index // N - self._first + whole(numbers["row"]), index % N
        mark("generator: forward and backward")
        labels = self._conditions[row] if self.network.label_dim else None
        x, target, level = self._points[row * N + point], self._points[row * N + N - 1], self._levels[point]
        finite = finite_samples(x) & finite_samples(target)
        x, target = (values.masked_fill(per_sample(~finite, values), 0.0) for values in (x, target))
        if self.config.dropout > 0:
            # With dropout nothing is captured, and the numbers are those of the host.
            seed_dropout(self.config.seed, CmtStream.DROPOUT, int(step), int(first))
        y = self.generator(x, level, labels)
        loss, gradient, fits = self._distance(y.detach().to(target.dtype), target)
        valid = finite & fits
        gradient = gradient.masked_fill(per_sample(~valid, y), 0.0) / self.local_batch
        self.generator.backward(along(y, gradient.to(y.dtype)))
        self._tally.add(loss.masked_fill(~valid, 0.0), valid)

    def _distance(self, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """d (B,), its gradient with respect to y, and whether both are finite (B,)."""
        if self._lpips is not None:
            return lpips_gradient(self._lpips, y, target)
        away = y - target
        square = away.square().sum((1, 2, 3))
        if self._huber == 0:
            return square, 2 * away, torch.isfinite(square)
        root = (square + self._huber**2).sqrt()
        # Without the cancellation of the root and c where the two nearly agree.
        return square / (root + self._huber), away / per_sample(root, away), torch.isfinite(square)


def _trajectories(config: CmtConfig, processes: int, rank: int = 0) -> tuple[int, int]:
    """The first trajectory that a process solves, and how many: of all processes alike."""
    local, N = config.batch // processes, config.points
    parts = [(rank * local // N, -(-(rank + 1) * local // N)) for rank in range(processes)]
    count = max(end - first for first, end in parts)
    return min(parts[rank][0], -(-config.batch // N) - count), count
