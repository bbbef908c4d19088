"""A run as it is compared: its report's facts, where its numbers stand over images and time, what they compare with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ipfm.engine.checks import number
from ipfm.engine.commands.compare.selection import names_of
from ipfm.engine.commands.report.facts import Facts, facts_of, nfe_of
from ipfm.engine.evaluation.metrics.measures import Measured, Metric, best_of
from ipfm.engine.evaluation.results import EvaluationRow
from ipfm.engine.experiments.ablation_runs import DISTANCE_FILE
from ipfm.engine.runtime.files import read_json
from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.environment import in_words
from ipfm.engine.training.pace import Pace
from ipfm.engine.training.run_folder import ABLATION_FILE
from ipfm.engine.training.run_state import EvaluationPoint, RunRecord, read_run

# Two measurements of one teacher that differ by more than this share are not of the same features and reference.
TOLERANCE = 0.01


@dataclass(frozen=True)
class ComparedRun:
    """A run, what its report says, and what it is called beside the others."""

    name: str
    record: RunRecord
    facts: Facts
    points: tuple[EvaluationPoint, ...]
    """What was measured, by step; the line of the table of results where the run's end is no evaluation."""
    nfe: int | None
    data: tuple[str | None, int | None, str | None]
    """Of the teacher's training: name, number of images, digest of some of them; None: not known."""
    shape: tuple[int, int] | None
    """Channels and side of its images."""
    classes: int | None
    teacher: EvaluationRow | None
    """What was measured of its teacher: in the run's own table, or by the ablation that it is of."""
    seconds: Mapping[int, float]
    """Step of an evaluation -> seconds of training until then, since the first logged step."""

    @property
    def last(self) -> Measured | None:
        """What was measured of the network at the end, or last: as the run's own table or its last evaluation says."""
        row = generator_row(self.record)
        return row if row is not None else self.points[-1] if self.points else None

    @property
    def teacher_values(self) -> Mapping[str, float]:
        """The teacher's numbers by the keys of `MEASURES`; empty where it was not measured."""
        return {} if self.teacher is None else self.teacher.values

    @property
    def scale(self) -> tuple[str, int | None]:
        """What the last evaluation calls the distance, and the number of images."""
        return (self.record.metric, self.points[-1].images) if self.points else (self.record.metric, None)

    def best(self, metric: Metric) -> EvaluationPoint | None:
        """The best evaluation by this metric; None where none has a number of it."""
        return best_of(self.facts.evaluations or self.points, metric)

    def is_copy_of(self, other: ComparedRun) -> bool:
        """Whether both have the same seed and the very same numbers, as a run and what it has put aside."""
        mine, theirs = (
            (run.record.config.get("seed"), [(point.step, point.images, point.values) for point in run.points])
            for run in (self, other)
        )
        return bool(self.points) and mine == theirs

    def images(self, step: int) -> int | None:
        """Images that the network was trained on after `step` steps."""
        return None if self.facts.batch is None else step * self.facts.batch


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """The runs in these folders.

    Raises:
        ValueError: one is no run folder.
    """
    records = [read_run(path) for path in paths]
    known = _data_by_teacher(records)
    return [_compared(name, record, known) for name, record in zip(names_of(paths), records, strict=True)]


def generator_row(record: RunRecord) -> EvaluationRow | None:
    """The line of the run's network in its table of results."""
    return next((row for row in record.results if row.label != "teacher"), None)


def training_seconds(pace: Pace, steps: Sequence[int]) -> dict[int, float]:
    """Step -> seconds of training until it, evaluations and checkpoints included, since the first logged step.

    Time between the parts of a run that was continued does not count; steps that were made twice count twice. A step
    before the first logged one, or long after the last, is left out.
    """
    logged: dict[int, float] = {}
    before = 0.0
    for part in pace.parts:
        # A part goes on from a checkpoint: what an earlier one logged beyond it was made again.
        logged = {step: time for step, time in logged.items() if step < part[0][0]}
        logged |= {step: before + max(0.0, time - part[0][1]) for step, time in part}
        before += max(0.0, part[-1][1] - part[0][1])
    if len(logged) < 2:
        return {}
    known, times = np.array(sorted(logged)), np.array([logged[step] for step in sorted(logged)])
    slack = int(np.diff(known).max())
    return {step: float(np.interp(step, known, times)) for step in steps if known[0] <= step <= known[-1] + slack}


def incomparable(one: ComparedRun, other: ComparedRun) -> str | None:
    """Why the numbers of two runs are not of the same thing; None where nothing that is recorded speaks against it."""
    return next(_reasons(one, other), None)


def _reasons(one: ComparedRun, other: ComparedRun) -> Iterator[str]:
    if one.record.kind != other.record.kind:
        yield "one is a teacher's training, the other a distillation"
    if one.shape and other.shape and one.shape != other.shape:
        yield f"images of {_shape(one.shape)} and of {_shape(other.shape)}"
    for a, b, text in zip(
        one.data, other.data, ("data: {} and {}", "data of {:,} and of {:,} images", ""), strict=True
    ):
        if a is not None and b is not None and a != b:
            yield text.format(a, b) or "data with other images"
    (name, images), (other_name, other_images) = one.scale, other.scale
    if one.points and other.points and name != other_name:
        yield f"{name} and {other_name}: other features"
    if images and other_images and images != other_images:
        yield f"evaluations of {images:,} and of {other_images:,} images"
    for what in ("features", "reference"):
        here, there = (run.record.identity.get(what, _ablation(run.record.path).get(what)) for run in (one, other))
        if here is not None and there is not None and here != there:
            yield f"{what}: {here} and {there}"
    mine, its = (math.nan if run.teacher is None else run.teacher.frechet for run in (one, other))
    if _same_teacher(one, other) and abs(mine - its) > TOLERANCE * max(abs(mine), abs(its)):
        yield f"the same teacher's distance is {mine:.4g} in one and {its:.4g} in the other"


