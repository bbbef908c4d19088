"""What a run measures its samples against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ipfm.engine.metrics import Features, FrechetResult, Statistics, evaluate_frechet
from ipfm.engine.zero import World


@dataclass(frozen=True)
class Evaluation:
    """Fréchet distance of `images` samples to `reference` on `features`.

    `batch`: images one process draws at a time. `seed`: of the samples; fixed, so that evaluations compare.
    """

    features: Features
    reference: Statistics
    images: int
    batch: int = 512
    seed: int = 10_000

    def measure(self, sample: Callable[[int, int], Tensor], world: World) -> FrechetResult:
        """Distance of the images that `sample(first index, count)` draws, shared out over the processes."""
        return evaluate_frechet(
            sample,
            self.images,
            self.features,
            self.reference,
            batch=self.batch,
            rank=world.rank,
            world_size=world.size,
        )
