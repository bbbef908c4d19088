"""Memory: the plan beside the allocator's, the process's and the driver's account, at the peak of each phase."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ipfm.engine.commands.doctor.forms import EAGER
from ipfm.engine.commands.doctor.place import OK, Place, Row, failed, judged, within
from ipfm.engine.distributed.world import World, start_world
from ipfm.engine.memory.live import bytes_in_use
from ipfm.engine.memory.process import resident_bytes
from ipfm.engine.memory.profile import STATE, TOLERANCE, MemoryProfiler
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.runtime.wording import size
from ipfm.engine.training.distiller import Distiller
from ipfm.models import NetworkConfig, build_network, presets


def rows(place: Place) -> Iterator[Row]:
    """A row a phase of a step, for each network and form of it."""
    world = start_world()
    # What is compiled, imported and set up at the first use belongs to no step.
    _distiller(presets.get("digits"), 2, {"backward": "joint", "precision": "fp32", "zero": 0}, world).iteration(0)
    networks = _networks(place)
    for network, name, settings in within(place, _cases(place), "forms"):
        gc.collect()
        if place.cuda:
            torch.cuda.empty_cache()
        try:
            yield from _measured(network, name, *networks[network], settings, world)
        except Exception as error:  # the other forms are measured too
            yield {"network": network, "form": name, "verdict": failed(f"{type(error).__name__}: {error}")}


def _networks(place: Place) -> dict[str, tuple[NetworkConfig, int]]:
    """Networks and images of a step; thin ones of few pixels where there is no GPU."""
    ncsnpp = replace(presets.get("ncsnpp", D=2048.0), dropout=0.0)
    edm2 = replace(presets.get("edm2-img64-xs"), dropout=0.0)
    if place.cuda:
        return {"ncsnpp": (ncsnpp, 64), "edm2": (edm2, 32)}
    thin_edm2 = replace(edm2, model_channels=32, channel_mult=(1, 2), num_blocks=1, img_resolution=16,
                        channels_per_head=32, label_dim=10)  # fmt: skip
    if place.quick:
        return {"ncsnpp": (presets.get("digits", D=128.0), 16), "edm2": (replace(thin_edm2, img_resolution=8), 16)}
    return {"ncsnpp": (replace(ncsnpp, model_channels=16, img_resolution=16), 8), "edm2": (thin_edm2, 8)}


def _cases(place: Place) -> list[tuple[str, str, dict[str, Any]]]:
    """Networks, names and settings."""
    forms: list[tuple[str, dict[str, Any]]] = [
        ("joint, fp32, ZeRO 0", {"backward": "joint", "precision": "fp32", "zero": 0}),
        ("phased, fp32, ZeRO 0", {"backward": "phased", "precision": "fp32", "zero": 0}),
        ("phased, checkpointed, fp32, ZeRO 0",
         {"backward": "phased", "precision": "fp32", "zero": 0, "activation_checkpointing": "on"}),
    ]  # fmt: skip
    half: list[tuple[str, dict[str, Any]]] = [
        ("joint, bf16, ZeRO 0", {"backward": "joint", "precision": "bf16", "zero": 0}),
        ("joint, bf16, ZeRO 1", {"backward": "joint", "precision": "bf16", "zero": 1}),
        ("phased, bf16, ZeRO 2", {"backward": "phased", "precision": "bf16", "zero": 2}),
    ]
    chosen = {
        "ncsnpp": forms[1:2] if place.quick else [*forms, *half] if place.cuda else forms,
        "edm2": [half[0], half[2]] if place.cuda and not place.quick else forms[:1],
    }
    return [(network, *case) for network, cases in chosen.items() for case in cases]


def _distiller(network: NetworkConfig, batch: int, settings: dict[str, Any], world: World) -> Distiller:
    form = {"activation_checkpointing": "off", **EAGER, **settings}
    torch.manual_seed(0)
    config = DistillConfig(batch=batch, micro_batch=batch, max_steps=9, **form)
    return Distiller(config, build_network(network), world=world)


def _measured(
    network: str, name: str, config: NetworkConfig, batch: int, settings: dict[str, Any], world: World
) -> Iterator[Row]:
    about: Row = {"network": network, "form": name}
    before, other = resident_bytes(), bytes_in_use(world.device)
    distiller = _distiller(config, batch, settings, world)
    plan = distiller.memory_plan()
    gc.collect()
    profiler = MemoryProfiler(world.device, plan.phases, plan.state, other=other)
    for step in range(2):
        with profiler.step():
            distiller.iteration(step)
    for phase in profiler.rows:
        off = phase.difference_percent
        # The state alone holds what a step's first use makes; the peaks are what a GPU must hold.
        right = off is None or abs(off) <= 100 * TOLERANCE or phase.phase == STATE
        yield {
            **about,
            "phase": phase.phase,
            "planned": "" if phase.predicted_bytes is None else size(phase.predicted_bytes),
            "measured": size(phase.measured_bytes),
            "off": "" if off is None else f"{off:+.1f} %",
            "reserved": "" if phase.reserved_bytes is None else size(phase.reserved_bytes),
            "driver": "" if phase.nvml_bytes is None else size(phase.nvml_bytes),
            "resident": size(max(0, phase.rss_bytes - before)),
            "verdict": judged(right, f"{off} % off, promised are {100 * TOLERANCE:.0f}"),
        }
    worst = max((abs(row.difference_percent or 0.0) for row in profiler.rows if row.phase != STATE), default=0.0)
    yield about | {"phase": "peak", "measured": size(profiler.peak_bytes), "off": f"{worst:.1f} %", "verdict": OK}
