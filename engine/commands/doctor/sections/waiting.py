"""What the host waits for within a step, counted; on a GPU also the kernels of a step and the GPU's busy share."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from ipfm.engine.commands.bench.no_reading import ON_A_CPU_ALONE, NoReading, synchronizations
from ipfm.engine.commands.bench.plain_rule import EDM2
from ipfm.engine.commands.doctor.forms import BEFORE_REPLAY, EAGER, captured
from ipfm.engine.commands.doctor.place import Place, Row, judged, tried, within
from ipfm.engine.distributed.world import World, start_world
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.training.distiller import Distiller
from ipfm.models import NetworkConfig, build_network, presets

# Calls of CUDA's runtime and driver by which a host waits for the device.
WAITING = (
    "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cuCtxSynchronize", "cuStreamSynchronize",
    "cuEventSynchronize", "cudaMemcpy",
)  # fmt: skip
# How the step is called in a profile.
RANGE = "ipfm doctor: a step"


def rows(place: Place) -> Iterator[Row]:
    """A row a setting, after steps that are allowed to wait."""
    world = start_world()
    for name, network, settings, read in within(place, _cases(place), "settings"):
        row: Row = {"setting": name}
        yield tried(row, lambda n=network, s=settings, r=read: _counted(n, s, r, world))  # type: ignore[misc]


def _cases(place: Place) -> list[tuple[str, NetworkConfig, dict[str, Any], bool]]:
    """Name, network, settings, and whether readings are counted: what DeepSpeed's stage 3 gathers is looked up."""
    digits = presets.get("digits", D=128.0)
    forms: list[tuple[str, dict[str, Any], bool]] = [
        ("fp32, ZeRO 0, joint", {"precision": "fp32", "zero": 0, "backward": "joint"}, True),
        ("bf16, ZeRO 0, joint", {"precision": "bf16", "zero": 0, "backward": "joint"}, True),
        ("bf16, ZeRO 1, joint", {"precision": "bf16", "zero": 1, "backward": "joint"}, True),
        ("bf16, ZeRO 1, phased", {"precision": "bf16", "zero": 1, "backward": "phased"}, True),
        ("fp32, ZeRO 2, phased", {"precision": "fp32", "zero": 2, "backward": "phased"}, True),
        ("fp32, ZeRO 3, joint", {"precision": "fp32", "zero": 3, "backward": "joint"}, False),
    ]
    forms = [(name, {**EAGER, **more}, read) for name, more, read in forms]
    forms += [
        (f"bf16, ZeRO 0, {backward}, CUDA graphs", {"precision": "bf16", "zero": 0, "backward": backward, **more}, True)
        for more in captured(place.device.partition(":")[0])
        for backward in ("joint", "phased")
    ]
    found = [(f"digits, {name}", digits, {"batch": 8, **more}, read) for name, more, read in forms]
    if place.quick:
        return found[2:3]
    # EDM2's rule for weights, and what normalises in the place of groups.
    edm2 = [*forms[1:2], *forms[3:4], *forms[6:]]
    found += [(f"edm2, {name}", EDM2, {"batch": 8, **more}, read) for name, more, read in edm2]
    if place.cuda:
        large = {"ncsnpp": presets.get("ncsnpp", D=2048.0), "edm2-img64-xs": presets.get("edm2-img64-xs")}
        found += [
            (f"{label}, batch 32, {name}", network, {"batch": 32, **more}, read)
            for label, network in large.items()
            for name, more, read in (*forms[1:3], *forms[6:7])
        ]
    return found


def _counted(network: NetworkConfig, settings: dict[str, Any], read: bool, world: World) -> Row:
    config = DistillConfig(
        max_steps=100, dropout=0.0, activation_checkpointing="off", micro_batch=settings["batch"], **settings
    )
    torch.manual_seed(0)
    distiller = Distiller(config, build_network(network), world=world)
    for step in range(BEFORE_REPLAY):
        distiller.iteration(step)
    with synchronizations() as waits, NoReading(count=True) as reading:
        distiller.iteration(BEFORE_REPLAY)
    readings = dict(reading.found) if read else {}
    if world.device.type != "cuda":
        readings = {where: count for where, count in readings.items() if not where.startswith(ON_A_CPU_ALONE)}
    row: Row = {
        "device-wide waits": sum(waits.values()),
        "readings": sum(readings.values()) if read else "not counted",
    }
    places = [*waits, *readings]
    if world.device.type == "cuda":
        row |= _seen_by_cuda(distiller, places)
    else:
        row |= profiled(distiller, BEFORE_REPLAY + 1)
    stops = {name: row[name] for name in ("device-wide waits", "readings", "warnings", "waits") if row.get(name)}
    stops = {name: count for name, count in stops.items() if isinstance(count, int)}
    return row | {
        "where": "; ".join(places)[:400],
        "verdict": judged(not stops, "the host waits: " + ", ".join(f"{n} {count}" for n, count in stops.items())),
    }


def _seen_by_cuda(distiller: Distiller, places: list[str]) -> Row:
    """What CUDA itself says: warnings of torch's debug mode, then what the profiler sees of the runtime's calls."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            distiller.iteration(BEFORE_REPLAY + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    places += [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    torch.cuda.synchronize()
    return {"warnings": len(found), **profiled(distiller, BEFORE_REPLAY + 2)}


def profiled(distiller: Distiller, step: int) -> Row:
    """An iteration under torch's profiler."""
    device = distiller.world.device
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        with torch.profiler.record_function(RANGE):
            distiller.iteration(step)
        host = time.perf_counter() - began
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        whole = time.perf_counter() - began
    return account(profiler.events() or [], host, whole)


def account(events: Any, host: float, whole: float) -> Row:
    """What a profile says: waits of the host, kernels, their time as a share of the step's; the host's own time.

    Args:
        events: of torch's profiler; the step is the range `RANGE`. The profiler itself waits at its end.
        host: seconds after which the host had given everything to the device.
        whole: seconds after which the device had done it.
    """
    step = next(event.time_range for event in events if event.name == RANGE)
    waits = Counter(
        event.name for event in events if event.name in WAITING and step.start <= event.time_range.start < step.end
    )
    on_gpu = [event for event in events if str(event.device_type).endswith("CUDA")]
    # Ranges that have a name show on the device too.
    kernels = [e for e in on_gpu if e.name != RANGE and not getattr(e, "is_user_annotation", False)]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    return {
        "waits": sum(waits.values()),
        "kernels": len(kernels) or "",
        "host ms": f"{1e3 * host:.1f}",
        "step ms": f"{1e3 * whole:.1f}",
        "GPU busy": f"{busy / whole:.0%}" if kernels else "",
    }
