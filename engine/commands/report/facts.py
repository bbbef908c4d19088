"""What a report says about a run: sentences, tables and numbers, made of what its folder holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ipfm.engine.checks import number, option_name
from ipfm.engine.commands.report.reproduce import (
    Command,
    distillation_class,
    is_default,
    paths,
    portable,
    reproduce,
    settings_class,
    use,
)
from ipfm.engine.config import TeacherConfig
from ipfm.engine.evaluation.metrics.measures import MEASURES, Measure, Measured, Metric, measures_of
from ipfm.engine.evaluation.results import EvaluationRow
from ipfm.engine.memory.profile import PhaseMemory
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.runtime.json_output import plain
from ipfm.engine.runtime.versions import installed
from ipfm.engine.runtime.wording import counted, duration, significant, symbol
from ipfm.engine.training.environment import in_words
from ipfm.engine.training.run_state import EvaluationPoint, RunRecord
from ipfm.engine.training.snapshots import KeptModel
from ipfm.engine.training.start import Branch

State = Literal["finished", "going on", "stopped", "diverged"]


@dataclass(frozen=True)
class SettingRow:
    """A setting as text, and what it is when nothing is given (None: not known to this version)."""

    name: str
    value: str
    default: str | None
    changed: bool


@dataclass(frozen=True)
class Loss:
    """A loss at the first step and, as the mean over the last tenth of the run, at the end; NaN: never finite."""

    name: str
    first: float
    last: float


@dataclass(frozen=True)
class Kept:
    """A network that the run keeps: its folder, as it is given to commands, its step and by what it is the best."""

    path: str
    step: int
    number: str


@dataclass(frozen=True)
class Facts:
    """Everything that a report says. Paths are without the folders of the machine that the run was made on."""

    run: str
    """Name of the folder."""
    title: str
    summary: str
    kind: str
    objective: str
    D: float
    """NaN where it is not known."""
    state: State
    steps_done: int
    total_steps: int | None
    batch: int | None
    images: int | None
    """Images that the network was trained on."""
    metric: str
    """What the distance is called."""
    metrics: tuple[Metric, ...]
    """What was measured; the first decides which evaluation is the best."""
    results: tuple[EvaluationRow, ...]
    evaluations: tuple[EvaluationPoint, ...]
    averages: Mapping[str, tuple[EvaluationPoint, ...]]
    """The evaluations of each of several averages, by its name."""
    best: EvaluationPoint | None
    """By the first of the metrics."""
    kept: Kept | None
    """The network of the best evaluation that the run keeps; None where it keeps none."""
    losses: tuple[Loss, ...]
    loss_reading: str
    teacher_distance: float | None
    """Of the teacher's samples; None where it was not measured."""
    teacher_values: Mapping[str, float]
    """All that was measured of them, by the keys of `MEASURES`."""
    started: str | None
    """Date and time in UTC."""
    logged_seconds: float | None
    """Time of the training, evaluations and checkpoints included."""
    images_per_second: float | None
    """The median over the steps, of the training alone, over all processes."""
    pace: tuple[tuple[int, float], ...]
    """(steps done, images/s)."""
    bad_steps: int
    """Steps with samples or gradients that were not finite."""
    bad: Mapping[str, int]
    """How many, by network."""
    memory: tuple[PhaseMemory, ...]
    settings: tuple[SettingRow, ...]
    environment: tuple[tuple[str, str], ...]
    command: Command
    uses: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    """Sentences on what the folder lacks."""
    made: str
    """Version and time of the report."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, see `plain`."""
        best = None if self.best is None else self.best.to_json()
        measured = {"results": _listed(self.results), "evaluations": _listed(self.evaluations), "best": best}
        measured |= {"averages": {name: _listed(points) for name, points in self.averages.items()}}
        return {"format": 1, **plain(self), **plain(measured)}


