"""The expected duration: whole steps of the run's own are measured, and what is in proportion to the images scaled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ipfm.engine import DistillConfig, Distiller, PidConfig, TeacherConfig
from ipfm.engine.config import Resolved
from ipfm.engine.distributed.world import World
from ipfm.engine.experiments import step_time
from ipfm.engine.experiments.step_time import StepTime
from ipfm.engine.experiments.step_time import step_time as time_of
from ipfm.engine.objectives.cmt import CmtConfig
from ipfm.engine.objectives.initial_networks import trained_config
from ipfm.models import NetworkConfig, Precond, build_network

CPU = torch.device("cpu")
SMALL = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
    dropout=0.0, D=128.0,
)  # fmt: skip
SETTINGS = {
    "ipfm": DistillConfig(D=128.0, batch=8, max_steps=1, precision="fp32", teacher_storage="fp32"),
    "two steps": DistillConfig(D=128.0, batch=8, max_steps=1, precision="fp32", teacher_storage="fp32", steps=2),
    "pid": PidConfig(D=128.0, batch=8, max_steps=1, precision="fp32", teacher_storage="fp32", distance="l2"),
    "cmt": CmtConfig(D=128.0, batch=8, max_steps=1, precision="fp32", teacher_storage="fp32", points=4),
    "teacher": TeacherConfig(D=128.0, batch=8, max_steps=1, precision="fp32"),
}


def form_of(name: str, micro_batch: int) -> Resolved[Any]:
    config = SETTINGS[name]
    if isinstance(config, TeacherConfig):
        return config.laid_out(D=128.0, stage=0, micro_batch=micro_batch, phased=False, checkpointed=False)
    config = config.completed(SMALL)
    return config.laid_out(D=128.0, stage=0, micro_batch=micro_batch, phased=False, checkpointed=False)


class Operations(TorchDispatchMode):
    """Counts operations by their name and the size of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.counted[str(func), out.numel() if isinstance(out, torch.Tensor) else 0] += 1
        return out


def operations(work: Callable[[], object]) -> Counter[tuple[str, int]]:
    with Operations() as mode:
        work()
    return mode.counted


@pytest.mark.quick
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_of_each_kind_is_measured(name: str) -> None:
    assert 0 < time_of(form_of(name, 4), SMALL, 11, CPU).seconds < 60


@pytest.mark.parametrize("name", ["ipfm", "two steps", "pid", "cmt"])
def test_what_is_measured_is_the_step_of_the_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[Counter[tuple[str, int]]] = []

    def counted(step: step_time.Iteration, number: int, device: torch.device) -> tuple[float, float]:
        counts.append(operations(lambda: step(number)))
        return 1.0, 0.0

    monkeypatch.setattr(step_time, "_timed", counted)
    form = form_of(name, 8)
    time_of(form, trained_config(SMALL, 0.0), 11, CPU)
    teacher = build_network(SMALL).eval().requires_grad_(False)
    run = Distiller(replace(form.config, zero=0), teacher, world=World(0, 1, CPU))
    run.iteration(0)
    assert counts[1] == operations(lambda: run.iteration(1)) and counts[1].total() > 100


def test_networks_are_measured_as_the_run_executes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its memory format, with its checkpointing, and compiled; the number of images is found without compiling."""
    made: list[tuple[bool, bool, bool]] = []
    compiled: list[int] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(1))
    monkeypatch.setattr(step_time, "_timed", lambda *_: (1.0, 0.0))

    def forward(net: Precond, count: int, device: torch.device, times: int = 2) -> float:
        made.append((net.channels_last, net.activation_checkpointing, bool(compiled)))
        return 0.5 if compiled else 0.001 * count

    monkeypatch.setattr(step_time, "_forward_seconds", forward)
    form = replace(form_of("ipfm", 8), checkpointed=True)
    form = replace(form, config=replace(form.config, memory_format="channels_last", compile=True))
    found = time_of(form, SMALL, 11, CPU)
    assert found == StepTime(1.0, pass_seconds=0.5 / 8)
    assert made == [(True, True, False)] * 3 + [(True, True, True)] * 2
    assert len(compiled) == 4  # the pass that evaluations take, teacher, student and generator


def sizes_measured(monkeypatch: pytest.MonkeyPatch, forward: float) -> list[int]:
    """Sizes at which a step is measured: `forward` seconds a pass of an image, 10 ms each, 0.2 s for the optimisers."""
    sizes: list[int] = []

    def at(count: int) -> step_time.Iteration:
        sizes.append(count)
        return lambda number: None

    monkeypatch.setattr(step_time, "_distillation", lambda *_: at)
    monkeypatch.setattr(step_time, "_forward_seconds", lambda _, count, *__, **___: forward * count)
    monkeypatch.setattr(step_time, "_timed", lambda *_: (0.01 * sizes[-1], 0.2))
    return sizes


@pytest.mark.parametrize(
    ("forward", "micro_batch", "images"),
    [
        (0.0001, 64, 64),  # a micro-batch is soon done
        (0.0125, 64, 16),  # 10 times as much as a forward pass: 0.125 s for one image, 2 s for 16, 8 s for 64
        (0.02, 64, 4),
        (0.08, 64, 1),
        (0.0001, 32, 32),
    ],
)
def test_images_count_in_proportion_and_the_optimisers_once(
    forward: float, micro_batch: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 images a step: 10 ms each, and 0.2 s for the optimisers."""
    sizes = sizes_measured(monkeypatch, forward)
    form = form_of("ipfm", 8)
    form = replace(form, config=replace(form.config, batch=128), micro_batch=micro_batch)
    found = time_of(form, SMALL, 10, CPU)
    assert found.seconds == pytest.approx(128 * 0.01 + 0.2) and found.how() == "measured"
    assert sizes == [images]


