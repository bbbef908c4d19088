"""Bar charts of the microbenchmarks: one PNG an operation, a bar a provider. Only this file needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ipfm.kernels.bench.machine import Machine
from ipfm.kernels.bench.report import TARGET_SHARE, Row, format_time

BAR = 0.13  # inches


def write_plots(folder: Path, rows: Sequence[Row], machine: Machine, *, gpu: bool) -> list[Path]:
    """Write micro-OP.png for every operation: share of the copy bandwidth by case, the time beside each bar.

    Wrong results have no bar. The dashed line is the target, which holds on GPUs.
    """
    return [
        _plot(folder / f"micro-{op}.png", op, [row for row in rows if row.op == op], machine, gpu=gpu)
        for op in dict.fromkeys(row.op for row in rows)
    ]


def _plot(path: Path, op: str, rows: list[Row], machine: Machine, *, gpu: bool) -> Path:
    # The import fails where this names a backend that is not installed, as a notebook's; files need none.
    os.environ.pop("MPLBACKEND", None)
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(_case(row) for row in rows))
    providers = list(dict.fromkeys(row.provider for row in rows))
    height = 1.6 + BAR * len(cases) * (len(providers) + 1)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    thickness = 1 / (len(providers) + 1)
    for number, provider in enumerate(providers):
        drawn = [row for row in rows if row.provider == provider and row.correct and row.share_of_copy is not None]
        places = [cases.index(_case(row)) + (number - (len(providers) - 1) / 2) * thickness for row in drawn]
        shares = [100 * (row.share_of_copy or 0.0) for row in drawn]
        bars = axes.barh(places, shares, height=thickness, label=provider, color=f"C{number}")
        axes.bar_label(bars, [f"{format_time(row.us_50)} µs" for row in drawn], padding=2, fontsize=6)
    if gpu:
        axes.axvline(100 * TARGET_SHARE[op], color="0.4", linestyle="--", linewidth=0.8, label="target")
    axes.set_yticks(range(len(cases)), cases, fontsize=7)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel("bandwidth of the bytes that must move, % of a copy of the same bytes")
    axes.set_title(f"{op} on {machine.device}, torch {machine.torch}, triton {machine.triton}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(providers) + 1, fontsize=7)
    figure.savefig(path, dpi=110)
    return path


def _case(row: Row) -> str:
    return " ".join(filter(None, (row.variant, row.shape, row.dtype, row.mode)))
