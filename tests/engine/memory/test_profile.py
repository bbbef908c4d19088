"""The memory profiler: phases of steps whose memory is known, warnings, files, and the engine's own steps."""

from __future__ import annotations

import csv
import gc
import json
import os
import sys
import threading
import types
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import launch
import pytest
import torch

from ipfm.engine import DistillConfig
from ipfm.engine.distributed.world import World
from ipfm.engine.memory import plan_memory
from ipfm.engine.memory.live import bytes_in_use
from ipfm.engine.memory.process import Sampler, driver_bytes, largest_resident_bytes
from ipfm.engine.memory.profile import STATE, MemoryProfiler, PhaseMemory
from ipfm.engine.memory.timeline import Span, Timeline
from ipfm.engine.memory.watch import MemoryWatch
from ipfm.engine.objectives.base import StepContext
from ipfm.engine.objectives.phases import mark
from ipfm.engine.objectives.student_steps import DistillSteps
from ipfm.kernels import AdamEMA
from ipfm.models import EDMPrecond, NetworkConfig

CPU = torch.device("cpu")
MEGA = 2**20
PNG = b"\x89PNG\r\n\x1a\n"


class Toy:
    """A step of two phases, whose largest temporaries are `first` and `second` bytes."""

    def __init__(self, first: int, second: int) -> None:
        self.sizes = first, second

    def iteration(self) -> None:
        torch.empty(8 * MEGA, dtype=torch.uint8)  # before the first phase: belongs to none
        mark("teacher: forward and backward")
        torch.empty(self.sizes[0], dtype=torch.uint8)
        mark("teacher: optimiser")
        torch.empty(self.sizes[1], dtype=torch.uint8)


def measure(profiler: MemoryProfiler, *steps: Toy) -> dict[str, PhaseMemory]:
    gc.collect()  # what earlier tests have left must not go in between
    for toy in steps:
        with profiler.step():
            toy.iteration()
    return {row.phase: row for row in profiler.rows}


def test_each_phase_has_its_own_peak():
    profiler = MemoryProfiler(CPU)
    rows = measure(profiler, Toy(3 * MEGA, 2 * MEGA), Toy(MEGA, 5 * MEGA))
    assert list(rows) == [STATE, "teacher: forward and backward", "teacher: optimiser"]
    state = rows[STATE].measured_bytes
    assert rows["teacher: forward and backward"].measured_bytes - state == 3 * MEGA  # of the first step
    assert rows["teacher: optimiser"].measured_bytes - state == 5 * MEGA  # of the second
    assert (profiler.peak_bytes, profiler.peak_phase) == (state + 5 * MEGA, "teacher: optimiser")
    assert profiler.state_bytes == state
    assert all(row.reserved_bytes is None and row.nvml_bytes is None for row in rows.values())
    # Some kernels count the largest one a little behind.
    assert 0 < rows[STATE].rss_bytes <= profiler.peak_rss_bytes <= 1.02 * largest_resident_bytes()
    assert profiler.warnings() == []


def test_the_state_is_what_is_there_before_the_step():
    before = measure(MemoryProfiler(CPU), Toy(1, 1))[STATE].measured_bytes
    kept = torch.ones(3 * MEGA, dtype=torch.uint8)
    assert measure(MemoryProfiler(CPU), Toy(1, 1))[STATE].measured_bytes - before == 3 * MEGA
    other = measure(MemoryProfiler(CPU, other=kept.numel()), Toy(4 * MEGA, 1))
    assert other[STATE].measured_bytes == before
    assert other["teacher: forward and backward"].measured_bytes == before + 4 * MEGA


def test_nothing_is_measured_outside_of_the_step():
    profiler = MemoryProfiler(CPU)
    measure(profiler, Toy(MEGA, MEGA))
    rows = profiler.rows
    Toy(50 * MEGA, 50 * MEGA).iteration()
    assert profiler.rows == rows
    assert not [t for t in threading.enumerate() if t.name == "memory sampler"]


