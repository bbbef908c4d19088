"""How a teacher judges images that are none of the data's: its first generator's, for several D, at every noise level.

A distillation begins with y = G_0(z, sigma_init), where G_0 is the teacher itself: images out of the data's law. At a
noise level sigma and the teacher's own D, x = y + noise, and two things are measured:

* the teacher's error on them relative to that on the data: ln(e_out / e_data), where e is the mean of
  ||T(x, sigma) - y||^2 over the images of either law. The share of the error that the images being out of law makes is
  1 - e_data / e_out: 0 where they are denoised as the data are, towards 1 where all of it is theirs. The logarithm is
  what means are taken of: a share below 0 has no bound.
* how well the noise hides where an image is from: the share of noisy images that the more likely of two mixtures, of
  data and of generated images under the same noise, tells wrongly. 0.5: not told apart at all; 0: always.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.world import World
from ipfm.engine.experiments.claims import (
    BELOW_ZERO,
    Judged,
    below_zero,
    criterion_said,
    verdicts_table,
    write_verdicts,
)
from ipfm.engine.experiments.options import check_images
from ipfm.engine.experiments.recipe import Plan, Recipe
from ipfm.engine.experiments.repeats import spread
from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.runtime.commandline import Given
from ipfm.engine.runtime.launcher import launched_processes
from ipfm.engine.runtime.progress import ProgressBar
from ipfm.engine.runtime.wording import significant
from ipfm.engine.sampling.batches import sample_generator
from ipfm.kernels import perturb
from ipfm.models import Precond, load_teacher
from ipfm.models.atomic_files import atomic_write
from ipfm.models.checkpoints.run_models import locate

# Streams of the noise, of those that training has for a student and a generator: nothing is trained here.
DATA_NOISE, OUT_NOISE = 2, 7
COLUMNS = ("D", "seed", "sigma", "error_data", "error_out", "relative", "share", "told_wrongly")
SOURCE = "arXiv 2509.22454, section 4"


@dataclass(frozen=True, kw_only=True)
class OutOfLawOptions:
    """Options of the measurement."""

    teachers: tuple[Path, ...] = ()
    """Teachers of different D, model folders or run folders, of images like the data."""
    data: Path | None = None
    """The images that they were trained on. Default: Debian's Fashion-MNIST."""
    images: int = 1000
    """Images of each law, for every seed and noise level."""
    levels: int = 16
    """Noise levels, which share the law of the generator's step evenly among them."""
    sigma_init: float = 2.5
    """Noise level of the generator's latents."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of images, latents and noise; the same ones for every teacher."""
    batch: int = 250
    """Images that the teacher denoises at a time."""
    out: Path | None = None
    """Folder of the results. Default: runs/ablation-out-of-law."""
    dry_run: bool = False
    """Say what would be measured, and stop."""

    def __post_init__(self) -> None:
        for name in ("images", "levels", "batch"):
            least = 2 if name == "images" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not (math.isfinite(self.sigma_init) and self.sigma_init > 0):
            raise ValueError(f"sigma-init must be a finite number > 0, got {self.sigma_init}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            shown = " ".join(map(str, self.seeds)) or "none"
            raise ValueError(f"seeds must be different integers >= 0, at least one, got {shown}")


@dataclass(frozen=True)
class Measured:
    """At one noise level, with one seed.

    Attributes:
        D: of the teacher.
        seed: of everything drawn.
        sigma: noise level.
        error_data: mean of ||T(x) - y||^2 over images of the data.
        error_out: over the first generator's.
        told_wrongly: share of the noisy images of both whose law is told wrongly.
    """

    D: float
    seed: int
    sigma: float
    error_data: float
    error_out: float
    told_wrongly: float

    @property
    def relative(self) -> float:
        """ln(error_out / error_data)."""
        positive = self.error_out > 0 and self.error_data > 0
        return math.log(self.error_out / self.error_data) if positive else math.nan

    @property
    def share(self) -> float:
        """Of the error on the generator's images, what it exceeds that on the data by: 1 - error_data / error_out."""
        return -math.expm1(-self.relative)


def levels(count: int, noise: NoiseLevels | None = None) -> list[float]:
    """Noise levels in the middles of `count` parts, as likely as each other, of the law of the generator's step."""
    noise = noise or NoiseLevels()
    t = (torch.arange(count, dtype=torch.float64) + 0.5) / count * (noise.t_max / 1000)
    return [float(sigma) for sigma in noise.at(t)]


def log_mixture(x: Tensor, centres: Tensor, sigma: float, D: float) -> Tensor:
    """The log density, but for a constant, of x under noise of level sigma around the centres, each as likely.

    Args:
        x: (B, N).
        centres: (M, N).
        sigma: noise level.
        D: auxiliary dimensions; p(x | y) ~ (||x - y||^2 + sigma^2 D)^(-(N + D) / 2) [Xu et al. 2023, eq. 4], and its
            limit at inf.

    Returns:
        (B,) float64.
    """
    squares = torch.cdist(x.double(), centres.double()).square() / sigma**2
    logs = -squares / 2 if math.isinf(D) else -(x.shape[1] + D) / 2 * torch.log1p(squares / D)
    return logs.logsumexp(dim=1)


@torch.no_grad()
def measure(
    net: Precond, data: ImageDataset, options: OutOfLawOptions, seed: int, advance: Callable[[int], None]
) -> list[Measured]:
    """A teacher with one seed, at every noise level.

    Half of the images of each law are those that the mixtures are made of; the others are told.

    Args:
        net: the teacher, in eval mode.
        data: images that it was trained on.
        options: how many, and at which levels.
        seed: of what is drawn.
        advance: called with the number of images that have been denoised.
    """
    D, device = net.config.D, next(net.parameters()).device
    index = torch.arange(options.images, device=device)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[: options.images]
    real = torch.cat([data.take(int(i), 1) for i in order]).to(device)
    draw = partial(sample_generator, net, D=D, sigmas=(options.sigma_init,), seed=seed)
    firsts = range(0, options.images, options.batch)
    drawn = [draw(first, min(options.batch, options.images - first)) for first in firsts]
    laws = {DATA_NOISE: real, OUT_NOISE: torch.cat(drawn)}
    found = []
    for step, sigma in enumerate(levels(options.levels)):
        sigmas = torch.full((options.images,), sigma, device=device)
        noisy = {
            stream: perturb(y, sigmas, D, seed=seed, stream=stream, step=step, sample_index=index)
            for stream, y in laws.items()
        }
        errors = {}
        for stream, x in noisy.items():
            total = 0.0
            for first in firsts:
                part = slice(first, first + options.batch)
                away = net(x[part], sigmas[part]) - laws[stream][part]
                total += float(away.double().square().sum())
                advance(len(away))
            errors[stream] = total / options.images
        wrongly = _told_wrongly(noisy, laws, sigma, D)
        found.append(Measured(D, seed, sigma, errors[DATA_NOISE], errors[OUT_NOISE], wrongly))
    return found


def _told_wrongly(noisy: Mapping[int, Tensor], laws: Mapping[int, Tensor], sigma: float, D: float) -> float:
    half = len(laws[DATA_NOISE]) // 2
    centres = {stream: y[:half].flatten(1) for stream, y in laws.items()}
    wrong = []
    for stream, x in noisy.items():
        asked = x[half:].flatten(1)
        real, out = (log_mixture(asked, centres[other], sigma, D) for other in (DATA_NOISE, OUT_NOISE))
        wrong.append((real > out) if stream == OUT_NOISE else (out >= real))
    return float(torch.cat(wrong).double().mean())


@dataclass(frozen=True)
class Question:
    """What is compared between a small D and a large one: the mean over the noise levels of what was measured."""

    text: str
    """The claim: "{small}" and "{large}" stand for the two D."""
    measured: str
    """Its name for people."""
    of: Callable[[Measured], float]
    higher: bool
    """Whether the claim says that it is higher at the small D; else lower."""

    def stated(self, small: float, large: float) -> str:
        """What decides it."""
        first, second = (large, small) if self.higher else (small, large)
        return (
            f"{self.measured}, mean over the law of the generator's noise levels, at D = {first:g} minus that at D = "
            f"{second:g}, by seed: {BELOW_ZERO}"
        )

    def judged(self, found: Sequence[Measured], small: float, large: float) -> Judged:
        """The verdict."""
        means = {D: self.by_seed(found, D) for D in (small, large)}
        first, second = (large, small) if self.higher else (small, large)
        text = self.text.format(small=f"{small:g}", large=f"{large:g}")
        return Judged(text, SOURCE, self.stated(small, large), below_zero(means[first], means[second]))

    def by_seed(self, found: Sequence[Measured], D: float) -> dict[int, float]:
        """Seed -> the mean over the noise levels."""
        seeds = dict.fromkeys(m.seed for m in found)
        return {seed: spread([self.of(m) for m in found if (m.D, m.seed) == (D, seed)]).mean for seed in seeds}


QUESTIONS = (
    Question(
        "a teacher of D = {small} is more robust to the first generator's images than one of D = {large}",
        "ln(teacher's error on the first generator's images / its error on the data)",
        lambda m: m.relative,
        higher=False,
    ),
    Question(
        "at D = {small} the noise hides the distance between the generator's images and the data better than at "
        "D = {large}",
        "share of noisy images whose law is told wrongly",
        lambda m: m.told_wrongly,
        higher=True,
    ),
)


def table(found: Sequence[Measured]) -> str:
    """Markdown: a row for each D and noise level, means over the seeds; last the mean over the levels."""
    lines = [
        "| D | sigma | error on data | error on the generator's images | ln of their ratio | share | told wrongly |",
        "|---|---|---|---|---|---|---|",
    ]
    for D in dict.fromkeys(m.D for m in found):
        its = [m for m in found if m.D == D]
        sigmas = dict.fromkeys(m.sigma for m in its)
        rows = [(significant(sigma), [m for m in its if m.sigma == sigma]) for sigma in sigmas]
        for name, group in [*rows, ("mean", its)]:
            means = [spread([getattr(m, column) for m in group]).mean for column in COLUMNS[3:]]
            lines.append(f"| {D:g} | {name} | {' | '.join(map(significant, means))} |")
    return "\n".join(lines) + "\n"


def write_csv(found: Sequence[Measured], path: Path) -> None:
    """Write a line for each D, seed and noise level, of `COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for m in found:
        writer.writerow([f"{m.D:g}", m.seed, *(repr(getattr(m, column)) for column in COLUMNS[2:])])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def read_csv(path: Path) -> list[Measured]:
    """What `write_csv` wrote.

    Raises:
        ValueError: the file is none of that.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has not the columns {', '.join(COLUMNS)}")
        return [
            Measured(
                float(row["D"]),
                int(row["seed"]),
                *(float(row[name]) for name in ("sigma", "error_data", "error_out", "told_wrongly")),
            )
            for row in rows
        ]


def verdicts(found: Sequence[Measured]) -> list[Judged]:
    """What was measured says about the claims, of the smallest and the largest D."""
    Ds = [m.D for m in found]
    return [question.judged(found, min(Ds), max(Ds)) for question in QUESTIONS]


@dataclass(frozen=True)
class OutOfLawPlan(Plan):
    """See `Plan`. `teachers` by increasing D."""

    options: OutOfLawOptions
    path: Path
    data: ImageDataset
    teachers: Sequence[Precond]

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest D, which are compared."""
        return self.teachers[0].config.D, self.teachers[-1].config.D

    def describe(self) -> str:
        """See `Plan.describe`."""
        options, (small, large) = self.options, self.ends
        sigmas = " ".join(f"{sigma:.3g}" for sigma in levels(options.levels))
        lines = [
            f"teachers of D = {', '.join(f'{net.config.D:g}' for net in self.teachers)}",
            f"{options.images:,} images of {self.data.name} and as many of the first generator, at sigma = {sigmas}",
            f"seeds {' '.join(map(str, options.seeds))}   out {self.path}",
        ]
        for question in QUESTIONS:
            text = question.text.format(small=f"{small:g}", large=f"{large:g}")
            lines.append(f"claim: {criterion_said(text, SOURCE, question.stated(small, large))}")
        return "\n".join(lines)

    def begin(self, world: World) -> Callable[[], None]:
        """See `Plan.begin`."""
        if world.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
        return partial(self._measure, world)

    def _measure(self, world: World) -> None:
        options = self.options
        print(self.describe())
        found: list[Measured] = []
        total = 2 * options.images * options.levels * len(options.seeds) * len(self.teachers)
        with ProgressBar("denoised", total) as bar:
            for net in self.teachers:
                net = net.to(world.device).eval()
                for seed in options.seeds:
                    found += measure(net, self.data, options, seed, bar.advance)
        judged = verdicts(found)
        text = f"{table(found)}\n{verdicts_table(judged)}"
        write_csv(found, self.path / "out-of-law.csv")
        write_verdicts(judged, self.path / "claims.csv")
        with atomic_write(self.path / "out-of-law.md") as file:
            file.write(text.encode())
        print(f"\n{text}\nnumbers: {self.path / 'out-of-law.csv'}")


@dataclass(frozen=True, kw_only=True)
class OutOfLaw(Recipe[OutOfLawOptions]):
    """Measures teachers on images that are none of the data's."""

    data: Callable[[Path | None], ImageDataset]
    """--data -> the images that the teachers were trained on."""
    base: OutOfLawOptions

    @property
    def defaults(self) -> OutOfLawOptions:
        """See `Recipe.defaults`."""
        return self.base

    def plan(self, given: Given[OutOfLawOptions]) -> OutOfLawPlan:
        """See `Recipe.plan`."""
        options = given.options
        if launched_processes() > 1:
            raise ValueError(f"{self.file} runs in one process: start it with python")
        if len(options.teachers) < 2:
            raise ValueError(
                "give --teachers with at least two teachers of different D, such as those in the folder teachers of an "
                "ablation"
            )
        data = self.data(options.data)
        teachers = [load_teacher(locate(path.expanduser(), teacher=True).path) for path in options.teachers]
        for path, net in zip(options.teachers, teachers, strict=True):
            check_images(net.config, data.shape, f"{path}: the data are")
            if net.config.label_dim:
                raise ValueError(f"{path} is conditional: give teachers without classes")
        teachers.sort(key=lambda net: net.config.D)
        Ds = [net.config.D for net in teachers]
        if len(set(Ds)) < len(Ds):
            raise ValueError(f"the teachers must be of different D, got {', '.join(f'{D:g}' for D in Ds)}")
        if options.images > len(data):
            raise ValueError(f"images must be at most the {len(data):,} of the data, got {options.images:,}")
        return OutOfLawPlan(options, options.out or Path("runs") / "ablation-out-of-law", data, teachers)
