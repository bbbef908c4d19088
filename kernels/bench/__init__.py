"""Benchmarks of the kernels: `python -m ipfm.kernels.bench [--offline] [--out DIR] [--quick]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .micro import run_microbenchmarks
from .offline import run_offline

__all__ = ["main", "run_microbenchmarks", "run_offline"]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the microbenchmarks, or with --offline the compile report, and prints the table and where it went."""
    parser = argparse.ArgumentParser(prog="python -m ipfm.kernels.bench", description=__doc__)
    parser.add_argument("--offline", action="store_true", help="compile for sm_80, sm_90 and sm_100 without a GPU")
    parser.add_argument(
        "--out", default="runs/bench", help="folder of the CSV and Markdown files (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and shorter measurements")
    options = parser.parse_args(argv)
    run = run_offline if options.offline else run_microbenchmarks
    path = run(options.out, quick=options.quick)
    print(path.with_suffix(".md").read_text())
    print(path)
