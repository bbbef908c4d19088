"""Denoiser matching: distribution matching distillation [DMD2, Yin et al. 2024] at every D.

A student S learns to denoise the generator's samples, as in inverse Poisson flow matching. The generator G gets, at its
sample y, the difference of the two denoisers at x = y + noise,

    dL/dy = 2 lambda (S(x) - T(x)),   lambda = 1 / mean|T(x) - y|,

which is the explicit part of inverse Poisson flow matching's gradient, without those that pass back through T and S.

At D = inf, (S - T) / sigma^2 is the difference of the scores of p_G and p*, so that the step descends their
Kullback-Leibler divergence. At finite D it does not: the step is 0 where S = T, p_G = p* among them, and

    d KL(p_G,sigma | p*_sigma) / d sigma = -E <s_G - s_*, S - T> / sigma <= 0     (s the scores of what is noisy)

hold at every D, but S - T is not the difference of the scores, and the step is the gradient of no known divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ipfm.engine.checks import number
from ipfm.engine.config import setting
from ipfm.engine.objectives.base import TEACHER, Passes
from ipfm.engine.objectives.discriminator import CLAMP, Adversary, words_of
from ipfm.engine.objectives.ipfm import InversePoissonFlowMatching
from ipfm.engine.objectives.losses import (
    GeneratorGradient,
    Noisy,
    PredictionWeighting,
    Raw,
    Weighting,
    finite_samples,
    held,
    isolate,
    per_sample,
    reweighted,
)
from ipfm.engine.objectives.phases import mark
from ipfm.engine.objectives.published import Conditions, PaperResult, plain_name
from ipfm.engine.objectives.student_settings import StudentConfig
from ipfm.engine.objectives.variations import variation_name, variation_rows
from ipfm.engine.runtime.wording import counted
from ipfm.models import NetworkConfig

if TYPE_CHECKING:
    from ipfm.engine.objectives.base import Objective

SOURCE = "arXiv 2405.14867"
# Its ImageNet-64 without a discriminator, 410 000 iterations. Adam's weight decay of 0.01 is not in this project.
_IMAGENET = PaperResult(
    2.61,
    None,
    None,
    SOURCE,
    Conditions(
        "imagenet64-adm",
        {
            "student_updates": (5,),
            "sigmas": ([80.0],),
            "batch": (280,),
            "width": (1.0,),
            "student_width": (1.0,),
            "init": ("teacher",),
            "student_init": ("teacher",),
        },
        unknown=("weight decay 0.01 there",),
    ),
)
FWeight = Literal["reverse-kl", "kl", "jensen-shannon", "softened-reverse-kl", "neyman", "hellinger", "jeffreys"]
# Below this mean |T - y| the weight grows no further, as in inverse Poisson flow matching.
SMALLEST_DISTANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class DmdConfig(StudentConfig):
    """Denoiser matching: the generator's gradient is the difference of student and teacher [DMD2 at D = inf]."""

    kind: ClassVar[str] = "dmd"
    planned: ClassVar[Mapping[str, str]] = {
        "student": "Of IPFM and DMD: full, lora, as in --generator. Default: full.",
        "steps": "K: evaluations of the generator. Default: 1.",
        "student_updates": "Student updates per generator update. Default: the objective's, 1 or 5.",
        "discriminator": "Of IPFM and DMD: encoder, with SiDA's term.",
    }
    method: ClassVar[str] = "denoiser matching"
    readings: ClassVar[Mapping[str, str]] = {
        "generator_loss": "generator_loss is the weighted squared distance of student and teacher: it falls to 0 as "
        "they agree, but says nothing of how good the images are; watch the distance.",
        "student_loss": "student_loss is a denoising loss: it falls, then follows the generator.",
    }
    passes_through: ClassVar[bool] = False
    measured: ClassVar[Mapping[str, Mapping[str, Any]]] = {"1 student update": {"student_updates": 1}, "": {}}

    steps: int = 1
    """K: network evaluations of the generator."""
    student_updates: int = setting(5, memory=False)
    """Student updates per generator update; 5 in DMD2. The step is right as far as the student denoises the generator's
    samples."""

    f_weight: FWeight = setting("reverse-kl", memory=False, added=True)
    """With a discriminator: the f-divergence by whose weight h(r), r = p* / p_G as the discriminator sees it, each
    sample's step is multiplied (f-distill); kl is what it has for CIFAR-10. reverse-kl: 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.f_weight not in RATIO_WEIGHTS:
            raise ValueError(f"f-weight must be {', '.join(RATIO_WEIGHTS)}, got {self.f_weight!r}")
        if self.f_weight != "reverse-kl" and self.discriminator is None:
            raise ValueError(f"f-weight {self.f_weight} needs the ratio of densities: give discriminator encoder too")

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
        """See `StudentConfig.gradient_of`: nothing passes back through the two, so that no form matters."""
        return denoiser_difference(
            teacher,
            student,
            y,
            noisy,
            weighting=weighting,
            adversary=adversary,
            ratio_weight=RATIO_WEIGHTS[self.f_weight],
            rescale=rescale,
        )

    @property
    def title_word(self) -> str:
        """See `StudentConfig.title_word`."""
        return f"DMD updates={self.student_updates}"

    @property
    def summary_word(self) -> str:
        """See `StudentConfig.summary_word`."""
        return f"by {self.method}, {counted(self.student_updates, 'student update')} a generator update"

    def objective(self, network: NetworkConfig) -> Objective:
        """See `Distillation.objective`."""
        return DenoiserMatching(self, network)

    def name(self) -> str:
        """See `Distillation.name`."""
        told = "" if self.discriminator is None else f"-{self.discriminator}"
        told += "" if self.f_weight == "reverse-kl" else f"-{self.f_weight}"
        return f"dmd{self.student_updates}-K{self.steps}" + "-logvar" * self.logvar + variation_name(self) + told

    @classmethod
    def figures(cls, dataset: str, settings: Mapping[str, Any]) -> Mapping[float, PaperResult]:
        """See `Distillation.figures`: that of one step without a discriminator."""
        one = settings.get("steps") == 1 and cls._as_published(settings) and cls.kind == DmdConfig.kind
        one = one and settings.get("discriminator") is None
        return {math.inf: _IMAGENET} if one and plain_name(dataset) == "imagenet64cond" else {}

    @classmethod
    def report_title(cls, settings: Mapping[str, Any], at: str) -> str:
        """See `Distillation.report_title`."""
        return f"Denoiser matching{at}, {counted(settings.get('steps'), 'step')}"

    @classmethod
    def report_words(cls, settings: Mapping[str, Any]) -> str:
        """See `Distillation.report_words`."""
        # Not with another term or weight beside, nor with a guided teacher.
        alone = settings.get("discriminator") is None and settings.get("guidance") is None
        infinite = number(settings.get("D")) == math.inf
        case = ", which at D = ∞ descends a Kullback-Leibler divergence (DMD)" if infinite and alone else ""
        updates = counted(settings.get("student_updates"), "student update")
        return f"{cls.method}{case} ({updates} a generator update){cls._weighting(settings)}{cls._told(settings)}"

    @classmethod
    def info_words(cls, settings: Mapping[str, Any]) -> str:
        """See `Distillation.info_words`."""
        updates, steps = (counted(settings.get(n, 1), w) for n, w in _COUNTED)
        return f"{cls.method}, {updates} a generator update, {steps}{cls._weighting(settings)}{cls._told(settings)}"

    @staticmethod
    def _told(settings: Mapping[str, Any]) -> str:
        divergence = DmdConfig._f_weight(settings)
        weighed = "" if divergence == "reverse-kl" else f" and the weight of {divergence}"
        return words_of(settings) + weighed

    @staticmethod
    def _f_weight(settings: Mapping[str, Any]) -> str:
        """The divergence of a folder's settings, reverse-kl where they are damaged."""
        divergence = str(settings.get("f_weight"))
        return divergence if divergence in RATIO_WEIGHTS else "reverse-kl"

    @classmethod
    def card_words(cls) -> str:
        """See `Distillation.card_words`."""
        return f"{cls.method} (at D = ∞ [DMD2](https://arxiv.org/abs/2405.14867) without a discriminator)"

    @classmethod
    def card_rows(cls, settings: Mapping[str, Any]) -> Mapping[str, object]:
        """See `Distillation.card_rows`."""
        return {
            "student updates a generator update": settings.get("student_updates"),
            "weighting": cls.weighting_words(settings) or None,
            "discriminator": settings.get("discriminator"),
            "weight of an f-divergence": None if cls._f_weight(settings) == "reverse-kl" else cls._f_weight(settings),
            **variation_rows(settings),
        }


