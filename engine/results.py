"""The end of a distillation: the generator's table line beside the teacher's, and the curve that led there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ipfm.engine.evaluation import Evaluation
from ipfm.engine.metrics import FrechetResult
from ipfm.engine.report import (
    EvaluationHistory,
    EvaluationRow,
    plot_convergence,
    read_results,
    write_results,
)
from ipfm.engine.samplers import evaluations
from ipfm.engine.teacher_training import evaluate_teacher

if TYPE_CHECKING:
    from ipfm.engine.trio import Distiller


def conclude(
    distiller: Distiller, folder: Path, evaluation: Evaluation, last: FrechetResult | None
) -> list[EvaluationRow]:
    """Write results.txt, results.json and convergence.png into the run folder; every process calls it.

    Args:
        distiller: a distillation at its end.
        folder: its run folder.
        evaluation: what samples are measured against.
        last: the generator's distance at the end; None when nothing was trained, then a table that is there stands.

    Returns:
        The rows of the table: teacher, generator.
    """
    known = read_results(folder)
    if known and last is None:
        return known
    config = distiller.config
    teacher = evaluate_teacher(distiller.teacher, evaluation, distiller.world, D=distiller.D, steps=config.heun_steps)
    generator = last or distiller.evaluate()
    assert generator is not None
    # A published figure is an FID: nothing else compares with it.
    published = None
    if teacher.name == "FID":
        published = distiller.objective.published(distiller.dataset).get(distiller.D)
    rows = [
        _row(
            "teacher",
            None,
            evaluations(config.heun_steps, "heun"),
            teacher,
            f"FID {published.teacher_fid:g}" if published and published.teacher_fid else None,
        ),
        _row("generator", distiller.objective.nfe, distiller.objective.nfe, generator, published and str(published)),
    ]
    if distiller.world.first:
        write_results(folder, rows)
        points = EvaluationHistory(folder).points
        plot_convergence(points, teacher.distance, folder / "convergence.png", distiller.title, teacher.name)
    distiller.world.barrier()
    return rows


def _row(label: str, steps: int | None, nfe: int, result: FrechetResult, paper: str | None) -> EvaluationRow:
    return EvaluationRow(
        label, steps, nfe, result.distance, result.images, result.images_per_second, paper, result.name
    )
