"""What --branch names: another run's checkpoint and its settings, with which a new run goes on.

The settings of that run are the defaults, as they were when the branch began: its own folder has them, so that the
same command goes on with them, whatever has become of the other run. Networks are read as --continue-from reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ipfm.engine.checks import option_name
from ipfm.engine.config import FIRST_RULES, RunConfig, TeacherConfig, first_weights_settings, free_settings
from ipfm.engine.distributed.agreement import together
from ipfm.engine.distributed.world import World
from ipfm.engine.experiments.options import DistillationOptions
from ipfm.engine.experiments.starts import record_of, run_of, typed
from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.objectives import OBJECTIVES
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.runtime.commandline import BadInput, Given
from ipfm.engine.runtime.files import StepLog
from ipfm.engine.training.checkpoint import checkpoints_in, find_checkpoint, is_whole, step_of
from ipfm.engine.training.snapshots import best_path, read_best
from ipfm.engine.training.start import Branch
from ipfm.models.checkpoints.recognise import is_checkpoint, missing, user_path
from ipfm.models.checkpoints.run_models import EXPORTS
from ipfm.models.store import TENSOR_FILE

O = TypeVar("O", bound=RunConfig)

# Settings of the other run that are no defaults: of the one start alone, as it was told; or decided for its processes.
NOT_TAKEN = frozenset({"out", "resume", "from_step", "profile_memory", "zero", "teacher_storage"})
# Options that say in another way what a run begins with.
OTHERS = ("continue_from", "student_from", "continue_at_kimg", "continue_average", "transfer")
WORDS = ("best", "last")


@dataclass(frozen=True)
class _Found:
    """What --branch says: a run, and where in it; no step is the newest."""

    run: Path
    word: str | None


def branched(given: Given[O], base: O) -> tuple[Given[O], Branch | None]:
    """The command line with what --branch stands for; as it is, and None, without.

    Args:
        given: the command line, with an option `branch`.
        base: the recipe's own settings, for options that no run records.

    Returns:
        The command line as if the other run's settings had been given, and its checkpoint as --continue-from.

    Raises:
        ValueError: what is named cannot be branched from, or something else that was given does not go with it.
    """
    options: Any = given.options
    if options.branch is None:
        return given, None
    for name in OTHERS:
        if name in given.names:
            raise ValueError(
                f"{option_name(name)} was given, but branch says what the run begins with: leave one of them out"
            )
    kind = _settings_class(options)
    if inits := sorted(given.names & first_weights_settings(kind)):
        raise ValueError(f"{option_name(inits[0])} was given, but branch says what the first weights are")
    if options.out is None:
        raise BadInput("--branch makes a run of its own: give its folder as --out")
    branch = _begun(options, kind) or _new(options, kind)
    own = options.out / "checkpoints"
    if options.from_step is not None and not checkpoints_in(own):
        raise ValueError(
            f"from-step goes back in {options.out}, which has not begun: {branch.run}:{options.from_step} as --branch "
            "names the step to begin with"
        )
    values = _inherited(branch, kind)
    taken = _names(values, kind)
    options = given.over(replace(base, **values))
    if "teacher" in taken - given.names and not user_path(options.teacher).exists():
        raise ValueError(
            f"the teacher of {branch.run}, {options.teacher}, is not there: give it as --teacher, where it lies now"
        )
    others = _others(branch, options)
    others = {name: value for name, value in others.items() if name not in given.names}
    options = replace(options, continue_from=branch.checkpoint, **others)
    return Given(options, given.names | taken | others.keys()), branch


def check_agreed(branch: Branch | None, world: World) -> None:
    """Check that all processes have found the same checkpoint: a run that goes on may have made one meanwhile.

    Raises:
        ValueError: on every process: they have not.
    """
    if branch is None:
        return
    first = world.broadcast_text(f"{branch.step}")

    def same() -> None:
        if first != f"{branch.step}":
            raise ValueError(
                f"{branch.run} has made a checkpoint meanwhile: name the step, as --branch {branch.run}:{first}"
            )

    together(same, world.size)


def _settings_class(options: Any) -> type[RunConfig]:
    """The class of the settings that these options hold."""
    return options.settings_class() if isinstance(options, DistillationOptions) else TeacherConfig


def _found(path: Path) -> _Found:
    """The run and the step that an option's value names."""
    path = user_path(path)
    run = run_of(path) if path.is_dir() else None
    if run is not None:
        return _Found(run, f"{step_of(path.resolve())}" if is_checkpoint(path) else None)
    before, colon, word = str(path).rpartition(":")
    if not path.exists() and colon and (word in WORDS or re.fullmatch(r"\d{1,12}", word)):
        return _Found(Path(before), word)
    if not path.exists() and colon and Path(before).is_dir():
        raise ValueError(f"branch takes RUN or RUN:STEP, where STEP is a number, best or last, got {str(path)!r}")
    return _Found(path, None)


