"""Benchmarks of the kernels: `python -m ipfm.kernels.bench [--offline] [--out DIR] [--quick]`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from ipfm.kernels.bench.compile_report import run_offline
from ipfm.kernels.bench.fake_driver import Launch
from ipfm.kernels.bench.instruction_count import run_floor
from ipfm.kernels.bench.micro import run_microbenchmarks
from ipfm.kernels.bench.rehearsal import report_rows

__all__ = ["main", "run_compiled", "run_floor", "run_microbenchmarks", "run_offline"]


def run_compiled(out: str | Path, *, quick: bool = False, launches: Iterable[Launch] = ()) -> list[Path]:
    """What needs no GPU: the compile report and the instruction count.

    Args:
        out: folder to write into.
        quick: fewer variants, and the instruction count for sm_90 alone.
        launches: as they were recorded, whose variants are compiled too.

    Returns:
        The paths of floor.csv and offline.csv.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where nothing is compiled.
    """
    launched = list(launches)
    report = run_offline(out, quick=quick, further=lambda arch: report_rows(launched, arch))
    return [run_floor(out, ("sm_90",)) if quick else run_floor(out), report]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the microbenchmarks, or with --offline the compile report and the instruction count of perturb.

    Prints the tables and where they went.
    """
    parser = argparse.ArgumentParser(prog="python -m ipfm.kernels.bench", description=__doc__)
    parser.add_argument("--offline", action="store_true", help="compile for sm_80, sm_90 and sm_100 without a GPU")
    parser.add_argument(
        "--out", default="runs/bench", help="folder of the CSV and Markdown files (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and shorter measurements")
    options = parser.parse_args(argv)
    if options.offline:
        paths = run_compiled(options.out, quick=options.quick)
    else:
        paths = [run_microbenchmarks(options.out, quick=options.quick)]
    for path in paths:
        print(path.with_suffix(".md").read_text(encoding="utf-8"))
    for path in paths:
        print(path)