RatioWeight = Callable[[Tensor], Tensor]
# h(r) = r^2 f''(r) of an f-divergence, r = p* / p_G, by its value at r = 1 [f-distill].
RATIO_WEIGHTS: Mapping[str, RatioWeight | None] = {
    "reverse-kl": None,
    "kl": lambda r: r,
    "jensen-shannon": lambda r: 2 * r / (1 + r),
    "softened-reverse-kl": lambda r: 2 / (1 + r),
    "neyman": lambda r: 1 / r,
    "hellinger": torch.sqrt,
    "jeffreys": lambda r: (1 + r) / 2,
}
# Beyond these the ratio is taken to be the end.
RATIOS = (0.1, 20.0)


@torch.no_grad()
def density_ratio(logits: Tensor) -> Tensor:
    """p*(x) / p_G(x) (B,) as the discriminator sees it: exp of the mean logit, within `RATIOS`."""
    return logits.flatten(1).mean(1).clamp(-CLAMP, CLAMP).exp().clamp(*RATIOS)


_COUNTED = (("student_updates", "student update"), ("steps", "step"))


class DenoiserMatching(InversePoissonFlowMatching):
    """See `Objective`; the networks and the student's step are those of inverse Poisson flow matching.

    The generator's step needs no backward pass through teacher or student, so that the two run without a graph, and
    phased is joint.
    """

    def passes(self, *, phased: bool) -> Mapping[str, Passes]:
        """See `Objective.forwards`: teacher and student once each in the generator's update."""
        updates, said = self.config.student_updates, super().passes(phased=False)
        told, further = said["student"], said["generator"]
        # There and back to the input through the encoder alone.
        more = 2 * (self.config.discriminator is not None)
        return {
            "student": Passes.of(
                updates + 1,
                to_weights=updates,
                encoder=told.encoder + more,
                encoder_again=told.encoder_again + more // 2,
            ),
            "generator": further,
            TEACHER: Passes.of(1),
        }


