"""Inverse Poisson flow matching, and SiD, which is its case D = inf: what they train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from ipfm.engine.checks import is_number, number
from ipfm.engine.config import setting
from ipfm.engine.objectives import discriminator
from ipfm.engine.objectives.base import TEACHER, Objective, Passes, Role, StepContext, forwards_of, lora_title
from ipfm.engine.objectives.discriminator import Adversary
from ipfm.engine.objectives.initial_networks import generator_network, initial_weights
from ipfm.engine.objectives.losses import (
    GeneratorGradient,
    Noisy,
    PredictionWeighting,
    Raw,
    Weighting,
    generator_gradient,
)
from ipfm.engine.objectives.published import (
    PaperResult,
    discriminator_results,
    paper_results,
    real_data_results,
)
from ipfm.engine.objectives.real_data import NO_REAL_DATA, RealWeights, decided, real_weights, weights_said
from ipfm.engine.objectives.student_settings import StudentConfig
from ipfm.engine.objectives.student_steps import DistillSteps
from ipfm.engine.objectives.variations import variation_name, variation_rows
from ipfm.engine.runtime.wording import counted
from ipfm.engine.sampling.batches import sample_generator
from ipfm.models import NetworkConfig, Precond


class InversePoissonFlowMatching:
    """See `Objective`; with a student, which learns to denoise the generator's samples.

    The generator learns to make the student agree with the teacher [IPFM eq. 21, regularised eq. 28; SiD eq. 23].

    Args:
        config: settings, D among them.
        network: the teacher's architecture, as it is trained.
    """

    def __init__(self, config: StudentConfig, network: NetworkConfig) -> None:
        self.config, self.network = config, network
        self.D = network.D if config.D is None else config.D
        weighting = type(config).weighting_words(replace(config, logvar=False).to_json())
        self.title = f"distil D={self.D:g} {config.title_word} K={config.steps}" + f" {weighting}" * bool(weighting)
        self.title += " logvar" * config.logvar + lora_title(config)
        self.title += "".join(f", {words}" for words in variation_rows(config.to_json()).values())
        self.summary = f"{config.summary_word} and {counted(config.steps, 'step')}"
        if config.weights != NO_REAL_DATA:
            self.title += f" real={config.weights.a:g},{config.weights.b:g}"
            self.summary += f", with real data by {config.weights}"
        if config.discriminator is not None:
            self.title += f" discriminator={config.discriminator}"
            self.summary += discriminator.words_of({"discriminator": config.discriminator})
        self.roles: tuple[Role, ...] = (
            Role(
                "student",
                generator_network(network, config.student_width, logvar=config.logvar),
                initial_weights(config.student_init, config.student_width),
                config.student_lr or config.lr,
                config.student_beta1,
                followed=config.student_ema is not None,
                lora=config.lora_of("student"),
            ),
            Role(
                "generator",
                generator_network(network, config.width),
                initial_weights(config.init, config.width),
                config.lr,
                config.generator_beta1,
                averaged=True,
                lora=config.lora_of("generator"),
            ),
        )
        self.generator = "generator"
        self.nfe = config.steps

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Objective.facts`."""
        return {"sigmas": list(self.config.levels), **self.config.further_facts}

    def steps(self, context: StepContext) -> DistillSteps:
        """See `Objective.steps`."""
        return DistillSteps(self.config, context, self.network)

    def forwards(self, *, phased: bool, checkpointed: bool) -> int:
        """See `Objective.forwards`."""
        return forwards_of(self.passes(phased=phased), checkpointed=checkpointed)

    def passes(self, *, phased: bool) -> Mapping[str, Passes]:
        """See `Objective.forwards`: of the student's updates, and of the generator's, in which all three take part."""
        updates, K = self.config.student_updates, self.config.steps
        through = K if self.config.gradient == "all" else 1
        both = self.config.weights != NO_REAL_DATA
        halves = updates * (1 + both)
        # Of real images the discriminator needs the encoder alone.
        encoder = updates if self.config.discriminator is not None and not both else 0
        # Each further evaluation of the generator costs a forward pass; in the generator's update, where the gradient
        # passes through it, one more, and a backward.
        samples, trained = K * updates, K + through - 1 + phased
        return {
            "student": Passes.of(halves + 1, to_input=1, to_weights=halves, encoder=3 * encoder, encoder_again=encoder),
            "generator": Passes.of(samples + trained, to_weights=through),
            TEACHER: Passes.of(1 + phased, to_input=1),
        }

    def passes_at_first(self) -> Mapping[str, Passes]:
        """`passes` of a step before `RunConfig.first_whole_step`: the student's updates alone."""
        updates, K = self.config.student_updates, self.config.steps
        both, told = self.config.weights != NO_REAL_DATA, self.config.discriminator is not None
        halves, encoder = updates * (1 + both), updates * (told and not both)
        student = Passes.of(halves, to_weights=halves, encoder=3 * encoder, encoder_again=encoder)
        return {"student": student, "generator": Passes.of(K * updates)}

    def sample(self, net: Precond, first: int, count: int, *, seed: int) -> Tensor:
        """See `Objective.sample`."""
        return sample_generator(net, first, count, D=self.D, sigmas=self.config.levels, seed=seed)