def _listed(found: Iterable[Measured]) -> list[dict[str, Any]]:
    return [one.to_json() for one in found]


def facts_of(record: RunRecord) -> Facts:
    """See `Facts`."""
    config = record.config
    D, batch = number(config.get("D")), number(config.get("batch"))
    whole_batch = int(batch) if math.isfinite(batch) else None
    state, done = _state(record), record.steps_done
    best, teacher = record.best_evaluation, record.teacher_row
    kept = None if record.best is None else _kept(record, record.best)
    network = _network(record, kept)
    objective = _objective(record)
    pace = _pace(record, whole_batch)
    names = record.losses
    distillation = distillation_class(record)
    told = TeacherConfig if record.kind == "teacher" else distillation
    readings = told.readings if told else _own(record)
    bad_names = dict.fromkeys(name for line in record.metrics for name in line if name.endswith("_bad"))
    bad = {name.removesuffix("_bad"): [_count(line.get(name)) for line in record.metrics] for name in bad_names}
    images = None if whole_batch is None else done * whole_batch
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Facts(
        run=record.path.resolve().name,
        title=_title(record, D),
        summary=" ".join(_summary(record, state, objective, D, best, images)),
        kind=record.kind,
        objective=objective,
        D=D,
        state=state,
        steps_done=done,
        total_steps=record.total_steps,
        batch=whole_batch,
        images=images,
        metric=record.metric,
        metrics=record.measured,
        results=record.results,
        evaluations=record.evaluations,
        averages=record.averages,
        best=best,
        kept=kept,
        losses=tuple(_loss(record, name) for name in names),
        loss_reading=" ".join(readings[name] for name in names if name in readings and config),
        teacher_distance=record.teacher_distance,
        teacher_values={} if teacher is None else teacher.values,
        started=None if record.pace.started is None else _date(record.pace.started),
        logged_seconds=record.pace.seconds or None,
        images_per_second=statistics.median(speed for _, speed in pace) if pace else None,
        pace=tuple(pace),
        bad_steps=sum(any(counts) for counts in zip(*bad.values(), strict=True)),
        bad={name: sum(counts) for name, counts in bad.items()},
        memory=record.memory,
        settings=tuple(_settings(record)),
        environment=tuple(_environment(record)),
        command=reproduce(record),
        uses=() if network is None else use(record, network),
        missing=tuple(_missing(record, state)),
        made=f"Made by ipfm {installed('ipfm')} on {made}.",
    )


def _kept(record: RunRecord, best: KeptModel) -> Kept:
    return Kept(f"{_place(record.path)}/{best.path.name}", best.step, best.number)


def _network(record: RunRecord, kept: Kept | None) -> str | None:
    """The network of the run that is there to be used: its result, else the best so far; None where neither is."""
    if record.export:
        return f"{_place(record.path)}/{record.export_path.name}"
    return None if kept is None else kept.path


def nfe_of(record: RunRecord) -> int | None:
    """Network evaluations of an image of the run's network; a teacher's by the sampler that it is measured with."""
    kind, steps = distillation_class(record), record.config.get("heun_steps")
    if record.kind == "teacher":
        return 2 * steps - 1 if isinstance(steps, int) else None
    if (row := next((row for row in record.results if row.label == "generator"), None)) is not None:
        return row.nfe
    own = record.about.get("nfe", record.config.get("steps")) if kind is None else kind.nfe_of(record.config)
    return own if isinstance(own, int) else None


def _state(record: RunRecord) -> State:
    """The run's state, by the report's word for it."""
    return "going on" if record.state == "running" else record.state


def _objective(record: RunRecord) -> str:
    if record.kind == "teacher":
        return "denoising score matching"
    kind = distillation_class(record)
    if kind is None and isinstance(record.about.get("words"), str):
        return str(record.about["words"])
    if kind is None:
        return f"an objective that {'this version does not know' if record.config else 'is not recorded'}"
    return kind.report_words(record.config) + kind.further_words(record.config)


