"""Networks that a run keeps along the way: snapshots at regular steps, and always the best by the run's metric.

In the run folder, beside the result (`EXPORTS`), and in the same format:

    generator-best/           the averaged network of the best evaluation so far; model-best/ of a teacher's training
    snapshots/step-0000400/   that of step 400; of several averages the first one
    snapshots/ema0.05/step-0000400/   of each of the others

Each is written beside its place and renamed, so that after a kill either the old one or the new one is there, whole.
Their config.json says the step and, under "measured", what an evaluation found of them.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from ipfm.engine.checks import number
from ipfm.engine.config import RunConfig
from ipfm.engine.evaluation.metrics import FrechetResult
from ipfm.engine.evaluation.metrics.measures import DISTANCE, MEASURES, METRICS, Measured, Metric, measures_of, merit
from ipfm.engine.evaluation.results import EvaluationHistory, is_better
from ipfm.engine.runtime import peers
from ipfm.engine.runtime.files import read_json
from ipfm.engine.runtime.wording import significant
from ipfm.engine.training.checkpoint import checkpoints_in, step_of
from ipfm.engine.training.run_folder import EXPORTS
from ipfm.engine.training.task import Task
from ipfm.models import load_model, save_model
from ipfm.models.atomic_files import previous_of, why
from ipfm.models.store import CONFIG_FILE, TENSOR_FILE, in_the_way, read_config

SNAPSHOTS = "snapshots"
# Of a folder that is being removed: half of a model is not to be met under its own name.
REMOVED = ".removed-"


@dataclass(frozen=True)
class KeptModel:
    """A network that a run kept, as its folder says.

    Attributes:
        path: its folder.
        step: steps done.
        distance: that was measured of it, NaN where none was.
        metric: what the distance is called; None where that is not said.
        drawn: images that were drawn for it, None where that is not said.
        values: all that was measured of it, by the keys of `MEASURES`.
        chosen_by: the metric by which it was the best.
    """

    path: Path
    step: int
    distance: float = math.nan
    metric: str | None = None
    drawn: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    chosen_by: Metric = "fid"

    def merit(self, metric: Metric) -> float:
        """See `merit`."""
        return merit(metric, self.values)

    @property
    def number(self) -> str:
        """By what it was the best, for people: "0.31", "KID 0.0021", "precision 0.7, recall 0.5"; "" without any."""
        if self.chosen_by == "fid":
            return significant(self.distance) if math.isfinite(self.distance) else ""
        found = [measure for measure in measures_of((self.chosen_by,)) if measure.key in self.values]
        name = self.metric or DISTANCE
        return ", ".join(f"{measure.called(name)} {significant(self.values[measure.key])}" for measure in found)

    def in_words(self) -> str:
        """As in "step 400, 0.31: runs/x/generator-best"."""
        number = self.number
        return f"step {self.step}{number and f', {number}'}: {self.path}"


def best_said(run: Path, kind: str) -> str | None:
    """The line at the end of a run: "best: step 400, 0.31: runs/x/generator-best"; None where there is none."""
    best = read_best(run, kind)
    return None if best is None else f"best: {best.in_words()}"


def best_path(run: Path, kind: str) -> Path:
    """Where the run `run`, of this kind, keeps its best network."""
    return run / f"{EXPORTS[kind]}-best"


def read_best(run: Path, kind: str) -> KeptModel | None:
    """The best network that the run kept; None where there is none that says by what."""
    found = _read(best_path(run, kind))
    return None if found is None or not math.isfinite(found.merit(found.chosen_by)) else found


def read_snapshots(run: Path) -> tuple[KeptModel, ...]:
    """The snapshots of the run, the oldest first."""
    return tuple(found for path in snapshots_in(run) if (found := _read(path)) is not None)


def snapshots_in(run: Path, average: str = "") -> list[Path]:
    """The folders of the run's snapshots, the oldest first.

    Args:
        run: the run folder.
        average: of several averages, which one's beside the first.
    """
    return _steps_in(run / SNAPSHOTS / average)


def _steps_in(folder: Path) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def all_snapshots_in(run: Path) -> list[Path]:
    """The folders of the snapshots of all averages."""
    folder = run / SNAPSHOTS
    others = sorted(path.name for path in folder.iterdir() if path.name.startswith("ema")) if folder.is_dir() else []
    return [path for average in ("", *others) for path in snapshots_in(run, average)]


def snapshot_path(run: Path, step: int, average: str = "") -> Path:
    """Where the run keeps its network of this step; `average`: as of `snapshots_in`."""
    return run / SNAPSHOTS / average / f"step-{step:07d}"


def _read(path: Path) -> KeptModel | None:
    """What the model folder says of itself; None where there is none."""
    stored = read_json((path if path.exists() else previous_of(path)) / CONFIG_FILE) or {}
    extra = stored.get("extra")
    extra = extra if isinstance(extra, dict) else {}
    step, measured = extra.get("optimizer_steps"), extra.get("measured")
    if not isinstance(step, int):
        return None
    said = measured if isinstance(measured, dict) else {}
    metric, images, left_out = said.get("metric"), number(said.get("images")), number(said.get("left_out", 0))
    return KeptModel(
        path,
        step,
        number(said.get("distance")),
        metric if isinstance(metric, str) else None,
        int(images + left_out) if math.isfinite(images + left_out) else None,
        values_of(said),
        next(iter(asked_of(said)), "fid"),
    )


def values_of(said: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that are finite of what a model folder says was measured of it, by the keys of `MEASURES`."""
    return _values({**said, "frechet": said.get("distance")})


