"""Memory of a run's first steps, measured by phase and held against the prediction."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch

from ipfm.engine.memory.live import LiveBytes
from ipfm.engine.memory.process import Sampler, driver_bytes, largest_resident_bytes, resident_bytes
from ipfm.engine.memory.series import Series
from ipfm.engine.memory.timeline import Span, Timeline
from ipfm.engine.objectives.phases import Phase, listening
from ipfm.engine.runtime.wording import size
from ipfm.models.atomic_files import atomic_write

# How far a measurement may lie from the prediction, relative to it, without a warning.
TOLERANCE = 0.1
STATE = "permanent state"


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes of one process at the peak of a phase; a prediction that was not given, and what is not known, is None."""

    phase: str
    """A `Phase`, or "permanent state": what is there before a step's first phase."""
    measured_bytes: int
    """Everything alive at the peak, the permanent state included: of tensors on the CPU, of the allocator on a GPU."""
    predicted_bytes: int | None
    difference_percent: float | None
    """(measured - predicted) / predicted."""
    rss_bytes: int
    """The process's resident memory on the host."""
    reserved_bytes: int | None
    """What PyTorch's allocator took from the GPU for it."""
    nvml_bytes: int | None
    """What the GPU's driver counts at the end of the phase, see `driver_bytes`."""