def _own(record: RunRecord) -> Mapping[str, str]:
    """How to read the losses, as an objective from outside says it."""
    found = record.about.get("readings")
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _title(record: RunRecord, D: float) -> str:
    at = f", D = {symbol(D)}" if D > 0 else ""
    if record.kind == "teacher":
        return f"Training of a teacher{at}"
    kind = distillation_class(record)
    if kind is None:
        return f"{record.about.get('title', 'Distillation')}{at}"
    return kind.report_title(record.config, at)


def _summary(
    record: RunRecord,
    state: State,
    objective: str,
    D: float,
    best: EvaluationPoint | None,
    images: int | None,
) -> Iterator[str]:
    at = f" at D = {symbol(D)}" if D > 0 else ""
    if record.kind == "teacher":
        yield f"This run trains a denoiser{at} on {_data(record.identity)}, to be a teacher."
    else:
        nfe = nfe_of(record)
        evaluations = f" that makes an image in {counted(nfe, 'network evaluation')}" if nfe else ""
        yield f"This run distils {_teacher(record)} into a generator{evaluations}{at}, by {objective}."
    start = record.identity.get("start")
    if isinstance(start, dict):
        seen = start.get("images_seen")
        after = f", after {seen:,} images" if isinstance(seen, int) and seen else ""
        if "tensors" in start:
            yield f"It began with {start['tensors']} of {start.get('of')} tensors of {start.get('source')}."
        else:
            second = "It is a second stage: its generator began with"
            staged, student = start.get("stage") is True, start.get("student_source")
            beside = f", and its student {'with' if staged else 'from'} {student}" if student else ""
            yield f"{second if staged else 'It went on from'} {start.get('source')}{after}{beside}."
            yield from _branch(record, start)
    yield _length(record, state, images)
    for one in record.set_aside:
        back = "" if one.from_step is None else f"It went back to step {one.from_step:,}: "
        yield f"{back}what came after it, up to step {one.step:,}, is a run of its own in set-aside/{one.path.name}/."
    rows = {row.label: row for row in record.results}
    metric = record.metric
    if generator := rows.get("generator"):
        yield _result(generator, rows.get("teacher"), metric)
        yield from _further(generator, rows.get("teacher"), metric)
    elif record.evaluations:
        last = record.evaluations[-1]
        whose = "teacher" if record.kind == "teacher" else "generator"
        drawn = f" over {last.images:,} images" if last.images else ""
        name, value = _leading(last).called(metric), last.shown(_leading(last))
        yield f"The {name} of the {whose}'s samples after {counted(f'{last.step:,}', 'step')} is {value}{drawn}."
        yield from _further(last, record.teacher_row, metric)
    else:
        yield "Its samples have not been measured."
    if record.averages_in_words:
        yield f"Of its averages at the last evaluation: {record.averages_in_words}."
    if best is not None and record.evaluations and best.step != record.evaluations[-1].step:
        yield f"{_superlative(best, record.measured[0], metric)}, after {best.step:,} steps."
    if record.best is not None and (state != "finished" or record.best.step != record.steps_done):
        yield f"The best network, of step {record.best.step:,} ({record.best.number}), is in {record.best.path.name}/."


def _branch(record: RunRecord, start: Mapping[str, Any]) -> Iterator[str]:
    """A sentence on the run whose settings were the defaults, if there was one."""
    branch = Branch.read(start.get("branch"))
    if branch is None or record.settings is None:
        return
    changed = "; ".join(branch.changes(record.settings, settings_class(record) or Distillation))
    yield f"It is a branch of {branch.run} with its settings{f', but for these: {changed}' if changed else ''}."


def _leading(found: Measured) -> Measure:
    """The number that is spoken of first: the Fréchet distance where there is one."""
    measures = measures_of(found.metrics) or MEASURES
    return next((measure for measure in measures if measure.metric == "fid"), measures[0])


