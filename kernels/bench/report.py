"""What a run of the microbenchmarks leaves: micro.csv, and micro.md with a table an operation and the targets."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from ipfm.kernels.bench.cases import LARGE
from ipfm.kernels.bench.machine import Machine
from ipfm.kernels.bench.providers import TRITON

# Share of the copy bandwidth that each operation should reach at 2^25 elements on an H200-class GPU.
TARGET_SHARE = {
    "perturb": 0.85,
    "ipfm_loss": 0.85,
    "denoising_loss": 0.85,
    "AdamEMA": 0.85,
    "group_norm_silu": 0.75,
}
TARGET_SPEEDUP = 4.0


@dataclass(frozen=True)
class Row:
    """One line of micro.csv; times in microseconds, bandwidths in GB/s of needed bytes; None where not measured."""

    op: str
    variant: str
    shape: str
    dtype: str
    elements: int
    mode: str
    provider: str
    needed_bytes: int
    copy_gb_per_s: float
    us_20: float | None = None
    us_50: float | None = None
    us_80: float | None = None
    gb_per_s: float | None = None
    share_of_copy: float | None = None
    moved_over_needed: float | None = None
    peak_mb: float | None = None
    error_over_allowed: float | None = None
    correct: bool = False
    speedup: float | None = None  # over eager
    speedup_over_compile: float | None = None
    note: str = ""


def write_csv(path: Path, rows: Sequence[Row], machine: Machine) -> None:
    """One line a row, each with the machine's columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in (*fields(Row), *fields(Machine))])
        writer.writerows((*astuple(row), *astuple(machine)) for row in rows)


def markdown(rows: Sequence[Row], machine: Machine, *, gpu: bool, quick: bool) -> str:
    """The tables, for people."""
    versions = [f"torch {machine.torch}", f"triton {machine.triton}"]
    versions += [f"driver {machine.driver}"] if machine.driver else []
    versions += [] if gpu else [f"{machine.threads} CPU thread{'s' if machine.threads > 1 else ''}"]
    lines = [
        f"# Kernel microbenchmarks on {machine.device}",
        "",
        ", ".join(versions) + (", quick run." if quick else "."),
        "",
        "Time: median, with the 20 and 80 % quantiles. Of copy: bandwidth of the bytes that must move, over that of a "
        "copy of as many bytes in the same run" + (", with cold caches." if gpu else ", with warm caches.") + " "
        "Moved: bytes moved over those that must move. Peak: memory beyond what was there before the call"
        + ("." if gpu else ", of PyTorch's operations.")
        + " No ratio is given for a result that differs from the float64 truth. Unsteady: the 80 % quantile is over "
        "1.5 times the 20 % one, as where other programs use the machine.",
    ]
    for op in dict.fromkeys(row.op for row in rows):
        lines += ["", f"## {op}", "", *_table(_COLUMNS, (r for r in rows if r.op == op))]
    lines += ["", "## Targets", ""]
    if gpu:
        lines += _table(_TARGET_COLUMNS, targets(rows))
    else:
        lines.append("The targets are for GPUs. On a CPU this run is a smoke test of the benchmark itself.")
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def format_time(value: float | None) -> str:
    """Microseconds, without an exponent."""
    return _number(value, ".1f" if value is not None and value < 100 else ".0f")


def _spread(row: Row) -> str:
    if row.us_50 is None:
        return ""
    return f"{format_time(row.us_50)} ({format_time(row.us_20)} to {format_time(row.us_80)})"


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "variant": lambda r: r.variant,
    "shape": lambda r: r.shape,
    "dtype": lambda r: r.dtype,
    "mode": lambda r: r.mode,
    "provider": lambda r: r.provider,
    "µs": _spread,
    "of copy": lambda r: _number(r.share_of_copy, ".0%"),
    "moved": lambda r: _number(r.moved_over_needed),
    "peak MB": lambda r: _number(r.peak_mb),
    "× eager": lambda r: _number(r.speedup),
    "× compile": lambda r: _number(r.speedup_over_compile),
    "note": lambda r: r.note.replace("|", "/"),
}


def _table(columns: dict[str, Callable[[Any], str]], items: Any) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(show(item) for show in columns.values())} |" for item in items]


# ---------------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """A target, whether it is met, the case that is farthest from it, and how many cases meet it."""

    op: str
    goal: str
    verdict: str
    worst: str
    cases: str


_TARGET_COLUMNS: dict[str, Callable[[Target], str]] = {
    "operation": lambda t: t.op,
    "target": lambda t: t.goal,
    "": lambda t: t.verdict,
    "worst": lambda t: t.worst,
    "cases that meet it": lambda t: t.cases,
}


def targets(rows: Sequence[Row]) -> Iterator[Target]:
    """The targets of every measured operation, judged by its Triton rows. A wrong result misses every target."""
    for op, share in TARGET_SHARE.items():
        mine = [row for row in rows if row.op == op and row.provider == TRITON]
        large = [row for row in mine if row.elements >= LARGE]
        if any(row.op == op for row in rows):
            yield _judge(op, f"≥ {share:.0%} of copy at ≥ 2^25 elements", large, lambda r: r.share_of_copy, share)
            yield _judge(op, f"≥ {TARGET_SPEEDUP:g} × eager", mine, lambda r: r.speedup, TARGET_SPEEDUP)
            yield _judge(op, "never slower than compile", mine, lambda r: r.speedup_over_compile, 1.0)


def _judge(op: str, goal: str, rows: list[Row], value: Callable[[Row], float | None], least: float) -> Target:
    found = [((value(row) if row.correct else 0.0), row) for row in rows]
    measured = [(v, row) for v, row in found if v is not None]  # None: the other provider failed
    if not measured:
        return Target(op, goal, "not measured", "", "0 of 0")
    worst, row = min(measured, key=lambda pair: pair[0])
    met = sum(v >= least for v, _ in measured)
    figure = "failed or wrong" if not row.correct else f"{worst:.0%}" if "copy" in goal else f"{worst:.3g} ×"
    where = " ".join(filter(None, (row.variant, row.shape, row.dtype, row.mode)))
    verdict = "met" if met == len(measured) else "**missed**"
    return Target(op, goal, verdict, f"{figure} ({where})", f"{met} of {len(measured)}")
