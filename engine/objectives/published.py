"""Figures of the papers: what each is of, and in what a run or a model differs from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ipfm.models import NetworkConfig, presets

IPFM, SID, REALUID = "arXiv 2509.22454", "arXiv 2404.04057", "arXiv 2509.22459"
SIDA = "arXiv 2410.14919"

# Settings in words, where their name is not enough.
_WORDS = {
    "init": "first weights",
    "student_init": "first weights of the student",
    "student_width": "width of the student",
    "discriminator_weights": "weights of the discriminator",
    "generator": "weights of the generator",
    "student": "weights of the student",
    "sigmas": "noise levels",
    "gradient": "gradient through evaluations",
    "lpips_side": "side before VGG",
}
UNPRINTED = "its noise levels are not printed"
# What makes an architecture beside its family and the width of its first level.
_LAYOUT = ("channel_mult", "num_blocks", "attn_resolutions", "channel_mult_emb", "img_resolution")


@dataclass(frozen=True)
class Conditions:
    """What a published figure was made with, beside what it is looked up by."""

    network: str
    """Preset of the teacher's architecture."""
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Name of a setting -> its values that agree, as JSON has them; the first is the paper's."""
    required: Mapping[str, str] = field(default_factory=dict)
    """Name of a setting that must have a value, which one is not known -> it in words."""
    unknown: tuple[str, ...] = ()
    """What matters and is not printed, in words."""

    def differences(self, settings: Mapping[str, Any], network: NetworkConfig) -> tuple[str, ...]:
        """What differs, in words; settings that are not known are not compared.

        Args:
            settings: of the distillation, as JSON has them.
            network: the teacher's architecture, or the generator's.
        """
        width = settings.get("width")
        scale = width if isinstance(width, int | float) and width > 0 else 1.0
        found = list(_of_networks(presets.get(self.network), network, scale))
        for name, values in self.settings.items():
            here = _plain(name, settings)
            if name in settings and here not in values:
                found.append(f"{_WORDS.get(name, name)} {_shown(values[0])} there, {_shown(here)} here")
        found += [f"{words} there" for name, words in self.required.items() if settings.get(name, words) is None]
        return (*found, *self.unknown)


class PaperResult(NamedTuple):
    """A published FID.

    Attributes:
        fid: of 50 000 images, the minimum of three.
        teacher_fid: of its teacher, where it is known.
        teacher_nfe: network evaluations an image of its teacher, where they are known.
        source: the paper.
        conditions: what it was made with; None where that is not known.
        differs: what a run or a model has otherwise, in words, see `beside`.
    """

    fid: float
    teacher_fid: float | None
    teacher_nfe: int | None
    source: str = IPFM
    conditions: Conditions | None = None
    differs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"FID {self.fid:g} ({'; '.join((self.source, *self.differs))})"

    def beside(self, settings: Mapping[str, Any], network: NetworkConfig) -> PaperResult:
        """The figure with what differs; arguments as of `Conditions.differences`."""
        known = self.conditions
        return self if known is None else self._replace(differs=known.differences(settings, network))

    def teacher(self, network: NetworkConfig, nfe: int) -> str | None:
        """The teacher's figure as text, with what differs for this network and number of evaluations an image."""
        if self.teacher_fid is None:
            return None
        differs = [] if self.conditions is None else [*_of_networks(presets.get(self.conditions.network), network)]
        if self.teacher_nfe not in (None, nfe):
            differs.append(f"{self.teacher_nfe} evaluations there, {nfe} here")
        return f"FID {self.teacher_fid:g} ({'; '.join((self.source, *differs))})"


class PaperSetting(NamedTuple):
    """What a published figure is looked up by.

    Attributes:
        dataset: "cifar10" or "ffhq64"; unconditional, but for names that end in "cond".
        D: in (0, ∞].
        alpha: SiD's; ½ is pure IPFM, which the paper's table 1 prints as 0.0.
        steps: of the generator.
    """

    dataset: str
    D: float
    alpha: float
    steps: int


