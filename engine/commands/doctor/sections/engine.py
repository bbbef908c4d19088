"""The engine against the plain PyTorch loop: forms of the step, ZeRO stages, precisions, accumulation, compilation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from ipfm.engine.commands.bench import plain_loop
from ipfm.engine.commands.bench.equivalence import (
    BASE,
    LIMIT,
    Difference,
    compared_teacher,
    difference,
    trained_tensors,
)
from ipfm.engine.commands.doctor.forms import EAGER, captured
from ipfm.engine.commands.doctor.place import Place, Row, at_most, judged, tried, within
from ipfm.engine.distributed.precision import allow_tf32, fp16_supported
from ipfm.engine.distributed.world import World, start_world
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.training.distiller import Distiller
from ipfm.models import Precond

# So many that captured ones are replayed.
STEPS, STEPS_QUICK = 6, 2
# On a GPU sums have another order in either of the two, in TF32 nothing is computed.
LIMIT_GPU = 1e-4
# In 16 bits: of what the plain loop's weights have moved.
LIMIT_HALF = 0.5


def rows(place: Place) -> Iterator[Row]:
    """A row a setting: how far weights and average are from those of the plain loop after some steps."""
    world = start_world()
    steps = STEPS_QUICK if place.quick else STEPS
    # The loop in fp32, as the engine's settings below say of it.
    allow_tf32(False)
    teacher = compared_teacher().to(world.device)
    plain = plain_loop.distill(teacher, DistillConfig(**BASE, tf32=False), steps)
    before = {name: p.detach() for name, p in teacher.named_parameters()}
    moved = max(
        float((p.detach() - before[n]).norm() / before[n].norm()) for n, p in plain.generator.named_parameters()
    )
    for name, settings in within(place, cases(world.device, quick=place.quick), "settings"):
        row: Row = {"setting": name, "steps": steps}
        yield tried(row, lambda settings=settings: _compared(place, settings, teacher, plain, moved, world))  # type: ignore[misc]


def cases(device: torch.device, *, quick: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """Names and settings; those that this version or device does not have are left out."""
    forms = [
        (f"fp32, ZeRO {stage}, {backward}, {parts} micro-batch{'es' if parts > 1 else ''}",
         {"zero": stage, "backward": backward, "micro_batch": BASE["batch"] // parts})
        for stage in (0, 1, 2, 3)
        for backward, parts in (("joint", 1), ("phased", 2))
    ]  # fmt: skip
    half = [
        (f"{precision}, ZeRO {stage}, {backward}", {"precision": precision, "zero": stage, "backward": backward})
        for precision in ("bf16", "fp16")
        for stage, backward in ((0, "joint"), (1, "phased"), (2, "joint"))
        if precision == "bf16" or fp16_supported(device)
    ]
    compiled: list[tuple[str, dict[str, Any]]] = [("fp32, ZeRO 0, joint, compiled", {"zero": 0, "compile": True})]
    compiled += [(f"{compiled[0][0]}, CUDA graphs", {**compiled[0][1], **more}) for more in captured(device.type)]
    graphs: list[tuple[str, dict[str, Any]]] = [
        (f"fp32, ZeRO 0, {backward}, CUDA graphs", {"zero": 0, "backward": backward, **settings})
        for settings in captured(device.type)
        for backward in ("joint", "phased")
    ]
    found = [*forms, *half, *graphs, *compiled]
    return [forms[0], forms[-1], half[0], *graphs] if quick else found


def _compared(
    place: Place, settings: dict[str, Any], teacher: Precond, plain: plain_loop.Plain, moved: float, world: World
) -> Row:
    config = DistillConfig(**{**BASE, "precision": "fp32", "tf32": False, **EAGER, **settings})
    distiller = Distiller(config, copy.deepcopy(teacher), world=world)
    # Compiling may take minutes, on a CPU above all.
    with at_most(place.left) if config.compile else contextlib.nullcontext():
        for step in range(plain_steps(plain)):
            distiller.iteration(step)
    found = difference(plain, trained_tensors(distiller))
    limit = LIMIT_HALF * moved if config.precision != "fp32" else LIMIT_GPU if place.cuda else LIMIT
    return _row(found, limit, moved)


def plain_steps(plain: plain_loop.Plain) -> int:
    """How many steps the loop has done."""
    return len(plain.student_loss)


def _row(found: Difference, limit: float, moved: float) -> Row:
    right = all(value <= limit for value in found)
    return {
        **{name: f"{value:.1e}" for name, value in found._asdict().items()},
        "allowed": f"{limit:.1e}",
        "moved": f"{moved:.1e}",
        "verdict": judged(right, f"differs by {max(found):.1e}, allowed are {limit:.1e}"),
    }