@torch.no_grad()
def denoiser_difference(
    teacher: Raw,
    student: Raw,
    y: Tensor,
    noisy: Noisy,
    *,
    weighting: Weighting | PredictionWeighting | None = None,
    adversary: Adversary | None = None,
    ratio_weight: RatioWeight | None = None,
    rescale: bool = False,
) -> GeneratorGradient:
    """2 lambda (S(x) - T(x)), lambda = 1 / mean|T(x) - y|, and the loss lambda |S(x) - T(x)|^2.

    By 1 / (2 N), N the number of elements, it is the gradient of DMD2, which has no floor below mean|T - y| and takes
    the mean over the elements: Adam does not see the factor. The difference of the two is c_out (F_S - F_T), so that
    c_skip x does not cancel. Nothing passes back through the networks.

    A sample counts when y, x, both predictions, its loss and its gradient are finite.

    Args:
        teacher: a network without randomness (in eval mode).
        student: another one, of the same preconditioning.
        y: (B, C, H, W) generated samples, without a graph.
        noisy: their perturbation, without a graph.
        weighting: what to take instead of the weight lambda; None takes lambda. A sample whose weight is not finite
            does not count.
        adversary: a discriminator's term is a part of the gradient, and passes back through the student's encoder.
        ratio_weight: factor of the difference by the ratio p* / p_G that the discriminator sees; None is 1.
        rescale: as of `losses.generator_gradient`, of the term alone.
    """
    noisy = isolate(noisy)
    mark("generator: student")
    seen = None if adversary is None else adversary.seen(noisy.scaled, noisy.sigma)
    s = held(student(noisy.scaled, noisy.sigma)).to(y.dtype)
    mark("generator: teacher")
    t = held(teacher(noisy.scaled, noisy.sigma)).to(y.dtype)
    c_skip, c_out = (per_sample(c, y).to(y.dtype) for c in (noisy.c_skip, noisy.c_out))
    away = (c_skip * noisy.x + c_out * t - y).abs().flatten(1).mean(1)
    weight = 1 / away.clamp(min=SMALLEST_DISTANCE)
    difference = c_out * (s - t)
    square = difference.square().flatten(1).sum(1)
    valid = torch.isfinite(weight * square) & torch.isfinite(away)
    weight = weight.masked_fill(~valid, 0.0)
    own = reweighted(weighting, noisy, (t, s), weight)
    if own is not None:
        weight = own.weight
    share = weight
    if seen is not None and ratio_weight is not None:
        share = weight * ratio_weight(density_ratio(seen.logits)).to(weight.dtype)
    gradient = difference * per_sample(2 * share, y)
    loss = share * square
    if seen is not None and adversary is not None:
        term = adversary.gradient(seen, weight, rescale=rescale)
        gradient = gradient + per_sample(noisy.c_in, y).to(y.dtype) * term.to(y.dtype)
    valid = valid & torch.isfinite(loss) & finite_samples(gradient)
    return GeneratorGradient(
        gradient.masked_fill(per_sample(~valid, y), 0.0),
        loss.masked_fill(~valid, 0.0),
        weight.masked_fill(~valid, 0.0),
        valid,
    )
