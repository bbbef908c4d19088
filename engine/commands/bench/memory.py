"""The memory of a teacher's training beside that of a distillation's two forms: `ipfm bench --memory`."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path

from ipfm.engine.commands.bench.memory_step import Kind, StepCase, StepRow
from ipfm.engine.runtime.launcher import VARIABLES
from ipfm.engine.runtime.progress import ProgressBar
from ipfm.engine.runtime.wording import size
from ipfm.models import NetworkConfig, presets

KINDS: tuple[Kind, ...] = ("teacher", "joint", "phased")
# What the project promises: a distillation in the memory of training the teacher, and plans that hold.
RATIO, TOLERANCE = 1.05, 0.1
STEPS, STEPS_QUICK = 2, 1
# glibc keeps blocks that were freed, and asks for larger ones the more it has seen: fixed, they go back at once.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def bench_network(model: str, channels: int | None = None) -> NetworkConfig:
    """The network to measure, without dropout.

    Args:
        model: a family ("ncsnpp", "ddpmpp": CIFAR-10's; "adm": ImageNet's) or a preset's name.
        channels: of the first level; None: as published.

    Raises:
        ValueError: the model is unknown, or cannot have so many channels.
    """
    network = replace(presets.get(model), dropout=0.0)
    if channels is None:
        return network
    try:
        return replace(network, model_channels=channels)
    except ValueError as error:
        raise ValueError(f"{model} cannot have {channels} channels: {error}") from error


def run_memory(
    out: Path | str,
    network: NetworkConfig,
    *,
    batch: int,
    checkpointed: bool = False,
    quick: bool = False,
    title: str = "",
) -> Path:
    """Measure one process's memory in a step of a teacher's training and in an iteration of a distillation, in fp32.

    Each row has a process of its own, so that its resident memory is its own too. On a GPU the allocator's statistics
    take the place of live tensors, and the resident memory is the host's.

    Args:
        out: folder for memory.csv, memory.md and a timeline-ROW.png for each row.
        network: architecture of all networks, without dropout.
        batch: images in a step, all at once.
        checkpointed: measure the two forms with activation checkpointing too.
        quick: one step a row instead of two.
        title: what the network is called in the table.

    Returns:
        Path of memory.csv.

    Raises:
        ValueError: the batch is not a whole number of at least 1.
        RuntimeError: a row's process failed; the message has the end of what it said.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be an integer >= 1, got {batch}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    cases = list(_cases(folder, network, batch, checkpointed, STEPS_QUICK if quick else STEPS))
    rows = []
    with ProgressBar("steps", len(cases), unit=" form") as bar:
        for case in cases:
            rows.append(_measure(case))
            bar.advance()
    path = folder / "memory.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(StepRow))
        writer.writerows(map(astuple, rows))
    name = f"{title or network.model_type}, {network.model_channels} channels, batch {batch}"
    path.with_suffix(".md").write_text(report(rows, name), encoding="utf-8")
    return path


def report(rows: Sequence[StepRow], title: str) -> str:
    """The table in Markdown, ratios to the row "teacher", and a line for each promise that is not kept."""
    teacher = next(row for row in rows if row.step == "teacher")
    header = ("step", "live", "resident", "predicted", "live / predicted", "live / teacher", "resident / teacher")
    lines = [f"Memory of {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    broken = []
    for row in rows:
        off = row.live_bytes / row.predicted_bytes - 1
        ratios = {"live": row.live_bytes / teacher.live_bytes, "resident": row.rss_bytes / max(1, teacher.rss_bytes)}
        cells = [row.step, *map(size, (row.live_bytes, row.rss_bytes, row.predicted_bytes)), f"{100 * off:+.1f} %"]
        lines.append(f"| {' | '.join([*cells, *(f'{ratio:.3f}' for ratio in ratios.values())])} |")
        if abs(off) > TOLERANCE:
            broken.append(f"{row.step}: measured {100 * off:+.1f} % of what was predicted, promised are 10 %")
        if row.step == "phased":
            broken += [
                f"phased: {ratio:.3f} times the {kind} memory of training the teacher, promised are {RATIO}"
                for kind, ratio in ratios.items()
                if ratio > RATIO
            ]
    return "\n".join([*lines, *(f"\nwarning: {line}" for line in broken)]) + "\n"


def _cases(folder: Path, network: NetworkConfig, batch: int, checkpointed: bool, steps: int) -> Iterator[StepCase]:
    forms: list[tuple[Kind, bool]] = [(kind, False) for kind in KINDS]
    forms += [(kind, True) for kind in KINDS[1:] if checkpointed]
    for kind, again in forms:
        name = f"{kind}-checkpointed" if again else kind
        picture = str((folder / f"timeline-{name}.png").resolve())
        yield StepCase(name, kind, network.to_json(), batch, again, steps, picture)


def _measure(case: StepCase) -> StepRow:
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES} | ALLOCATOR
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        command = [
            sys.executable,
            "-m",
            "ipfm.engine.commands.bench.memory_step",
            json.dumps(asdict(case)),
            str(result),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            # The last line of a traceback; torch says whose it is.
            lines = [line.removeprefix("[rank0]: ") for line in done.stderr.splitlines() if line.strip()]
            said = lines[-1][:300] if lines else ""
            killed = " (killed: perhaps out of memory)" if done.returncode == -9 else ""
            raise RuntimeError(f"the step {case.name} ended with {done.returncode}{killed}: {said}")
        return StepRow(**json.loads(result.read_text(encoding="utf-8")))
