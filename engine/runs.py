"""A run from its folder to its exported network: what distillation and teacher training have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ipfm.engine.config import RunConfig
from ipfm.engine.loop import Progress, Task, train
from ipfm.engine.run_folder import RunFolder, check_run_folder, open_run_folder
from ipfm.models import Precond, save_model


class Exportable(Task, Protocol):
    """A task that ends in a network."""

    average: Precond


def execute(
    task: Exportable, config: RunConfig, path: Path, *, kind: str, facts: Mapping[str, Any], export: str,
    about: Mapping[str, Any],
) -> tuple[RunFolder, Progress]:  # fmt: skip
    """Train `task` in the run folder `path`, or continue it there, and export its averaged network.

    Args:
        task: what is trained.
        config: its settings.
        path: the run folder.
        kind: "distill" or "teacher".
        facts: what identifies the run besides `config`.
        export: name of the exported model's folder within the run folder.
        about: facts stored with the exported model, beside its settings and the number of steps.

    Returns:
        The folder, and where the loop ended.

    Raises:
        ValueError: the folder belongs to another run.
        TrainingFailed, Interrupted: from the loop.
    """
    world = task.world
    record = check_run_folder(path, kind, config, facts)
    # Every process has looked before the first one writes.
    world.barrier()
    folder = open_run_folder(path, record, write=world.first)
    world.barrier()
    progress = train(task, config, folder)
    task.refresh()
    if world.first:
        # Paths of this machine mean nothing to whoever gets the model.
        settings = {name: value for name, value in config.to_json().items() if name not in ("out", "teacher")}
        save_model(task.average, path / export, extra={**about, "optimizer_steps": progress.step, "config": settings})
    world.barrier()
    return folder, progress
