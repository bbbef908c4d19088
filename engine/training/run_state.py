"""A run folder, read once: how far the run is, what it has measured, where its network is, how it was made.

What is damaged or missing is a line of `problems` and not the end of the reading. Nothing is verified: a run that
continues in the folder does that.
"""

from __future__ import annotations

import csv
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ipfm.engine.checks import number
from ipfm.engine.evaluation.metrics.measures import DISTANCE, METRICS, Measure, Measured, Metric, best_of, measures_of
from ipfm.engine.evaluation.results import TEACHER_RESULTS, EvaluationRow, read_results
from ipfm.engine.memory.profile import PhaseMemory
from ipfm.engine.runtime.files import StepLog, read_json
from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.checkpoint import checkpoints_in, step_of
from ipfm.engine.training.environment import ENVIRONMENT_FILE, read_starts
from ipfm.engine.training.pace import Pace, read_pace
from ipfm.engine.training.run_folder import ABLATION_FILE, EXPORTS, SET_ASIDE, folder_user
from ipfm.engine.training.set_aside import SetAside, read_set_aside
from ipfm.engine.training.snapshots import SNAPSHOTS, KeptModel, best_path, read_best, read_snapshots
from ipfm.models.atomic_files import atomic_write, why
from ipfm.models.facts import GeneratorFacts, TeacherFacts, read_facts
from ipfm.models.store import CONFIG_FILE

T = TypeVar("T")
State = Literal["finished", "running", "stopped", "diverged"]
# In the folder of a run that had too many non-finite samples or gradients: the step and the reason.
FAILED_FILE = "diverged.json"
# A folder without a readable config.json is a run's if it has one of these.
TRACES = ("metrics.jsonl", "evaluations.jsonl", "checkpoints")


@dataclass(frozen=True)
class EvaluationPoint(Measured):
    """An evaluation of a run; `Measured` has what was measured beside the distance.

    Attributes:
        step: generator steps before it.
        frechet: its distance, NaN where it was not finite or not measured.
        images: how many were drawn, None where that is not recorded.
        seconds: that drawing them took, likewise.
        name: what the distance is called.
    """

    step: int
    frechet: float
    images: int | None
    seconds: float | None
    name: str = DISTANCE

    def to_json(self) -> dict[str, Any]:
        """As the line of evaluations.jsonl has it."""
        found = super().to_json()
        return {name: value for name, value in found.items() if name != "name" or value != DISTANCE}


