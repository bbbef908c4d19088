"""The time of a whole training step, beside the same step in plain PyTorch, in alternation: `ipfm bench --step`."""

from __future__ import annotations

import csv
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ipfm.engine.commands.bench.plain_step import PlainDistillation
from ipfm.engine.config import MemoryFormat, Precision
from ipfm.engine.distributed.compilation import set_execution
from ipfm.engine.distributed.precision import allow_tf32
from ipfm.engine.distributed.world import World, start_world
from ipfm.engine.memory.live import LiveBytes, bytes_in_use
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.runtime.launcher import stop_world
from ipfm.engine.runtime.progress import ProgressBar
from ipfm.engine.training.distiller import Distiller
from ipfm.engine.training.resolve import resolve
from ipfm.kernels.bench.machine import describe
from ipfm.models import NetworkConfig, Precond, build_network

Form = Literal["plain", "joint", "phased"]
FORMS: tuple[Form, ...] = ("plain", "joint", "phased")
Rival = Literal["plain", "channels_last", "fused", "tuned"]
RIVALS: tuple[Rival, ...] = get_args(Rival)
WARM_UP = 2
ROUNDS, ROUNDS_QUICK = 20, 3


@dataclass(frozen=True)
class Variant:
    """One way to run the step."""

    form: Form
    """plain: in plain PyTorch; joint and phased: by the engine, see `DistillConfig.backward`."""
    precision: Precision
    compiled: bool = False
    rival: Rival = "plain"
    """Of the plain form: as one would write it down; with activations and weights in channels_last; with torch's fused
    Adam; "tuned": with both."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the engine's forms: settings of the distillation beside those of this benchmark."""

    @property
    def name(self) -> str:
        """As in "plain", "plain tuned", "joint", "joint, zero 1"."""
        if self.form == "plain":
            return "plain" if self.rival == "plain" else f"plain {self.rival}"
        own = (f"{name.replace('_', '-')} {value}" for name, value in self.settings.items() if value != "off")
        return ", ".join([self.form, *own])


@dataclass(frozen=True)
class StepTime:
    """A row of step.csv: a student step, a generator step and the update of the average."""

    step: str
    precision: str
    compiled: bool
    ms_20: float
    ms_50: float
    ms_80: float
    images_per_s: float
    speed: float
    """Median over the rounds of plain PyTorch's time, in the same precision, by this one's."""
    peak_mb: float
    """Weights, state and everything else at the peak, in MiB."""
    model: str
    channels: int
    batch: int
    device: str
    threads: int
    torch: str
    speed_over_best: float
    """Median over the rounds of the time of the fastest plain form, compiled or not, by this one's."""


def default_rivals(device: torch.device) -> tuple[Rival, ...]:
    """The forms of plain PyTorch that are timed where none are named: on a GPU the best one too."""
    return ("plain", "tuned") if device.type == "cuda" else ("plain",)


