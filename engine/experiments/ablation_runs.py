"""The runs of an ablation: each has its own run folder, goes on where it stopped, and is only read when it is done."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ipfm.engine.config import Rules
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.agreement import together
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.evaluation import Evaluation, evaluate_teacher
from ipfm.engine.evaluation.metrics import FrechetResult, Metric
from ipfm.engine.evaluation.results import EvaluationHistory
from ipfm.engine.experiments.ablation_report import Curve
from ipfm.engine.experiments.claims import SETS
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.runtime.commandline import user_input
from ipfm.engine.runtime.errors import FolderInUse
from ipfm.engine.runtime.files import read_json
from ipfm.engine.sampling.batches import sample_teacher
from ipfm.engine.training.data_order import real_facts
from ipfm.engine.training.distiller import Distiller
from ipfm.engine.training.machine_folders import fetch
from ipfm.engine.training.run_folder import (
    ABLATION_FILE,
    EXPORTS,
    check_run_folder,
    exported_steps,
    lock_folder,
    open_run_folder,
    release_folder,
    teacher_facts,
)
from ipfm.engine.training.run_state import FAILED_FILE, read_run
from ipfm.engine.training.start import DistillationStart, start_facts
from ipfm.engine.training.task import NotFinite
from ipfm.models import Precond, load_model
from ipfm.models.atomic_files import atomic_write

# In the folder of a teacher: its distance, measured once for all runs.
DISTANCE_FILE = "distance.json"
# In that folder and in the run folders: the distances of several sets of samples.
SETS_FILE = "sets.json"


class MeasuredDistiller(Distiller):
    """A distillation that measures its generator alone: the teacher is measured once for all runs."""

    def __init__(
        self,
        config: Distillation,
        teacher: Precond,
        measure: Evaluation,
        world: World,
        real: ImageDataset | None = None,
        start: DistillationStart | None = None,
    ) -> None:
        super().__init__(config, teacher, start=start, real=real, world=world)
        self.measure = measure

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """See `Task.metrics`."""
        return self.measure.metrics

    def evaluate(self) -> FrechetResult:
        """The metrics of the averaged generator's samples."""
        return self._measure(self.measure)


@dataclass(frozen=True)
class Run:
    """One variant with one seed.

    Attributes:
        variant: its name.
        seed: of the run.
        config: its settings, with nothing left open but what memory decides.
        nfe: network evaluations of an image of its generator.
        path: its folder.
        real: images that its student learns from too.
        start: teacher -> what it begins with instead of the teacher, as soon as that is there.
    """

    variant: str
    seed: int
    config: Distillation
    nfe: int
    path: Path
    real: ImageDataset | None = None
    start: Callable[[Precond], DistillationStart | None] | None = None

    def by_rules(self, rules: Rules) -> Run:
        """The same by these rules."""
        return replace(self, config=replace(self.config, rules=rules))

    @property
    def state(self) -> str:
        """In words: "finished", "diverged", "new", or "at step N"."""
        points = self._points
        if self._failure is not None:
            return "diverged"
        if not points:
            return "new"
        step = points[-1][0]
        whole = step >= self.config.total_steps and read_run(self.path, times=False).is_exported
        return "finished" if whole else f"measured up to step {step}"

    @property
    def curve(self) -> Curve:
        """What was measured, up to the run's length; a training that failed ends in NaN."""
        points, failure = dict(self._points), self._failure
        if failure is not None:
            points[failure] = math.nan
        kept = sorted((step, value) for step, value in points.items() if step <= self.config.total_steps)
        rate = EvaluationHistory(self.path).images_per_second
        return Curve(self.variant, self.seed, self.config.batch, tuple(kept), self.nfe, rate)

    def go(self, teacher: Precond, evaluation: Evaluation, world: World) -> None:
        """Distil, or continue, unless it is done; every process calls it.

        The generator is measured before the first step too. A training that stops because too many steps had non-finite
        samples has diverged: that is a result, kept in the folder.

        Raises:
            BadInput: the folder belongs to another run, or its generator came from another teacher.
            TrainingFailed: for another reason, such as a full disk.
            Interrupted: by a signal.
        """
        state = world.broadcast_text(self.state)
        with user_input():
            facts = {**teacher_facts(teacher), **real_facts(self.real)}
            check_run_folder(self.path, "distill", self.config, facts)
        if state in ("finished", "diverged"):
            return
        with user_input():
            start = None if self.start is None else self.start(teacher)
            record = check_run_folder(self.path, "distill", self.config, {**facts, **start_facts(start)})
            distiller = MeasuredDistiller(self.config, teacher, evaluation, world, self.real, start)
        if state == "new":
            world.barrier()
            with user_input():
                open_run_folder(self.path, record, write=world.is_main)
            distiller.refresh()
            first = distiller.evaluate()
            if world.is_main:
                EvaluationHistory(self.path, 0).add_result(0, first)
        # The loop has noted it in the folder.
        with contextlib.suppress(NotFinite):
            distiller.run(self.path)

    @property
    def _points(self) -> list[tuple[int, float]]:
        return EvaluationHistory(self.path).points

    @property
    def _failure(self) -> int | None:
        found = read_json(self.path / FAILED_FILE)
        return None if found is None else int(found["step"])