@dataclass(frozen=True)
class RunRecord:
    """A run folder's content, as far as it can be read. Nothing in it is resolved against this machine."""

    path: Path
    kind: str
    """"distill" or "teacher"."""
    settings: Mapping[str, Any] | None
    """As config.json has them; None where they cannot be read."""
    config: Mapping[str, Any]
    """The same, those within another under their full name, such as noise.p_mean; empty where they cannot be read."""
    identity: Mapping[str, Any]
    """What else config.json says of the run: the teacher's checksum, or network and data."""
    metrics: tuple[Mapping[str, Any], ...]
    """The lines of metrics.jsonl by their step, which counts from 0."""
    evaluations: tuple[EvaluationPoint, ...]
    results: tuple[EvaluationRow, ...]
    earlier: tuple[EvaluationRow, ...]
    """The teacher's line of the table of an earlier end, where the run was lengthened since."""
    pictures: tuple[tuple[int, Path], ...]
    """(steps done, samples/step-*.png), in order; whether they can be read is not yet known."""
    starts: tuple[Mapping[str, Any], ...]
    """The lines of environment.jsonl: versions, processes and device of each part of the run."""
    memory: tuple[PhaseMemory, ...]
    memory_picture: Path | None
    export: Mapping[str, Any]
    """config.json of the exported network; empty where there is none."""
    teacher: Mapping[str, Any]
    """config.json of the teacher's own run in teacher/; empty where the teacher was given."""
    checkpoint: Path | None
    """The newest one."""
    best: KeptModel | None
    """The best network of all evaluations; None where the run had none, or is of an older version."""
    snapshots: tuple[KeptModel, ...]
    """Networks that were kept along the way, the oldest first."""
    pace: Pace
    diverged: int | None
    """The step at which too many samples or gradients had not been finite."""
    in_use: bool
    """A process is working in the folder."""
    problems: tuple[str, ...]
    """A line for each part that cannot be read."""
    set_aside: tuple[SetAside, ...] = ()
    """What came after steps that the run went back to."""
    averages: Mapping[str, tuple[EvaluationPoint, ...]] = field(default_factory=dict)
    """The evaluations of each of several averages, by its name."""

    @property
    def averages_in_words(self) -> str:
        """What was last measured of each of several averages: "ema500k 3.21, ema0.05 2.98"; "" without several."""
        leading = measures_of(self.measured)[0]
        last = {name: points[-1] for name, points in self.averages.items()}
        return ", ".join(
            f"{name} {point.shown(leading)}" for name, point in last.items() if leading.key in point.values
        )

    @property
    def steps_done(self) -> int:
        """Steps of which something is known: a line of metrics, an evaluation or a checkpoint."""
        last = int(self.metrics[-1]["step"]) + 1 if self.metrics else 0
        return max(last, self.evaluations[-1].step if self.evaluations else 0, self.checkpoint_step or 0)

    @property
    def total_steps(self) -> int | None:
        """Optimiser steps that the settings ask for, as `RunConfig.total_steps`; None where they are not known."""
        steps, kimg, batch = (number(self.config.get(name)) for name in ("max_steps", "kimg", "batch"))
        if math.isfinite(steps):
            return int(steps)
        return max(1, math.ceil(kimg * 1000 / batch)) if math.isfinite(kimg) and batch > 0 else None

    @property
    def checkpoint_step(self) -> int | None:
        """Steps done at the newest checkpoint, which its name says."""
        return None if self.checkpoint is None else step_of(self.checkpoint)

    @property
    def export_path(self) -> Path:
        """Where the run leaves its network, whether it has or not."""
        return self.path / EXPORTS[self.kind]

    @property
    def exported(self) -> TeacherFacts | GeneratorFacts | None:
        """What the exported network says of itself; None where there is none."""
        extra = self.export.get("extra")
        return read_facts(extra) if isinstance(extra, dict) else None

    @property
    def state(self) -> State:
        """How the run is going.

        diverged: too many samples or gradients were not finite. running: a process of this machine works in the folder.
        finished: the network that was exported is that of the last step, not of an earlier end of a run that was
        lengthened since. stopped: the same command continues.
        """
        if self.diverged is not None:
            return "diverged"
        if self.in_use:
            return "running"
        return "finished" if self.is_exported else "stopped"

    @property
    def about(self) -> Mapping[str, Any]:
        """What an objective from outside this project said of itself; empty for others."""
        said = self.identity.get("about")
        return said if isinstance(said, dict) else {}

    @property
    def measured(self) -> tuple[Metric, ...]:
        """The metrics that the run has measured: those of the last evaluation, and then those of earlier ones."""
        found = [metric for one in (*self.evaluations[::-1], *self.results) for metric in one.metrics]
        return tuple(dict.fromkeys(found)) or ("fid",)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The numbers that these give."""
        return measures_of(self.measured)

    @property
    def best_evaluation(self) -> EvaluationPoint | None:
        """The best evaluation by the metric that the last one names first; None where there is none."""
        return best_of(self.evaluations, self.measured[0])

    @property
    def teacher_row(self) -> EvaluationRow | None:
        """What was measured of the teacher's samples, also at an earlier end of the run; None where nothing was."""
        return next((row for row in (*self.results, *self.earlier) if row.label == "teacher"), None)

    @property
    def teacher_distance(self) -> float | None:
        """The distance of the teacher's samples, also that of an earlier end of the run; None where there is none."""
        row = self.teacher_row
        return row.frechet if row is not None and "fid" in row.metrics else None

    @property
    def is_exported(self) -> bool:
        """Whether the exported network is that of the last step, and not of steps that the run has gone back from."""
        if self.exported is None:
            return False
        done = self.steps_done if self.exported.optimizer_steps is None else self.exported.optimizer_steps
        undone = self.checkpoint_step is not None and done > self.steps_done
        return self.total_steps is None or (done >= self.total_steps and not undone)

    @property
    def metric(self) -> str:
        """What the distance is called."""
        if self.results:
            return self.results[0].metric
        return self.evaluations[-1].name if self.evaluations else DISTANCE

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the losses in metrics.jsonl, as they first appear."""
        return tuple(dict.fromkeys(name for line in self.metrics for name in line if name.endswith("_loss")))


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a distillation or of a teacher's training."""
    return _says_kind(read_json(path / CONFIG_FILE))