def _begun(options: Any, kind: type[RunConfig]) -> Branch | None:
    """The branch that has begun in --out, where it is the one that is asked for."""
    start = record_of(options.out).get("start")
    said = Branch.read(start.get("branch")) if isinstance(start, dict) else None
    asked = _found(options.branch)
    if said is None:
        return None
    record = record_of(asked.run)
    is_it = _is_it(record, said, kind) if record else asked.run.resolve().name == Path(said.run).name
    if not is_it or not (asked.word in (None, *WORDS) or int(asked.word or 0) == said.step):
        raise ValueError(
            f"{options.out} is a branch of {'' if is_it else 'another run, '}{said.run} at step {said.step}, "
            f"and {options.branch} was asked for: choose another --out"
        )
    return replace(said, run=str(asked.run), checkpoint=_checkpoint_path(asked.run, said.step))


def _new(options: Any, kind: type[RunConfig]) -> Branch:
    """The branch that is to begin."""
    asked = _found(options.branch)
    run = asked.run
    if not run.exists():
        raise ValueError(f"{missing(run)}; branch takes the folder of a run, RUN or RUN:STEP")
    record = record_of(run)
    if not record:
        raise ValueError(
            f"{run} is no run folder: branch takes RUN or RUN:STEP; --continue-from goes on from other states and "
            "networks"
        )
    if run.resolve() == options.out.resolve():
        raise ValueError(f"{run} is the run itself: give the branch another --out; --from-step goes back within a run")
    _check_kind(run, record, kind)
    step = _step(run, asked.word, record["kind"])
    settings = {n: value for n, value in _settings_of(record).items() if n not in ("out", "resume", "from_step")}
    own = run / "teacher" / EXPORTS["teacher"]
    if record["kind"] == "distill" and settings.get("teacher") is None and (own / TENSOR_FILE).is_file():
        settings["teacher"] = str(own)
    try:
        images = step * int(settings["batch"])
    except (LookupError, TypeError, ValueError):
        raise ValueError(f"{run / 'config.json'} cannot be read as a run's settings") from None
    return Branch(
        run=str(run),
        step=step,
        images_seen=images,
        facts=_facts(record),
        settings=settings,
        options=_options(run, record),
        checkpoint=_checkpoint_path(run, step),
    )


def _check_kind(run: Path, record: Mapping[str, Any], kind: type[RunConfig]) -> None:
    """Check that the run is of the recipe's kind and objective.

    Raises:
        ValueError: it is not.
    """
    if (record["kind"] == "teacher") != (kind is TeacherConfig):
        what, whose = "a distillation", "one of its objective, such as digits_ipfm.py or distill_pid.py,"
        if record["kind"] == "teacher":
            what, whose = "the training of a teacher", "one that trains teachers alone, such as train_teacher.py,"
        raise ValueError(f"{run} is {what}, which this recipe does not make: {whose} branches it")
    if not issubclass(kind, Distillation):
        return
    there = OBJECTIVES.of(record.get("objective"), record["config"])
    if there is None or there.kind != kind.kind:
        method = record.get("objective", "an objective that is not known here") if there is None else there.method
        raise ValueError(
            f"{run} was distilled by {method}, whose recipes branch it: this one is of {kind.method}, whose networks "
            "and steps are others"
        )


def _step(run: Path, word: str | None, kind: str) -> int:
    """The step that is asked for, of which the run has a whole checkpoint."""
    steps = _steps(run)
    export = run / EXPORTS[kind]
    if not steps:
        raise ValueError(f"{run} has no checkpoint to branch from: --continue-from {export} begins with its network")
    has = f"it has those of steps {', '.join(map(str, steps))}"
    if word in (None, "last"):
        newest = find_checkpoint(run / "checkpoints")
        if newest is None:
            raise ValueError(f"no checkpoint of {run} is whole: --continue-from {export} begins with its network")
        return step_of(newest)
    if word == "best":
        best = read_best(run, kind)
        if best is None:
            raise ValueError(f"{run} has measured no best network: {has}")
        if best.step not in steps:
            raise ValueError(
                f"the best of {run}, of step {best.step}, has no checkpoint any more: {has}; --continue-from "
                f"{best_path(run, kind)} begins with that network alone"
            )
        word = str(best.step)
    step = int(word or 0)
    if step not in steps:
        raise ValueError(f"{run} has no checkpoint of step {step}: {has}")
    if not any(is_whole(path) for path in checkpoints_in(run / "checkpoints") if step_of(path) == step):
        whole = [other for other in steps if other != step]
        raise ValueError(f"the checkpoint of step {step} in {run} is damaged" + (f": {has}" if whole else ""))
    return step


