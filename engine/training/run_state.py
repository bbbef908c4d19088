"""The state of a run, read from its folder: how far it is, what it has measured, where its network is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ipfm.engine.checks import number
from ipfm.engine.evaluation.results import EvaluationHistory, EvaluationRow, read_results
from ipfm.engine.runtime.files import StepLog, read_json
from ipfm.engine.training.checkpoint import checkpoints_in
from ipfm.engine.training.run_folder import folder_user
from ipfm.models.store import CONFIG_FILE

# The exported network of each kind of run.
EXPORTS = {"distill": "generator", "teacher": "model"}


@dataclass(frozen=True)
class RunState:
    """What a run folder tells. Nothing in it is verified: a run that continues there does that."""

    kind: Literal["distill", "teacher"]
    state: Literal["finished", "running", "stopped"]
    """running: a process of this machine uses the folder; stopped: the same command continues."""
    steps_done: int
    """Those that are recorded."""
    steps_total: int | None
    """None where the folder does not say."""
    checkpoint: Path | None
    """The newest one."""
    checkpoint_step: int | None
    distances: list[tuple[int, float]]
    """(step, Fréchet distance of the average); a distance that was not finite is NaN."""
    metric: str
    """What the distance is called."""
    results: list[EvaluationRow]
    """The table at the end."""
    last: dict[str, Any]
    """The last line of metrics.jsonl."""
    network: Path | None
    """Where the exported network is: a generator, or a teacher."""
    objective: str | None
    """Kind of a distillation's objective; None of a teacher's training, and where an older folder does not say."""
    config: dict[str, Any]
    """The settings."""


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a distillation or of a teacher's training."""
    return (read_json(path / CONFIG_FILE) or {}).get("kind") in EXPORTS


def read_run(path: Path) -> RunState:
    """The state of the run in `path`.

    Raises:
        ValueError: there is none.
        OSError: it cannot be read.
    """
    record = read_json(path / CONFIG_FILE) or {}
    kind, config = record.get("kind"), record.get("config")
    if kind not in EXPORTS or not isinstance(config, dict):
        raise ValueError(f"{path} holds no run: no {CONFIG_FILE} that says distill or teacher")
    checkpoint = newest_checkpoint(path)
    saved = None if checkpoint is None else step_of(checkpoint)
    lines = StepLog(path / "metrics.jsonl", None).read()
    last = lines[-1] if lines else {}
    done = max(saved or 0, last.get("step", -1) + 1)
    network = path / EXPORTS[kind]
    exported = (read_json(network / CONFIG_FILE) or {}).get("extra")
    total = total_steps(config)
    over = isinstance(exported, dict) and total is not None and exported.get("optimizer_steps", 0) >= total
    results = read_results(path)
    return RunState(
        kind=kind,
        state="running" if folder_user(path) else "finished" if over else "stopped",
        steps_done=done,
        steps_total=total,
        checkpoint=checkpoint,
        checkpoint_step=saved,
        distances=EvaluationHistory(path).points,
        metric=results[0].metric if results else "Fréchet distance",
        results=results,
        last=last,
        network=network if isinstance(exported, dict) else None,
        objective=record.get("objective"),
        config=config,
    )


def newest_checkpoint(path: Path) -> Path | None:
    """Of the run in `path`; whether it is whole is not looked at."""
    return next(iter(checkpoints_in(path / "checkpoints")), None)


def step_of(checkpoint: Path) -> int:
    """The number of steps that its name says."""
    return int(checkpoint.name.rpartition("-")[2])


def total_steps(config: Mapping[str, Any]) -> int | None:
    """Optimiser steps of the whole run, as `RunConfig.total_steps`; None where the settings do not say."""
    steps, kimg, batch = (number(config.get(name)) for name in ("max_steps", "kimg", "batch"))
    if math.isfinite(steps):
        return int(steps)
    return max(1, math.ceil(kimg * 1000 / batch)) if math.isfinite(kimg) and batch > 0 else None
