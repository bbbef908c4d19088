"""The training loop that distillation and teacher training share: log, evaluate, checkpoint, resume, stop."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from ipfm.engine.checkpoint import load_checkpoint, save_checkpoint
from ipfm.engine.config import RunConfig
from ipfm.engine.launcher import Launcher
from ipfm.engine.measure import Measured
from ipfm.engine.metrics import FrechetResult
from ipfm.engine.monitor import Monitor
from ipfm.engine.report import EvaluationHistory
from ipfm.engine.run_folder import RunFolder
from ipfm.engine.zero import TrainedNetwork, World

PICTURE_IMAGES = 64
PICTURE_SEED = 20_000


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says why and where to continue."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived and the state is saved. `signum` is the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}, state saved")
        self.signum = signum


class Task(Protocol):
    """What the loop trains."""

    title: str
    world: World
    first_step: int
    """Where a run without a checkpoint starts: 0, or the steps done before by other means."""

    @property
    def networks(self) -> Mapping[str, TrainedNetwork]:
        """What is saved in a checkpoint, by name."""
        ...

    def iteration(self, step: int) -> Measured:
        """One step of training; `step` counts from 0."""
        ...

    def refresh(self) -> None:
        """Bring the averaged network up to date, on every process."""
        ...

    def evaluate(self) -> FrechetResult | None:
        """Fréchet distance of the averaged network; None without a reference."""
        ...

    def picture(self, count: int, seed: int) -> Tensor:
        """Images of the averaged network from fixed latents, (count, C, H, W) in [-1, 1]."""
        ...


@dataclass
class Progress:
    """Where the loop stands; also what it leaves behind."""

    step: int
    last: FrechetResult | None = None
    bad_steps: int = 0
    bad_networks: Counter[str] = field(default_factory=Counter)
    saved_at: int = -1
    pending: list[tuple[int, Measured]] = field(default_factory=list)


def train(task: Task, config: RunConfig, folder: RunFolder) -> Progress:
    """Run `task` from the folder's checkpoint (or its first step) to `config.total_steps`.

    Raises:
        TrainingFailed: more than `max_bad_steps` steps had non-finite samples or gradients.
        Interrupted: a signal stopped the run; a checkpoint was written.
    """
    world, total = task.world, config.total_steps
    progress = Progress(task.first_step)
    if folder.checkpoint is not None:
        progress.step = load_checkpoint(folder.checkpoint, task.networks)
        progress.saved_at = progress.step
    if progress.step >= total:
        return progress
    if world.first:
        # The table of an earlier, shorter part of the run no longer holds.
        (folder.path / "results.json").unlink(missing_ok=True)

    monitor = Monitor(
        folder.path,
        title=task.title,
        total_steps=total,
        first_step=progress.step,
        batch_size=config.batch,
        enabled=world.first,
    )
    history = EvaluationHistory(folder.path, progress.step) if world.first else None

    def checkpoint() -> None:
        if progress.saved_at != progress.step:
            with monitor.paused():
                save_checkpoint(folder.checkpoints, progress.step, task.networks, world, keep=config.keep_checkpoints)
            progress.saved_at = progress.step

    launcher = Launcher(world.launched)
    with _signals() as received, monitor:
        if folder.checkpoint is not None:
            monitor.message(f"continuing at step {progress.step} from {folder.checkpoint}")
        while progress.step < total:
            progress.pending.append((progress.step, task.iteration(progress.step)))
            progress.step += 1
            finished = progress.step == total
            due = _due(progress.step, config.checkpoint_every) or finished
            look = _due(progress.step, config.eval_every) or finished
            if not (due or look or _due(progress.step, config.log_every)):
                continue
            told = signal.SIGTERM if launcher.gone() else 0
            stop = _report(progress, world, monitor, received.get("signum", told))
            if progress.bad_steps > config.max_bad_steps:
                raise TrainingFailed(_too_bad(progress, config, folder))
            if look and not stop:
                with monitor.paused():
                    _look(task, progress, monitor, history)
            if due or stop:
                checkpoint()
            if stop and not finished:
                raise Interrupted(stop)
    return progress


def _report(progress: Progress, world: World, monitor: Monitor, signum: int) -> int:
    """Bring the pending measurements of all processes to the host in one transfer and log them.

    Returns:
        The signal that some process received, or 0.
    """
    names = list(progress.pending[0][1].sums)
    bad_names = list(progress.pending[0][1].bad)
    rows = [
        torch.stack(
            [m.sums[n].double() for n in names]
            + [m.counts[n].double() for n in names]
            + [m.bad[n].double() for n in bad_names]
        )
        for _, m in progress.pending
    ]
    table = world.sum_(torch.stack(rows)).tolist()
    stop = int(world.max_(torch.tensor(signum, device=rows[0].device)))
    values: dict[str, float] = {}
    for (step, _), row in zip(progress.pending, table, strict=True):
        sums, counts, bad = row[: len(names)], row[len(names) : 2 * len(names)], row[2 * len(names) :]
        values = {n: s / c if c else float("nan") for n, s, c in zip(names, sums, counts, strict=True)}
        values |= {f"{n}_bad": b for n, b in zip(bad_names, bad, strict=True)}
        progress.bad_steps += any(b > 0 for b in bad)
        progress.bad_networks.update(n for n, b in zip(bad_names, bad, strict=True) if b > 0)
        monitor.record(step, values)
    monitor.flush()
    monitor.advance(progress.step - 1, {n: values[n] for n in names})
    progress.pending.clear()
    return stop


def _look(task: Task, progress: Progress, monitor: Monitor, history: EvaluationHistory | None) -> None:
    task.refresh()
    result = task.evaluate()
    images = task.picture(PICTURE_IMAGES, PICTURE_SEED)
    monitor.image(progress.step, images)
    if result is not None:
        progress.last = result
        monitor.scalar(progress.step, "frechet", result.distance)
        monitor.message(f"step {progress.step}: {result.name} {result.distance:.4f}")
        if history is not None:
            history.add(progress.step, result.distance, images=result.images, seconds=round(result.seconds, 3))


def _too_bad(progress: Progress, config: RunConfig, folder: RunFolder) -> str:
    networks = ", ".join(f"{name} in {count}" for name, count in progress.bad_networks.items())
    where = (
        f"its checkpoint of step {progress.saved_at}" if progress.saved_at >= 0 else "the start, it has no checkpoint"
    )
    return (
        f"{progress.bad_steps} steps up to step {progress.step} had non-finite samples or gradients ({networks}; "
        f"max-bad-steps is {config.max_bad_steps}): {folder.path} can be continued from {where}"
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _signals() -> Iterator[dict[str, int]]:
    """Note SIGINT and SIGTERM instead of dying; a second one acts as it normally does."""
    received: dict[str, int] = {}
    previous: dict[int, Any] = {}
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread alone
        return

    def note(signum: int, _frame: FrameType | None) -> None:
        received["signum"] = signum
        signal.signal(signum, previous[signum])

    for one in (signal.SIGINT, signal.SIGTERM):
        previous[one] = signal.signal(one, note)
    try:
        yield received
    finally:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, previous[one])
