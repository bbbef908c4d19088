"""Microbenchmarks of the kernels: time, bandwidth against a copy of the same bytes, traffic and peak memory.

`run_microbenchmarks` writes micro.csv, micro.md and a plot an operation. A provider whose results fail the comparison
with a float64 truth is listed with its times and without a speed-up.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch._functorch.config

from ipfm.kernels.bench import machine, report
from ipfm.kernels.bench.cases import Case, cases
from ipfm.kernels.bench.measurement import (
    allocator_peak,
    copy_quantiles,
    error_over_allowed,
    quantiles,
    unsteady,
    watched,
)
from ipfm.kernels.bench.plots import write_plots
from ipfm.kernels.bench.providers import COMPILE, EAGER, TRITON, Run, graph_breaks
from ipfm.kernels.bench.report import Row


def measure(case: Case, device: torch.device, quick: bool, providers: Sequence[str] = ()) -> list[Row]:
    """The lines of a case, by mode, the eager reference first; `providers`: these alone."""
    truth = cache(case.workload.truth)
    copies = {mode: copy_quantiles(moved.needed, device, quick) for mode, moved in case.bytes.items()}
    rows: list[Row] = []
    for provider in case.workload.providers():
        if providers and provider not in providers:
            continue
        blanks = [
            Row(
                op=case.op,
                variant=case.variant,
                shape=case.shape,
                dtype=str(case.dtype).removeprefix("torch."),
                elements=case.elements,
                mode=mode,
                provider=provider,
                needed_bytes=moved.needed,
                copy_gb_per_s=1e-3 * moved.needed / copies[mode][1],
                note="unsteady copy" if unsteady(copies[mode]) else "",
            )
            for mode, moved in case.bytes.items()
        ]
        try:
            runs = case.workload.prepare(provider)
        except Exception as error:  # a provider that cannot run is a line in the table, not the end of it
            rows += [replace(row, note=_reason(error)) for row in blanks]
            continue
        for row in blanks:
            try:
                rows.append(_measured(row, case, runs[row.mode], truth(row.mode), device, quick))
            except Exception as error:
                rows.append(replace(row, note=_reason(error)))
    return sorted(_compared(rows), key=lambda row: list(case.bytes).index(row.mode))


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _measured(row: Row, case: Case, run: Run, truth: object, device: torch.device, quick: bool) -> Row:
    error = error_over_allowed(run.result(), truth)
    moved, peak = None, None
    if row.provider != COMPILE:  # whose code PyTorch's operations do not show
        watch = watched(run.call)
        moved = watch.moved + (case.bytes[row.mode].kernel if row.provider == TRITON else 0)
        peak = watch.peak
    if device.type == "cuda":
        peak = allocator_peak(run.call, device)
    times = quantiles(run.call, device, quick)
    low, middle, high = times
    speed = 1e-3 * row.needed_bytes / middle
    breaks = graph_breaks() if row.provider == COMPILE else 0
    notes = [f"error {error:.3g} times what is allowed"] if error > 1 else []
    notes += ["unsteady time"] if unsteady(times) else []
    notes += [row.note] if row.note else []
    notes += [f"{breaks} graph break{'s' if breaks > 1 else ''}"] if breaks else []
    return replace(
        row,
        us_20=low,
        us_50=middle,
        us_80=high,
        gb_per_s=speed,
        share_of_copy=speed / row.copy_gb_per_s,
        moved_over_needed=None if moved is None else moved / row.needed_bytes,
        peak_mb=None if peak is None else peak / 2**20,
        error_over_allowed=error,
        correct=error <= 1,
        note=", ".join(notes),
    )


def _compared(rows: list[Row]) -> Iterator[Row]:
    """The rows of a case with their speed-ups, of right results over right results."""
    times = {(row.mode, row.provider): row.us_50 for row in rows if row.correct}
    for row in rows:
        mine = times.get((row.mode, row.provider))

        def over(provider: str, row: Row = row, mine: float | None = mine) -> float | None:
            other = times.get((row.mode, provider))
            return other / mine if mine is not None and other is not None else None

        yield replace(row, speedup=over(EAGER), speedup_over_compile=over(COMPILE))


def run_microbenchmarks(out: str | Path, quick: bool = False) -> Path:
    """Measure on the CUDA device if there is one, else on the CPU (eager and compiled: Triton needs the device).

    Writes micro.csv, micro.md and micro-OP.png. Says on standard error what is being measured: on a CPU all of it takes
    some ten minutes.

    Args:
        out: folder to write into; it is made where it is missing.
        quick: fewer cases and shorter measurements, about a minute on a CPU.

    Returns:
        The path of the CSV file.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    # The backward pass is repeated on one graph, which must then keep what it saved.
    with torch._functorch.config.patch(donated_buffer=False):
        for case in cases(device, quick):
            print(f"{case.op} {case.variant} {case.shape} {case.dtype}", file=sys.stderr, flush=True)
            rows += measure(case, device, quick)
    here, gpu = machine.describe(device), device.type == "cuda"
    path = folder / "micro.csv"
    report.write_csv(path, rows, here)
    path.with_suffix(".md").write_text(report.markdown(rows, here, gpu=gpu, quick=quick), encoding="utf-8")
    write_plots(folder, rows, here, gpu=gpu)
    return path