def test_an_error_in_the_step_passes_through():
    profiler = MemoryProfiler(CPU)
    with pytest.raises(ZeroDivisionError), profiler.step():
        mark("teacher: optimiser")
        _ = 1 / 0
    assert not [t for t in threading.enumerate() if t.name == "memory sampler"]
    torch.empty(4)
    assert measure(profiler, Toy(MEGA, 2 * MEGA))["teacher: optimiser"].measured_bytes >= 2 * MEGA


def test_a_difference_of_more_than_a_tenth_warns(tmp_path: Path):
    state = measure(MemoryProfiler(CPU), Toy(1, 1))[STATE].measured_bytes
    a, b = "teacher: forward and backward", "teacher: optimiser"
    mebi = state + 100 * MEGA

    def profile(first: float, second: float) -> MemoryProfiler:
        predicted = {a: round(first * mebi) - state, b: round(second * mebi) - state}
        profiler = MemoryProfiler(CPU, predicted, state)
        measure(profiler, Toy(100 * MEGA, 100 * MEGA))
        return profiler

    assert profile(1.08, 0.93).finish(None) == []
    warnings = profile(0.8, 1.25).finish(tmp_path)
    assert [line.split(":")[0] for line in warnings] == ["memory of 'teacher", "memory of 'teacher"]
    assert a in warnings[0] and "(+25.0 %)" in warnings[0]
    assert b in warnings[1] and "(-20.0 %)" in warnings[1]
    assert [line.startswith("warning: ") for line in (tmp_path / "memory" / "memory.md").open()].count(True) == 2
    (only,) = profile(1.0, 0.8).warnings()
    assert b in only


def test_the_files(tmp_path: Path):
    state = measure(MemoryProfiler(CPU), Toy(1, 1))[STATE].measured_bytes
    profiler = MemoryProfiler(CPU, {"teacher: optimiser": 20 * MEGA}, state)
    measure(profiler, Toy(MEGA, 20 * MEGA))
    assert profiler.finish(tmp_path) == []
    folder = tmp_path / "memory"
    assert {path.name for path in folder.iterdir()} == {"memory.csv", "memory.md", "timeline.png"}
    assert (folder / "timeline.png").read_bytes().startswith(PNG)
    with (folder / "memory.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:5] == ["phase", "measured_bytes", "predicted_bytes", "difference_percent", "rss_bytes"]
    assert [row["phase"] for row in rows] == [STATE, "teacher: forward and backward", "teacher: optimiser"]
    assert [row["predicted_bytes"] for row in rows] == [str(state), "", str(state + 20 * MEGA)]
    assert int(rows[2]["measured_bytes"]) == pytest.approx(state + 20 * MEGA, rel=0.01)
    assert abs(float(rows[2]["difference_percent"])) < 1
    report = (folder / "memory.md").read_text()
    assert "| teacher: optimiser |" in report and "warning" not in report


def test_without_a_step_there_is_nothing(tmp_path: Path):
    profiler = MemoryProfiler(CPU)
    assert profiler.finish(tmp_path) == [] and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"^no step was measured"):
        _ = profiler.peak_bytes
    with pytest.raises(ValueError, match=r"^no step was measured"):
        profiler.plot(tmp_path / "picture.png")
    with pytest.raises(ValueError, match=r"^no phase was measured"):
        Timeline((), (), ()).plot(tmp_path / "picture.png", state=1, predicted={})


def test_a_timeline_without_points(tmp_path: Path):
    """A step may be over before anything was sampled."""
    spans = (Span("teacher: optimiser", 1.0, 2.0),)
    Timeline((), (), spans).plot(tmp_path / "picture.png", state=0, predicted={})
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