def asked_of(said: Mapping[str, Any]) -> tuple[Metric, ...]:
    """The metrics of it, first what decides; versions that did not say them knew the Fréchet distance alone."""
    asked = said.get("metrics")
    return tuple(metric for metric in asked if metric in METRICS) if isinstance(asked, list) else ("fid",)


def _values(line: Mapping[str, Any]) -> dict[str, float]:
    """The same of a line of evaluations.jsonl."""
    found = {measure.key: number(line.get(measure.key)) for measure in MEASURES}
    return {key: value for key, value in found.items() if math.isfinite(value)}


@dataclass
class _Average:
    """The averaged network of a step, what was measured of it, and what stores it, once it is asked for."""

    step: int
    which: str
    measured: Mapping[str, Any]
    store: Callable[[Path], None] | None = None
    halved: Callable[[Path], None] | None = None
    """The same in fp16."""


class _Writing(NamedTuple):
    """Something that is written, and what is to be done if it fails."""

    what: str
    future: Future[None]
    failed: Callable[[], None]


class Snapshots:
    """Keeps a run's snapshots and its best network. Every process has one; the first one writes.

    With `async_checkpoints` it copies the averaged network into the host's memory, and a thread of its own writes it
    while the training goes on. What the disk refuses is a warning: the run is well without, and what was there stays.

    Args:
        task: what is trained.
        config: settings of the run.
        run: the run folder.
        kind: "distill" or "teacher".
        message: takes a line for the person who watches.
    """

    def __init__(self, task: Task, config: RunConfig, run: Path, kind: str, message: Callable[[str], None]) -> None:
        self._task, self._run, self._kind, self._message = task, run, kind, message
        self.every, self.keep = config.snapshot_every, config.keep_snapshots
        self._halved, self._averages = config.snapshot_precision == "fp16", config.average_names
        self.best: KeptModel | None = None
        """On the first process: the best so far, on the disk or on its way there."""
        self._thread = ThreadPoolExecutor(1, "snapshots") if config.async_checkpoints and task.world.is_main else None
        self._writing: list[_Writing] = []
        self._at: _Average | None = None

    def resume(self, step: int, history: EvaluationHistory | None, *, go_back: bool) -> None:
        """Begin where the run does, on the first process.

        Args:
            step: steps done.
            history: the run's evaluations up to there.
            go_back: what came after this step, which is put aside, is removed. Otherwise it stays, and comes again.

        Raises:
            OSError: what is to be forgotten cannot be removed.
        """
        if not self._task.world.is_main:
            return
        _forget_unfinished(self._run, self._kind)
        if go_back:
            result = _read(self._run / EXPORTS[self._kind])
            snapshots = map(_read, all_snapshots_in(self._run))
            for found in (*snapshots, _read(best_path(self._run, self._kind)), result):
                if found is not None and found.step > step:
                    _remove(found.path)
        self.best = read_best(self._run, self._kind)
        first = next(iter(self._task.metrics), None)
        other = self.best is not None and first is not None and self.best.chosen_by != first
        if other:
            assert self.best is not None
            self._message(
                f"the best was chosen by {self.best.chosen_by} ({self.best.in_words()}), and is chosen by {first} from "
                f"here on, among the evaluations that have it"
            )
            self.best = None
        if self.best is None and history is not None:
            self._find_best(step, history, first or "fid")

    def due(self, step: int) -> bool:
        """Whether a snapshot is to be taken at this step."""
        return self.every > 0 and step % self.every == 0

    def offer(self, step: int, result: FrechetResult, which: str = "") -> None:
        """Keep the averaged network of `step`, as it was last refreshed, if it is the best so far.

        Args:
            step: steps done.
            result: what was measured of it.
            which: of several averages, which one it is of.
        """
        if not self._task.world.is_main:
            return
        self._average(step, which, _measured(result))
        best, metric = self.best, result.metrics[0]
        drawn = result.images + result.left_out
        same = best is None or (best.drawn in (None, drawn) and best.metric in (None, result.name))
        than = best.merit(metric) if best is not None and same else None
        if not is_better(result.merit(metric), than, higher=True):
            return
        if best is not None and not same:
            self._message(
                f"the best so far ({best.in_words()}) was measured otherwise, over {best.drawn:,} images: it gives way"
            )
        path = best_path(self._run, self._kind)
        self.best = KeptModel(path, step, result.distance, result.name, drawn, result.values, metric)

        def back() -> None:
            # The one before it is there still, and counts.
            self.best = best

        self._write(path, f"the best network, of step {step},", failed=back)

    def take(self, step: int, which: str = "") -> None:
        """Keep a snapshot of the averaged network, as it was last refreshed at `step`.

        Args:
            step: steps done.
            which: of several averages, which one it is of.
        """
        if self._task.world.is_main:
            self._average(step, which, {})
            average = "" if which in ("", self._averages[0]) else which
            path = snapshot_path(self._run, step, average)
            what = f"the snapshot of step {step}" + (f", {which}," if average else "")
            self._write(path, what, then=lambda: self._forget_old(path), halved=self._halved)

    def wait(self) -> None:
        """Return when what was kept is on the disk, or is not."""
        for one in self._writing:
            one.future.exception()
        self.report()
        self._at = None

    def report(self) -> None:
        """Say what the disk has refused; waits for nothing."""
        while self._writing and self._writing[0].future.done():
            one = self._writing.pop(0)
            if (error := one.future.exception()) is not None:
                one.failed()
                self._message(f"warning: {one.what} cannot be written: {why(error)}; the run goes on")

    def after_writing(self) -> Callable[[], None]:
        """What waits, in any thread, until all that was kept so far is written: a checkpoint comes after it."""
        futures = [one.future for one in self._writing]

        def wait() -> None:
            for future in futures:
                future.exception()

        return wait

    def settle(self) -> None:
        """Let the thread come to its end."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()

    def _average(self, step: int, which: str, measured: Mapping[str, Any]) -> _Average:
        """An averaged network of `step`, of which a step's snapshot and best share one copy."""
        if self._at is None or (self._at.step, self._at.which) != (step, which):
            # What is written holds a copy of its own: no more than one is there at a time.
            self.wait()
            self._at = _Average(step, which, measured)
        return self._at

    def _write(
        self,
        path: Path,
        what: str,
        *,
        then: Callable[[], None] = lambda: None,
        failed: Callable[[], None] = lambda: None,
        halved: bool = False,
    ) -> None:
        """Write the averaged network to `path`, and do what comes then; now, or in the background."""
        assert self._at is not None
        at = self._at
        copy = self._thread is not None
        if halved and at.halved is None:
            at.halved = self._task.stored(at.step, at.measured, copy=copy, halved=True)
        elif not halved and at.store is None:
            at.store = self._task.stored(at.step, at.measured, copy=copy)
        store = at.halved if halved else at.store
        assert store is not None

        def write() -> None:
            with peers.at_work():
                store(path)
                with suppress(OSError):
                    then()

        future: Future[None]
        if self._thread is not None:
            future = self._thread.submit(write)
        else:
            future = Future()
            try:
                write()
                future.set_result(None)
            except (OSError, ValueError) as error:
                future.set_exception(error)
        self._writing.append(_Writing(what, future, failed))
        self.report()

    def _forget_old(self, newest: Path) -> None:
        """Remove all snapshots but as many as are kept, the newest first; all stay where that is 0."""
        others = [path for path in _steps_in(newest.parent) if path != newest]
        if self.keep:
            for path in others[: max(0, len(others) + 1 - self.keep)]:
                _remove(path)

    def _find_best(self, step: int, history: EvaluationHistory, metric: Metric) -> None:
        """Make the best of what is left of the run: its snapshots and checkpoints of which the metric was measured."""
        points = [(merit(metric, _values(line)), line) for line in history.lines if line["step"] <= step]
        best_first = sorted((-worth, line["step"], line) for worth, line in points if math.isfinite(worth))
        left = {step_of(path): path for path in checkpoints_in(self._run / "checkpoints")}
        left |= {step_of(path): path for path in snapshots_in(self._run)}
        former = _read(best_path(self._run, self._kind))
        left |= {} if former is None else {former.step: former.path}
        for _, at, line in best_first:
            source = left.get(at)
            if source is None:
                continue
            measured = _said_of(line, metric)
            try:
                _copy(source, best_path(self._run, self._kind), measured)
            except (OSError, ValueError) as error:
                # Of an older version, which kept no architecture in its checkpoints, or damaged.
                self._message(f"{source} cannot be kept as the best so far: {why(error)}")
                continue
            self.best = read_best(self._run, self._kind)
            return


