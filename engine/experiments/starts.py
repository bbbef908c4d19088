"""What --continue-from and --student-from name: another distillation's state, a run of this project, or networks."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ipfm.engine.config import RunConfig, place_settings
from ipfm.engine.distributed.zero import BETA2
from ipfm.engine.experiments.options import DistillationOptions
from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.objectives import DEFAULT, OBJECTIVES
from ipfm.engine.objectives.base import Distillation, Role
from ipfm.engine.objectives.initial_networks import starting_network, trained_config
from ipfm.engine.objectives.own_files import VARIABLE
from ipfm.engine.runtime.files import read_json
from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.checkpoint import BUFFER, checkpoints_in, find_checkpoint, step_of, verify_checkpoint
from ipfm.engine.training.run_folder import EXPORTS, fingerprint
from ipfm.engine.training.start import Branch, DistillationStart, NetworkStart, short_name
from ipfm.kernels.adam import ema_entries
from ipfm.models import NetworkConfig, Precond, read_config
from ipfm.models.checkpoints.distillation_state import (
    DistillationState,
    NetworkState,
    distillation_state_of,
    is_distillation_state,
)
from ipfm.models.checkpoints.reader import Checkpoint, open_checkpoint
from ipfm.models.checkpoints.recognise import is_checkpoint, missing, user_path
from ipfm.models.checkpoints.run_models import locate
from ipfm.models.checkpoints.training_state import (
    STUDENTS,
    AdamState,
    TrainingState,
    is_training_state,
    read_training_state,
)
from ipfm.models.facts import GeneratorFacts, TeacherFacts
from ipfm.models.store import CONFIG_FILE, load_stored

# The role of a student.
STUDENT = "student"
CAN_BE = (
    "what can be continued: a training state of SiD or pfgmpp-idmd, a run folder of a distillation or one of its "
    "checkpoints, or a generator (a model folder, a network-snapshot-*.pkl)"
)


def read_start(
    options: DistillationOptions,
    config: Distillation,
    teacher: Precond | None,
    folder: Path | None = None,
    branch: Branch | None = None,
) -> DistillationStart | None:
    """What the run begins with, as --continue-from, --init and --student-from say; None without. Nothing is written.

    Args:
        options: of the recipe.
        config: the settings with nothing left open but what memory decides.
        teacher: None where it is still to be trained.
        folder: the run folder. A run that has begun there, and has a checkpoint, needs no file that is gone.
        branch: of which --continue-from is the checkpoint, where that follows from --branch.

    Raises:
        ValueError: a file or folder that is neither, or does not fit; one line that names it.
    """
    given = (
        ("continue-from", options.continue_from),
        ("init", options.init_from),
        ("student-from", options.student_from),
    )
    named = {option: path for option, path in given if path is not None}
    if not named:
        return None
    if teacher is None:
        option, path = next(iter(named.items()))
        # Of a run with a teacher of its own, such as the digits', that is said by its folder.
        own = f", such as --teacher {path}" if (path / "teacher" / "config.json").exists() else ", as --teacher"
        raise ValueError(f"{option} was given: give the teacher that it was distilled from too{own}")
    gone = [path for path in named.values() if not user_path(path).exists()]
    if gone and folder is not None and options.from_step != 0 and (begun := _begun(folder, gone[0])) is not None:
        return begun
    if folder is not None and options.from_step != 0 and (begun := _begun_stage(folder, options.init_from)) is not None:
        return begun
    check_there(branch)
    check_length(branch, config)
    start = _Reader(options, config, teacher, branch).read()
    return start if branch is None else replace(start, branch=branch)


def described_start(start: DistillationStart | None, config: Distillation) -> tuple[str, ...]:
    """Lines on what is continued, for a dry run and for the start of a run; none where nothing is."""
    if start is None:
        return ()
    if start.stage:
        first = [f"second stage: the generator begins with {start.source}, at step 0"]
        return (*first, *(f"  {role}: {one.words}" for role, one in start.networks.items()), *_indented(start.notes))
    step, seen = start.first_step(config.batch), f"{start.images_seen:,} images seen"
    goes_on = f"continues {start.source}: {seen}, goes on at step {step:,} of {config.total_steps:,}"
    counted_from = " (--continue-at-kimg sets it)" if set(start.networks) != {STUDENT} else ""
    return (
        goes_on if step else f"starts from {start.source}, at step 0{counted_from}",
        *(f"  {role}: {network.words}" for role, network in start.networks.items()),
        *_indented(start.notes),
    )


def _indented(notes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"  {note}" for note in notes)


def read_teacher_state(path: Path, *, D: float | None = None) -> TrainingState:
    """The training of a teacher that is continued: a state of EDM or PFGM++, or a run of this project.

    Args:
        path: the file; or a run folder of a teacher's training, one of its checkpoints, or the folder of them.
        D: auxiliary dimensions that it is expected to have.

    Raises:
        ValueError: anything else; one line that names it.
    """
    if not path.is_dir():
        return read_training_state(path, D=D)
    run = run_of(path)
    if run is None:
        _check_no_states(path)
        stored = read_config(path)
        raise ValueError(f"{stored.folder} is a network without its optimiser: --transfer begins with its weights")
    record = record_of(run)
    if record["kind"] != "teacher":
        raise ValueError(f"{run} is a distillation, and no training of a teacher: recipes that distil continue it")
    checkpoint = _newest(path, run)
    if checkpoint is None:
        raise ValueError(
            f"{run} has no checkpoint to continue from: --transfer {run / 'model'} begins with its weights"
        )
    average = load_stored(read_config(checkpoint))
    if D is not None and D != average.D:
        raise ValueError(f"{run} was trained for D = {average.D:g}, but D = {D:g} was asked for")
    try:
        batch, beta1, lr, eps = (float(record["config"][name]) for name in ("batch", "beta1", "lr", "eps"))
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{run / 'config.json'} cannot be read as a run's settings: {error}") from None
    kinds, steps = _saved_state(checkpoint, "teacher")
    zeros = {name: torch.zeros_like(value) for name, value in kinds["exp_avg_sq"].items()}
    return TrainingState(
        config=average.config,
        D_source="file",
        weights={**average.state_dict(), **kinds["weight"]},
        ema=average.state_dict(),
        ema_from=f"{short_name(run)}/{checkpoint.name}",
        exp_avg=kinds.get("exp_avg", zeros),
        exp_avg_sq=kinds["exp_avg_sq"],
        adam_steps=steps,
        images_seen=step_of(checkpoint) * int(batch),
        betas=(beta1, BETA2),
        lr=lr,
        eps=eps,
        source=f"{short_name(run)}/{checkpoint.name}",
    )


def begun_in(folder: Path, gone: Path | None = None) -> TrainingState | None:
    """The training of a teacher that goes on in `folder` from another one, and has a checkpoint of its own.

    It needs nothing else; None where there is none.

    Args:
        folder: a run folder, or none yet.
        gone: what it began with; None: any.

    Raises:
        ValueError: it cannot be read.
    """
    record = record_of(folder)
    said, continues = record.get("start"), record.get("continues")
    if not isinstance(said, dict) or not continues or find_checkpoint(folder / "checkpoints") is None:
        return None
    # The name of a file, or RUN/CHECKPOINT.
    if gone is not None and str(said.get("source")).partition("/")[0] not in (gone.name, short_name(gone)):
        return None
    state = read_teacher_state(folder)
    images = said.get("images_seen")
    seen = images if isinstance(images, int) else state.images_seen
    return replace(state, images_seen=seen, source=str(said.get("source")), said=said, continues=str(continues))


def _saved_state(checkpoint: Path, network: str) -> tuple[dict[str, dict[str, Tensor]], int]:
    """What a checkpoint has of a network: its tensors by kind and name, and the steps of its optimiser."""
    path = checkpoint / f"{network}.safetensors"
    kinds: dict[str, dict[str, Tensor]] = {"weight": {}, "exp_avg_sq": {}}
    try:
        for key, tensor in load_file(path).items():
            kind, _, name = key.partition("/")
            kinds.setdefault(kind, {})[name] = tensor
        return kinds, json.loads((checkpoint / "progress.json").read_bytes())["steps_applied"][network]
    except (OSError, SafetensorError, LookupError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as the state of the {network}: {error}") from None


def _loss_scale(checkpoint: Path, network: str) -> dict[str, float]:
    """Where the scale of a network's fp16 losses stands in a checkpoint; empty in other arithmetic."""
    found = (read_json(checkpoint / "progress.json") or {}).get("loss_scale", {})
    return dict(found.get(network, {})) if isinstance(found, dict) else {}