def holds_runs(path: Path) -> list[Path]:
    """The runs in the folder `path`, by name."""
    if not path.is_dir():
        return []
    return [one for one in sorted(path.iterdir()) if one.is_dir() and is_run(one)]


def is_damaged_run(path: Path) -> bool:
    """Whether `path` holds what a run writes, but no config.json that can be read."""
    return read_json(path / CONFIG_FILE) is None and any((path / name).exists() for name in TRACES)


def _says_kind(found: Mapping[str, Any] | None) -> bool:
    """Whether what a config.json holds is the record of a run."""
    kind = found and found.get("kind")
    return isinstance(kind, str) and kind in EXPORTS


def read_run(path: Path, *, times: bool = True) -> RunRecord:
    """Read the run folder `path`. Nothing is written.

    Args:
        path: the folder.
        times: whether to look for the times of steps in TensorBoard's files, which may be large; else `pace` is empty.

    Raises:
        ValueError: it is no run folder; the message is one line and says what is possible.
    """
    problems: list[str] = []

    def tolerant(name: str, read: Callable[[], T], otherwise: T) -> T:
        """What `read` returns, or `otherwise` and a line about `name` where it cannot be read."""
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = read()
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            reason = f": {why(error)}" if isinstance(error, OSError) else ""
            problems.append(f"{name} cannot be read{reason}")
            return otherwise
        problems.extend(str(warning.message).replace(f"{path}/", "") for warning in caught)
        return found

    record = _config(path, problems)
    no_lines: list[dict[str, Any]] = []
    metrics = tolerant("metrics.jsonl", lambda: StepLog(path / "metrics.jsonl", None).read(), no_lines)
    kind = record.get("kind")
    if kind not in EXPORTS:
        kind = "teacher" if any("teacher_loss" in line for line in metrics) else "distill"
    config = record.get("config")
    settings = config if isinstance(config, dict) else None
    results = read_results(path)
    if not results and (path / "results.json").is_file():
        problems.append("results.json cannot be read")
    memory = path / "memory"
    return RunRecord(
        path=path,
        kind=kind,
        settings=settings,
        config=_flat(settings or {}),
        identity={name: value for name, value in record.items() if name not in ("format", "kind", "config")},
        # A step that is there twice counts once, with its last line.
        metrics=tuple(sorted({line["step"]: line for line in metrics}.values(), key=lambda line: line["step"])),
        evaluations=tolerant("evaluations.jsonl", lambda: _evaluations(path), ()),
        averages=tolerant("evaluations.jsonl", lambda: _averages(path), {}),
        results=tolerant("results.json", lambda: tuple(_checked(row) for row in results), ()),
        earlier=tolerant(TEACHER_RESULTS, lambda: tuple(map(_checked, read_results(path, TEACHER_RESULTS))), ()),
        pictures=tolerant("samples", lambda: _pictures(path / "samples"), ()),
        starts=tolerant(ENVIRONMENT_FILE, lambda: read_starts(path), ()),
        memory=tolerant("memory/memory.csv", lambda: _memory(memory / "memory.csv"), ()),
        memory_picture=memory / "timeline.png" if (memory / "timeline.png").is_file() else None,
        export=read_json(path / EXPORTS[kind] / CONFIG_FILE) or {},
        teacher=read_json(path / "teacher" / "config.json") or {},
        checkpoint=tolerant("checkpoints", lambda: next(iter(checkpoints_in(path / "checkpoints")), None), None),
        best=tolerant(best_path(path, kind).name, lambda: read_best(path, kind), None),
        snapshots=tolerant(SNAPSHOTS, lambda: read_snapshots(path), ()),
        pace=tolerant("tensorboard", lambda: read_pace(path), Pace()) if times else Pace(),
        diverged=tolerant(FAILED_FILE, lambda: _diverged(path / FAILED_FILE), None),
        in_use=folder_user(path) is not None,
        problems=tuple(problems),
        set_aside=tolerant(SET_ASIDE, lambda: read_set_aside(path), ()),
    )


