"""One step of the memory benchmark, in a process of its own.

python -m ipfm.engine.commands.bench.memory_step CASE RESULT
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ipfm.engine.memory.process import resident_bytes
from ipfm.models import NetworkConfig, build_network, presets

if TYPE_CHECKING:
    from ipfm.engine.distributed.world import World
    from ipfm.engine.memory.plan import MemoryPlan
    from ipfm.engine.training.distiller import Distiller
    from ipfm.engine.training.teacher import TeacherTraining


Kind = Literal["teacher", "joint", "phased"]


@dataclass(frozen=True)
class StepCase:
    """What is measured, and where its picture goes."""

    name: str
    kind: Kind
    """A step of a teacher's training, or an iteration of a distillation in one of its two forms."""
    network: dict[str, Any]
    """As of `NetworkConfig.to_json`; without dropout."""
    batch: int
    checkpointed: bool
    steps: int
    """Steps that are run; the largest counts."""
    picture: str


@dataclass(frozen=True)
class StepRow:
    """A row of memory.csv; bytes of one process."""

    step: str
    live_bytes: int
    """Tensors alive at the peak: permanent state, gradients, activations."""
    rss_bytes: int
    """Resident memory at the peak, above what it was when all modules were imported."""
    predicted_bytes: int
    """Of `live_bytes`, by the memory plan."""
    state_bytes: int
    """The permanent part of `live_bytes`."""
    activation_bytes: int
    """The rest of it, with the gradients."""
    peak_phase: str
    seconds: float
    """Of the last step, while it was measured."""


def measure(case: StepCase, world: World) -> StepRow:
    """Run the steps of `case` in this process, through the engine that trains, and plot the last one.

    Raises:
        ValueError: the machine's memory does not suffice.
    """
    from ipfm.engine.memory.profile import MemoryProfiler

    # What is imported and compiled at the first use belongs to no step.
    warm_up, _ = prepare(replace(case, network=presets.get("digits").to_json(), batch=2), world)
    warm_up.iteration(0)
    del warm_up
    gc.collect()
    baseline = resident_bytes()
    task, plan = prepare(case, world)
    gc.collect()
    profiler = MemoryProfiler(world.device, plan.phases, plan.state)
    seconds = 0.0
    for step in range(case.steps):
        started = time.perf_counter()
        with profiler.step():
            task.iteration(step)
        seconds = time.perf_counter() - started
    channels = NetworkConfig.from_json(case.network).model_channels
    profiler.plot(case.picture, f"{case.name}: {channels} channels, batch {case.batch}")
    state, peak = profiler.state_bytes, profiler.peak_bytes
    return StepRow(
        case.name,
        peak,
        profiler.peak_rss_bytes - baseline,
        plan.peak,
        state,
        peak - state,
        profiler.peak_phase,
        round(seconds, 1),
    )


def prepare(case: StepCase, world: World) -> tuple[TeacherTraining | Distiller, MemoryPlan]:
    """The training of `case`, ready for its first step, and what is predicted for it."""
    from ipfm.engine.config import TeacherConfig
    from ipfm.engine.data.dataset import ImageDataset
    from ipfm.engine.memory.plan import plan_memory, plan_teacher_training
    from ipfm.engine.objectives.ipfm import DistillConfig
    from ipfm.engine.training.distiller import Distiller
    from ipfm.engine.training.teacher import TeacherTraining

    network = NetworkConfig.from_json(case.network)
    again: Literal["on", "off"] = "on" if case.checkpointed else "off"
    torch.manual_seed(0)
    if case.kind != "teacher":
        config = DistillConfig(
            batch=case.batch,
            micro_batch=case.batch,
            max_steps=case.steps,
            zero=0,
            precision="fp32",
            backward=case.kind,
            activation_checkpointing=again,
        )
        plan = plan_memory(network, micro_batch=case.batch, backward=case.kind, activation_checkpointing=again)
        return Distiller(config, build_network(network), world=world), plan
    images = torch.randint(256, (case.batch, *network.image_shape), dtype=torch.uint8)
    labels = torch.arange(case.batch) % network.label_dim if network.label_dim else None
    data = ImageDataset(images, labels, classes=network.label_dim or None)
    teaching = TeacherConfig(
        batch=case.batch,
        micro_batch=case.batch,
        max_steps=case.steps,
        zero=0,
        precision="fp32",
        activation_checkpointing=again,
    )
    plan = plan_teacher_training(
        network, micro_batch=case.batch, beta1=teaching.beta1, activation_checkpointing=case.checkpointed
    )
    return TeacherTraining(teaching, network, data, world=world), plan


def main(case: str, result: str) -> None:
    """Measure `case`, a StepCase as JSON, and leave its StepRow in the file `result`, as JSON."""
    from ipfm.engine.distributed.world import start_world
    from ipfm.engine.runtime.launcher import stop_world

    world = start_world()
    row = measure(StepCase(**json.loads(case)), world)
    Path(result).write_text(json.dumps(asdict(row)), encoding="utf-8")
    stop_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