def _further(found: Measured, teacher: Measured | None, metric: str) -> Iterator[str]:
    """A sentence on what else was measured, if anything."""
    parts = []
    for measure in measures_of(found.metrics):
        if measure == _leading(found):
            continue
        beside = "" if teacher is None or measure.key not in teacher.values else f" (teacher: {teacher.shown(measure)})"
        parts.append(f"{measure.called(metric)} {found.shown(measure)}{beside}")
    if parts:
        yield f"Of the same samples: {', '.join(parts)}."


def _superlative(best: EvaluationPoint, chosen_by: Metric, metric: str) -> str:
    """The best evaluation, by the metric that decides."""
    if chosen_by == "fid":
        return f"The lowest so far was {significant(best.frechet)}"
    shown = " and ".join(f"{one.called(metric)} {best.shown(one)}" for one in measures_of((chosen_by,)))
    return f"The best so far had {shown}"


def _length(record: RunRecord, state: State, images: int | None) -> str:
    done, total, batch = record.steps_done, record.total_steps, record.config.get("batch")
    of = f" of {total:,}" if total is not None and done < total else ""
    size = f" of {batch} images" if batch else ""
    sum_ = f", {images:,} {'training' if record.kind == 'teacher' else 'generated'} images in all" if images else ""
    if of:
        sum_ = f"{sum_} so far"
    steps = f"{done:,}{of} steps{size}{sum_}"
    if state == "finished":
        return f"It is finished: {steps}."
    if state == "diverged":
        return f"It diverged: too many samples or gradients were not finite at step {record.diverged:,}, after {steps}."
    if state == "going on":
        return f"It is going on, at {steps}."
    return f"It was stopped before its end, at {steps}; the same command continues it."


def _result(generator: EvaluationRow, teacher: EvaluationRow | None, metric: str) -> str:
    first = _leading(generator)
    text = f"The {first.called(metric)} of the generator's samples is {generator.shown(first)}"
    if teacher is not None:
        text += f", beside {teacher.shown(first)} of the teacher at {counted(teacher.nfe, 'evaluation')}"
        text += " an image"
        # Where one of them is broken a ratio says nothing.
        if first.key == "frechet" and teacher.frechet > 0 and 0.1 < generator.frechet / teacher.frechet < 100:
            text += f": {generator.frechet / teacher.frechet:.2f} times the teacher's"
    text += f" ({generator.images:,} images each)." if teacher is not None else f" ({generator.images:,} images)."
    return f"{text} Published: {generator.paper}." if generator.paper else text


def _teacher(record: RunRecord) -> str:
    if record.teacher:
        steps = record.teacher.get("config", {}).get("max_steps") if _is_object(record.teacher.get("config")) else None
        trained = f"{steps:,} steps" if isinstance(steps, int) else "some steps"
        return f"a teacher, which it first trains itself for {trained} on {_data(record.teacher)},"
    given = record.config.get("teacher")
    return f"the teacher {portable(given)}" if isinstance(given, str) and given else "a teacher"


def _data(about: Mapping[str, Any]) -> str:
    dataset, images = about.get("dataset"), about.get("images")
    count = f"{images:,} images" if isinstance(images, int) else "images"
    return f"{count} ({dataset})" if dataset else count


