"""Consistency tuning [ECT, Geng et al. 2024]: a network learns to give one image all along a path of noise.

Of a real image y and one draw xi of the kernel at sigma = 1 there are two points, x_t = y + t xi and x_r = y + r xi,
r < t, and the generator descends

    d(G(x_t, t), sg G(x_r, r)) / (t - r),   G(x, 0) := x,   r = max(0, t (1 - q^-(s+1) (1 + 8 / (1 + e^t))))

with the same dropout in both. The stage s grows with the images seen, so that r nears t. As E[xi | x_t] is the slope
(x_t - T(x_t, t)) / t of the teacher's ODE at every D, the pair is one of neighbouring points of the ODE on average: the
teacher gives the first weights, and is asked no more. With a step of a solver in the place of the pair (`pairs`) it is
asked: consistency distillation. At finite D heavy tails are in the pairs, which the norm of the difference, or its
pseudo-Huber form, does not let rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ipfm.engine.checks import is_number, not_negative, number, positive
from ipfm.engine.config import setting
from ipfm.engine.data.dataset import Batch
from ipfm.engine.distributed.pieces import Number, whole
from ipfm.engine.objectives.base import TEACHER, Objective, Passes, StepContext, lora_title
from ipfm.engine.objectives.generator_alone import ConsistencyConfig, ConsistencyModel
from ipfm.engine.objectives.losses import along, finite_samples, per_sample
from ipfm.engine.objectives.phases import mark
from ipfm.engine.objectives.published import Conditions, PaperResult, plain_name
from ipfm.engine.objectives.step_metrics import LossSum, StepMetrics, measured_as
from ipfm.engine.random_streams import ObjectiveStream, seed_dropout
from ipfm.engine.runtime.wording import counted
from ipfm.kernels import perturb, philox
from ipfm.models import NetworkConfig

# k of the gap's factor 1 + k / (1 + e^(b t)), b = 1.
GAP = 8.0
# Of q^-(s+1), below which float32 has no more digits for t - r; a long run's last stages have it.
SMALLEST_GAP = 1e-6
# Norm of an input up to which no square of an activation leaves float32; only tails of a D far below 1 reach it.
LARGEST = 1e15


class EctStream(ObjectiveStream):
    """Random streams of this objective."""

    LEVEL = 31
    NOISE = 32
    DROPOUT = 33


def _figure(fid: float, source: str, q_kimg: float, *levels: float, after: tuple[str, ...] = ()) -> PaperResult:
    settings: dict[str, tuple[Any, ...]] = {
        "width": (1.0,), "init": ("teacher",), "generator": ("full",), "huber": (0.0,), "q_kimg": (q_kimg,),
        # Without any it is the largest.
        "sigmas": ([80.0, *levels], *([] if levels else [[]])),
    }  # fmt: skip
    return PaperResult(fid, None, None, source, Conditions("cifar10-ddpmpp", settings, unknown=after))


_AFTER = ("a second stage after consistency mid-training there",)
# q and evaluations of the generator -> FID of CIFAR-10.
_FIGURES: Mapping[tuple[float, int | None], PaperResult] = {
    (2.0, 1): _figure(3.60, "locuslab/ect", 3200.0),
    (2.0, 2): _figure(2.11, "locuslab/ect", 3200.0, 0.821),
    (4096.0, 1): _figure(2.74, "sony/cmt", 0.0, after=_AFTER),
    (4096.0, 2): _figure(1.97, "sony/cmt", 0.0, 0.7757, after=_AFTER),
}


@dataclass(frozen=True, kw_only=True)
class EctConfig(ConsistencyConfig):
    """Consistency tuning of a teacher, or of a generator that has begun with it, on real images [ECT]."""

    kind: ClassVar[str] = "ect"
    measured: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}, "heun": {"pairs": "heun"}}
    method: ClassVar[str] = "consistency tuning"
    readings: ClassVar[Mapping[str, str]] = {
        "generator_loss": "generator_loss is the distance of neighbouring points' images by the gap of their levels: "
        "it jumps where --q-kimg halves the gap; watch the distance.",
    }

    real_data: Path | None = setting(None, identity=False, place=True, memory=False)
    """Real images to learn from: a folder, a zip, CIFAR-10's archive; own: those of the recipe itself."""
    real_xflip: bool = setting(False, memory=False)
    """Mirror real images at random."""
    pairs: Literal["data", "euler", "heun"] = "data"
    """Where the point at r is from: data: of the same image and noise; euler, heun: a step of the teacher's ODE from
    the point at t, consistency distillation."""
    q: float = setting(2.0, memory=False)
    """r / t is 1 - q^-(s+1) (1 + 8 / (1 + e^t)) in the stage s; 4096 after a consistency mid-training."""
    q_kimg: float = setting(3200.0, memory=False)
    """Thousands of images of a stage; 0 stays in the first, as after a consistency mid-training."""
    t_mean: float = setting(-1.1, memory=False)
    """Mean of ln t."""
    t_std: float = setting(2.0, memory=False)
    """Standard deviation of ln t, which lies between noise.sigma-min and noise.sigma-max."""
    huber: float = setting(0.0, memory=False)
    """c of the loss (|a|^2 + c^2)^(1/2) - c; 0 takes |a|."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs not in ("data", "euler", "heun"):
            raise ValueError(f"pairs must be data, euler or heun, got {self.pairs!r}")
        if not isinstance(self.real_xflip, bool):
            raise ValueError(f"real-xflip must be True or False, got {self.real_xflip!r}")
        if not (is_number(self.q) and 1 < self.q <= 1e6):
            raise ValueError(f"q must lie in (1, 1e+06], got {self.q}")
        not_negative("q-kimg", self.q_kimg)
        if not (is_number(self.t_mean) and abs(self.t_mean) <= 100):
            raise ValueError(f"t-mean must be a number in [-100, 100], got {self.t_mean}")
        positive("t-std", self.t_std)
        not_negative("huber", self.huber)

    @property
    def takes_real_images(self) -> bool:
        """See `Distillation.takes_real_images`."""
        return True

    def gap_at(self, step: int) -> float:
        """q^-(s+1) at 0-based `step`, at least 1e-6; s is the stage by the images seen before it."""
        stage = int(step * self.batch / (1000 * self.q_kimg)) if self.q_kimg else 0
        return max(float(self.q) ** -(stage + 1), SMALLEST_GAP)

    def completed(self, network: NetworkConfig) -> Self:
        """See `Distillation.completed`."""
        self.check_network(network)
        return self

    def check_network(self, network: NetworkConfig) -> None:
        """See `Distillation.check_network`."""
        noise = self.noise
        if noise.sigma_max > network.sigma_max or noise.sigma_min < network.sigma_min:
            raise ValueError(
                f"the teacher knows noise levels between {network.sigma_min:g} and {network.sigma_max:g}, and t lies "
                f"between {noise.sigma_min:g} and {noise.sigma_max:g}: give --noise.sigma-max and --noise.sigma-min"
            )
        super().check_network(network)

    def objective(self, network: NetworkConfig) -> Objective:
        """See `Distillation.objective`."""
        return ConsistencyTuning(self, network)

    def name(self) -> str:
        """See `Distillation.name`."""
        return f"ect-{self.pairs}-q{self.q:g}"

    @classmethod
    def figures(cls, dataset: str, settings: Mapping[str, Any]) -> Mapping[float, PaperResult]:
        """See `Distillation.figures`: at infinite D, by q and the number of evaluations."""
        asked = (number(settings.get("q")), cls.nfe_of(settings))
        if plain_name(dataset) != "cifar10" or settings.get("pairs", "data") != "data" or asked not in _FIGURES:
            return {}
        return {math.inf: _FIGURES[asked]}

    @classmethod
    def report_words(cls, settings: Mapping[str, Any]) -> str:
        """See `Distillation.report_words`."""
        return f"{cls.method} (pairs of {cls._pairs(settings)}, q = {settings.get('q')})"

    @classmethod
    def info_words(cls, settings: Mapping[str, Any]) -> str:
        """See `Distillation.info_words`."""
        steps = counted(cls.nfe_of(settings), "step")
        return f"{cls.method}, pairs of {cls._pairs(settings)}, q = {settings.get('q')}, {steps}"

    @staticmethod
    def _pairs(settings: Mapping[str, Any]) -> str:
        pairs = settings.get("pairs")
        return "data" if pairs in (None, "data") else f"the teacher's ODE ({pairs})"


class ConsistencyTuning(ConsistencyModel[EctConfig]):
    """See `Objective`."""

    def __init__(self, config: EctConfig, network: NetworkConfig) -> None:
        super().__init__(config, network)
        self.title = f"distil D={self.D:g} ECT {config.pairs} q={config.q:g}" + lora_title(config)
        self.summary = f"by consistency tuning on pairs of {config.pairs}"

    def steps(self, context: StepContext) -> EctSteps:
        """See `Objective.steps`."""
        return EctSteps(self.config, context, self.network)

    def passes(self, *, phased: bool) -> Mapping[str, Passes]:
        """See `Objective.forwards`: two evaluations and the way back through one; phased is joint."""
        asked = {"data": 0, "euler": 1, "heun": 2}[self.config.pairs]
        generator = {"generator": Passes.of(2, to_weights=1)}
        return {**generator, TEACHER: Passes.of(asked)} if asked else generator


class EctSteps:
    """The step of consistency tuning.

    Args:
        config: settings with nothing left open but what memory decides.
        context: the network "generator", real images, and where it runs.
        network: the teacher's architecture.
    """

    def __init__(self, config: EctConfig, context: StepContext, network: NetworkConfig) -> None:
        self.config, self.network, self.D = config, network, context.settings.D
        self.generator, self.teacher, self.world = context.trained["generator"], context.teacher, context.world
        self.micro_batch, device = context.micro_batch, context.world.device
        self.local_batch = config.batch // context.world.size
        if context.real is None:
            raise ValueError(f"{config.method} was asked for without real images")
        self._real = context.real
        self._pieces, self._tally = context.pieces, LossSum("generator", context.world, self.local_batch)
        self.generator.module.train(config.dropout > 0)
        self._zeros = torch.zeros(context.micro_batch, *network.image_shape, device=device)
        self._ones = torch.ones(context.micro_batch, device=device)
        self._offsets = torch.arange(context.micro_batch, device=device)

    def iteration(self, step: int) -> StepMetrics:
        """One update of the generator and its EMA; `step` counts from 0."""
        config = self.config
        for first in self.world.micro_batches(config.batch, self.micro_batch):
            mark("generator: samples")
            found = self._real.batch(step, self._offsets + first)
            labels = None if found.labels is None else self._pieces.placed("real labels", found.labels)
            batch = Batch(self._pieces.placed("real images", found.images), labels)
            numbers = {"step": step, "first": first, "gap": config.gap_at(step)}
            self._pieces.run(("the generator's step",), partial(self._micro_step, batch), **numbers)
        mark("generator: optimiser")
        rates = {"lr": config.lr_at(step), "ema_decay": config.ema_decay(step)}
        applied = self._pieces.run(("the generator's update",), self._update, **rates)
        assert applied is not None
        return measured_as("generator", applied)

    def _update(self, numbers: Mapping[str, Any]) -> Tensor:
        scale = self._tally.grad_scale(self.config.batch)
        return self._tally.taken(self.generator.step(grad_scale=scale, **numbers))

    def _micro_step(self, real: Batch, numbers: Mapping[str, Number]) -> None:
        """Forward and backward of the micro-batch that begins with the image "first", in the update "step"."""
        config = self.config
        step, first = whole(numbers["step"]), whole(numbers["first"])
        index = self._offsets + first
        at: dict[str, Any] = {"seed": config.seed, "step": step}
        t, r = self._levels(index, numbers["gap"], at)
        y, labels = real.images, real.labels if self.network.label_dim else None
        xi = perturb(self._zeros, self._ones, self.D, stream=EctStream.NOISE, sample_index=index, **at)
        assert isinstance(xi, Tensor)
        mark("generator: forward and backward")
        # At small D there are some that leave float32, or the network's arithmetic: they must not meet the weights.
        x = y + per_sample(t, y) * xi
        c_in = self.teacher.coefficients(t.to(self.teacher.wide_dtype))[2]
        scaled = per_sample(c_in, x) * x
        finite = finite_samples(scaled.to(self.teacher.input_dtype)) & (scaled.flatten(1).norm(dim=1) < LARGEST)
        x, xi, y = (values.masked_fill(per_sample(~finite, values), 0.0) for values in (x, xi, y))
        x_r = y + per_sample(r, y) * xi if config.pairs == "data" else self._solved(x, t, r, labels)
        sound = finite & finite_samples(x_r)
        x_r = x_r.masked_fill(per_sample(~sound, x_r), 0.0)
        with torch.no_grad():
            # The network knows no level 0, where the image is the point itself.
            ended = r <= 0
            self._seed_dropout(step, first)
            target = self.generator.module(x_r, torch.where(ended, t, r), labels).to(x.dtype)
            target = torch.where(per_sample(ended, x), x_r, target)
        self._seed_dropout(step, first)
        out = self.generator(x, t, labels)
        loss, gradient = self._distance(out.detach().to(x.dtype) - target)
        by_gap = 1 / (t - r)
        loss, gradient = loss * by_gap, gradient * per_sample(by_gap, gradient)
        valid = sound & torch.isfinite(loss) & finite_samples(gradient)
        gradient = gradient.masked_fill(per_sample(~valid, gradient), 0.0) / self.local_batch
        self.generator.backward(along(out, gradient.to(out.dtype)))
        self._tally.add(loss.masked_fill(~valid, 0.0), valid)

    def _levels(self, index: Tensor, gap: Number, at: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """t and r, each (B,) float32."""
        config, noise = self.config, self.config.noise
        assert not isinstance(gap, tuple)
        n = philox.normal(index, 1, stream=EctStream.LEVEL, **at)[:, 0].double()
        t = (config.t_mean + config.t_std * n).exp().clamp(noise.sigma_min, noise.sigma_max)
        # 1 / (1 + e^t) = sigmoid(-t), which does not overflow.
        r = (t * (1 - gap * (1 + GAP * torch.sigmoid(-t)))).clamp(min=0.0)
        return t.float(), r.float()

    @torch.no_grad()
    def _solved(self, x: Tensor, t: Tensor, r: Tensor, labels: Tensor | None) -> Tensor:
        """The point at r to which a step of the teacher's ODE leads from x (B, C, H, W) at t."""
        mark("generator: teacher")
        kept = per_sample(r / t, x)
        denoised = self.teacher(x, t, labels).to(x.dtype)
        x_r = kept * x + (1 - kept) * denoised
        if self.config.pairs == "heun":
            ended = r <= 0
            again = self.teacher(x_r, torch.where(ended, t, r), labels).to(x.dtype)
            slope = (x - denoised) / per_sample(t, x)
            there = (x_r - again) / per_sample(torch.where(ended, t, r), x)
            better = x + per_sample((r - t) / 2, x) * (slope + there)
            x_r = torch.where(per_sample(ended, x), x_r, better)
        mark("generator: forward and backward")
        return x_r

    def _distance(self, away: Tensor) -> tuple[Tensor, Tensor]:
        """d (B,) and its gradient (B, C, H, W) by the difference; 0 where there is none."""
        square, c = away.square().flatten(1).sum(1), self.config.huber
        root = (square + c**2).sqrt()
        smallest = torch.finfo(away.dtype).tiny
        return square / (root + c).clamp(min=smallest), away / per_sample(root.clamp(min=smallest), away)

    def _seed_dropout(self, step: int | Tensor, first: int | Tensor) -> None:
        if self.config.dropout > 0:
            # With dropout nothing is captured, and the numbers are those of the host.
            seed_dropout(self.config.seed, EctStream.DROPOUT, int(step), int(first))