def _measured(result: FrechetResult) -> dict[str, Any]:
    found: dict[str, Any] = {"metric": result.name, "distance": result.distance, "images": result.images}
    found |= {"left_out": result.left_out} if result.left_out else {}
    found |= {name: value for name, value in result.to_json().items() if name in result.others}
    return {name: value for name, value in found.items() if not isinstance(value, float) or math.isfinite(value)}


def _said_of(line: Mapping[str, Any], metric: Metric) -> dict[str, Any]:
    """What a model folder says of an evaluation, from its line, by whose `metric` the network is the best."""
    names = ("images", "left_out", *(f.name for f in fields(Measured) if f.name != "metrics"))
    said = {"distance": line.get("frechet"), "metric": line.get("name"), **{name: line.get(name) for name in names}}
    asked = list(dict.fromkeys((metric, *(one.metric for one in MEASURES if one.key in line))))
    said |= {} if asked == ["fid"] else {"metrics": asked}
    return {name: value for name, value in said.items() if value is not None}


def _copy(source: Path, target: Path, measured: Mapping[str, Any]) -> None:
    extra = {**read_config(source).extra, "measured": dict(measured)}
    save_model(load_model(source), target, extra=extra)


def _remove(path: Path) -> None:
    """Remove a model folder of ours, and what stands in for it; of one that holds others' files our own alone."""
    shutil.rmtree(previous_of(path), ignore_errors=True)
    # A link stays one.
    path = path.resolve()
    if in_the_way(path):
        for name in (CONFIG_FILE, TENSOR_FILE):
            (path / name).unlink(missing_ok=True)
    elif path.exists():
        removed = path.with_name(f"{REMOVED}{path.name}")
        shutil.rmtree(removed, ignore_errors=True)
        path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def _forget_unfinished(run: Path, kind: str) -> None:
    """Remove what killed processes left half-written or half-removed, and finish what they replaced."""
    best = best_path(run, kind)
    snapshots = run / SNAPSHOTS
    others = (path for path in snapshots.glob("ema*") if path.is_dir())
    for folder, name in ((run, best.name), *((place, "step-*") for place in (snapshots, *others))):
        for pattern in (f".{name}.partial", f"{REMOVED}{name}"):
            for leftover in folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)
        for previous in folder.glob(f".{name}.previous"):
            target = folder / previous.name.removeprefix(".").removesuffix(".previous")
            if target.exists():
                shutil.rmtree(previous, ignore_errors=True)
            else:
                previous.rename(target)