def _loss(record: RunRecord, name: str) -> Loss:
    values = [number(line.get(name)) for line in record.metrics if name in line]
    end = [value for value in values[-max(1, len(values) // 10) :] if math.isfinite(value)]
    return Loss(name, values[0], statistics.fmean(end) if end else math.nan)


def _pace(record: RunRecord, batch: int | None) -> list[tuple[int, float]]:
    every = {name: _count(record.config.get(name)) for name in ("log_every", "eval_every", "checkpoint_every")}
    if batch is None or every["log_every"] < 1:
        return []
    pauses = (every["eval_every"], every["checkpoint_every"])
    found = record.pace.images_per_second(batch, log_every=every["log_every"], pauses=pauses)
    # Where every interval has a pause in it.
    return found or record.pace.images_per_second(batch, log_every=every["log_every"], pauses=())


def _settings(record: RunRecord) -> Iterator[SettingRow]:
    kind, places = settings_class(record), paths(record)
    defaults: dict[str, Any] = {}
    if kind is not None:
        defaults = kind().to_json()
        defaults |= {f"noise.{name}": value for name, value in defaults.pop("noise").items()}
    unused = record.about.get("unused", ()) if kind is None else getattr(kind, "unused", ())
    for name, value in record.config.items():
        if name == "out" or name in unused:
            continue  # the folder itself, and what had no effect
        known = name in defaults
        yield SettingRow(
            option_name(name),
            shown_setting(portable(value) if name in places and isinstance(value, str) else value),
            shown_setting(defaults[name]) if known else None,
            not known or not is_default(record, name, defaults[name]),
        )


def _environment(record: RunRecord) -> Iterator[tuple[str, str]]:
    config, pace = record.config, record.pace
    if pace.started is not None:
        yield "started", _date(pace.started)
    if pace.seconds:
        parts = f", in {len(pace.parts)} parts" if len(pace.parts) > 1 else ""
        yield "training, evaluations and checkpoints", f"{duration(pace.seconds)}{parts}"
    if record.memory:
        on_gpu = any(row.reserved_bytes is not None for row in record.memory)
        yield "device of the memory profile", "GPU" if on_gpu else "CPU"
    if config.get("precision"):
        yield "arithmetic", shown_setting(config["precision"])
    if config.get("zero") is not None:
        yield "ZeRO stage", shown_setting(config["zero"])
    checksum = record.identity.get("teacher")
    if isinstance(checksum, str):
        yield "SHA-256 of the teacher's weights", checksum
    if isinstance(record.export.get("sha256"), str):
        yield f"SHA-256 of {record.export_path.name}/model.safetensors", record.export["sha256"]
    if record.starts:
        yield from in_words(record.starts)
    else:
        yield "versions of software, hardware, number of processes", "not recorded in the run folder"


def _missing(record: RunRecord, state: State) -> Iterator[str]:
    """What a report would like to say and cannot, then what is damaged."""
    distils, over = record.kind == "distill", state == "finished"
    if not record.metrics:
        yield "No losses: metrics.jsonl has no lines."
    early = "" if over else ", or has not come to its first evaluation"
    if not record.evaluations:
        yield f"No distances: the run was given no reference{early}."
    if distils and not record.results and (record.evaluations or not over):
        yield "No table beside the teacher: it is made at the end of a run that has a reference."
    if not record.pictures:
        yield f"No pictures: samples/ has none{'' if over else '; the run has not come to its first evaluation'}."
    if not record.export:
        best = "" if record.best is None else f" The best so far is in {record.best.path.name}/."
        yield (
            f"No network: {record.export_path.name}/ is made at the end.{best} The checkpoints are there to continue "
            "from."
        )
    if not record.pace.parts:
        yield "No images/s: they come from the times in TensorBoard's files, of which none can be read."
    if not record.memory and record.memory_picture is None:
        yield "No profile of memory: --profile-memory N leaves one."
    yield from (f"{line[0].upper()}{line[1:]}." for line in record.problems)


def _place(path: Path) -> str:
    """The run folder in commands: as it was given, if that says nothing of the machine."""
    return portable(str(path)) if not path.is_absolute() and ".." not in path.parts else path.resolve().name


def shown_setting(value: object) -> str:
    """A setting's value for people."""
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ", ".join(map(shown_setting, value)) or "not given"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _count(value: object) -> int:
    found = number(value)
    return int(found) if math.isfinite(found) and found > 0 else 0


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _is_object(value: object) -> bool:
    return isinstance(value, dict)
