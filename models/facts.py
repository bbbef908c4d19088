"""What a stored network says of itself beside its architecture: what it is for, how it is drawn from, how it was made.

The facts are the object "extra" in the config.json of a model folder. `read_facts` makes `TeacherFacts` or
`GeneratorFacts` of it; their `to_json` is that object again, every key and its place included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelFacts(ABC):
    """What is said of a teacher and of a generator alike; None or empty where it is not said, or is damaged."""

    dataset: str | None = None
    """Name of the data that the network, or the teacher of the generator, was trained on; "" where it is not known."""
    D: float | str | None = None
    """As its writer put it: a number, or "inf". What counts is the network's own configuration."""
    optimizer_steps: int | None = None
    """Of the training that made the weights."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of that training, as JSON values; their key is "config"."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """What an evaluation in the training found of these very weights: metric, distance, images. Only of networks that a
    run keeps along the way."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """The file that it was converted from: its name, format and SHA-256, and the network taken."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """What this version does not know, and values that are not what they should be, by their keys."""
    order: tuple[str, ...] = ()
    """The keys that come first in the JSON."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values, but for infinite numbers, which `save_model` takes care of."""

    def _in_order(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` and `others` by key, those of `order` first; without what is not said."""
        said = {key: value for key, value in values.items() if value not in (None, {}) or key in self.order}
        found = {**said, **self.others}
        return {key: found[key] for key in dict.fromkeys((*self.order, *found)) if key in found}


@dataclass(frozen=True, kw_only=True)
class TeacherFacts(ModelFacts):
    """A denoiser that is sampled with a sampler of the caller's choice, and distilled from."""

    task: str | None = "teacher"
    """None where the file says nothing, as one that `save_model` wrote without facts."""

    def to_json(self) -> dict[str, Any]:
        """See `ModelFacts.to_json`."""
        return self._in_order(
            {
                "task": self.task,
                "dataset": self.dataset,
                "D": self.D,
                "optimizer_steps": self.optimizer_steps,
                "config": self.settings,
                "measured": self.measured,
                "source": self.source,
            }
        )


@dataclass(frozen=True, kw_only=True)
class GeneratorFacts(ModelFacts):
    """A generator, which is drawn from in its own way: at its few noise levels, or along a trajectory.

    No value is checked here: `ipfm.engine.sampling.stored_model.generator_levels` does that.
    """

    objective: str | None = None
    """Kind of the objective that it was distilled by; older generators do not say it."""
    sigmas: Sequence[float] | None = None
    """Noise levels of its evaluations, the highest first."""
    parametrisation: str | None = None
    """ "trajectory": one evaluation leads from sigma_max to sigma_min; None: a denoiser, evaluated at `sigmas`."""
    sigma_max: float | None = None
    sigma_min: float | None = None
    alpha: float | None = None
    """Of inverse Poisson flow matching."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What an objective from outside this project said of itself, as text for readers that do not know it."""

    @property
    def is_trajectory(self) -> bool:
        """Whether one evaluation leads from sigma_max to sigma_min."""
        return self.parametrisation == "trajectory"

    def to_json(self) -> dict[str, Any]:
        """See `ModelFacts.to_json`."""
        return self._in_order(
            {
                "task": "generator",
                "dataset": self.dataset,
                "objective": self.objective,
                "D": self.D,
                "parametrisation": self.parametrisation,
                "sigmas": None if self.sigmas is None else list(self.sigmas),
                "sigma_max": self.sigma_max,
                "sigma_min": self.sigma_min,
                "alpha": self.alpha,
                "about": self.about,
                "optimizer_steps": self.optimizer_steps,
                "config": self.settings,
                "measured": self.measured,
                "source": self.source,
            }
        )


def read_facts(stored: Mapping[str, Any]) -> TeacherFacts | GeneratorFacts:
    """The facts of a stored network; nothing is refused.

    Args:
        stored: what its file says, JSON values with infinite numbers as numbers.

    Returns:
        A generator's facts if "task" is "generator", else a teacher's.
    """
    values = _Values(stored)
    task, dataset = values.take("task", str), values.take("dataset", str)
    D = values.take("D", str) if isinstance(stored.get("D"), str) else values.number("D")
    steps = values.take("optimizer_steps", int)
    settings, source = values.take("config", dict) or {}, values.take("source", dict) or {}
    measured = values.take("measured", dict) or {}
    if task != "generator":
        return TeacherFacts(
            task=task,
            dataset=dataset,
            D=D,
            optimizer_steps=steps,
            settings=settings,
            measured=measured,
            source=source,
            others=values.left,
            order=tuple(stored),
        )
    return GeneratorFacts(
        dataset=dataset,
        D=D,
        objective=values.take("objective", str),
        sigmas=values.take("sigmas", list),
        parametrisation=values.take("parametrisation", str),
        sigma_max=values.number("sigma_max"),
        sigma_min=values.number("sigma_min"),
        alpha=values.number("alpha"),
        about=values.take("about", dict) or {},
        optimizer_steps=steps,
        settings=settings,
        measured=measured,
        source=source,
        others=values.left,
        order=tuple(stored),
    )


class _Values:
    """Takes values out of an object by key, if they are of the right kind; `left`: the others."""

    def __init__(self, stored: Mapping[str, Any]) -> None:
        self.left = dict(stored)

    def take(self, key: str, kind: type[T]) -> T | None:
        value = self.left.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            return None
        del self.left[key]
        return value

    def number(self, key: str) -> float | None:
        whole = self.take(key, int)
        return self.take(key, float) if whole is None else whole
