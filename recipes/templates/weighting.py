"""A weighting of my own: IPFM whose generator weighs each noise level by a power of it. Change it into your idea.

    deepspeed example.py --teacher TEACHER --data my-images.zip --power 1
    IPFM_OBJECTIVES=example.py ipfm plan --objective example --model TEACHER

What else a weighting may say otherwise: docs/own-objective.md of ipfm. Other settings are those of distill_ipfm.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ipfm.engine import DistillConfig
from ipfm.engine.experiments import run_command
from ipfm.engine.objectives import setting
from ipfm.recipes import distill_ipfm


@dataclass(frozen=True, kw_only=True)
class ExampleConfig(DistillConfig):
    """The settings of IPFM and this one, an option of the recipe, whose docstring is its help."""

    kind: ClassVar[str] = "example"

    power: float = setting(0.5, memory=False)
    """Exponent of the noise level in the generator's weight; 0 is the method as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.power):
            raise ValueError(f"power must be finite, got {self.power}")

    def generator_weight(self, sigma: Tensor, weight: Tensor) -> Tensor:
        """(B,) instead of the method's `weight` (B,), lambda = 1 / mean |T - y|; sigma (B,). No gradient flows here."""
        return weight * sigma**self.power

    def name(self) -> str:
        return f"{super().name()}-power{self.power:g}"

    @classmethod
    def weighting_words(cls, settings: Mapping[str, Any]) -> str:
        """What reports say after "weighting: ", of settings as JSON has them."""
        return f"lambda sigma^{settings.get('power')}"


RECIPE = distill_ipfm.RECIPE.by(ExampleConfig, __file__, __doc__)
main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