def teacher_distance(
    net: Precond, folder: Path, evaluation: Evaluation, world: World, *, steps: int, shared: Path | None = None
) -> tuple[float, str]:
    """The distance of a teacher's samples by Heun's method with `steps` steps, and what it is called.

    It is measured once, then read from `folder`. Every rank calls it.

    Args:
        net: the teacher.
        folder: of the teacher in the ablation.
        evaluation: what its samples are compared with.
        world: the run's ranks.
        steps: of Heun's method.
        shared: a folder of the teacher that other ablations read and write too.
    """
    about = {**teacher_facts(net), "images": evaluation.images, "heun_steps": steps}

    def measure() -> dict[str, Any]:
        alone = replace(evaluation, metrics=("fid",))
        result = evaluate_teacher(net, alone, world, D=net.config.D, steps=steps)
        return {"frechet": result.distance if math.isfinite(result.distance) else None, "name": result.name}

    known = _measured_once(DISTANCE_FILE, (folder, shared), about, evaluation, world, measure)
    # The other processes need none of it.
    return (math.nan if known.get("frechet") is None else float(known["frechet"])), str(known.get("name", ""))


def teacher_sets(
    net: Precond, folder: Path, evaluation: Evaluation, world: World, *, steps: int, shared: Path | None = None
) -> list[float]:
    """The distances of `SETS` sets of a teacher's samples, measured once; arguments as in `teacher_distance`."""
    about = {**teacher_facts(net), "images": evaluation.images, "heun_steps": steps}

    def sample(first: int, count: int) -> Tensor:
        return sample_teacher(net, first, count, D=net.config.D, steps=steps, seed=evaluation.seed)

    return _sets((folder, shared), about, sample, evaluation, world)


def generator_sets(run: Run, teacher: Precond, evaluation: Evaluation, world: World) -> list[float]:
    """The distances of `SETS` sets of samples of a run's last generator; NaN where it diverged. Measured once.

    Args:
        run: which is done.
        teacher: that it distilled.
        evaluation: what samples are compared with.
        world: the run's ranks.
    """
    if world.broadcast_text(run.state) != "finished":
        return [math.nan] * SETS
    fetch(run.path / EXPORTS["distill"], world)
    net = load_model(run.path / EXPORTS["distill"]).to(world.device).eval()
    objective = run.config.objective(teacher.config)
    about = {**teacher_facts(teacher), "images": evaluation.images, "step": exported_steps(run.path, "distill")}

    def sample(first: int, count: int) -> Tensor:
        return objective.sample(net, first, count, seed=evaluation.seed)

    return _sets((run.path, None), about, sample, evaluation, world)


def _sets(
    places: tuple[Path, Path | None],
    about: dict[str, Any],
    sample: Callable[[int, int], Tensor],
    evaluation: Evaluation,
    world: World,
) -> list[float]:
    alone = replace(evaluation, metrics=("fid",))

    def measure() -> dict[str, Any]:
        firsts = [number * evaluation.images for number in range(SETS)]
        found = [alone.measure(sample, world, first_index=first, leave_out=True).distance for first in firsts]
        return {"frechet": [value if math.isfinite(value) else None for value in found]}

    known = _measured_once(SETS_FILE, places, about, evaluation, world, measure)
    return [math.nan if value is None else float(value) for value in known.get("frechet", ())]


def _measured_once(
    name: str,
    places: tuple[Path, Path | None],
    about: dict[str, Any],
    evaluation: Evaluation,
    world: World,
    measure: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """What a file of this name says in one of the places, else what is measured now; left in all of them.

    Every rank calls it; what is read is known to the first one alone.
    """
    folders = [place for place in places if place is not None]
    # Files from before it was noted are those of an ablation of its own, which has compared by one thing throughout.
    features = evaluation.features.name
    found = [(read_json(folder / name) or {}) for folder in folders]
    same = [
        known
        for known in found
        if {key: known.get(key) for key in about} == about and known.get("features", features) == features
    ]
    if not world.broadcast_text("known" if same else ""):
        same = [{**about, "features": features, **measure()}]
    known = same[0] if same else {}
    if world.is_main:
        for folder, there in zip(folders, found, strict=True):
            if there != known:
                folder.mkdir(parents=True, exist_ok=True)
                _write_json(folder / name, known)
    return known


@contextlib.contextmanager
def shared_training(folder: Path, world: World) -> Iterator[None]:
    """Alone in the run folder of a teacher that several ablations train and take: waits while another is in it.

    The folder is free again afterwards, while this process goes on. Every process calls it.
    """

    def enter() -> None:
        while world.is_main:
            try:
                return lock_folder(folder)
            except FolderInUse:
                continue  # another command is training it, which may take hours

    together(enter, world.size)
    try:
        yield
    finally:
        if world.is_main:
            release_folder(folder)


def open_ablation_folder(path: Path, record: dict[str, Any], *, write: bool) -> None:
    """Take `path` for the ablation that `record` describes; `check_ablation_folder` approved it."""
    if write:
        path.mkdir(parents=True, exist_ok=True)
        found = read_json(path / ABLATION_FILE) or {}
        # What is not known yet of an ablation that goes on stands there already.
        if found != {**found, **record}:
            _write_json(path / ABLATION_FILE, {**found, **record})


def check_ablation_folder(path: Path, record: dict[str, Any]) -> None:
    """Check that `path` is new, empty, or holds this very ablation, measured in the same way.

    Raises:
        ValueError: it holds something else.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file: choose another --out")
    found = read_json(path / ABLATION_FILE)
    if found is None and any(path.iterdir()):
        raise ValueError(f"{path} is not empty and holds no ablation: choose another --out")
    differences = [
        f"{name} is {found.get(name)} there, {value} here"
        for name, value in record.items()
        # What is not known there yet is no difference.
        if found is not None and found.get(name, value) != value
    ]
    if differences:
        raise ValueError(f"{path} belongs to another ablation ({'; '.join(differences)}): choose another --out")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(values, indent=1) + "\n").encode())