# Generator and student from the teacher's weights, of its width.
_FROM_TEACHER: Mapping[str, tuple[Any, ...]] = {
    "width": (1.0,),
    "student_width": (1.0,),
    "init": ("teacher",),
    "student_init": ("teacher",),
    "generator": ("full",),
    "student": ("full",),
}


def _conditions(preset: str, steps: int) -> Conditions:
    if steps == 1:
        return Conditions(preset, {**_FROM_TEACHER, "sigmas": ([2.5],)})
    return Conditions(preset, {**_FROM_TEACHER, "gradient": ("all",)}, unknown=(UNPRINTED,))


def _published(
    dataset: str, preset: str, D: float, alpha: float, teacher: tuple[float, int], *fids: float
) -> dict[PaperSetting, PaperResult]:
    """Results at 1, 2, 4 … steps."""
    return {
        PaperSetting(dataset, D, alpha, 2**i): PaperResult(fid, *teacher, IPFM, _conditions(preset, 2**i))
        for i, fid in enumerate(fids)
    }


_CIFAR, _FFHQ = ("cifar10", "cifar10-ncsnpp"), ("ffhq64", "ffhq64-ddpmpp")

PAPER_RESULTS: Mapping[PaperSetting, PaperResult] = {
    **_published(*_CIFAR, 128, 0.5, (1.92, 35), 5.38, 2.68, 2.08),
    **_published(*_CIFAR, 128, 1.0, (1.92, 35), 3.31, 2.12, 1.75),
    **_published(*_CIFAR, 2048, 0.5, (1.91, 35), 5.47, 3.05, 2.02),
    **_published(*_CIFAR, 2048, 1.0, (1.91, 35), 3.20, 2.15, 1.82),
    **_published(*_CIFAR, math.inf, 0.5, (1.98, 35), 5.57, 2.86, 2.13),
    **_published(*_CIFAR, math.inf, 1.0, (1.98, 35), 3.47, 2.15, 1.86),
    **_published(*_FFHQ, 128, 0.5, (2.43, 79), 3.42, 2.12),
    **_published(*_FFHQ, 128, 1.0, (2.43, 79), 2.40, 1.72),
    **_published(*_FFHQ, math.inf, 0.5, (2.53, 79), 3.91, 2.04),
    **_published(*_FFHQ, math.inf, 1.0, (2.53, 79), 2.60, 1.70),
}
"""Those of IPFM's table 1."""


def _sid(dataset: str, preset: str, alpha: float, fid: float) -> tuple[PaperSetting, PaperResult]:
    result = PaperResult(fid, None, None, SID, _conditions(preset, 1))
    return PaperSetting(dataset, math.inf, alpha, 1), result


SID_RESULTS: Mapping[PaperSetting, PaperResult] = dict(
    (
        _sid("cifar10", "cifar10-ddpmpp", 1.2, 1.923),
        _sid("cifar10cond", "cifar10-ddpmpp-cond", 1.2, 1.710),
        _sid("ffhq64", "ffhq64-ddpmpp", 1.2, 1.550),
        _sid("afhqv264", "afhqv2-64-ddpmpp", 1.0, 1.628),
        _sid("imagenet64cond", "imagenet64-adm", 1.2, 1.524),
    )
)
"""Those of SiD, at the settings of its `*_sid.py` recipes."""

_FLOWS = "a smaller flow matching network there"
# Data set and weights -> FID, of one step; teachers of 100 evaluations.
REALUID_RESULTS: Mapping[tuple[str, tuple[float, float]], PaperResult] = {
    ("cifar10", (0.92, 0.94)): PaperResult(2.23, 3.57, 100, REALUID, None, (_FLOWS,)),
    ("cifar10cond", (0.98, 0.96)): PaperResult(2.02, 5.56, 100, REALUID, None, (_FLOWS,)),
    ("cifar10", (0.92, 0.86)): PaperResult(1.98, 3.57, 100, REALUID, None, ("a finetuned run", _FLOWS)),
    ("cifar10cond", (0.96, 0.92)): PaperResult(1.87, 5.56, 100, REALUID, None, ("a finetuned run", _FLOWS)),
}
"""Those of RealUID for CIFAR-10, by the weights of its two stages."""

