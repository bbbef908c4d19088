"""`ipfm bench`: the kernels, measured or compiled offline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ipfm.engine.commandline import user_input


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure the kernels or the metrics, or compile the kernels for GPUs that are not here.

    Example: ipfm bench --offline --out build/bench
    """

    out: Path = Path("bench")
    """Folder for the tables."""
    offline: bool = False
    """Compile every kernel for sm_80, sm_90 and sm_100 and report registers, spills and access widths; needs no GPU."""
    metrics: bool = False
    """Measure FID, KID, Inception score, precision and recall on 50 000 random features of 2048 dimensions."""
    quick: bool = False
    """Small shapes and few repetitions."""

    def run(self) -> None:
        """Write the tables to `out` and print a summary."""
        from ipfm.engine.metrics.bench import run_metrics
        from ipfm.kernels import bench

        with user_input():
            if self.offline and self.metrics:
                raise ValueError("offline and metrics exclude each other: give one of them")
            self.out.mkdir(parents=True, exist_ok=True)
        run = run_metrics if self.metrics else bench.run_offline if self.offline else bench.run_microbenchmarks
        table = run(self.out, quick=self.quick)
        print(table.with_suffix(".md").read_text(encoding="utf-8"))
        print(table)