@pytest.mark.parametrize(
    ("forward", "micro_batch", "images"),
    [(0.001, 64, 64), (0.001, 40, 32), (0.001, 8, 16), (0.02, 64, 16)],
)
def test_images_that_belong_together_are_measured_together(
    forward: float, micro_batch: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole trajectories of 16 points: of one image the teacher would follow one all the way."""
    sizes = sizes_measured(monkeypatch, forward)
    form = form_of("cmt", 8)
    form = replace(form, config=replace(form.config, batch=128, points=16), micro_batch=micro_batch)
    assert time_of(form, SMALL, 4, CPU).seconds == pytest.approx(128 * 0.01 + 0.2) and sizes == [images]


def test_images_that_belong_together_are_reckoned_where_one_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large teacher on a CPU: nobody waits for sixteen of its images to learn that."""
    sizes: list[int] = []

    def seconds(net: Precond, count: int, *more: object, **named: object) -> float:
        sizes.append(count)
        return 0.3 * count

    monkeypatch.setattr(step_time, "_forward_seconds", seconds)
    form = form_of("cmt", 8)
    form = replace(form, config=replace(form.config, batch=128, points=16), micro_batch=64)
    assert time_of(form, SMALL, 4, CPU) == StepTime(pytest.approx(4 * 0.3 * 128), 1, 0.3) and max(sizes) == 4


@pytest.mark.parametrize(
    ("passes", "seconds", "said"),
    [
        # (seconds of a forward pass by its images, of a step of 8 images that is 11 of them each, where from)
        ({1: 2.0, 4: 4.0}, 11 * 8 * 1.0, "a forward pass of 4 images"),  # together they take half as long each
        ({1: 2.0, 4: 9.0}, 11 * 8 * 2.0, "a forward pass of 1 image"),
        ({1: 6.0}, 11 * 8 * 6.0, "a forward pass of 1 image"),  # more would take too long
    ],
)
def test_a_step_that_would_take_minutes_is_reckoned_from_a_forward_pass(
    monkeypatch: pytest.MonkeyPatch, passes: dict[int, float], seconds: float, said: str
) -> None:
    monkeypatch.setattr(step_time, "_distillation", None)  # nothing is made
    monkeypatch.setattr(step_time, "_forward_seconds", lambda _, count, *__, **___: passes[count])
    found = time_of(form_of("ipfm", 8), SMALL, 11, CPU)
    assert found.seconds == pytest.approx(seconds)
    assert found.how() == f"reckoned from {said}, which was measured"


def test_images_that_cost_nothing_more_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on cores that others want too: 0.2 s of waiting a pass, however many images, would be 140 s for 64 alone."""
    sizes: list[int] = []

    def at(count: int) -> step_time.Iteration:
        sizes.append(count)
        return lambda number: None

    monkeypatch.setattr(step_time, "_distillation", lambda *_: at)
    monkeypatch.setattr(step_time, "_forward_seconds", lambda _, count, *__, **___: 0.2 + 0.0001 * count)
    monkeypatch.setattr(step_time, "_timed", lambda *_: (3.0, 0.1))
    form = form_of("ipfm", 8)
    form = replace(form, config=replace(form.config, batch=64), micro_batch=64)
    found = time_of(form, SMALL, 11, CPU)
    assert found == StepTime(pytest.approx(3.1), pass_seconds=pytest.approx(0.2064 / 64)) and sizes == [64]


def test_a_step_that_needs_too_much_memory_is_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(step_time, "_distillation", too_large)
    monkeypatch.setattr(step_time, "_forward_seconds", lambda _, count, *__, **___: 0.02 * count)
    assert time_of(form_of("ipfm", 8), SMALL, 11, CPU) == StepTime(
        pytest.approx(0.02 * 11 * 8), forward_of=8, pass_seconds=pytest.approx(0.02)
    )


def test_what_vgg_computes_counts_too() -> None:
    """Of a pair of images of side 32: VGG-16's convolutions, 313.2 million products each, forward and once back."""
    lpips = PidConfig(D=128.0, batch=8, max_steps=1, distance="lpips")
    network = replace(SMALL, img_resolution=32)
    flops = lpips.further_flops(network)
    assert flops == pytest.approx(3 * 2 * 313.2e6, rel=0.01)
    resized = replace(lpips, lpips_side=64)
    assert resized.further_flops(network) == pytest.approx(4 * flops, rel=0.05)
    assert SETTINGS["pid"].further_flops(network) == SETTINGS["ipfm"].further_flops(network) == 0
