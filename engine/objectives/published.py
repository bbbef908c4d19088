"""Figures of the papers, looked up by exactly the setting that they are of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class PaperResult(NamedTuple):
    """A published FID.

    Attributes:
        fid: of 50 000 images, the minimum of three.
        teacher_fid: of its teacher, where it is known.
        teacher_nfe: network evaluations an image of its teacher, where they are known.
        source: the paper.
    """

    fid: float
    teacher_fid: float | None
    teacher_nfe: int | None
    source: str = "arXiv 2509.22454"

    def __str__(self) -> str:
        return f"FID {self.fid:g} ({self.source})"


class PaperSetting(NamedTuple):
    """What a published figure is of.

    Attributes:
        dataset: "cifar10" or "ffhq64", both unconditional.
        D: in (0, ∞].
        alpha: SiD's; ½ is pure IPFM, which the paper's table 1 prints as 0.0.
        steps: of the generator.
    """

    dataset: str
    D: float
    alpha: float
    steps: int


def _published(
    dataset: str, D: float, alpha: float, teacher: tuple[float, int], *fids: float
) -> dict[PaperSetting, PaperResult]:
    """Results at 1, 2, 4 … steps."""
    return {PaperSetting(dataset, D, alpha, 2**i): PaperResult(fid, *teacher) for i, fid in enumerate(fids)}


PAPER_RESULTS: Mapping[PaperSetting, PaperResult] = {
    **_published("cifar10", 128, 0.5, (1.92, 35), 5.38, 2.68, 2.08),
    **_published("cifar10", 128, 1.0, (1.92, 35), 3.31, 2.12, 1.75),
    **_published("cifar10", 2048, 0.5, (1.91, 35), 5.47, 3.05, 2.02),
    **_published("cifar10", 2048, 1.0, (1.91, 35), 3.20, 2.15, 1.82),
    **_published("cifar10", math.inf, 0.5, (1.98, 35), 5.57, 2.86, 2.13),
    **_published("cifar10", math.inf, 1.0, (1.98, 35), 3.47, 2.15, 1.86),
    **_published("ffhq64", 128, 0.5, (2.43, 79), 3.42, 2.12),
    **_published("ffhq64", 128, 1.0, (2.43, 79), 2.40, 1.72),
    **_published("ffhq64", math.inf, 0.5, (2.53, 79), 3.91, 2.04),
    **_published("ffhq64", math.inf, 1.0, (2.53, 79), 2.60, 1.70),
}


def paper_result(dataset: str, D: float, alpha: float, steps: int) -> PaperResult | None:
    """The figure of arXiv 2509.22454 for exactly this setting; None where none was published.

    `dataset` is compared without case, hyphens and underscores: "CIFAR-10" finds "cifar10".
    """
    return PAPER_RESULTS.get(PaperSetting(plain_name(dataset), D, alpha, steps))


def paper_results(dataset: str, alpha: float, steps: int) -> dict[float, PaperResult]:
    """The figures of arXiv 2509.22454 with this `alpha` and these `steps` by D, rising; names as above."""
    name = plain_name(dataset)
    found = {s.D: r for s, r in PAPER_RESULTS.items() if (s.dataset, s.alpha, s.steps) == (name, alpha, steps)}
    return dict(sorted(found.items()))


def plain_name(dataset: str) -> str:
    """A data set's name as tables of figures have it: without case, hyphens and underscores."""
    return dataset.lower().replace("-", "").replace("_", "")
