"""Inverse Poisson flow matching, and SiD, which is its case D = inf: what they train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ipfm.engine.config import DistillConfig
from ipfm.engine.networks import generator_network, start_of
from ipfm.engine.objective import Role, Setting
from ipfm.engine.report import PaperResult, paper_results
from ipfm.engine.sampling import sample_generator
from ipfm.engine.steps import DistillSteps
from ipfm.models import NetworkConfig, Precond

# Forward passes, or as much arithmetic, of an image in a student update, in a generator update, what the phased form
# adds, and activation checkpointing for each of the networks that are differentiated.
STUDENT_FORWARDS, GENERATOR_FORWARDS, PHASED_FORWARDS = 4, 7, 2


class InversePoissonFlowMatching:
    """See `Objective`. A student learns to denoise the generator's samples, the generator to make the student agree
    with the teacher [IPFM eq. 21; SiD eq. 23].

    Args:
        config: settings, D among them.
        network: the teacher's architecture, as it is trained.
    """

    def __init__(self, config: DistillConfig, network: NetworkConfig) -> None:
        self.config, self.network = config, network
        self.D = network.D if config.D is None else config.D
        self.title = f"distil D={self.D:g} alpha={config.alpha:g} K={config.steps}"
        self.manner = f"at alpha = {config.alpha:g} and {config.steps} step{'s' * (config.steps > 1)}"
        self.roles: tuple[Role, ...] = (
            Role(
                "student",
                generator_network(network, config.student_width),
                start_of(config.student_init, config.student_width),
                config.student_lr or config.lr,
                config.student_beta1,
            ),
            Role(
                "generator",
                generator_network(network, config.width),
                start_of(config.init, config.width),
                config.lr,
                config.generator_beta1,
                averaged=True,
            ),
        )
        self.generator = "generator"
        self.nfe = config.steps

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Objective.facts`."""
        return {"sigmas": list(self.config.levels), "alpha": self.config.alpha}

    def steps(self, setting: Setting) -> DistillSteps:
        """See `Objective.steps`."""
        return DistillSteps(self.config, setting, self.network)

    def forwards(self, *, phased: bool, checkpointed: bool) -> int:
        """See `Objective.forwards`."""
        updates, K = self.config.student_updates, self.config.steps
        # Each further evaluation of the generator costs a forward pass; in the generator's update, where the gradient
        # passes through it, one more, and a backward.
        further = 4 if self.config.gradient == "all" else 1
        student = STUDENT_FORWARDS + K - 1 + checkpointed
        generator = GENERATOR_FORWARDS + further * (K - 1) + phased * PHASED_FORWARDS + checkpointed * (2 + K)
        return updates * student + generator

    def sample(self, net: Precond, first: int, count: int, *, seed: int) -> Tensor:
        """See `Objective.sample`."""
        return sample_generator(net, first, count, D=self.D, sigmas=self.config.levels, seed=seed)

    def published(self, dataset: str) -> Mapping[float, PaperResult]:
        """See `Objective.published`."""
        return paper_results(dataset, self.config.alpha, self.config.steps)