def _steps(run: Path) -> list[int]:
    return sorted({step_of(path) for path in checkpoints_in(run / "checkpoints")})


def _checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:07d}"


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What tells the run apart from others beside its settings, wherever its folder lies."""
    names = ("teacher", "network", "continues", "dataset", "pictures", "real_data")
    return {name: record[name] for name in names if name in record}


def _settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings, with what it has decided where they leave it open: a branch of another length keeps that."""
    settings, decided = {"rules": FIRST_RULES, **record["config"]}, record.get("decided")
    known = decided if isinstance(decided, dict) else {}
    return settings | {name: value for name, value in known.items() if settings.get(name) is None}


def _is_it(record: Mapping[str, Any], said: Branch, kind: type[RunConfig]) -> bool:
    """Whether a run is the one that was branched: what both know of what identifies it is equal."""
    free = free_settings(kind)
    # What it has decided may have been recorded since.
    known = record["config"], _settings_of(record)
    same = (any(one.get(n, value) == value for one in known) for n, value in said.settings.items() if n not in free)
    return all(same) and all(record.get(name, value) == value for name, value in said.facts.items())


def _options(run: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the run was made with that is no setting, as far as its folder tells."""
    found: dict[str, Any] = {"xflip": True} if record.get("xflip") is True else {}
    try:
        last = StepLog(run / "evaluations.jsonl", None).read()[-1]
    except (OSError, ValueError, LookupError):
        return found
    if isinstance(images := last.get("images"), int):
        found["eval_images"] = images + int(last.get("left_out", 0))
    if isinstance(metrics := last.get("metrics"), list):
        found["metrics"] = metrics
    return found


def _inherited(branch: Branch, kind: type[RunConfig]) -> dict[str, Any]:
    """The settings of the other run that are the branch's defaults, by name, typed."""
    known = {f.name: f for f in fields(kind)}
    taken = known.keys() - NOT_TAKEN - first_weights_settings(kind)
    settings = {name: value for name, value in branch.settings.items() if name in taken}
    if settings.get("offload", "none") != "none":
        settings["zero"] = branch.settings.get("zero")
    # What followed from other settings follows from them again.
    implied = kind.implied(settings) if issubclass(kind, Distillation) else {}
    follows = {name for name, value in settings.items() if name in implied and implied[name] == value}
    values: dict[str, Any] = {n: known[n].default if n in follows else typed(n, value) for n, value in settings.items()}
    paths = {name for name, value in values.items() if "Path" in str(known[name].type) and value is not None}
    return {**values, **{name: Path(values[name]) for name in paths}}


def _others(branch: Branch, options: Any) -> dict[str, Any]:
    """What the other run was made with that is no setting: what was measured, where something is to be."""
    trains_a_teacher_too = getattr(options, "teacher_steps", None) is not None
    names = ["eval_images", "metrics"] if trains_a_teacher_too or options.compared_with is not None else []
    names += ["xflip"] if hasattr(options, "xflip") else []
    return {name: typed(name, branch.options[name]) for name in names if name in branch.options}


def _names(values: Mapping[str, Any], kind: type[RunConfig]) -> frozenset[str]:
    """The names of options under which these settings count as given."""
    lengths = {name for name in ("kimg", "max_steps", "teacher") if values.get(name) is None}
    names = values.keys() - lengths - {"noise"}
    noise, plain = values.get("noise"), NoiseLevels()
    # A preconditioning with noise levels of its own takes none of EDM's.
    own = ("p_mean", "p_std", "sigma_data") if kind is TeacherConfig else ()
    for f in fields(noise) if isinstance(noise, NoiseLevels) else ():
        if f.name not in own or getattr(noise, f.name) != getattr(plain, f.name):
            names.add(f"noise.{f.name}")
    return frozenset(names)


def described_branch(branch: Branch | None, config: RunConfig) -> tuple[str, ...]:
    """Lines on the settings of a branch, for a dry run and for the start of a run; none without one."""
    if branch is None:
        return ()
    changed = "; ".join(branch.changes(config.to_json(), type(config)))
    lines = [
        f"branch of {branch.run} at step {branch.step:,}, with its settings{f' but: {changed}' if changed else ''}"
    ]
    if branch.settings.get("batch") != config.batch:
        first = branch.images_seen // config.batch
        lines.append(f"  steps count from the images seen: step {branch.step:,} there is step {first:,} here")
    return tuple(lines)