def _config(path: Path, problems: list[str]) -> dict[str, Any]:
    """config.json; empty where it is damaged, but what lies beside it is a run's."""
    if not path.is_dir():
        raise ValueError(f"{path} is {'a file' if path.exists() else 'not there'}: give the folder of a run")
    if (path / ABLATION_FILE).is_file():
        raise ValueError(
            f"{path} is the folder of an ablation, whose report is its ablation.md and ablation.png: "
            "give the folder of one of its runs, VARIANT/seedN, or `ipfm compare` all of them"
        )
    found = read_json(path / "config.json")
    if found is not None and _says_kind(found):
        return found
    if found is not None and str(found.get("format", "")).startswith("ipfm-network"):
        raise ValueError(f"{path} is a model folder, not that of a run: `ipfm info` describes it")
    if any((path / name).exists() for name in TRACES):
        missing = "is missing" if not (path / "config.json").exists() else "cannot be read as a run's settings"
        problems.append(f"config.json {missing}")
        return {}
    if inside := holds_runs(path):
        raise ValueError(
            f"{path} is no run folder, it has {counted(len(inside), 'run')} in it: give one, such as {inside[0]}; "
            f"ipfm compare {path} takes them all"
        )
    raise ValueError(f"{path} is no run folder (no config.json of a run): give the folder that a recipe's --out named")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, value in config.items():
        settings |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return settings


def _averages(path: Path) -> dict[str, tuple[EvaluationPoint, ...]]:
    lines = StepLog(path / "evaluations.jsonl", None).read()
    known = [line["averages"] for line in lines if isinstance(line.get("averages"), dict)]
    return {name: _evaluations(path, name) for name in dict.fromkeys(name for found in known for name in found)}


def _evaluations(path: Path, average: str | None = None) -> tuple[EvaluationPoint, ...]:
    found = {}
    for line in StepLog(path / "evaluations.jsonl", None).read():
        if average is not None:
            several = line.get("averages")
            own = several.get(average) if isinstance(several, dict) else None
            if not isinstance(own, dict):
                continue
            line = {"step": line["step"], **own}
        images, seconds = number(line.get("images")), number(line.get("seconds"))
        named, asked = line.get("name"), line.get("metrics")
        found[line["step"]] = EvaluationPoint(
            line["step"],
            number(line.get("frechet")),
            int(images) if math.isfinite(images) else None,
            seconds if math.isfinite(seconds) else None,
            named if isinstance(named, str) else DISTANCE,
            **_others(line, asked if isinstance(asked, list) else ["fid"]),
        )
    return tuple(found[step] for step in sorted(found))


def _others(found: Mapping[str, Any], asked: Sequence[object]) -> dict[str, Any]:
    """What `Measured` has, from a file: numbers, or None where there is none."""
    counts = ("kid_subset_size", "pr_images", "pr_real_images")
    others: dict[str, Any] = {}
    for name in (f.name for f in fields(Measured) if f.name != "metrics"):
        value = number(found.get(name))
        others[name] = None if not math.isfinite(value) else int(value) if name in counts else value
    return others | {"metrics": tuple(metric for metric in asked if metric in METRICS)}


def _checked(row: EvaluationRow) -> EvaluationRow:
    """The row with NaN where a number was not finite or is none. TypeError: it is no row."""
    if not (isinstance(row.label, str) and isinstance(row.nfe, int) and isinstance(row.images, int)):
        raise TypeError
    return replace(
        row,
        frechet=number(row.frechet),
        images_per_second=number(row.images_per_second),
        **_others(row.others, row.metrics),
    )


def _pictures(folder: Path) -> tuple[tuple[int, Path], ...]:
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if named := re.fullmatch(r"step-(\d+)\.png", path.name):
            found.append((int(named[1]), path))
    return tuple(sorted(found))


def _memory(path: Path) -> tuple[PhaseMemory, ...]:
    if not path.is_file():
        return ()

    def whole(text: str) -> int | None:
        return int(text) if text else None

    with open(path, newline="", encoding="utf-8") as file:
        return tuple(
            PhaseMemory(
                line["phase"],
                int(line["measured_bytes"]),
                whole(line["predicted_bytes"]),
                float(line["difference_percent"]) if line["difference_percent"] else None,
                int(line["rss_bytes"]),
                whole(line["reserved_bytes"]),
                whole(line["nvml_bytes"]),
            )
            for line in csv.DictReader(file)
        )


def write_divergence(folder: Path, step: int, reason: str) -> None:
    """Note in the run folder that the training failed at `step`; the next start in the folder forgets it.

    Raises:
        OSError: the disk refuses.
    """
    with atomic_write(folder / FAILED_FILE) as file:
        file.write((json.dumps({"step": step, "reason": reason}, indent=1) + "\n").encode())


def _diverged(path: Path) -> int | None:
    return int(json.loads(path.read_text(encoding="utf-8"))["step"]) if path.exists() else None