_BEST = "the best of SiDA and SiD²A there, which begins with SiD's generator"
# Data set -> preset, FID; of one step.
_SIDA = {
    "cifar10": ("cifar10-ddpmpp", 1.499),
    "cifar10cond": ("cifar10-ddpmpp-cond", 1.396),
    "ffhq64": ("ffhq64-ddpmpp", 1.040),
    "afhqv264": ("afhqv2-64-ddpmpp", 1.276),
    "imagenet64cond": ("imagenet64-adm", 1.110),
}


def discriminator_results(dataset: str, alpha: float, steps: Any) -> dict[float, PaperResult]:
    """The figures with a discriminator from the student's encoder by D; names as of `paper_result`."""
    if plain_name(dataset) not in _SIDA or steps != 1 or alpha not in (1.0, 1.2):
        return {}
    preset, fid = _SIDA[plain_name(dataset)]
    known = _conditions(preset, 1)
    # None where the teacher, by which they are decided, is not known.
    settings = {**known.settings, "discriminator_weights": ([1.0, 2e-4], None)}
    return {math.inf: PaperResult(fid, None, None, SIDA, replace(known, settings=settings, unknown=(_BEST,)))}


_ALL = {**PAPER_RESULTS, **SID_RESULTS}


def real_data_results(dataset: str, weights: tuple[float, float], steps: Any) -> dict[float, PaperResult]:
    """The figures with real data in the student's loss by D, at these weights (a, b); names as of `paper_result`."""
    found = REALUID_RESULTS.get((plain_name(dataset), weights)) if steps == 1 else None
    return {} if found is None else {math.inf: found}


def paper_result(dataset: str, D: float, alpha: float, steps: int) -> PaperResult | None:
    """The figure of IPFM or SiD that was published for this; None where none was.

    `dataset` is compared without case, hyphens and underscores: "CIFAR-10" finds "cifar10".
    """
    return _ALL.get(PaperSetting(plain_name(dataset), D, alpha, steps))


def paper_results(dataset: str, alpha: float, steps: int) -> dict[float, PaperResult]:
    """The figures of IPFM or SiD with this `alpha` and these `steps` by D, rising; names as above."""
    name = plain_name(dataset)
    found = {s.D: r for s, r in _ALL.items() if (s.dataset, s.alpha, s.steps) == (name, alpha, steps)}
    return dict(sorted(found.items()))


def plain_name(dataset: str) -> str:
    """A data set's name as tables of figures have it: without case, hyphens and underscores."""
    return dataset.lower().replace("-", "").replace("_", "")


def _of_networks(there: NetworkConfig, here: NetworkConfig, width: float = 1.0) -> Sequence[str]:
    """How two architectures differ, in words; `here` has `width` times its teacher's channels."""
    found = []
    if there.family != here.family:
        found.append(f"{there.family} there, {here.family} here")
    channels = {here.model_channels, here.model_channels / width}
    if there.model_channels not in channels:
        found.append(f"{there.model_channels} channels there, {here.model_channels} here")
    if any(getattr(there, name) != getattr(here, name) for name in _LAYOUT):
        found.append("other levels or blocks there")
    return found


def _plain(name: str, settings: Mapping[str, Any]) -> Any:
    """A setting as it is compared: first weights that follow from the width are what follows."""
    value = settings.get(name)
    if name in ("init", "student_init") and value == "auto":
        width = settings.get("width" if name == "init" else "student_width")
        return "teacher" if width in (1, None) else "random"
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if value is None:
        return "as it is"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    # A folder's settings may hold anything.
    return text if text.isprintable() and len(text) <= 40 else f"{text[:40]!r}"
