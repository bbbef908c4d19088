"""The engine against the plain PyTorch loop: forms of the step, ZeRO stages, precisions, accumulation, compilation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from ipfm.engine.commands.bench.plain_rule import compared_edm2_teacher, distill_edm2, normalise_once
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


@dataclass(frozen=True)
class Rival:
    """A network, and what the plain loop makes of it in fp32."""

    teacher: Precond
    plain: plain_loop.Plain
    moved: float
    """The largest ||change|| / ||parameter|| of the generator."""

    @classmethod
    def of(cls, network: str, steps: int, device: torch.device) -> Rival:
        """The loop's, from the same teacher each time."""
        make, distill = NETWORKS[network]
        teacher = make().to(device)
        config = DistillConfig(**BASE, tf32=False)
        plain, start = distill(teacher, config, steps), distill(teacher, config, 0).generator
        normalise_once(start)  # as the rule does before the first step, of which no step's size is a part
        before = {name: p.detach() for name, p in start.named_parameters()}
        moved = max(
            float((p.detach() - before[name]).norm() / before[name].norm())
            for name, p in plain.generator.named_parameters()
        )
        return cls(teacher, plain, moved)


# What makes a teacher, and the loop that distils it.
NETWORKS: dict[str, tuple[Callable[[], Precond], Callable[[Precond, DistillConfig, int], plain_loop.Plain]]] = {
    "NCSN++": (compared_teacher, plain_loop.distill),
    "EDM2": (compared_edm2_teacher, distill_edm2),
}


def rows(place: Place) -> Iterator[Row]:
    """A row a network and setting: how far weights and average are from those of the plain loop after some steps."""
    world = start_world()
    steps = STEPS_QUICK if place.quick else STEPS
    # The loop in fp32, as the engine's settings below say of it.
    allow_tf32(False)
    rivals: dict[str, Rival] = {}
    for network, name, settings in within(place, cases(world.device, quick=place.quick), "settings"):
        row: Row = {"network": network, "setting": name, "steps": steps}
        yield tried(row, lambda n=network, s=settings: _compared(place, n, s, rivals, steps, world))  # type: ignore[misc]


def cases(device: torch.device, *, quick: bool = False) -> list[tuple[str, str, dict[str, Any]]]:
    """Networks, names and settings; those that this version or device does not have are left out."""
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
    chosen = {
        "NCSN++": [forms[0], forms[-1], half[0], *graphs] if quick else [*forms, *half, *graphs],
        # Each stage once: its masters are kept apart from its weights at each in another way.
        "EDM2": [forms[0]] if quick else [forms[0], forms[3], forms[5], forms[6], *half[::2], *graphs],
    }
    found = [(network, *case) for network, cases_ in chosen.items() for case in cases_]
    # What is compiled takes long, and comes last.
    return found if quick else [*found, *(("NCSN++", *case) for case in compiled)]


def _compared(
    place: Place, network: str, settings: dict[str, Any], rivals: dict[str, Rival], steps: int, world: World
) -> Row:
    if network not in rivals:
        rivals[network] = Rival.of(network, steps, world.device)
    rival = rivals[network]
    config = DistillConfig(**{**BASE, "precision": "fp32", "tf32": False, **EAGER, **settings})
    distiller = Distiller(config, copy.deepcopy(rival.teacher), world=world)
    # Compiling may take minutes, on a CPU above all.
    with at_most(place.left) if config.compile else contextlib.nullcontext():
        for step in range(steps):
            distiller.iteration(step)
    found = difference(rival.plain, trained_tensors(distiller))
    limit = LIMIT_HALF * rival.moved if config.precision != "fp32" else LIMIT_GPU if place.cuda else LIMIT
    return _row(found, limit, rival.moved)


def _row(found: Difference, limit: float, moved: float) -> Row:
    right = all(value <= limit for value in found)
    return {
        **{name: f"{value:.1e}" for name, value in found._asdict().items()},
        "allowed": f"{limit:.1e}",
        "moved": f"{moved:.1e}",
        "verdict": judged(right, f"differs by {max(found):.1e}, allowed are {limit:.1e}"),
    }
