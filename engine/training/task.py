"""What the training loop trains, where it stands, and what may end it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ipfm.engine.distributed.world import World
from ipfm.engine.distributed.zero import TrainedNetwork
from ipfm.engine.evaluation.metrics import FrechetResult, Metric
from ipfm.engine.memory import MemoryPlan
from ipfm.engine.objectives.step_metrics import StepMetrics
from ipfm.engine.runtime.errors import Failed, TrainingFailed


class NotFinite(TrainingFailed):
    """Too many steps, of the `step` ones done, had non-finite samples or gradients."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class StepFailed(Failed):
    """A step cannot be made, for a reason that every process knows, and nothing has been changed: one line says it."""


class Task(Protocol):
    """What the loop trains."""

    title: str
    world: World
    other_bytes: int
    """Bytes on the device that `memory_plan` does not speak of, such as a data set's; only known if steps are
    profiled."""
    first_step: int
    """Where a run without a checkpoint starts: 0, or the steps done before by other means."""

    @property
    def networks(self) -> Mapping[str, TrainedNetwork]:
        """What is saved in a checkpoint, by name."""
        ...

    @property
    def metrics(self) -> Sequence[Metric]:
        """What an evaluation measures; the first decides which one is the best. Empty where nothing is measured."""
        ...

    def iteration(self, step: int) -> StepMetrics:
        """One step of training; `step` counts from 0."""
        ...

    def memory_plan(self) -> MemoryPlan:
        """The predicted memory of a step."""
        ...

    def refresh(self, which: str | None = None) -> None:
        """Bring the averaged network up to date, on every process.

        Args:
            which: which of several averages it is of, by its name; None takes the first one.
        """
        ...

    def evaluate(self) -> FrechetResult | None:
        """The metrics of the averaged network's samples; None where nothing is measured."""
        ...

    def average_said(self, step: int) -> Mapping[str, Any] | None:
        """What a checkpoint of `step` says of the average in it, see `describe_average`; None says nothing."""
        ...

    def stored(
        self, step: int, measured: Mapping[str, Any], *, copy: bool, halved: bool = False
    ) -> Callable[[Path], None]:
        """What stores the averaged network of the last `refresh` in a model folder, on the first process.

        Args:
            step: steps done.
            measured: what an evaluation found of it; empty if there was none.
            copy: take a copy, so that it may be stored later and in any thread.
            halved: in fp16.
        """
        ...

    def picture(self, count: int, seed: int) -> Tensor:
        """Images of the averaged network from fixed latents, (count, C, H, W) in [-1, 1]."""
        ...


@dataclass
class Progress:
    """Where the loop stands; also what it leaves behind."""

    step: int
    last: FrechetResult | None = None
    """What was measured of the average that is exported."""
    averages: Mapping[str, FrechetResult] = field(default_factory=dict)
    """What was measured of each of several averages."""
    bad_steps: int = 0
    bad_networks: Counter[str] = field(default_factory=Counter)
    saved_at: int = -1
    pending: list[tuple[int, StepMetrics]] = field(default_factory=list)