class MemoryProfiler:
    """Measures the memory of training steps by phase (`ipfm.engine.objectives.phases`).

    On the CPU live tensors are counted, and the process's resident memory is sampled; on a GPU the allocator's own
    statistics are read, whose peaks are reset at each phase. It costs time only within `step`.

        profiler = MemoryProfiler(device, plan.phases, plan.state)
        with profiler.step():
            task.iteration(0)
        warnings = profiler.finish(folder)

    Args:
        device: where the training runs.
        predicted: for each phase the bytes at its peak above the permanent state, or None.
        state_predicted: bytes of the permanent state: weights of all networks, masters, optimiser state, EMA; None.
        other: bytes on `device` that the prediction does not speak of, such as a data set's; they are subtracted.
    """

    def __init__(
        self,
        device: torch.device,
        predicted: Mapping[Phase, int] | None = None,
        state_predicted: int | None = None,
        *,
        other: int = 0,
    ) -> None:
        self.device = device
        self._predicted, self._state_predicted, self._other = predicted or {}, state_predicted, other
        self._peaks: dict[str, PhaseMemory] = {}
        self._phase: Phase = "between steps"
        self._live: LiveBytes | None = None
        self._spans: list[Span] = []
        self._timeline: Timeline | None = None
        self._largest = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure the training step that runs in this block.

        A GPU's statistics of the largest memory allocated and reserved start anew in it.
        """
        host = Sampler(resident_bytes)
        gpu = Sampler(lambda: torch.cuda.memory_allocated(self.device)) if self._cuda else None
        before = largest_resident_bytes()
        self._spans, self._phase = [], "between steps"
        with ExitStack() as stack:
            stack.enter_context(host)
            if gpu is not None:
                stack.enter_context(gpu)
                torch.cuda.reset_peak_memory_stats(self.device)
            else:
                self._live = LiveBytes(timeline=True)
                self._live.adopt(self.device)
                stack.enter_context(self._live)

            def begin(phase: Phase) -> None:
                self._end_phase(host)
                self._begin_phase(phase, host)

            stack.enter_context(listening(begin))
            yield
            self._end_phase(host)
            points = gpu.readings if gpu is not None else self._live.timeline if self._live is not None else Series()
        largest = largest_resident_bytes()
        # The kernel's account misses nothing that falls between two samples, where it speaks of this step.
        self._largest = max(self._largest, largest if largest > before else 0)
        self._live = None
        self._timeline = Timeline(
            tuple((time, value - self._other) for time, value in points.points),
            host.readings.points,
            tuple(self._spans),
        )

    @property
    def rows(self) -> list[PhaseMemory]:
        """The permanent state, then the phases in their order, each at the largest of the measured steps."""
        return list(self._peaks.values())

    @property
    def state_bytes(self) -> int:
        """What was there before a step's first phase.

        Raises:
            ValueError: no step was measured.
        """
        self._top()
        return self._peaks[STATE].measured_bytes

    @property
    def peak_bytes(self) -> int:
        """The largest `measured_bytes`.

        Raises:
            ValueError: no step was measured.
        """
        return self._top().measured_bytes

    @property
    def peak_phase(self) -> str:
        """The phase of `peak_bytes`.

        Raises:
            ValueError: no step was measured.
        """
        return self._top().phase

    @property
    def peak_rss_bytes(self) -> int:
        """The largest resident memory of the process within the measured steps; 0 where the system does not say."""
        return max(self._largest, *(row.rss_bytes for row in self._peaks.values()), 0)

    def warnings(self) -> list[str]:
        """A line for each phase that differs from its prediction by more than 10 %."""
        return [
            f"memory of {row.phase!r}: {size(row.measured_bytes)} measured, {size(row.predicted_bytes)} predicted "
            f"({row.difference_percent:+.1f} %)"
            for row in self.rows
            if row.phase != STATE and row.predicted_bytes is not None and row.difference_percent is not None
            if abs(row.difference_percent) > 100 * TOLERANCE
        ]

    def finish(self, folder: Path | str | None) -> list[str]:
        """Write memory/memory.csv, memory.md and timeline.png (of the last step measured) into `folder`.

        Args:
            folder: of the run; None, on all processes but the first, writes nothing.

        Returns:
            `warnings`.
        """
        if folder is not None and self._peaks:
            path = Path(folder) / "memory"
            path.mkdir(parents=True, exist_ok=True)
            text = io.StringIO(newline="")
            writer = csv.writer(text)
            writer.writerow(field.name for field in fields(PhaseMemory))
            writer.writerows(astuple(row) for row in self.rows)
            with atomic_write(path / "memory.csv") as file:
                file.write(text.getvalue().encode())
            with atomic_write(path / "memory.md") as file:
                file.write(self._report().encode())
            self.plot(path / "timeline.png", "memory of a step")
        return self.warnings()

    def plot(self, path: Path | str, title: str = "") -> None:
        """Write the last measured step as a PNG, see `Timeline.plot`.

        Raises:
            ValueError: no step was measured.
        """
        self._top()
        assert self._timeline is not None
        totals = {row.phase: row.predicted_bytes for row in self.rows if row.predicted_bytes is not None}
        self._timeline.plot(path, state=self.state_bytes, predicted=totals, title=title)

    # -- measuring --------------------------------------------------------------------------------------------------

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    def _now(self) -> int:
        if self._live is not None:
            return self._live.current - self._other
        return torch.cuda.memory_allocated(self.device) - self._other

    def _begin_phase(self, phase: Phase, host: Sampler) -> None:
        if self._phase == "between steps":
            reserved = torch.cuda.memory_reserved(self.device) if self._cuda else None
            self._note(STATE, self._now(), self._state_predicted, resident_bytes(), reserved)
        if self._live is not None:
            self._live.reset_peak()
        else:
            torch.cuda.reset_peak_memory_stats(self.device)
        host.take_peak()
        self._phase = phase
        self._spans.append(Span.starting(phase))

    def _end_phase(self, host: Sampler) -> None:
        """The phase that ran until now; what comes before a step's first one is not noted."""
        if self._phase == "between steps":
            return
        self._spans[-1] = self._spans[-1].ended()
        if self._live is not None:
            peak, reserved = self._live.peak, None
        else:
            peak = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
        above = self._predicted.get(self._phase)
        known = above is not None and self._state_predicted is not None
        predicted = self._state_predicted + above if known else None  # type: ignore[operator]
        self._note(self._phase, peak - self._other, predicted, host.take_peak(), reserved)

    def _note(self, phase: str, measured: int, predicted: int | None, rss: int, reserved: int | None) -> None:
        old = self._peaks.get(phase)
        nvml = driver_bytes(self.device)
        if old is not None:
            measured, rss = max(measured, old.measured_bytes), max(rss, old.rss_bytes)
            reserved, nvml = _larger(reserved, old.reserved_bytes), _larger(nvml, old.nvml_bytes)
        difference = round(100 * (measured - predicted) / predicted, 2) if predicted else None
        self._peaks[phase] = PhaseMemory(phase, measured, predicted, difference, rss, reserved, nvml)

    def _top(self) -> PhaseMemory:
        if not self._peaks:
            raise ValueError("no step was measured: run one within `step`, with phases that are announced")
        return max(self._peaks.values(), key=lambda row: row.measured_bytes)

    def _report(self) -> str:
        kind = "the allocator's statistics" if self._cuda else "live tensors"
        lines = [
            f"Memory by phase, of {kind} on {self.device.type}, permanent state included",
            "",
            "| phase | predicted | measured | difference |",
            "|---|---|---|---|",
        ]
        for row in self.rows:
            predicted = "" if row.predicted_bytes is None else size(row.predicted_bytes)
            difference = "" if row.difference_percent is None else f"{row.difference_percent:+.1f} %"
            lines.append(f"| {row.phase} | {predicted} | {size(row.measured_bytes)} | {difference} |")
        lines += ["", f"Resident memory of the process at most {size(self.peak_rss_bytes)}"]
        driver = max((row.nvml_bytes for row in self.rows if row.nvml_bytes is not None), default=None)
        if driver is not None:
            lines += ["", f"The driver counts at most {size(driver)} on the GPU, its context and libraries included"]
        return "\n".join([*lines, *(f"\nwarning: {line}" for line in self.warnings())]) + "\n"


def _larger(a: int | None, b: int | None) -> int | None:
    return a if b is None else b if a is None else max(a, b)
