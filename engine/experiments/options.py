"""What every recipe shares: its options, the way from a teacher to a run, and --dry-run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from ipfm.engine.evaluation.options import EvaluationOptions
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.objectives.pid import PidConfig
from ipfm.models import NetworkConfig, Precond, load_teacher


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(Distillation, EvaluationOptions):
    """Options of every recipe that distils, beside those of its objective."""

    teacher_steps: int | None = None
    """Training steps of the teacher, in a recipe that trains one when --teacher is not given."""
    dry_run: bool = False
    """Print the resolved configuration, the memory plan and the expected duration, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_evaluation()
        if self.teacher_steps is not None and self.teacher_steps < 1:
            raise ValueError(f"teacher-steps must be at least 1, got {self.teacher_steps}")

    def distillation(self) -> Distillation:
        """The settings of the distillation alone."""
        kind = next(
            c for c in type(self).__mro__ if issubclass(c, Distillation) and not issubclass(c, EvaluationOptions)
        )
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind)})


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(DistillationOptions, DistillConfig):
    """Options of every recipe that distils by inverse Poisson flow matching or SiD."""


@dataclass(frozen=True, kw_only=True)
class PidOptions(DistillationOptions, PidConfig):
    """Options of every recipe that distils by physics informed distillation."""


def ema_kimg(decay: float, batch: int) -> float:
    """The half-life, in thousands of images, of a moving average with this decay a step."""
    return batch * math.log(0.5) / math.log(decay) / 1000


def read_teacher(options: DistillationOptions) -> Precond | None:
    """The teacher that --teacher names, its D checked against --D; None without --teacher.

    Raises:
        ValueError: there is no such model, it cannot be read, or D contradicts it.
    """
    if options.teacher is None:
        return None
    return load_teacher(options.teacher, D=options.D)


def check_images(network: NetworkConfig, shape: tuple[int, int, int], whose: str) -> None:
    """ValueError unless the network makes images (C, H, W); `whose`: "CIFAR-10 is"."""
    if (network.img_channels, network.img_resolution, network.img_resolution) != shape:
        side = network.img_resolution
        raise ValueError(
            f"the teacher makes images {network.img_channels}x{side}x{side}, {whose} {'x'.join(map(str, shape))}"
        )


def run_name(recipe: str, config: Distillation, D: float) -> Path:
    """Default run folder: runs/<recipe>-D<D>-<what the settings say>, e.g. runs/cifar-D2048-alpha1-K1."""
    return Path("runs") / f"{recipe}-D{D:g}-{config.name()}"
