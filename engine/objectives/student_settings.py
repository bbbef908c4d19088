"""Settings that methods with a student share: of two networks, their noise levels, weights and further terms."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from ipfm.engine.checks import at_least, check_start, not_negative, number, positive, share
from ipfm.engine.config import InitialWeights, setting
from ipfm.engine.noise_levels import check_sigmas, few_step_sigmas
from ipfm.engine.objectives import discriminator
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.objectives.discriminator import Adversary, DiscriminatorWeights
from ipfm.engine.objectives.initial_networks import generator_network
from ipfm.engine.objectives.level_laws import level_law, student_draw
from ipfm.engine.objectives.loss_weights import WeightName
from ipfm.engine.objectives.losses import (
    GeneratorGradient,
    Noisy,
    PredictionWeighting,
    Raw,
    Weighting,
)
from ipfm.engine.objectives.real_data import NO_REAL_DATA, RealWeights
from ipfm.engine.objectives.variations import checked_laws, variation_rows, variation_words
from ipfm.engine.runtime.wording import counted
from ipfm.models import NetworkConfig

# Where the objectives of this project are.
_HERE = f"{__name__.rpartition('.')[0]}."


@dataclass(frozen=True, kw_only=True)
class StudentConfig(Distillation):
    """Settings of objectives whose student learns to denoise the samples of a K-step generator [IPFM, algorithm 1]."""

    passes_through: ClassVar[bool] = True
    """The generator's gradient passes through the teacher and the student. Where it does not, phased is joint."""

    steps: int = 1
    """K: network evaluations of the generator."""
    sigmas: tuple[float, ...] = setting((), memory=False)
    """Noise levels of the K evaluations, falling. Default: sigma_init (K - k + 1) / K, this project's choice for K > 1:
    the paper prints none."""
    sigma_init: float = setting(2.5, memory=False)
    """Noise level of the generator's input when --sigmas is not given."""
    gradient: Literal["all", "last"] = "all"
    """With several steps: all: the gradient passes through all of them; last: the chain ends after a number of steps
    drawn anew for each update, and the gradient passes through the last of these alone."""
    student_lr: float | None = setting(None, memory=False)
    """Learning rate of the student. Default: that of the generator."""
    generator_beta1: float = 0.0
    """Adam's first decay for the generator."""
    student_beta1: float = 0.0
    """Adam's first decay for the student."""
    student_updates: int = setting(1, memory=False)
    """Student updates per generator update."""
    student_first_kimg: float = setting(0.0, memory=False, added=True)
    """Thousands of images at the start for which the student alone is trained, part of the run's length; SiD²A has
    100."""
    student_init: InitialWeights = setting("auto", memory=False)
    """First weights of the student, as in --init."""
    student_width: float = 1.0
    """Channels of the student by those of the teacher."""
    student: Literal["full", "lora"] = setting("full", added=True)
    """How the student is trained, as in --generator."""

    student_ema: float | None = setting(None, added=True)
    """Train the generator against a moving average of the student of this decay an update of the student, such as
    0.99. Default: the student as it is."""
    weight: WeightName = setting("sid", added=True)
    """Weight of the generator's loss: sid, 1 / mean|T - y|; sigma, 1 / sigma^2; edm, 1 / c_out^2; score, 1 / sigma^2
    for finite D; unsquared, for a distance of T and S in the place of its square. See docs/objectives.md."""
    weight_power: float = setting(0.0, memory=False, added=True)
    """Multiply --weight by this power of sigma; 0.5 and 1 let high levels count for more."""
    levels_generator: str | None = setting(None, memory=False, added=True)
    """Law of the noise levels in the generator's step: grid:LOW:HIGH, rising:HIGH, lognormal:MEAN:STD,
    loguniform[:LOW:HIGH] or log-t:MEAN:SCALE:NU. Default: SiD's, grid:0:0.8."""
    levels_student: str | None = setting(None, memory=False, added=True)
    """The same in the student's step, or generator, the generator's law, or half, half of either. Default: EDM's,
    lognormal:-1.2:1.2."""
    logvar: bool = setting(False, added=True)
    """Weigh each noise level by e^-u in the losses of student and generator, u the student's log-variance, which it
    learns: of teachers that have one, EDM2's."""
    real_data: Path | None = setting(None, identity=False, place=True, memory=False, added=True)
    """Images from which the student learns beside the generator's: a folder, a zip, CIFAR-10's archive; own: those of
    the recipe itself. See docs/objectives.md."""
    real_xflip: bool = setting(False, memory=False, added=True)
    """Mirror real images at random."""
    discriminator: Literal["encoder"] | None = setting(None, added=True)
    """encoder: the student's encoder learns to tell the generator's images from those of --real-data, and the generator
    to deceive it (SiDA)."""
    discriminator_weights: tuple[float, float] | None = setting(None, memory=False, added=True)
    """Of a discriminator: factors of its loss in the student's and in the generator's. Default: SiDA's, 1 2e-4, of EDM2
    100 2e-4."""
    discriminator_kimg: tuple[float, float] | None = setting(None, memory=False, added=True)
    """With a discriminator: thousands of images before the generator is trained, and before it is told what the
    discriminator says. Default: 100 200, SiDA's, but at most 5 % and 10 % of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("steps", self.steps, 1)
        if self.sigmas != ():
            levels = check_sigmas(self.sigmas)
            object.__setattr__(self, "sigmas", levels)
            # --sigmas alone fixes the number of steps; together with --steps the two have to agree.
            if self.steps not in (1, len(levels)):
                raise ValueError(f"steps and sigmas disagree: {self.steps} steps, {len(levels)} noise levels")
            object.__setattr__(self, "steps", len(levels))
        positive("sigma-init", self.sigma_init)
        for name, law in checked_laws(self).items():
            object.__setattr__(self, name, law)
        if not isinstance(self.logvar, bool):
            raise ValueError(f"logvar must be True or False, got {self.logvar!r}")
        if self.gradient not in ("all", "last"):
            raise ValueError(f"gradient must be all or last, got {self.gradient!r}")
        if self.student_lr is not None:
            positive("student-lr", self.student_lr)
        share("generator-beta1", self.generator_beta1)
        share("student-beta1", self.student_beta1)
        at_least("student-updates", self.student_updates, 1)
        if not isinstance(self.real_xflip, bool):
            raise ValueError(f"real-xflip must be True or False, got {self.real_xflip!r}")
        discriminator.check(self.discriminator, self.discriminator_weights, self.discriminator_kimg)
        weights = discriminator.discriminator_weights(self.discriminator_weights)
        object.__setattr__(self, "discriminator_weights", None if weights is None else tuple(weights))
        object.__setattr__(self, "discriminator_kimg", discriminator.discriminator_starts(self.discriminator_kimg))
        not_negative("student-first-kimg", self.student_first_kimg)
        long = self.max_steps is not None or self.kimg is not None
        alone = math.ceil(self.student_first_kimg * 1000 / self.batch)
        if alone and long and alone >= self.total_steps:
            raise ValueError(
                f"student-first-kimg {self.student_first_kimg:g} are {counted(f'{alone:,}', 'step')} of the run's "
                f"{self.total_steps:,}, which leave none for the generator: give a longer run"
            )
        check_start("student-init", self.student_init, "student-width", self.student_width)
        self._check_training("student", self.student, "student_init", "student_width")
        if self.student == "lora" and self.student_ema is not None:
            raise ValueError(
                "student-ema keeps a network of averaged weights beside the student, and with student lora there is "
                "none of its own: leave one of them out"
            )

    @property
    def low_rank_roles(self) -> tuple[str, ...]:
        """See `Distillation.low_rank_roles`."""
        return ("student",) * (self.student == "lora") + super().low_rank_roles

    # -- what an objective of this kind says ---------------------------------------------------------------------------

    @abstractmethod
    def gradient_of(
        self,
        teacher: Raw,
        student: Raw,
        y: Tensor,
        noisy: Noisy,
        *,
        phased: bool,
        rescale: bool,
        weighting: Weighting | PredictionWeighting | None,
        adversary: Adversary | None = None,
    ) -> GeneratorGradient:
        """dL/dy of the generator's loss on a micro-batch; arguments as in `losses.generator_gradient`.

        With a discriminator `adversary` has the student with its logits, and the gradient is with its term.
        """

    @property
    @abstractmethod
    def title_word(self) -> str:
        """What decides over it besides D and K, in lines of the log: "alpha=1"."""

    @property
    @abstractmethod
    def summary_word(self) -> str:
        """The same within a sentence: "at alpha = 1"."""

    @property
    def weights(self) -> RealWeights:
        """The weights (a, b) of the student's loss; (1, 1) without real images."""
        return NO_REAL_DATA

    @property
    def takes_real_images(self) -> bool:
        """See `Distillation.takes_real_images`."""
        return self.weights != NO_REAL_DATA or self.discriminator is not None

    @property
    def why_real_images(self) -> str:
        """The setting that asks for real images, for a message."""
        return f"real-weights {self.weights}" if self.discriminator is None else f"discriminator {self.discriminator}"

    @property
    def discriminates(self) -> DiscriminatorWeights | None:
        """The factors of a discriminator's terms; None without one."""
        if self.discriminator is None:
            return None
        return DiscriminatorWeights(*(self.discriminator_weights or discriminator.WEIGHTS))

    @property
    def starts(self) -> tuple[float, float]:
        """Thousands of images before the generator is trained, and before it meets a discriminator."""
        if self.discriminator_kimg is not None:
            return self.discriminator_kimg
        known = self.max_steps is not None or self.kimg is not None
        return discriminator.starts_by_default(self.total_steps * self.batch / 1000 if known else None)

    @property
    def decided(self) -> Mapping[str, Any]:
        """See `RunConfig.decided`: when a discriminator's terms begin."""
        known = self.max_steps is not None or self.kimg is not None
        if self.discriminator is None or self.discriminator_kimg is not None or not known:
            return {}
        return {"discriminator_kimg": list(self.starts)}

    def keeping(self, decided: Mapping[str, Any]) -> Self:
        """See `RunConfig.keeping`."""
        starts = decided.get("discriminator_kimg")
        if starts is None or self.discriminator is None or self.discriminator_kimg is not None:
            return self
        return replace(self, discriminator_kimg=discriminator.discriminator_starts(starts))

    @property
    def further_facts(self) -> Mapping[str, Any]:
        """Plain JSON values that are stored with the result beside its noise levels."""
        return {}

    # -- what a weighting of one's own says otherwise ------------------------------------------------------------------

    def generator_weight(self, sigma: Tensor, weight: Tensor) -> Tensor:
        """The weight of each sample in the generator's loss, through which no gradient flows.

        A subclass with a kind of its own may return others; the tensor that was given, as it is, costs nothing.

        Args:
            sigma: (B,) float32: noise levels.
            weight: (B,) lambda = 1 / max(mean |T - y|, 1e-5); 0 where a sample does not count.

        Returns:
            (B,) the weights to take. A sample whose weight is not finite does not count.
        """
        return weight

    def student_weight(self, sigma: Tensor, weight: Tensor) -> Tensor:
        """The weight of each sample in the student's loss; see `generator_weight`.

        Args:
            sigma: (B,) float32: noise levels.
            weight: (B,) 1 / sigma_data^2 + 1 / sigma^2; 0 where a sample does not count.
        """
        return weight

    def generator_sigma(self, sample_index: Tensor, *, seed: int, stream: int, step: int | Tensor) -> Tensor:
        """sigma (B,) of the generator's step, by --levels-generator or `NoiseLevels.generator`.

        It is a function of the arguments alone.

        Args:
            sample_index: (B,) int64, the samples' global indices.
            seed: of the random numbers, as in `ipfm.kernels.philox.uniform`.
            stream: of the random numbers, likewise.
            step: of the random numbers, likewise.
        """
        law = level_law("levels-generator", self.levels_generator)
        if law is not None:
            return law.draw(self.noise, sample_index, seed=seed, stream=stream, step=step)
        return self.noise.generator(sample_index, seed=seed, stream=stream, step=step)

    def student_sigma(self, sample_index: Tensor, *, seed: int, stream: int, step: int | Tensor) -> Tensor:
        """sigma (B,) of the student's step, see `NoiseLevels.denoising` and --levels-student.

        Arguments as in `generator_sigma`.
        """
        draw = self.noise.denoising
        if self.levels_student in ("generator", "half"):
            draw = student_draw(self.levels_student, draw, self.generator_sigma)
        elif (law := level_law("levels-student", self.levels_student)) is not None:
            draw = partial(law.draw, self.noise)
        return draw(sample_index, seed=seed, stream=stream, step=step)

    @classmethod
    def weighting_words(cls, settings: Mapping[str, Any]) -> str:
        """What a subclass weighs otherwise, for reports: "1 / sigma^2"; its kind where it does not say.

        Args:
            settings: as JSON has them.
        """
        if settings.get("logvar") is True:
            return "e^-u, u the student's log-variance"
        kinds = (c.__dict__.get("kind") for c in cls.__mro__ if c.__module__.startswith(_HERE))
        ours = next((kind for kind in kinds if kind), "")
        return "" if cls.kind == ours else cls.kind

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def capturable(self) -> bool:
        """See `RunConfig.capturable`: but for noise levels or weights of a file of one's own."""
        own = ("generator_sigma", "student_sigma", "generator_weight", "student_weight")
        return all(getattr(type(self), name) is getattr(StudentConfig, name) for name in own)

    @property
    def first_whole_step(self) -> int:
        """See `RunConfig.first_whole_step`: where the student has learned alone for long enough."""
        told = 0.0 if self.discriminator is None else self.starts[0]
        return math.ceil(max(self.student_first_kimg, told) * 1000 / self.batch)

    @property
    def planned_step(self) -> int:
        """See `RunConfig.planned_step`: where the generator meets a discriminator, if there is one."""
        told = 0 if self.discriminator is None else math.ceil(self.starts[1] * 1000 / self.batch)
        return max(self.first_whole_step, told)

    def student_lr_at(self, update: int) -> float:
        """The student's learning rate in its 0-based `update`."""
        return self.scheduled(self.student_lr or self.lr, update, times=self.student_updates)

    def changing_rates(self, step: int) -> Mapping[str, float]:
        """See `RunConfig.changing_rates`: of the student that of its last update in the step."""
        if not self.lr_changes:
            return {}
        return {"student_lr": self.student_lr_at((step + 1) * self.student_updates - 1), **super().changing_rates(step)}

    def seeds_once(self, *, phased: bool) -> bool:
        """See `RunConfig.seeds_once`: where one evaluation of the generator is trained, and made once."""
        again = phased and self.passes_through
        return not again and not self.samples_have_dropout and (self.steps == 1 or self.gradient == "last")

    @property
    def levels(self) -> tuple[float, ...]:
        """The generator's noise levels, resolved."""
        return self.sigmas or few_step_sigmas(self.steps, self.sigma_init)

    def completed(self, network: NetworkConfig) -> Self:
        """See `Distillation.completed`: with the noise levels."""
        if self.logvar and not network.logvar_channels:
            why = "its file has none" if network.is_edm2 else f"which a network of {network.family} has not"
            raise ValueError(f"logvar needs a teacher with a log-variance, {why}: leave it out")
        for width in (self.width, self.student_width):
            generator_network(network, width)
        told_apart = discriminator.decided(self.discriminator, self.discriminator_weights, network)
        return replace(self, sigmas=self.levels, **told_apart)

    @classmethod
    def nfe_of(cls, settings: Mapping[str, Any]) -> int | None:
        """See `Distillation.nfe_of`."""
        return settings.get("steps")

    @classmethod
    def implied(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Distillation.implied`: the noise levels."""
        steps, level = settings.get("steps"), number(settings.get("sigma_init"))
        if isinstance(steps, int) and steps > 0 and 0 < level < math.inf:
            return {"sigmas": list(few_step_sigmas(steps, level))}
        return {}

    @classmethod
    def _weighting(cls, settings: Mapping[str, Any]) -> str:
        words = cls.weighting_words(settings)
        return (f", weighting: {words}" if words else "") + variation_words(settings)

    @classmethod
    def _as_published(cls, settings: Mapping[str, Any]) -> bool:
        """Whether nothing is otherwise for which no figure is published."""
        return settings.get("logvar") is not True and not variation_rows(settings)