# What the loss kernel takes.
ALPHA_LIMIT = 1e6


@dataclass(frozen=True, kw_only=True)
class DistillConfig(StudentConfig):
    """Distillation of a teacher into a K-step generator by inverse Poisson flow matching [IPFM, algorithm 1]."""

    kind: ClassVar[str] = "ipfm"
    planned: ClassVar[Mapping[str, str]] = {
        "student": "Of IPFM and DMD: full, lora, as in --generator. Default: full.",
        "steps": "K: evaluations of the generator. Default: 1.",
        "student_updates": "Student updates per generator update. Default: the objective's, 1 or 5.",
        "real_weights": "Of IPFM: with real images in the student's loss, such as 0.92 0.94.",
        "discriminator": "Of IPFM and DMD: encoder, with SiDA's term.",
    }
    plan_example: ClassVar[str] = "ipfm plan --model cifar_ipfm --gpus 1 8 --price A100=1.5 H100=2.5"
    method: ClassVar[str] = "inverse Poisson flow matching"
    measured: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {},
        "real images": {"real_weights": (0.92, 0.94)},
        "discriminator": {"discriminator": "encoder"},
    }
    readings: ClassVar[Mapping[str, str]] = {
        "generator_loss": "generator_loss is a difference of two denoising losses: it oscillates about zero and says "
        "little; watch the distance.",
        "student_loss": "student_loss is a denoising loss: it falls, then follows the generator.",
    }

    alpha: float = setting(1.0, memory=False)
    """Regularisation, in SiD's convention: 0.5 is the pure IPFM objective, 1.0 the paper's recommendation."""
    real_weights: tuple[float, float] | None = setting(None, added=True)
    """a b: the share of the generator's samples in the student's loss, and the factor of their targets. Default with
    --real-data: 0.92 0.94, with classes 0.98 0.96 (RealUID's); 1 1 is without real images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.alpha) and abs(self.alpha) <= ALPHA_LIMIT):
            raise ValueError(f"alpha must be a number in [-{ALPHA_LIMIT:g}, {ALPHA_LIMIT:g}], got {self.alpha}")
        weights = real_weights(self.real_weights)
        object.__setattr__(self, "real_weights", None if weights is None else tuple(weights))

    @property
    def weights(self) -> RealWeights:
        """The weights (a, b) of the student's loss; (1, 1) without real images."""
        return NO_REAL_DATA if self.real_weights is None else RealWeights(*self.real_weights)

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
        """See `StudentConfig.gradient_of` [IPFM, eq. 28]."""
        return generator_gradient(
            teacher,
            student if adversary is None else adversary.student,
            y,
            noisy,
            alpha=self.alpha,
            phased=phased,
            rescale=rescale,
            weighting=weighting,
            real_weights=self.weights,
            beside=None if adversary is None else adversary.beside,
        )

    @property
    def title_word(self) -> str:
        """See `StudentConfig.title_word`."""
        return f"alpha={self.alpha:g}"

    @property
    def summary_word(self) -> str:
        """See `StudentConfig.summary_word`."""
        return f"at alpha = {self.alpha:g}"

    @property
    def further_facts(self) -> Mapping[str, Any]:
        """See `StudentConfig.further_facts`."""
        return {"alpha": self.alpha}

    def completed(self, network: NetworkConfig) -> Self:
        """See `Distillation.completed`: with the noise levels, and the weights of real images where there are any."""
        # Beside a discriminator, which needs images itself, the term is one that is asked for.
        images = self.real_data is not None and self.discriminator is None
        weights = decided(real_weights(self.real_weights), network, images=images)
        return replace(super().completed(network), real_weights=weights)

    def objective(self, network: NetworkConfig) -> Objective:
        """See `Distillation.objective`."""
        return InversePoissonFlowMatching(self, network)

    def name(self) -> str:
        """See `Distillation.name`."""
        # Before the teacher is known, the weights by default are not.
        real = "-real" if self.real_weights is None and self.real_data is not None else ""
        real = f"-real{self.weights.a:g}-{self.weights.b:g}" if self.weights != NO_REAL_DATA else real
        told = "" if self.discriminator is None else f"-{self.discriminator}"
        real = "" if told and self.weights == NO_REAL_DATA else real
        return f"alpha{self.alpha:g}-K{self.steps}" + "-logvar" * self.logvar + real + told + variation_name(self)

    @classmethod
    def recognises(cls, settings: Mapping[str, Any]) -> bool:
        """See `Distillation.recognises`."""
        return "alpha" in settings

    @classmethod
    def figures(cls, dataset: str, settings: Mapping[str, Any]) -> Mapping[float, PaperResult]:
        """See `Distillation.figures`: none for another weighting."""
        if cls.kind != DistillConfig.kind or not cls._as_published(settings):
            return {}
        steps, weights = settings.get("steps"), weights_said(settings)
        if settings.get("discriminator") is not None:
            return {} if weights else discriminator_results(dataset, number(settings.get("alpha")), steps)
        if weights is not None:
            return real_data_results(dataset, (weights.a, weights.b), steps)
        return paper_results(dataset, number(settings.get("alpha")), steps) if isinstance(steps, int) else {}

    @classmethod
    def report_title(cls, settings: Mapping[str, Any], at: str) -> str:
        """See `Distillation.report_title`."""
        return f"Distillation{at}, α = {number(settings.get('alpha')):g}, {counted(settings.get('steps'), 'step')}"

    @classmethod
    def report_words(cls, settings: Mapping[str, Any]) -> str:
        """See `Distillation.report_words`."""
        alpha = number(settings.get("alpha"))
        pure = ", the pure objective" if alpha == 0.5 else ""
        case = ", which at D = ∞ is SiD" if number(settings.get("D")) == math.inf else ""
        return f"{cls.method}{case} (α = {alpha:g}{pure}){cls._weighting(settings)}{cls._real(settings)}"

    @classmethod
    def info_words(cls, settings: Mapping[str, Any]) -> str:
        """See `Distillation.info_words`."""
        steps = counted(settings.get("steps", 1), "step")
        words = f"{cls._weighting(settings)}{cls._real(settings)}"
        return f"{cls.method}, alpha = {number(settings.get('alpha')):g}, {steps}{words}"

    @classmethod
    def card_words(cls) -> str:
        """See `Distillation.card_words`."""
        return f"{cls.method} ([arXiv 2509.22454](https://arxiv.org/abs/2509.22454))"

    @classmethod
    def card_rows(cls, settings: Mapping[str, Any]) -> Mapping[str, object]:
        """See `Distillation.card_rows`."""
        return {
            "α (0.5 is the pure objective)": settings.get("alpha"),
            "weighting": cls.weighting_words(settings) or None,
            "real data in the student's loss, a and b": weights_said(settings),
            "discriminator": settings.get("discriminator"),
            **variation_rows(settings),
        }

    @staticmethod
    def _real(settings: Mapping[str, Any]) -> str:
        weights = weights_said(settings)
        real = "" if weights is None else f", with real data by {weights}"
        return real + discriminator.words_of(settings)