def test_resident_memory_grows_with_pages_in_use(tmp_path: Path) -> None:
    """In a process of its own: what earlier tests have left in this one may go back to the system at any time."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not say how much memory a process has")
    launch.run_workers("resident_pages.py", 1, {"bytes": 64 * MEGA, "out": str(tmp_path / "said.json")})
    said = json.loads((tmp_path / "said.json").read_text())
    assert 60 * MEGA < said["peak"] - said["before"] < 80 * MEGA
    assert 60 * MEGA < said["peak"] - said["after"] < 80 * MEGA
    assert 1.02 * said["largest"] >= said["peak"]


class Nvml(types.ModuleType):
    """A driver that knows one GPU, and the processes that it is said to know; or that refuses a question."""

    class NVMLError(Exception): ...

    def __init__(self, *processes: tuple[int, int | None], refuses: str = "", fault: str = "") -> None:
        super().__init__("pynvml")
        self.processes, self.refuses, self.fault, self.open = processes, refuses, fault, 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name == self.refuses:
            raise self.NVMLError("Not Supported")
        if name.startswith("nvml") and name == self.fault:
            raise AttributeError(name)
        return super().__getattribute__(name)

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        assert uuid == "GPU-12ab"
        return 3

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[types.SimpleNamespace]:
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(used=900 + handle)


@pytest.mark.parametrize(
    ("driver", "counted"),
    [
        pytest.param(Nvml((1, 70), (os.getpid(), 80)), 80, id="this-process"),
        pytest.param(Nvml((1, 70), (os.getpid(), None)), 903, id="this-process-unmeasured"),
        pytest.param(Nvml((1, 70)), 903, id="a-container"),
        pytest.param(Nvml(refuses="nvmlDeviceGetComputeRunningProcesses"), 903, id="no-list"),
        pytest.param(Nvml(refuses="nvmlDeviceGetHandleByUUID"), None, id="a-slice"),
        pytest.param(Nvml(refuses="nvmlInit"), None, id="no-driver"),
    ],
)
def test_what_the_driver_counts(driver: Nvml, counted: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="12ab"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert driver_bytes(torch.device("cuda")) == counted
    assert driver.open == 0


def test_of_a_cpu_no_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # to import it would fail, and be told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert driver_bytes(CPU) is None


def test_a_fault_in_asking_the_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends no run."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="12ab"))
    for driver, said in ((Nvml(fault="nvmlDeviceGetMemoryInfo"), "nvmlDeviceGetMemoryInfo"), (None, "pynvml")):
        monkeypatch.setitem(sys.modules, "pynvml", driver)
        with pytest.warns(UserWarning, match=f"what the GPU's driver counts is not known: .*{said}"):
            assert driver_bytes(torch.device("cuda")) is None


def test_the_sampler_starts_anew_and_is_bounded(monkeypatch):
    monkeypatch.setattr("ipfm.engine.memory.series.POINTS", 12)
    value = [7]
    sampler = Sampler(lambda: value[0])  # not entered: it reads when it is asked
    assert sampler.take_peak() == 7
    value[0] = 3
    assert sampler.take_peak() == 7  # what was there when the last peak was taken
    assert sampler.take_peak() == 3
    for _ in range(100):
        sampler.take_peak()
    assert len(sampler.readings) <= 12


# -- the engine's steps ------------------------------------------------------------------------------------------------

SMALL = NetworkConfig(
    img_resolution=16, img_channels=2, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,),
    dropout=0.0,
)  # fmt: skip


class Trained:
    """A network with its optimiser, as at stage 0."""

    loss_scale = 1.0

    def __init__(self, ema: bool) -> None:
        self.module = EDMPrecond(SMALL)
        self.optimizer = AdamEMA(self.module.parameters(), lr=1e-4, eps=1e-3, ema=ema)
        self.optimizer.create_state()

    def __call__(self, *args, **keywords):
        return self.module(*args, **keywords)

    def backward(self, loss):
        loss.backward()

    def step(self, *, lr, ema_decay=0.0, grad_scale=None):
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.optimizer.applied

    @contextmanager
    def frozen(self):
        self.module.requires_grad_(False)
        yield self.module
        self.module.requires_grad_(True)


@pytest.mark.parametrize("backward", ["joint", "phased"])
def test_a_distillation_holds_what_was_planned(backward: str, tmp_path: Path):
    """All phases of a real iteration, state and gradients included."""
    batch = 16
    plan = plan_memory(SMALL, micro_batch=batch, backward=backward)
    outside = measure(MemoryProfiler(CPU), Toy(1, 1))[STATE].measured_bytes
    config = DistillConfig(batch=batch, max_steps=1, D=128.0, zero=0, precision="fp32")
    context = StepContext(
        {"student": Trained(ema=False), "generator": Trained(ema=True)},
        EDMPrecond(SMALL).eval().requires_grad_(False),
        config.laid_out(D=128.0, stage=0, micro_batch=batch, phased=backward == "phased", checkpointed=False),
        World(0, 1, CPU),
    )
    steps = DistillSteps(config, context, SMALL)
    profiler = MemoryProfiler(CPU, plan.phases, plan.state, other=outside)
    with profiler.step():
        steps.iteration(0)
    rows = {row.phase: row for row in profiler.rows}
    assert set(plan.phases) == set(rows) - {STATE} and len(plan.phases) == 8
    assert rows[STATE].measured_bytes == pytest.approx(plan.state, rel=0.01)
    assert profiler.finish(tmp_path) == []
    assert abs(profiler.peak_bytes / plan.peak - 1) < 0.05
    assert profiler.peak_bytes > 2 * plan.state


class Watched(Toy):
    """A task of the loop, with `other_bytes` of images beside it."""

    def __init__(self, predicted: int, other_bytes: int) -> None:
        super().__init__(2 * MEGA, MEGA)
        self.world = World(0, 1, CPU)
        self.predicted, self.other_bytes = predicted, other_bytes
        self.steps: list[int] = []

    def iteration(self, step: int) -> int:
        super().iteration()
        self.steps.append(step)
        return step

    def memory_plan(self):
        plan = plan_memory(SMALL, micro_batch=1)
        phases = {"teacher: forward and backward": self.predicted, "teacher: optimiser": MEGA}
        return replace(plan, phases=phases, parts=replace(plan.parts, teacher=0, weights=0, optimizer=0))


@pytest.mark.parametrize(("predicted", "warnings"), [(2 * MEGA, 0), (4 * MEGA, 1)])
def test_the_first_steps_of_a_run_are_watched(tmp_path: Path, predicted: int, warnings: int):
    """As many as were asked for; what was there before, such as images, is not the training's."""
    images = torch.empty(64 * MEGA, dtype=torch.uint8)
    said: list[str] = []
    task = Watched(predicted, bytes_in_use(CPU))
    watch = MemoryWatch(task, 2, tmp_path, said.append)
    assert [watch.iteration(step) for step in (5, 6, 7)] == [5, 6, 7] == task.steps
    table = tmp_path / "memory" / "memory.md"
    assert said[0] == f"memory of a step, predicted and measured: {table}"
    assert [line.startswith("warning: memory of 'teacher: forward") for line in said[1:]] == [True] * warnings
    (state,) = [line for line in table.read_text().splitlines() if "permanent state |" in line]
    assert state.startswith("| permanent state | 0.0 MiB | 0.")
    before = table.stat().st_mtime_ns
    watch.iteration(8)
    assert table.stat().st_mtime_ns == before and images.numel()


def test_nothing_is_watched_unasked(tmp_path: Path):
    task = Watched(0, 0)
    MemoryWatch(task, 0, tmp_path, pytest.fail).iteration(3)
    assert task.steps == [3] and not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_is_asked(tmp_path: Path):
    device = torch.device("cuda")
    profiler = MemoryProfiler(device, {"teacher: optimiser": 20 * MEGA}, torch.cuda.memory_allocated())
    with profiler.step():
        mark("teacher: forward and backward")
        torch.empty(40 * MEGA, dtype=torch.uint8, device=device)
        mark("teacher: optimiser")
        torch.empty(20 * MEGA, dtype=torch.uint8, device=device)
    state, first, second = profiler.rows
    assert first.measured_bytes - state.measured_bytes == 40 * MEGA
    assert second.measured_bytes - state.measured_bytes == 20 * MEGA
    assert first.reserved_bytes is not None and first.reserved_bytes >= 40 * MEGA
    assert first.nvml_bytes is None or first.nvml_bytes >= first.reserved_bytes
    assert profiler.finish(tmp_path) == []
    assert (tmp_path / "memory" / "timeline.png").read_bytes().startswith(PNG)