def check_there(branch: Branch | None) -> None:
    """Check that the checkpoint of a branch is still there, which has none of its own to go on from.

    Raises:
        ValueError: it is not: the other run may go on, and keeps the newest ones alone.
    """
    if branch is None or branch.checkpoint.exists():
        return
    steps = ", ".join(f"{step_of(path)}" for path in reversed(checkpoints_in(branch.checkpoint.parent)))
    has = f"those of steps {steps}" if steps else "none"
    raise ValueError(
        f"{branch.run} has no checkpoint of step {branch.step} any more: it has {has}; more --keep-checkpoints there "
        "keeps them longer"
    )


def check_length(branch: Branch | None, config: RunConfig) -> None:
    """Check that a branch does not end before it begins.

    Raises:
        ValueError: it does.
    """
    if branch is None or (first := branch.images_seen // config.batch) < config.total_steps:
        return
    at, there = f"step {branch.step:,}", branch.images_seen // branch.step
    if there != config.batch:
        at += f", {branch.images_seen:,} images, which are {first:,} steps of {config.batch}"
    steps = [step_of(path) for path in checkpoints_in(branch.checkpoint.parent)]
    earlier = [step for step in steps if step * there // config.batch < config.total_steps]
    less = f", or an earlier step, as --branch {branch.run}:{max(earlier)}" if earlier else ""
    raise ValueError(
        f"{branch.run} is at {at}, and the branch is to end at step {config.total_steps:,}: give a larger --max-steps "
        f"or --kimg, which count from the first run's start{less}"
    )


def _begun(folder: Path, gone: Path) -> DistillationStart | None:
    """The start of the run in `folder` where it goes on from a checkpoint of its own, and the file `gone` is gone."""
    record = record_of(folder)
    said = record.get("start")
    if not isinstance(said, dict) or "continues" not in record or find_checkpoint(folder / "checkpoints") is None:
        return None
    seen, note = said.get("images_seen"), f"{gone} is gone: the run goes on from its checkpoint, and needs it no more"
    facts = {name: record[name] for name in ("continues", "start")}
    source, images = str(said.get("source")), seen if isinstance(seen, int) else 0
    return DistillationStart(source, {}, images, (note,), facts, stage=said.get("stage") is True)


def _begun_stage(folder: Path, run: Path | None) -> DistillationStart | None:
    """The start of the second stage in `folder` that has a checkpoint: its first run may have gone on since.

    Args:
        folder: the run folder.
        run: what --init names. Of a file or a model folder what it holds now counts: None.
    """
    said = record_of(folder).get("start")
    if run is None or not isinstance(said, dict) or said.get("stage") is not True:
        return None
    if run_of(run) is None or is_checkpoint(run) or str(said.get("source")).partition("/")[0] != run.resolve().name:
        return None
    begun = _begun(folder, run)
    note = f"the run goes on from its checkpoint: what {run} has become does not matter"
    return None if begun is None else replace(begun, notes=(note,))


class _Reader:
    """Reads what the options name.

    Args:
        options: of the recipe, which name something.
        config: the settings with nothing left open but what memory decides.
        teacher: what is distilled.
        branch: see `read_start`.
    """

    def __init__(
        self, options: DistillationOptions, config: Distillation, teacher: Precond, branch: Branch | None = None
    ) -> None:
        self.options, self.config, self.teacher, self.branch = options, config, teacher, branch
        self.objective = config.objective(trained_config(teacher.config, config.dropout))
        self.roles = {role.name: role for role in self.objective.roles}
        self.notes: list[str] = []

    def read(self) -> DistillationStart:
        """See `read_start`."""
        options, batch, total = self.options, self.config.batch, self.config.total_steps
        student = options.student_from
        if student is not None and STUDENT not in self.roles:
            raise ValueError(f"student-from was given, but {self.config.method} has no student")
        start = DistillationStart("" if student is None else short_name(student), {})
        if options.continue_from is not None:
            start = self._continued(options.continue_from)
        if options.init_from is not None:
            start = self._staged(options.init_from)
        if student is not None:
            if STUDENT in start.networks:
                raise ValueError(
                    f"student-from was given, but {options.continue_from} has the student of its own training: leave "
                    "student-from out"
                )
            elsewhere = short_name(student) if start.networks else ""
            networks = {**start.networks, STUDENT: self._student(student)}
            start = replace(start, networks=networks, student_source=elsewhere)
        start.check(self.objective.roles)
        for role in self.roles.values():
            if role.name not in start.networks:
                self.notes.append(f"{role.name}: starts from {_FIRST[role.start]}, with a fresh optimiser")
        seen = start.images_seen if options.continue_at_kimg is None else round(options.continue_at_kimg * 1000)
        start = replace(start, images_seen=seen, notes=tuple(self.notes))
        if (first := start.first_step(batch)) >= total:
            raise ValueError(
                f"{start.source} has seen {seen / 1000:g} kimg, {counted(f'{first:,}', 'step')} of {batch} images, "
                f"and the run is to end at step {total:,}: give a larger --kimg or --max-steps, which count from "
                "the first training's start, or --continue-at-kimg 0 to count from here"
            )
        return start

    # -- what --continue-from may be --------------------------------------------------------------------------------

    def _continued(self, path: Path) -> DistillationStart:
        average = self.options.continue_average
        if path.is_dir():
            if average is not None:
                raise ValueError(f"continue-average chooses among the averages in a file, and {path} is a folder")
            return self._folder(path)
        if not path.exists():
            raise ValueError(f"{missing(path)}; {CAN_BE}")
        checkpoint = open_checkpoint(path)
        if is_distillation_state(checkpoint):
            return self._state(distillation_state_of(checkpoint, path, D=self.teacher.D, average=average), path)
        return DistillationStart(path.name, {self.objective.generator: self._generator_in(checkpoint, path)})

    def _staged(self, path: Path) -> DistillationStart:
        """The generator of another run, or one alone, with nothing that trained it."""
        if not user_path(path).exists():
            raise ValueError(
                f"init takes auto, teacher, random, or a run folder, a model folder or a checkpoint file, and "
                f"{missing(path)}"
            )
        found = locate(path)
        if found.taken:
            self.notes.append(found.taken)
        place = found.path
        if not place.is_dir():
            first = self._generator_in(open_checkpoint(place), place)
        else:
            _check_no_states(place)
            first = self._generator_of(place, teachers_too=True)
        first = replace(first, ema_source="with which its fresh average begins")
        generator = self.objective.generator
        return DistillationStart(short_name(place), {generator: first}, stage=True)

    def _state(self, state: DistillationState, path: Path) -> DistillationStart:
        """A training state of SiD, of pfgmpp-idmd or of the project before it."""
        generator = self.objective.generator
        if STUDENT not in self.roles:
            raise ValueError(
                f"{path} is a {state.origin}, with a student, and {self.config.method} has none: a recipe of "
                f"{OBJECTIVES[DEFAULT].method} continues it"
            )
        seen = state.images_seen
        adam = state.generator.adam
        if seen is None and adam is not None and self.options.continue_at_kimg is None:
            steps = adam.steps
            seen = steps * self.config.batch
            self.notes.append(
                f"its name does not say how many images it has seen: "
                f"{counted(f'{steps:,}', 'step')} of its generator's optimiser, "
                f"of {self.config.batch} images each; --continue-at-kimg says it"
            )
        for role, stored in ((generator, state.generator), (STUDENT, state.student)):
            self._compare(self.roles[role], stored.adam)
        if state.D_source != "file" and not math.isinf(self.teacher.D):
            self.notes.append(f"the file does not say its D: taken for the teacher's, {self.teacher.D:g}")
        if state.average is None:
            self.notes.append(f"{generator}: the file has no average of it, which begins with its weights")
        networks = {
            generator: _of(state.generator, path, state.average, state.average_key or ""),
            STUDENT: _of(state.student, path),
        }
        return DistillationStart(path.name, networks, seen or 0)

    def _compare(self, role: Role, adam: AdamState | None) -> None:
        """Note where the optimiser of the training elsewhere had other settings than this run's."""
        if adam is None:
            return
        pairs = {"lr": (adam.lr, role.lr), "beta1": (adam.betas[0], role.beta1), "eps": (adam.eps, self.config.eps)}
        told = [f"{name} is {there:g} there, {here:g} here" for name, (there, here) in pairs.items() if there != here]
        if told:
            self.notes.append(f"{role.name}: its optimiser goes on with this run's settings ({'; '.join(told)})")

    def _folder(self, path: Path) -> DistillationStart:
        run = run_of(path)
        if run is None:
            _check_no_states(path)
            return DistillationStart(short_name(path), {self.objective.generator: self._generator_of(path)})
        there = _settings(run)
        if there.kind != self.config.kind:
            raise ValueError(
                f"{run} was distilled by {there.method}, whose recipes continue it: this one is of {self.config.method}"
            )
        if there.D != self.config.D:
            raise ValueError(
                f"{run} was distilled at D = {there.D:g}, the teacher of this run is of D {self.teacher.D:g}"
            )
        other = record_of(run).get("teacher") != fingerprint(self.teacher.state_dict())
        if other and self.branch is not None:
            raise ValueError(
                f"{run} was distilled from another teacher than {self.options.teacher}: a branch has the run's; "
                f"--continue-from {path} takes its networks to another one"
            )
        if other:
            self.notes.append(f"{run.name} was distilled from another teacher than this run's")
        checkpoint = _newest(path, run)
        if checkpoint is None:
            return DistillationStart(run.name, {self.objective.generator: self._generator_of(run / EXPORTS["distill"])})
        networks = {role.name: self._saved(role, checkpoint, run, there) for role in self._roles(there)}
        for name in networks.keys() & self.roles.keys():
            self._compare(self.roles[name], networks[name].adam)
        return DistillationStart(f"{short_name(run)}/{checkpoint.name}", networks, step_of(checkpoint) * there.batch)

    # -- single networks --------------------------------------------------------------------------------------------

    def _generator_of(self, folder: Path, *, teachers_too: bool = False) -> NetworkStart:
        """The generator in a model folder; `teachers_too`: a teacher is as good."""
        stored = read_config(folder)
        if not (teachers_too and isinstance(stored.facts, TeacherFacts)):
            self._check_facts(folder, stored.facts)
        weights = load_stored(stored).float().state_dict()
        return _alone(str(folder), weights, stored.network)

    def _check_facts(self, place: Path, facts: TeacherFacts | GeneratorFacts | None) -> None:
        """Compare what a network says of itself with a generator of this objective.

        Raises:
            ValueError: it is a teacher, or a generator of another kind.
        """
        if isinstance(facts, TeacherFacts) and facts.task == "teacher":
            raise ValueError(f"{place} is a teacher and no generator; without --continue-from that is the start")
        if not isinstance(facts, GeneratorFacts):
            return
        ours = self.objective.facts
        if facts.is_trajectory != (ours.get("parametrisation") == "trajectory"):
            kind = "a trajectory" if facts.is_trajectory else "evaluations at noise levels"
            raise ValueError(f"{place} is a generator by {kind}, which {self.config.method} does not go on from")
        levels = ours.get("sigmas")
        if facts.sigmas is not None and levels is not None and list(facts.sigmas) != levels:
            there, here = (", ".join(f"{sigma:g}" for sigma in given) for given in (facts.sigmas, levels))
            self.notes.append(f"it was distilled at the noise levels {there}, this run has {here}")

    def _generator_in(self, checkpoint: Checkpoint, path: Path) -> NetworkStart:
        """The generator in a file that holds no whole state."""
        name = checkpoint.choose(self.options.continue_average)
        if not checkpoint.is_generator(name) and (is_training_state(checkpoint) or "loss_fn" in checkpoint.entries):
            raise ValueError(
                f"{path} is a teacher's ({checkpoint.origin}) and no generator: recipes that train a teacher continue "
                f"its training; {CAN_BE}"
            )
        self._check_facts(path, checkpoint.facts)
        found = checkpoint.read(name, D=self.teacher.D)
        return _alone(f"{found.key} of {path.name}", found.weights, found.config)

    def _student(self, path: Path) -> NetworkStart:
        """The network that --student-from names."""
        if not path.exists():
            raise ValueError(f"{missing(path)}; a student is a model folder, a file with a fake_score, or a run folder")
        if path.is_dir():
            if (run := run_of(path)) is not None:
                there, saved = _settings(run), _newest(path, run)
                role = next((role for role in self._roles(there) if role.name == STUDENT), None)
                if saved is None or role is None:
                    raise ValueError(f"{path} has no checkpoint with a student")
                return replace(self._saved(role, saved, run, there), adam=None)
            stored = read_config(path)
            if isinstance(stored.facts, GeneratorFacts):
                raise ValueError(f"{path} is a generator and no student")
            return NetworkStart(str(path), load_stored(stored).float().state_dict(), stored.network)
        checkpoint = open_checkpoint(path)
        name = next((name for name in STUDENTS if name in checkpoint.networks), None) or checkpoint.choose()
        if checkpoint.is_generator(name):
            raise ValueError(f"{path}: {name} is a generator and no student")
        found = checkpoint.read(name, D=self.teacher.D)
        return NetworkStart(f"{found.key} of {path.name}", found.weights, found.config)

    # -- checkpoints of this project --------------------------------------------------------------------------------

    def _roles(self, there: Distillation) -> tuple[Role, ...]:
        """The networks of a run with the settings `there`."""
        return there.objective(trained_config(self.teacher.config, there.dropout)).roles

    def _saved(self, role: Role, checkpoint: Path, run: Path, there: Distillation) -> NetworkStart:
        """A network as a checkpoint has it, of a run with the settings `there`."""
        kinds, steps = _saved_state(checkpoint, role.name)
        weights, second = kinds["weight"], kinds["exp_avg_sq"]
        buffers = kinds.get(BUFFER) or self._buffers(role, run, there)
        return NetworkStart(
            f"{role.name} of {short_name(run)}/{checkpoint.name}",
            {**buffers, **weights},
            self._network_in(checkpoint) if role.name == self.objective.generator else None,
            ema=kinds.get("ema"),
            adam=AdamState(kinds.get("exp_avg", {}), second, steps, (role.beta1, BETA2), role.lr, there.eps),
            loss_scale=_loss_scale(checkpoint, role.name),
            averages={
                name: kinds[kind]
                for name, kind in zip(there.average_names, ema_entries(len(there.averages)), strict=True)
                if kind in kinds
            },
        )

    def _network_in(self, checkpoint: Path) -> NetworkConfig | None:
        """The architecture of the average in a checkpoint; older ones do not say it, and tensors are all there is."""
        try:
            return read_config(checkpoint).network
        except ValueError:
            return None

    def _buffers(self, role: Role, run: Path, there: Distillation) -> dict[str, Tensor]:
        """What a network has beside its parameters, as its run began with it: older checkpoints do not hold it.

        Raises:
            ValueError: it cannot be known.
        """
        own = fingerprint(self.teacher.state_dict())
        known = role.start == "random" or record_of(run).get("teacher") == own
        # Under other embeddings all buffers are constants.
        if role.network.embedding_type == "fourier" and not known:
            raise ValueError(
                f"{run} was distilled from another teacher, and its checkpoints lack the Fourier frequencies of its "
                f"{role.name}: give its generator, {run / EXPORTS['distill']}"
            )
        net = starting_network(role.network, role.start, self.teacher, role.seed(there.seed), lora=role.lora)
        return {name: buffer.cpu() for name, buffer in net.named_buffers()}


_FIRST = {"teacher": "the teacher", "random": "random weights"}


def _of(state: NetworkState, path: Path, average: Mapping[str, Tensor] | None = None, key: str = "") -> NetworkStart:
    """A network of a training state, and its average under its name there."""
    source = f"{state.key} of {path.name}"
    return NetworkStart(source, state.weights, state.config, average, state.adam, f"its average {key}")


def _alone(source: str, weights: Mapping[str, Tensor], config: NetworkConfig) -> NetworkStart:
    """A generator without what trained it."""
    return NetworkStart(source, weights, config, weights, ema_source="which is its average too")


def run_of(path: Path) -> Path | None:
    """The run whose folder, folder of checkpoints or checkpoint `path` is; None for anything else."""
    run = path
    if is_checkpoint(path):
        run = path.resolve().parent.parent
    elif path.name == "checkpoints":
        run = path.resolve().parent
    return run if record_of(run) else None


def _check_no_states(folder: Path) -> None:
    """ValueError for a folder of training states, as the authors' programs make it."""
    states = sorted(entry.name for entry in folder.glob("training-state-*.pt"))
    if states and not (folder / CONFIG_FILE).exists():
        raise ValueError(
            f"{folder} holds {counted(len(states), 'training state')}: give one, such as {folder / states[-1]}"
        )


def _newest(path: Path, run: Path) -> Path | None:
    """The checkpoint that `path` names, or the newest whole one of its run; None where there is none."""
    if not is_checkpoint(path):
        return find_checkpoint(run / "checkpoints")
    verify_checkpoint(path)
    return path


def record_of(run: Path) -> dict[str, Any]:
    """The config.json of a run folder; empty where there is none."""
    found = read_json(run / "config.json") or {}
    return found if isinstance(found.get("config"), dict) and "kind" in found else {}


def _unknown(run: Path, record: Mapping[str, Any]) -> str:
    """Says of a run by an objective that is not known here what makes it known."""
    about = record.get("about")
    file = about.get("file") if isinstance(about, dict) else None
    named = f"{VARIABLE}={file}" if isinstance(file, str) else f"{VARIABLE} with its file"
    return f"{run} is a run of the objective {record['objective']}, which is not known here: set {named} to continue it"


def _settings(run: Path) -> Distillation:
    """The settings that the folder of a distillation holds, but for those that are places.

    Raises:
        ValueError: it is another run, or they cannot be read.
    """
    record = record_of(run)
    kind = OBJECTIVES.of(record.get("objective"), record["config"]) if record["kind"] == "distill" else None
    if kind is None:
        if record["kind"] != "teacher" and isinstance(record.get("objective"), str):
            raise ValueError(_unknown(run, record))
        what = "the training of a teacher" if record["kind"] == "teacher" else "no distillation that is known here"
        raise ValueError(f"{run} is {what}; {CAN_BE}")
    names = {f.name for f in dataclasses.fields(kind)} - place_settings(kind)
    try:
        return kind(**{name: typed(name, value) for name, value in record["config"].items() if name in names})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{run / 'config.json'} cannot be read as a run's settings: {error}") from None


def typed(name: str, value: Any) -> Any:
    """A setting as it was before JSON."""
    if name == "noise" and isinstance(value, dict):
        return NoiseLevels(**value)
    return math.inf if value == "inf" else tuple(value) if isinstance(value, list) else value
