"""A stored model as it is exported: a function of tensors, and the facts that its users need."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipfm.engine.commands.export.functions import Denoising, OneStep, TrajectoryEnd
from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.objectives import OBJECTIVES
from ipfm.engine.runtime.json_output import plain
from ipfm.engine.sampling.samplers import draw_prior, usual_range
from ipfm.engine.sampling.seeds import SampleNoise
from ipfm.engine.sampling.stored_model import NO_CLAIM, Claim, facts_file, generator_levels, load_denoiser
from ipfm.engine.sampling.trajectory import trajectory_network
from ipfm.models import Precond
from ipfm.models.facts import GeneratorFacts, ModelFacts

FORMAT, VERSION = "ipfm-export", 1


@dataclass(frozen=True, eq=False)
class ExportedNetwork:
    """What is exported of a model.

    Attributes:
        net: the network, on the CPU.
        function: what the graph computes of it.
        levels: noise levels of a generator's evaluations, the ends of its trajectory, or those between which a teacher
            is sampled.
        about: what the model says of itself.
    """

    net: Precond
    function: OneStep | TrajectoryEnd | Denoising
    levels: tuple[float, ...] | NoiseLevels
    about: ModelFacts

    @property
    def is_generator(self) -> bool:
        """Whether it makes images of latents, and is no teacher."""
        return isinstance(self.about, GeneratorFacts)

    @property
    def nfe(self) -> int | None:
        """Network evaluations an image of a generator; None for a teacher, whose sampler decides."""
        if not self.is_generator:
            return None
        return 1 if isinstance(self.levels, NoiseLevels) else len(self.levels)

    @property
    def distilled(self) -> tuple[str | None, Mapping[str, object]]:
        """By what a generator was distilled, and further rows of a card; of an objective not known here, as it says."""
        if not isinstance(self.about, GeneratorFacts):
            return None, {}
        objective, settings = OBJECTIVES.of_generator(self.about)
        if objective is not None:
            return objective.card_words(), objective.card_rows(settings)
        words, rows = (self.about.about.get(name) for name in ("card", "card_rows"))
        return words if isinstance(words, str) else self.about.objective, rows if isinstance(rows, dict) else {}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the function's arguments."""
        names = ("x", "sigma") if isinstance(self.function, Denoising) else ("x",)
        return (*names, "class_labels") if self.net.label_dim else names

    @property
    def output(self) -> str:
        """Name of its result."""
        return "denoised" if isinstance(self.function, Denoising) else "images"

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader needs to use the graph, in JSON values; an infinite number is text: "inf"."""
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "task": "generator" if self.is_generator else "teacher",
            "inputs": list(self.inputs),
            "output": self.output,
            "image_shape": list(self.net.config.image_shape),
            "label_dim": self.net.label_dim,
            "D": self.net.D,
            "prior": "student-t" if math.isfinite(self.net.D) else "gaussian",
            **self._levels(),
            "torch": torch.__version__,
            "training": self.about.to_json(),
        }
        return {name: plain(value) for name, value in facts.items()}

    def facts_json(self) -> str:
        """`facts` as a text."""
        return json.dumps(self.facts, indent=1, allow_nan=False)

    def fresh(self, n: int, seed: int) -> dict[str, Tensor]:
        """Inputs of n images, float32: latents of `seed` at the levels that the function is used at, labels drawn."""
        index = torch.arange(n)
        sigma = self._sigmas(n)
        found = {"x": sigma.view(-1, 1, 1, 1) * draw_prior(self.net, index, 1.0, self.net.D, seed=seed)}
        if "sigma" in self.inputs:
            found["sigma"] = sigma
        labels = SampleNoise(((seed, index),)).labels(self.net.label_dim)
        return found if labels is None else found | {"class_labels": labels}

    def _levels(self) -> dict[str, Any]:
        if isinstance(self.levels, NoiseLevels):
            ends = {"sigma_max": self.levels.sigma_max, "sigma_min": self.levels.sigma_min}
            return {"sigmas": [self.levels.sigma_max], "parametrisation": "trajectory", **ends}
        if self.is_generator:
            return {"sigmas": list(self.levels), "parametrisation": "denoiser"}
        return {"parametrisation": "denoiser", "sigma_max": self.levels[0], "sigma_min": self.levels[-1]}

    def _sigmas(self, n: int) -> Tensor:
        if isinstance(self.levels, NoiseLevels):
            return torch.full((n,), self.levels.sigma_max)
        return torch.tensor([self.levels[i % len(self.levels)] for i in range(n)])


def open_network(path: Path, *, D: float | None, claim: Claim = NO_CLAIM) -> ExportedNetwork:
    """The model at `path`, a model folder or a checkpoint, as it is exported.

    A generator of one evaluation becomes a function of latents, one of several evaluations and a teacher the denoiser.

    Args:
        path: the model.
        D: auxiliary dimensions, for a checkpoint that does not say them.
        claim: whether it is a generator or a teacher, likewise.

    Raises:
        ValueError: there is no such model, D or the claim contradicts it, or its stored noise levels are unusable.
    """
    # On the CPU: operations that exist there exist wherever the graph goes.
    net, facts = load_denoiser(path, D=D, claim=claim)
    if not isinstance(facts, GeneratorFacts):
        low, high = usual_range(net)
        return ExportedNetwork(net, Denoising(net), (high, low), facts)
    levels = generator_levels(net, facts, facts_file(path))
    if isinstance(levels, NoiseLevels):
        return ExportedNetwork(net, TrajectoryEnd(trajectory_network(net), levels), levels, facts)
    return ExportedNetwork(net, OneStep(net, levels[0]) if len(levels) == 1 else Denoising(net), levels, facts)
