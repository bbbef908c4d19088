"""The training loop that distillation and teacher training share: log, evaluate, checkpoint, resume, stop."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch

from ipfm.engine.config import RunConfig
from ipfm.engine.distributed.agreement import attempt
from ipfm.engine.distributed.signals import SignalFlag, StopRequested, catching_signals
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.metrics import FrechetResult
from ipfm.engine.evaluation.metrics.measures import notes
from ipfm.engine.evaluation.results import EvaluationHistory, forget_results, is_better
from ipfm.engine.memory.watch import MemoryWatch
from ipfm.engine.objectives.phases import Phase, listening
from ipfm.engine.runtime import peers
from ipfm.engine.runtime.errors import Interrupted, ProcessLost, TrainingFailed, described
from ipfm.engine.runtime.host_memory import refuses_memory
from ipfm.engine.runtime.launcher import Launcher, lost_process
from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.checkpoint import checkpoints_in, find_checkpoint, forget_after, load_checkpoint
from ipfm.engine.training.checkpoint_writer import CheckpointFailed, CheckpointWriter
from ipfm.engine.training.environment import attention_taken, log_start
from ipfm.engine.training.machine_folders import seen_elsewhere
from ipfm.engine.training.monitor import COMPARISON_FILE, Monitor, picture_path, pictures_in
from ipfm.engine.training.run_folder import RunFolder, identity
from ipfm.engine.training.run_state import FAILED_FILE, write_divergence
from ipfm.engine.training.set_aside import forgotten
from ipfm.engine.training.snapshots import Snapshots, best_said
from ipfm.engine.training.task import NotFinite, Progress, StepFailed, Task
from ipfm.models.atomic_files import atomic_write

__all__ = ["Interrupted", "ProcessLost", "Progress", "Task", "TrainingFailed", "train"]

PICTURE_IMAGES = 64
PICTURE_SEED = 20_000
# The processes talk at least this often about signals: a scheduler that sends one gives some 30 s.
SECONDS_TO_NOTICE = 10.0
# In the run folder: where in the code a run failed, for whoever mends it.
TRACEBACK = "traceback.txt"
# What is no defect of the code, and needs no traceback.
PLAIN = (OSError, ValueError, MemoryError, StepFailed, torch.OutOfMemoryError)

T = TypeVar("T")


def train(task: Task, config: RunConfig, folder: RunFolder) -> Progress:
    """Run `task` from the folder's newest whole checkpoint (or its first step) to `config.total_steps`.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP, to any of the processes, save and stop; so does the end of the launcher. An
    evaluation or a picture that fails is a warning.

    Raises:
        TrainingFailed: more than `max_bad_steps` steps had non-finite samples or gradients; a checkpoint could not be
            written or read, or the logs not be opened; or whatever else was raised, after the state has been saved. On
            every process, unless it is `alone`: then the others lose this one.
        ProcessLost: another process has ended, or has not answered for the time of IPFM_TIMEOUT.
        Interrupted: a signal stopped the run; a checkpoint was written.
    """
    world = task.world
    peers.describe_way_on(lambda: f"{_way_on(folder)}{_best_of(folder)}")
    with catching_signals(Launcher(world.launched)) as noted, _failures(folder):
        found = find_checkpoint(folder.checkpoints, config.from_step) if world.is_main else None
        name = world.broadcast_text("" if found is None else found.name)
        checkpoint = folder.checkpoints / name if name else None
        progress = Progress(task.first_step)
        if checkpoint is not None:
            try:
                progress.step = load_checkpoint(checkpoint, task.networks)
            except ValueError as error:
                raise TrainingFailed(str(error)) from error
            progress.saved_at = progress.step
        reached = progress.step <= config.total_steps
        # What came after a step that is gone back to is put aside, its result too, also where this step is the last.
        gone_back = config.from_step is not None and progress.step == config.total_steps
        evaluation_due = (
            checkpoint is not None and reached and (gone_back or _look_is_missing(progress.step, config, folder, world))
        )
        if progress.step >= config.total_steps and not evaluation_due:
            return progress
        return _Run(task, config, folder, progress, checkpoint, noted).run(evaluation_due)


class _Run:
    """One part of a run: from a start or a checkpoint to the end or an interruption."""

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        folder: RunFolder,
        progress: Progress,
        checkpoint: Path | None,
        noted: SignalFlag,
    ) -> None:
        self.task, self.config, self.folder, self.progress = task, config, folder, progress
        self.world, self.checkpoint, self.noted = task.world, checkpoint, noted
        self.writer = CheckpointWriter(
            folder.checkpoints,
            self.world,
            keep=config.keep_checkpoints,
            background=config.async_checkpoints,
            last=checkpoint,
        )
        reason = ""
        try:
            self.monitor, self.history = self._logs()
            if self.world.device.type == "cuda":
                self.monitor.message(
                    "attention: {}, {}".format(*attention_taken(config.attention_backend, self.world.device))
                )
            self.snapshots = Snapshots(task, config, folder.path, folder.kind, self.monitor.message)
            self.snapshots.resume(progress.step, self.history, go_back=config.from_step is not None)
            aside = forgotten(folder.path) if self.world.is_main else ()
            if config.from_step is not None:
                for one in aside:
                    self.monitor.message(f"put aside, {one.in_words()}; --out {one.path} goes on from its end")
        except OSError as error:
            reason = described(error)
        if reason := self.world.broadcast_text(reason):
            raise TrainingFailed(f"the logs in {folder.path} cannot be written ({reason})")
        self.watch = MemoryWatch(
            task, config.profile_memory, folder.path, self.monitor.message, first=config.planned_step
        )
        # When the processes talk next: soon, so that they know how long a step takes.
        self._exchange_at = progress.step + 1
        self._since = 0.0
        self._updating = False
        self._averages = config.average_names

    def _logs(self) -> tuple[Monitor, EvaluationHistory | None]:
        path, first = self.folder.path, self.progress.step
        if self.world.is_main:
            if self.config.from_step is not None:
                forget_after(self.folder.checkpoints, first)
                for step, picture in pictures_in(path):
                    if step > first:
                        picture.unlink(missing_ok=True)
            # The table of an earlier, shorter part of the run no longer holds.
            forget_results(path)
            (path / COMPARISON_FILE).unlink(missing_ok=True)
            for left in (path / FAILED_FILE, *path.glob("traceback*.txt")):
                left.unlink(missing_ok=True)
            graphs = getattr(self.task, "captures", False)
            log_start(path, first, self.world, self.config.attention_backend, graphs=graphs)
        monitor = Monitor(
            path,
            title=self.task.title,
            total_steps=self.config.total_steps,
            first_step=first,
            batch_size=self.config.batch,
            enabled=self.world.is_main,
            readings=self.config.readings,
            settings=identity(self.config),
            metrics=self.task.metrics,
        )
        return monitor, EvaluationHistory(path, first) if self.world.is_main else None

    def run(self, evaluation_due: bool) -> Progress:
        """To the end; `evaluation_due`: the evaluation at the checkpoint is still to be made."""
        try:
            with self.monitor, listening(self._hear):
                try:
                    self._train(evaluation_due)
                except (Interrupted, TrainingFailed, CheckpointFailed):
                    raise
                except Exception as error:
                    if lost_process(error):
                        raise
                    raise self._failed(error) from error
        finally:
            self.writer.settle()
            self.snapshots.settle()
        return self.progress

    def _train(self, evaluation_due: bool) -> None:
        config, progress = self.config, self.progress
        total = config.total_steps
        if self.checkpoint is not None:
            self.monitor.message(f"continuing at step {progress.step} from {self.checkpoint}")
        if config.from_step is not None:
            self.monitor.message("went back to this step: leave --from-step out to resume afterwards")
        if evaluation_due:
            self._stop(self._evaluate())
        self._since = time.perf_counter()
        while progress.step < total:
            progress.pending.append((progress.step, self.watch.iteration(progress.step)))
            progress.step += 1
            peers.passed()
            self._updating = False
            finished = progress.step == total
            due = _due(progress.step, config.checkpoint_every) or finished
            look = _due(progress.step, config.eval_every) or finished
            log = _due(progress.step, config.log_every) or progress.step >= self._exchange_at
            snapshot = self.snapshots.due(progress.step)
            if not (due or look or log or snapshot):
                continue
            stop = self._log_pending()
            looked = look and not stop
            if looked:
                stop = self._evaluate()
            if snapshot:
                self._take_snapshot(refreshed=looked)
            if due:
                self._save()
            self._stop(stop)
            self._since = time.perf_counter()
        self.writer.wait()

    def _hear(self, phase: Phase) -> None:
        """Between the first optimiser of a step and its end the networks are those of no step."""
        self._updating = self._updating or phase.endswith("optimiser")

    def _failed(self, error: Exception) -> TrainingFailed:
        """What ends the run, once the state is saved, as far as it can be."""
        world, progress = self.world, self.progress
        text = described(error)
        if refuses_memory(error):
            text += "; a smaller --micro-batch, or --activation-checkpointing on, needs less memory"
        elif not isinstance(error, PLAIN):
            text += self._trace(error)
        # Where one process fails alone the others wait for it in the step, and cannot help to save.
        alone = world.size > 1 and not isinstance(error, StepFailed)
        saved = ""
        if not (alone or self._updating or progress.step == self.task.first_step):
            saved = self._saved()
        if not alone:
            return TrainingFailed(f"{text}{saved}: {_way_on(self.folder)}")
        # Which it is only the first process knows, which may still be writing one.
        way_on = f"the same command continues {self.folder.path} from its last checkpoint"
        failed = TrainingFailed(f"process {world.rank} of {world.size}: {text}: {way_on}")
        failed.alone = True
        return failed

    def _saved(self) -> str:
        """Save what there is after an error, and say how that went."""
        # Losses that cannot be read are no reason to lose the state too.
        with suppress(Exception):
            if self.progress.pending:
                self._log_pending()
        try:
            self._save()
            self.writer.wait()
        except Exception as error:
            return f"; and the state could not be saved ({described(error)})"
        return "; the state is saved"

    def _trace(self, error: Exception) -> str:
        """Leave the traceback in the run folder; where it is."""
        path = self.folder.path / TRACEBACK
        if not self.world.is_main:
            path = path.with_stem(f"{path.stem}-{self.world.rank}")
        with suppress(OSError):
            with atomic_write(path) as file:
                file.write("".join(traceback.format_exception(error)).encode())
            return f" ({path})"
        return ""

    def _log_pending(self) -> int:
        """Bring the pending measurements of all processes to the host in one transfer and log them.

        Returns:
            The signal that some process received, or 0.
        """
        progress, monitor, config = self.progress, self.monitor, self.config
        # Not every network is trained in every step.
        names = list(dict.fromkeys(n for _, m in progress.pending for n in m.sums))
        bad_names = list(dict.fromkeys(n for _, m in progress.pending for n in m.bad))
        none = torch.zeros((), dtype=torch.float64, device=self.world.device)
        rows = [
            torch.stack(
                [m.sums.get(n, none).double() for n in names]
                + [m.counts.get(n, none).double() for n in names]
                + [m.bad.get(n, none).double() for n in bad_names]
            )
            for _, m in progress.pending
        ]
        table = self.world.all_reduce_sum_(torch.stack(rows)).tolist()
        # All decide alike, from the slowest process's time.
        seconds = (time.perf_counter() - self._since) / len(rows)
        own = [float(self.noted.signum), float(self.writer.failed), seconds]
        stop, failed, seconds = self.world.all_reduce_max_(
            torch.tensor(own, dtype=torch.float64, device=self.world.device)
        ).tolist()
        if stop:
            peers.taken_up()
        self._exchange_at = progress.step + max(1, min(config.log_every, int(SECONDS_TO_NOTICE / max(seconds, 1e-9))))
        values: dict[str, float] = {}
        shown: dict[str, float] = {}
        rates: Mapping[str, float] = {}
        for (step, measured), row in zip(progress.pending, table, strict=True):
            sums, counts, bad = row[: len(names)], row[len(names) : 2 * len(names)], row[2 * len(names) :]
            losses = zip(names, sums, counts, strict=True)
            values = {n: s / c if c else float("nan") for n, s, c in losses if n in measured.sums}
            shown = dict(values)
            values |= {f"{n}_bad": b for n, b in zip(bad_names, bad, strict=True) if n in measured.bad}
            rates = config.changing_rates(step)
            values |= rates
            progress.bad_steps += any(b > 0 for b in bad)
            progress.bad_networks.update(n for n, b in zip(bad_names, bad, strict=True) if b > 0)
            monitor.record(step, values)
        monitor.flush()
        self.snapshots.report()
        for name, network in self.task.networks.items():
            found = {f"{name}_{rate}": value for rate, value in network.rates.items()}
            monitor.scalars(progress.step, {rate: value for rate, value in found.items() if rate not in rates})
        monitor.advance(progress.step - 1, {**shown, **rates})
        progress.pending.clear()
        if failed:
            self.writer.wait()
        if progress.bad_steps > config.max_bad_steps:
            self.writer.wait()
            reason = self._too_bad()
            if self.world.is_main:
                with monitor.tolerant(FAILED_FILE):
                    write_divergence(self.folder.path, progress.step, reason)
            raise NotFinite(reason, progress.step)
        return int(stop)

    def _evaluate(self) -> int:
        """Evaluate and draw a picture; a signal that came meanwhile, or 0. What fails here is a warning."""
        task, progress, monitor = self.task, self.progress, self.monitor
        with monitor.paused():
            try:
                average, averages = self._measure()
            except StopRequested as asked:
                return asked.signum
            result = averages.get(average)
            images = self._tried("picture", lambda: task.picture(PICTURE_IMAGES, PICTURE_SEED))
            # That of an earlier step is not this one's.
            progress.last, progress.averages = result, averages if len(self._averages) > 1 else {}
            if result is not None:
                monitor.scalars(progress.step, result.values)
                self._say_measured(average, averages)
                for note in notes([result], result.name):
                    monitor.message_once(note)
                if self.history is not None:
                    with monitor.tolerant("evaluations.jsonl"):
                        self.history.add_result(progress.step, result, average=average, averages=progress.averages)
                self.snapshots.offer(progress.step, result, average)
            # The picture is the last, so that it stands for the whole: see `_look_is_missing`.
            if images is not None:
                monitor.image(progress.step, images)
        return 0

    def _measure(self) -> tuple[str, dict[str, FrechetResult]]:
        """The average that is to be exported, which is the one shown then, and what was measured of each."""
        task, names, wanted = self.task, self._averages, self.config.export_ema
        averages: dict[str, FrechetResult] = {}
        shown = ""
        for name in names if task.metrics or len(names) == 1 else ():
            self._show(name)
            shown = name
            found = self._tried("evaluation", task.evaluate)
            averages |= {} if found is None else {name: found}
        best, most = "", None
        for name, found in averages.items() if wanted == "best" else ():
            worth = found.merit(found.metrics[0])
            if is_better(worth, most, higher=True):
                best, most = name, worth
        # Numbers of one process are not another's.
        chosen = self.task.world.broadcast_text(best) if len(names) > 1 else ""
        chosen = chosen or (names[0] if wanted == "best" else wanted)
        if shown != chosen:
            self._show(chosen)
        return chosen, averages

    def _show(self, average: str) -> None:
        """Bring the averaged network up to date; of several the one of this name."""
        if len(self._averages) > 1:
            self.task.refresh(average)
        else:
            self.task.refresh()

    def _say_measured(self, chosen: str, averages: Mapping[str, FrechetResult]) -> None:
        step, several = self.progress.step, len(self._averages) > 1
        for name, found in averages.items():
            which = f", {name}" if several else ""
            self.monitor.message(f"step {step}{which}: {found.in_words()}")
            if several:
                self.monitor.scalars(step, {f"{key}_{name}": value for key, value in found.values.items()})
        result = averages[chosen]
        if several and self.config.export_ema == "best" and math.isfinite(result.merit(result.metrics[0])):
            self.monitor.message(f"step {step}: {chosen} is the best")

    def _tried(self, what: str, work: Callable[[], T]) -> T | None:
        """What `work` returns; None on every process, and a warning, where it fails on one."""
        found, reason = attempt(work, self.world.size)
        if reason:
            self.monitor.message(f"warning: the {what} after step {self.progress.step} failed: {reason}")
        return found

    def _take_snapshot(self, *, refreshed: bool) -> None:
        with self.monitor.paused():
            for name in self._averages:
                if not refreshed or len(self._averages) > 1:
                    self._show(name)
                self.snapshots.take(self.progress.step, name)

    def _save(self) -> None:
        progress = self.progress
        if progress.saved_at != progress.step:
            with self.monitor.paused():
                if self.world.is_main and self.folder.restore():
                    self.monitor.message(f"warning: {self.folder.path} was removed while the run goes on: made again")
                self.monitor.sync()
                self.writer.save(
                    progress.step,
                    self.task.networks,
                    average=self.task.average_said(progress.step),
                    after=self.snapshots.after_writing(),
                )
            progress.saved_at = progress.step

    def _stop(self, signum: int) -> None:
        """Save and raise, if there is a signal."""
        if signum:
            self._save()
            self.writer.wait()
            raise Interrupted(signum, self.folder.path)

    def _too_bad(self) -> str:
        progress = self.progress
        networks = ", ".join(f"{name} in {count}" for name, count in progress.bad_networks.items())
        where = (
            f"its checkpoint of step {progress.saved_at}"
            if progress.saved_at >= 0
            else "the start, it has no checkpoint"
        )
        return (
            f"{counted(progress.bad_steps, 'step')} up to step {progress.step} had non-finite samples or gradients "
            f"({networks}; max-bad-steps is {self.config.max_bad_steps}): {self.folder.path} can be continued "
            f"from {where}"
        )


@contextmanager
def _failures(folder: RunFolder) -> Iterator[None]:
    """What comes from the disk or from other processes becomes a line that says where to continue."""
    try:
        yield
    except CheckpointFailed as error:
        raise TrainingFailed(f"{error}{_best_of(folder)}") from error
    except TrainingFailed as error:
        error.args = (f"{error}{_best_of(folder)}",)
        raise
    except RuntimeError as error:
        if not (reason := lost_process(error)):
            raise
        raise ProcessLost(
            f"another process of this run has ended or does not answer ({reason}): {_way_on(folder)}{_best_of(folder)}"
        ) from error
    except Interrupted as error:
        error.args = (f"{error}{_best_of(folder)}",)
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{_way_on(folder)}{_best_of(folder)}") from None


def _best_of(folder: RunFolder) -> str:
    """Where the best network is that the run hands over, for its last line; nothing where there is none."""
    best = best_said(folder.path, folder.kind)
    return "" if best is None else f"; {best}"


def _way_on(folder: RunFolder) -> str:
    if host := seen_elsewhere(folder.path):
        return f"the same command continues {folder.path} of {host} from its last checkpoint"
    # By name, as resuming does: a process that was lost may not have come to replace `latest`.
    found = checkpoints_in(folder.checkpoints)
    where = f"its checkpoint {found[0].name}" if found else "the start, it has no checkpoint"
    return f"the same command continues {folder.path} from {where}"


def _look_is_missing(step: int, config: RunConfig, folder: RunFolder, world: World) -> bool:
    """Whether the evaluation that is due at the checkpoint of `step` was cut off, or not begun, by a signal."""
    due = _due(step, config.eval_every) or step == config.total_steps
    missing = world.is_main and due and not picture_path(folder.path, step).exists()
    return bool(world.all_reduce_max_(torch.tensor(int(missing), device=world.device)))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
