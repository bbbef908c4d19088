"""A step of every objective beside the passes that it is counted by: `ipfm bench --passes`."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ipfm.engine.distributed.device import run_device
from ipfm.engine.experiments.step_time import passes_time
from ipfm.engine.memory.arithmetic import passes_in_words, step_forwards
from ipfm.engine.objectives import OBJECTIVES
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.runtime.progress import ProgressBar
from ipfm.kernels.bench.machine import describe
from ipfm.models import NetworkConfig

ROUNDS, ROUNDS_QUICK = 8, 2


@dataclass(frozen=True)
class PassesRow:
    """A row of passes.csv: a step of an objective, and what its passes predict."""

    objective: str
    form: str
    """joint or phased."""
    said: str
    """The passes of each network."""
    passes: float
    """Forward passes, or as much arithmetic, of one image."""
    forward_ms: float
    """Of a forward pass of all images, measured between the steps."""
    predicted_ms: float
    measured_ms: float
    """Of a step without its optimisers."""
    measured_by_predicted: float
    optimisers_ms: float
    model: str
    channels: int
    batch: int
    device: str
    threads: int
    torch: str


def cases(network: NetworkConfig, batch: int, D: float) -> Iterator[tuple[str, Distillation, bool]]:
    """What is measured: a name, settings with nothing open but their form, and whether it is phased."""
    for kind, settings in OBJECTIVES.items():
        for word, more in settings.measured.items():
            alone: dict[str, Any] = {"zero": 0, "precision": "fp32", "dropout": 0.0, "activation_checkpointing": "off"}
            config = settings(batch=batch, max_steps=1000, D=D, **alone, **more).completed(network)
            named, objective = kind + f", {word}" * bool(word), config.objective(network)
            yield named, config, False
            if step_forwards(objective, network, phased=True, checkpointed=False) != step_forwards(
                objective, network, phased=False, checkpointed=False
            ):
                yield named, config, True


def run_passes(out: Path | str, network: NetworkConfig, *, batch: int, quick: bool = False, title: str = "") -> Path:
    """Measure a step of each objective, joint and phased, and a forward pass of its images, in alternation.

    Args:
        out: folder for passes.csv and passes.md.
        network: architecture of all networks, without dropout, D among it.
        batch: images in a step.
        quick: 2 rounds instead of 8.
        title: what the network is called in the table.

    Returns:
        Path of passes.csv.

    Raises:
        ValueError: an objective has no step of so many images, or of such a network.
    """
    network, device = replace(network, dropout=0.0), run_device()
    torch.manual_seed(0)
    measured = list(cases(network, batch, network.D))
    machine = describe(device)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[PassesRow] = []
    with ProgressBar("steps", len(measured), unit=" step") as bar:
        for name, config, phased in measured:
            form = config.laid_out(D=network.D, stage=0, micro_batch=batch, phased=phased, checkpointed=False)
            objective = config.objective(network)
            passes = step_forwards(objective, network, phased=phased, checkpointed=False)
            found = passes_time(form, network, device, ROUNDS_QUICK if quick else ROUNDS)
            predicted = passes * found.forward
            rows.append(
                PassesRow(
                    name,
                    "phased" if phased else "joint",
                    passes_in_words(objective, phased=phased),
                    passes,
                    1e3 * found.forward,
                    1e3 * predicted,
                    1e3 * found.step,
                    found.step / predicted,
                    1e3 * found.optimisers,
                    title or network.model_type,
                    network.model_channels,
                    batch,
                    machine.device,
                    machine.threads,
                    machine.torch,
                )
            )
            bar.advance()
    path = folder / "passes.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(PassesRow))
        writer.writerows(map(astuple, rows))
    path.with_suffix(".md").write_text(report(rows, device), encoding="utf-8")
    return path


def report(rows: Sequence[PassesRow], device: torch.device) -> str:
    """The table in Markdown, under a line that says what was measured where."""
    first, clock = rows[0], "processor time" if device.type == "cpu" else "time"
    header: tuple[str, ...] = (
        "objective",
        "form",
        "passes",
        "forward pass, ms",
        "by passes, ms",
        "measured, ms",
        "ratio",
    )
    header += ("optimisers, ms",)
    lines = [
        f"A step of {first.model}, {first.channels} channels, batch {first.batch}, on {first.device} "
        f"({first.threads} threads), torch {first.torch}: {clock} without optimisers, beside its passes",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for row in rows:
        times = (row.forward_ms, row.predicted_ms, row.measured_ms)
        cells = (row.objective, row.form, f"{row.passes:g}", *(f"{v:.1f}" for v in times))
        lines.append(f"| {' | '.join((*cells, f'{row.measured_by_predicted:.2f}', f'{row.optimisers_ms:.1f}'))} |")
    return "\n".join(lines) + "\n"
