"""A run from its folder to its exported network: what distillation and teacher training have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ipfm.engine.config import RunConfig
from ipfm.engine.training.loop import Progress, Task, train
from ipfm.engine.training.run_folder import FREE, RunFolder, check_run_folder, open_run_folder
from ipfm.models import Precond, save_model

# Settings that say where and how a run was made, and nothing of its result: a model is the same whatever they are.
PLACE = FREE - {"max_steps", "kimg", "heun_steps", "tf32"}


class Exportable(Task, Protocol):
    """A task that ends in a network."""

    @property
    def average(self) -> Precond:
        """The averaged network of the last `refresh`."""
        ...


def run_training(
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
    folder = open_run_folder(path, record, write=world.is_main)
    world.barrier()
    progress = train(task, config, folder)
    export_network(task, config, path / export, about=about, steps=progress.step)
    return folder, progress


def export_network(task: Exportable, config: RunConfig, folder: Path, *, about: Mapping[str, Any], steps: int) -> None:
    """Store the averaged network of `task`, with the settings that it owes its weights to. Every process calls it.

    Args:
        task: what was trained.
        config: its settings.
        folder: where the model is stored; what is there is replaced.
        about: facts to store with it.
        steps: number of optimiser steps done.
    """
    task.refresh()
    if task.world.is_main:
        settings = {name: value for name, value in config.to_json().items() if name not in PLACE}
        save_model(task.average, folder, extra={**about, "optimizer_steps": steps, "config": settings})
    task.world.barrier()
