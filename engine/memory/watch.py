"""The first steps of a run under the memory profiler, for --profile-memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ipfm.engine.distributed.world import World
from ipfm.engine.memory.plan import MemoryPlan
from ipfm.engine.memory.profile import MemoryProfiler
from ipfm.engine.objectives.step_metrics import StepMetrics
from ipfm.engine.runtime.errors import described


class Profiled(Protocol):
    """What is watched."""

    world: World
    other_bytes: int
    """Bytes on the device that the plan does not speak of, such as a data set's; only known if steps are profiled."""

    def iteration(self, step: int) -> StepMetrics:
        """One step of training."""
        ...

    def memory_plan(self) -> MemoryPlan:
        """What its steps should need."""
        ...


class MemoryWatch:
    """Runs the steps of `task`, and measures the first ones.

    Args:
        task: what is trained.
        steps: how many steps are measured; 0 measures none.
        folder: the run folder; memory/ in it gets the table and the picture, from the first process.
        tell: takes a line for whoever watches the run.
        first: the first step that is measured.
    """

    def __init__(self, task: Profiled, steps: int, folder: Path, tell: Callable[[str], None], first: int = 0) -> None:
        self._task, self._left, self._folder, self._tell, self._first = task, steps, folder, tell, first
        self._profiler: MemoryProfiler | None = None

    def iteration(self, step: int) -> StepMetrics:
        """One step of training, measured if it is among the first; what fails about the measuring is a warning."""
        if self._left and self._profiler is None and step >= self._first:
            with self._without():
                plan = self._task.memory_plan()
                device = self._task.world.device
                self._profiler = MemoryProfiler(device, plan.phases, plan.state, other=self._task.other_bytes)
        if self._profiler is None:
            return self._task.iteration(step)
        with self._profiler.step():
            measured = self._task.iteration(step)
        self._left -= 1
        if self._left == 0:
            with self._without():
                warnings = self._profiler.finish(self._folder if self._task.world.is_main else None)
                self._tell(f"memory of a step, predicted and measured: {self._folder / 'memory' / 'memory.md'}")
                for line in warnings:
                    self._tell(f"warning: {line}")
            self._profiler = None
        return measured

    @contextmanager
    def _without(self) -> Iterator[None]:
        """The training goes on without the profile where the block fails."""
        try:
            yield
        except Exception as error:
            self._left, self._profiler = 0, None
            self._tell(f"warning: no profile of memory: {described(error)}")