def comparable_sets(runs: Sequence[ComparedRun]) -> list[list[ComparedRun]]:
    """The runs in sets whose numbers compare, in the order of the runs."""
    sets: list[list[ComparedRun]] = []
    for run in runs:
        for members in sets:
            if all(incomparable(run, member) is None for member in members):
                members.append(run)
                break
        else:
            sets.append([run])
    return sets


def same_latents(runs: Sequence[ComparedRun]) -> str | None:
    """Why images in the same place of the runs' grids are not of the same latent; None where they are."""
    for one, other in combinations(runs, 2):
        if one.shape and other.shape and one.shape != other.shape:
            return f"their shapes differ ({_shape(one.shape)} and {_shape(other.shape)})"
        if one.classes is not None and other.classes is not None and one.classes != other.classes:
            return f"their classes differ ({one.classes} and {other.classes})"
        a, b = one.facts.D, other.facts.D
        if a != b and not math.isnan(a) and not math.isnan(b):
            return f"D differs ({a:g} and {b:g})"
    return None


def _compared(name: str, record: RunRecord, known: Mapping[object, tuple[Any, Any, Any]]) -> ComparedRun:
    facts = facts_of(record)
    points = _points(record)
    network = _network(record)
    shape = tuple(network.get(key) for key in ("img_channels", "img_resolution"))
    classes = network.get("label_dim")
    return ComparedRun(
        name=name,
        record=record,
        facts=facts,
        points=points,
        nfe=nfe_of(record),
        data=_data(record, known),
        shape=shape if all(isinstance(n, int) for n in shape) else None,  # type: ignore[arg-type]
        classes=classes if isinstance(classes, int) else None,
        teacher=record.teacher_row or _teacher_of_ablation(record),
        seconds=training_seconds(record.pace, [point.step for point in points]),
    )


def _points(record: RunRecord) -> tuple[EvaluationPoint, ...]:
    row, done = generator_row(record), record.steps_done
    if row is None or any(point.step == done for point in record.evaluations):
        return record.evaluations
    end = EvaluationPoint(done, row.frechet, row.images, None, row.metric, **row.others)
    return (*record.evaluations, end)


def _network(record: RunRecord) -> Mapping[str, Any]:
    """The architecture of the run's network, or of its teacher; empty where none is recorded."""
    found = (record.export.get("network"), record.identity.get("network"), record.teacher.get("network"))
    return next((one for one in found if isinstance(one, dict)), {})


def _data(record: RunRecord, known: Mapping[object, tuple[Any, Any, Any]]) -> tuple[Any, Any, Any]:
    own = _data_of(record.identity if record.kind == "teacher" else record.teacher)
    if own[0] is None and record.kind == "distill":
        extra = record.export.get("extra")
        named = extra.get("dataset") if isinstance(extra, dict) else None
        own = known.get(record.identity.get("teacher"), (named or None, None, None))
    return own


def _data_of(about: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    name, images, digest = (about.get(key) for key in ("dataset", "images", "pictures"))
    return (
        name if isinstance(name, str) and name else None,
        images if isinstance(images, int) else None,
        digest if isinstance(digest, str) else None,
    )


def _data_by_teacher(records: Sequence[RunRecord]) -> dict[object, tuple[Any, Any, Any]]:
    """The teacher's checksum -> its data, from the runs that trained theirs: others were given it."""
    return {
        record.identity["teacher"]: _data_of(record.teacher)
        for record in records
        if record.kind == "distill" and record.teacher and isinstance(record.identity.get("teacher"), str)
    }


def _teacher_of_ablation(record: RunRecord) -> EvaluationRow | None:
    """The teacher's line of an ablation, which measures it once for all of its runs."""
    for path in sorted((record.path.resolve().parent.parent / "teachers").glob(f"*/{DISTANCE_FILE}")):
        found = read_json(path) or {}
        images, steps = found.get("images"), found.get("heun_steps")
        own = found.get("teacher") is not None and found.get("teacher") == record.identity.get("teacher")
        if own and isinstance(images, int) and isinstance(steps, int):
            name = str(found.get("name") or record.metric)
            return EvaluationRow(
                "teacher", None, 2 * steps - 1, number(found.get("frechet")), images, math.nan, metric=name
            )
    return None


def _same_teacher(one: ComparedRun, other: ComparedRun) -> bool:
    a, b = (
        (run.record.identity.get("teacher"), number(run.record.config.get("heun_steps")), run.scale)
        for run in (one, other)
    )
    return a == b and a[0] is not None and one.record.kind == "distill"


def _ablation(run: Path) -> Mapping[str, Any]:
    """What the ablation says that the run is one of; empty where it is of none."""
    return read_json(run.resolve().parent.parent / ABLATION_FILE) or {}


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}x{shape[1]}"


def surroundings(run: ComparedRun) -> dict[str, str]:
    """Processes, device and versions of all parts of the run, in words."""
    return dict(in_words(run.record.starts))


def place_of(run: ComparedRun) -> str:
    """Processes, device and arithmetic in few words; "-" where they are not recorded."""
    found = surroundings(run)
    parts = [f"{found['processes']} proc." if "processes" in found else "", found.get("device of a process", "")]
    parts.append(str(run.record.config.get("precision") or ""))
    return ", ".join(filter(None, parts)) or "-"


def length_of(run: ComparedRun) -> str:
    """Steps done, and of how many where there are more."""
    done, total = run.facts.steps_done, run.facts.total_steps
    return f"{done:,}" if total is None or done >= total else f"{done:,} of {counted(f'{total:,}', 'step')}"