def run_step(
    out: Path | str,
    network: NetworkConfig,
    *,
    batch: int,
    precisions: Sequence[Precision] = ("fp32",),
    compiled: bool = False,
    rivals: Sequence[Rival] = (),
    quick: bool = False,
    title: str = "",
) -> Path:
    """Time one-step distillation of random weights on this process's device: whole batch at once, ZeRO 0.

    Every round runs one iteration of each variant, so that what disturbs the machine meets all alike.

    Args:
        out: folder for step.csv and step.md.
        network: architecture of all networks, without dropout.
        batch: images in a step.
        precisions: arithmetic of the convolutions; each is compared with plain PyTorch in the same.
        compiled: time the networks under torch.compile too, plain ones as well.
        rivals: forms of plain PyTorch beside the plainest, which is always timed; none: on a GPU the tuned one.
        quick: 3 rounds instead of 20.
        title: what the network is called in the table.

    Returns:
        Path of step.csv.

    Raises:
        ValueError: a number out of its range, or a precision or compilation that this device does not do.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be an integer >= 1, got {batch}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    world = start_world()
    against = dict.fromkeys(("plain", *(rivals or default_rivals(world.device))))
    variants = [
        variant
        for precision in dict.fromkeys(precisions)
        for again in (False, True)[: 1 + compiled]
        for variant in (
            *(Variant("plain", precision, again, rival) for rival in against),
            *(Variant(form, precision, again) for form in FORMS[1:]),
        )
    ]
    try:
        rows = list(measure_steps(variants, network, batch, ROUNDS_QUICK if quick else ROUNDS, title, world))
    finally:
        stop_world()
    path = folder / "step.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(StepTime))
        writer.writerows(map(astuple, rows))
    path.with_suffix(".md").write_text(report(rows), encoding="utf-8")
    return path


def report(rows: Sequence[StepTime]) -> str:
    """The table in Markdown, under a line that says what was measured where."""
    first = rows[0]
    # Beside one form of plain PyTorch the fastest of them is itself.
    several = sum(row.step.startswith("plain") for row in rows) > len({row.precision for row in rows})
    header: tuple[str, ...] = ("step", "precision", "compiled", "ms (20 / 50 / 80 %)", "images/s", "speed", "peak MiB")
    header += ("speed over the best plain",) if several else ()
    lines = [
        f"One iteration of {first.model}, {first.channels} channels, batch {first.batch}, on {first.device} "
        f"({first.threads} threads), torch {first.torch}; speed: plain PyTorch's time by this one's",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for row in rows:
        cells = (
            row.step,
            row.precision,
            "yes" if row.compiled else "no",
            f"{row.ms_20:.1f} / {row.ms_50:.1f} / {row.ms_80:.1f}",
            f"{row.images_per_s:.4g}",
            f"{row.speed:.3f}",
            f"{row.peak_mb:.0f}",
            *((f"{row.speed_over_best:.3f}",) if several else ()),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def measure_steps(
    variants: Sequence[Variant], network: NetworkConfig, batch: int, rounds: int, title: str, world: World
) -> Iterator[StepTime]:
    """Time the variants in alternation, see `run_step`; of each precision the plain form, not compiled, is among them.

    Raises:
        RuntimeError, MemoryError: the device has no memory for all of them.
    """
    device = world.device
    machine = describe(device)
    # On a GPU steps may be captured first, to be replayed from then on.
    warm_up = WARM_UP + 2 * (device.type == "cuda")
    torch.manual_seed(0)
    teacher = build_network(network)
    tasks: list[Callable[[int], object]] = []
    states: list[int] = []
    for variant in variants:
        gc.collect()
        before = bytes_in_use(device)
        tasks.append(_prepare(variant, network, teacher, batch, world))
        for step in range(warm_up):
            tasks[-1](step)
        gc.collect()
        states.append(bytes_in_use(device) - before)
    times: list[list[float]] = [[] for _ in tasks]
    with ProgressBar("rounds", rounds, unit=" round") as bar:
        for step in range(warm_up, warm_up + rounds):
            for task, taken in zip(tasks, times, strict=True):
                _synchronize(device)
                started = time.perf_counter()
                task(step)
                _synchronize(device)
                taken.append(time.perf_counter() - started)
            bar.advance()
    timed = list(zip(variants, times, strict=True))
    plain = {v.precision: taken for v, taken in timed if v.form == "plain" and v.rival == "plain" and not v.compiled}
    best = {
        precision: min((t for v, t in timed if v.form == "plain" and v.precision == precision), key=statistics.median)
        for precision in plain
    }
    for variant, task, taken, state in zip(variants, tasks, times, states, strict=True):
        low, middle, high = torch.tensor(taken).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        speed, over_best = (
            statistics.median(theirs / ours for theirs, ours in zip(measure[variant.precision], taken, strict=True))
            for measure in (plain, best)
        )
        yield StepTime(
            variant.name,
            variant.precision,
            variant.compiled,
            1e3 * low,
            1e3 * middle,
            1e3 * high,
            batch / middle,
            speed,
            (state + _transient(task, rounds + warm_up, device)) / 2**20,
            title or network.model_type,
            network.model_channels,
            batch,
            machine.device,
            machine.threads,
            machine.torch,
            over_best,
        )


def _prepare(
    variant: Variant, network: NetworkConfig, teacher: Precond, batch: int, world: World
) -> Callable[[int], object]:
    form: dict[str, Any] = {"zero": 0, **variant.settings}
    config = DistillConfig(
        batch=batch,
        micro_batch=batch,
        max_steps=WARM_UP + ROUNDS + 3,
        precision=variant.precision,
        backward="joint" if variant.form == "plain" else variant.form,
        activation_checkpointing="off",
        compile=variant.compiled,
        **form,
    )
    if variant.form != "plain":
        return Distiller(config, teacher, world=world).iteration
    allow_tf32(config.tf32)
    plain = PlainDistillation(
        resolve(config, network, world),
        teacher,
        device=world.device,
        channels_last=variant.rival in ("channels_last", "tuned"),
        fused_adam=variant.rival in ("fused", "tuned"),
    )
    if variant.compiled:
        for net in (plain.teacher, plain.student, plain.generator):
            order: MemoryFormat = "channels_last" if net.channels_last else "contiguous"
            set_execution(net, memory_format=order, compiled=True, device=world.device)
    return plain.iteration


def _transient(task: Callable[[int], object], step: int, device: torch.device) -> int:
    """Bytes at the peak of an iteration above those that are there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        task(step)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        task(step)
    return live.peak


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
