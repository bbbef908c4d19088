"""Pictures at the end of runs: of each kind the first is drawn, and is what later ones of the same process have too.

Drawing takes longer than a small run; what pictures show is looked at in tests/engine/training/test_monitor.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# By what is on them: which curves, and whether the teacher's line is.
PICTURES: dict[tuple[object, ...], bytes] = {}


@contextmanager
def convergence() -> Iterator[None]:
    """In the place of the curve of a distillation's distances, where that has been imported."""
    from_runs = sys.modules.get("ipfm.engine.training.distiller")
    if from_runs is None:
        yield
        return
    from ipfm.engine.evaluation.results import Curve

    draw = from_runs.plot_convergence

    def plot(
        history: Sequence[tuple[int, float]],
        teacher: float | None,
        path: Path,
        title: str,
        metric: str,
        others: Sequence[Curve],
    ) -> None:
        curves = [Curve(history, teacher, metric), *others]
        kind = tuple((curve.is_finite, curve.teacher is None, curve.name) for curve in curves)
        if kind not in PICTURES:
            draw(history, teacher, path, title, metric, others)
            PICTURES[kind] = path.read_bytes()
        path.write_bytes(PICTURES[kind])

    from_runs.plot_convergence = plot  # type: ignore[attr-defined]
    try:
        yield
    finally:
        from_runs.plot_convergence = draw  # type: ignore[attr-defined]
