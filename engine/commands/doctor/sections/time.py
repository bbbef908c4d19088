"""The time of a step: the engine's forms beside plain PyTorch as one writes it and at its best, in alternation."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ipfm.engine.commands.bench.step import StepTime, Variant, measure_steps
from ipfm.engine.commands.doctor.expected import step_expectation
from ipfm.engine.commands.doctor.forms import EAGER, captured
from ipfm.engine.commands.doctor.place import LEFT_OUT, OK, Place, Row, TookTooLong, at_most, failed, within
from ipfm.engine.config import Precision
from ipfm.engine.distributed.compilation import check_compiler
from ipfm.engine.distributed.world import World, start_world
from ipfm.engine.experiments.gpu_costs import Run
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.models import NetworkConfig, presets

ROUNDS, ROUNDS_QUICK = 8, 1
BATCHES = (32, 256)
SMALLEST = 32


def rows(place: Place) -> Iterator[Row]:
    """A row a form of the step and batch; those that compile come last."""
    # Before anything is on a GPU, for which the meta device passes there.
    compared = _compared() if place.cuda else {}
    expected = {(n, b): step_expectation(network, b).ms for n, (network, batches) in compared.items() for b in batches}
    world = start_world()
    rounds = ROUNDS_QUICK if place.quick else ROUNDS
    cases = _cases(place, world)
    for name, network, batch, variants in within(place, cases, "comparisons"):
        about: Row = {"network": name, "batch": batch}
        refused = False
        try:
            # Compiling large networks may take longer than there is.
            with at_most(place.left) if any(v.compiled for v in variants) else contextlib.nullcontext():
                for row in _timed(about, network, variants, rounds, world, expected.get((name, batch))):
                    refused = refused or "memory" in str(row["verdict"])
                    yield row
        except TookTooLong as error:
            yield about | {"compiled": "yes", "verdict": f"{LEFT_OUT}: {error}"}
        gc.collect()
        if place.cuda:
            torch.cuda.empty_cache()
        # A GPU with less memory times half of the images.
        if refused and batch >= 2 * SMALLEST:
            cases.append((name, network, batch // 2, variants))


def _cases(place: Place, world: World) -> list[tuple[str, NetworkConfig, int, list[Variant]]]:
    """Name, network, batch and forms; published networks where there is a GPU."""
    if not place.cuda:
        digits = presets.get("digits", D=128.0)
        return [("digits", digits, 4 if place.quick else 64, _eager("fp32", world, quick=place.quick))]
    compared = _compared()
    eager = [(n, network, b, _eager("bf16", world)) for n, (network, batches) in compared.items() for b in batches]
    name, (network, (batch, *_)) = next(iter(compared.items()))
    return [*eager, (name, network, batch, _compiled("bf16", world))]


def _compared() -> dict[str, tuple[NetworkConfig, tuple[int, ...]]]:
    """Name -> the network, without dropout, and the batches of its steps; of the first one also compiled."""
    ncsnpp, edm2 = presets.get("ncsnpp", D=2048.0), presets.get("edm2-img64-xs")
    compared = {"ncsnpp": (ncsnpp, BATCHES), "edm2-img64-xs": (edm2, BATCHES[:1])}
    return {name: (replace(network, dropout=0.0), batches) for name, (network, batches) in compared.items()}


def _eager(precision: Precision, world: World, *, quick: bool = False) -> list[Variant]:
    """Plain PyTorch in two forms, the engine's two, further stages, and CUDA graphs where this version has them."""
    plain = [Variant("plain", precision), Variant("plain", precision, rival="tuned")]
    if quick:
        return [*plain, Variant("joint", precision)]
    graphs = captured(world.device.type)
    return [
        *plain,
        Variant("joint", precision, settings=EAGER),
        Variant("phased", precision, settings=EAGER),
        Variant("joint", precision, settings={"zero": 1}),
        *(Variant(form, precision, settings=settings) for form in ("joint", "phased") for settings in graphs),
    ]


def _compiled(precision: Precision, world: World) -> list[Variant]:
    check_compiler(world.device)
    return [
        Variant("plain", precision),
        Variant("plain", precision, True, "tuned"),
        Variant("joint", precision, True, settings=EAGER),
        *(Variant("joint", precision, True, settings=settings) for settings in captured(world.device.type)),
    ]


def _timed(
    about: Row, network: NetworkConfig, variants: Sequence[Variant], rounds: int, world: World, expected: float | None
) -> Iterator[Row]:
    """All forms of a comparison together."""
    batch = int(about["batch"])
    flops = Run(DistillConfig(batch=batch, max_steps=1), network).step_flops()
    try:
        for timed in measure_steps(variants, network, batch, rounds, str(about["network"]), world):
            yield about | _row(timed, flops, expected)
    except (torch.OutOfMemoryError, MemoryError) as error:
        yield about | {"verdict": f"{LEFT_OUT}: not enough memory ({' '.join(str(error).split())[:120]})"}
    except Exception as error:  # the other comparisons are made too
        yield about | {"verdict": failed(f"{type(error).__name__}: {error}")}


def _row(timed: StepTime, flops: float, expected: float | None) -> Row:
    known = expected is not None and timed.precision == "bf16"
    return {
        "form": timed.step,
        "precision": timed.precision,
        "compiled": "yes" if timed.compiled else "no",
        "ms 20 %": round(timed.ms_20, 2),
        "ms": round(timed.ms_50, 2),
        "ms 80 %": round(timed.ms_80, 2),
        "images/s": round(timed.images_per_s, 1),
        "speed over plain": round(timed.speed, 3),
        "over the best plain": round(timed.speed_over_best, 3),
        "TFLOP/s": f"{1e-9 * flops / timed.ms_50:.3g}",
        "expected of an H100, ms": f"{expected:.3g}" if known else "",
        "peak MiB": round(timed.peak_mb),
        "verdict": OK,
    }
