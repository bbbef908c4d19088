"""An ablation: one setting varied, the rest held, several seeds each; curves with their spread, a table, a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from ipfm.engine.checks import option_name
from ipfm.engine.config import FIRST_RULES, Rules, TeacherConfig
from ipfm.engine.distributed.compilation import set_execution
from ipfm.engine.distributed.device import run_device
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.evaluation import Comparison, Evaluation
from ipfm.engine.experiments import ablation_report as report
from ipfm.engine.experiments.ablation_numbers import DISTANCES_FILE, write_distances
from ipfm.engine.experiments.ablation_runs import (
    Run,
    check_ablation_folder,
    generator_sets,
    open_ablation_folder,
    shared_training,
    teacher_distance,
    teacher_sets,
)
from ipfm.engine.experiments.claims import (
    Claim,
    Found,
    criterion_said,
    decided_by,
    judged,
    verdicts_table,
    write_verdicts,
)
from ipfm.engine.experiments.distil import DistilRecipe
from ipfm.engine.experiments.dry_run import describe
from ipfm.engine.experiments.local import TrainAndDistil
from ipfm.engine.experiments.options import DistillationOptions, check_images, options_for
from ipfm.engine.experiments.real_data import OWN, read_real
from ipfm.engine.experiments.recipe import Plan, Recipe
from ipfm.engine.experiments.starts import read_start
from ipfm.engine.memory import MemoryPlan, choose_layout, device_budget
from ipfm.engine.memory.arithmetic import step_forwards
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.objectives.initial_networks import trained_config
from ipfm.engine.runtime.commandline import BadInput, Given, user_input
from ipfm.engine.runtime.launcher import launched_processes
from ipfm.engine.runtime.wording import counted, size
from ipfm.engine.training.data_order import real_facts
from ipfm.engine.training.resolve import complete, resolve_D, resolve_precision
from ipfm.engine.training.run_folder import EXPORTS, check_run_folder, exported_steps, teacher_facts
from ipfm.models import NetworkConfig, Precond, load_teacher, presets

Arch = Literal["ddpmpp", "ncsnpp", "adm"]

# What an objective decides itself of the settings that all have: its optimiser, how its rate changes, and its average.
OF_THE_OBJECTIVE = (
    *("lr", "lr_schedule", "lr_warmup", "lr_end", "lr_decay_batches"),
    *("eps", "clip_grad", "ema_kimg", "ema_rampup"),
)

# --quick: whether everything runs, in seconds; the numbers mean nothing.
QUICK: Mapping[str, Any] = {
    "batch": 16,
    "max_steps": 4,
    "kimg": None,
    "eval_every": 2,
    "eval_images": 64,
    "checkpoint_every": 2,
    "teacher_steps": 4,
    "heun_steps": 2,
    "seeds": (0,),
    "eps": 1e-3,
}


@dataclass(frozen=True, kw_only=True)
class AblationOptions(DistillationOptions):
    """Options of every ablation, beside those of the recipes."""

    data: Literal["digits", "cifar", "fashion"] = "digits"
    """digits: teachers are trained here where none is given, and images are compared in pixel space; fashion:
    likewise, on Fashion-MNIST and by the features of a small classifier; cifar: give teachers, --reference and
    --inception."""
    images: Path | None = None
    """Of --data fashion, the images, as --data of fashion_ipfm.py. Default: Debian's Fashion-MNIST."""
    classifier: Path | None = None
    """Of --data fashion, the classifier.safetensors to compare by. Default: the one that lies beside the ablation's
    folder, which the first run trains."""
    variants: tuple[str, ...] = ()
    """Which variants are run. Default: all but those that the recipe names as further ones."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the distillations, each of which every variant is run with."""
    seed: int = 0
    """Seed of the teachers' training."""
    teachers: tuple[str, ...] = ()
    """A teacher for single variants, each as VARIANT=PATH; --teacher is that of all."""
    teachers_from: Path | None = None
    """Folder of the teachers that are trained here, for several ablations: each architecture and D is trained once, by
    the command that needs it first, for which others wait. Default: one in the ablation's own."""
    arch: Arch = "ddpmpp"
    """Architecture of teachers that are trained here."""
    quick: bool = False
    """A few steps of everything, to see that it runs: the numbers mean nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different integers >= 0, at least one, got {_listed(self.seeds)}")
        if self.arch not in get_args(Arch):
            raise ValueError(f"arch must be one of {', '.join(get_args(Arch))}, got {self.arch!r}")
        for name in ("images", "classifier"):
            if getattr(self, name) is not None and self.data != "fashion":
                raise ValueError(f"{name} was given, but it is for --data fashion, not {self.data}")
        if self.teachers_from is not None and self.data == "cifar":
            raise ValueError("teachers-from was given, but --data cifar trains no teacher")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One value of what an ablation varies: of the teacher's D or architecture, or of the distillation's settings."""

    label: str
    """On the command line, in folders, tables and legends."""
    D: float | None = None
    arch: Arch | None = None
    of: Distillation | None = None
    """The settings of another objective than the data's recipe has. What all objectives have in common is the
    options', but for `OF_THE_OBJECTIVE`."""
    after: str = ""
    """The variant, earlier among them and of the same teacher, whose generators of the same seeds this one begins
    with: a second stage, see --init."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Name of a field of the objective's settings -> its value. `real_data` of `OWN` are the data's images, or those
    that the options name."""

    def over(self, base: Distillation) -> Distillation:
        """Its settings; `base`: those of the options."""
        values = dict(self.settings)
        if values.get("real_data") == OWN:
            values["real_data"] = getattr(base, "real_data", None) or OWN
        if self.of is None:
            return replace(base, **values)
        common = [f.name for f in dataclasses.fields(Distillation) if f.name not in OF_THE_OBJECTIVE]
        return replace(self.of, **{name: getattr(base, name) for name in common} | values)


@dataclass(frozen=True)
class Teacher:
    """A teacher of some variants: given, or trained here as `training` says."""

    network: NetworkConfig
    folder: Path
    """In the ablation's, where its distance is kept; it is trained there too, unless `shared` names another place."""
    net: Precond | None
    training: TeacherConfig | None
    shared: Path | None = None

    @property
    def place(self) -> Path:
        """Where it is trained."""
        return self.folder if self.shared is None else self.shared


@dataclass(frozen=True)
class AblationPlan(Plan):
    """See `Plan`. `runs`, and the teacher of each by its folder."""

    ablation: Ablation
    options: AblationOptions
    path: Path
    teachers: Mapping[Path, Teacher]
    runs: Sequence[tuple[Run, Path]]
    record: Mapping[str, Any]
    comparison: Comparison | None
    """None where the data's own recipe says how images are compared, and in a dry run without --reference."""
    local: TrainAndDistil[AblationOptions] | None = None
    """Trains teachers and says how images are compared; None where teachers are given."""

    @property
    def labels(self) -> list[str]:
        """The variants that are run."""
        return list(dict.fromkeys(run.variant for run, _ in self.runs))

    @property
    def claims(self) -> list[Claim]:
        """Those that these runs decide."""
        return decided_by(self.ablation.claims, self.labels)

    @property
    def criteria(self) -> list[str]:
        """A line for each claim: what decides it."""
        return [f"claim: {criterion_said(c.text, c.source, c.criterion.stated)}" for c in self.claims]

    def describe(self) -> str:
        """See `Plan.describe`. Settings of the first run, then teachers and runs with their states."""
        run, place = self.runs[0]
        given = replace(run.config, precision=self.options.precision, teacher_storage=self.options.teacher_storage)
        lines = [describe(run.config, self.teachers[place].network, run.path, given=given), "", "teachers"]
        for folder, teacher in self.teachers.items():
            how = "given"
            if teacher.training is not None:
                where = "here" if teacher.shared is None else f"in {teacher.shared}"
                how = f"trained {where}, {teacher.training.total_steps:,} steps of {teacher.training.batch} images"
            elif teacher.net is None:
                how = "still to be given"
            lines.append(f"  {folder.name:<20} {arch_of(teacher.network)}, D={teacher.network.D:g}: {how}")
        lines.append(f"runs, {run.config.total_steps:,} steps of {run.config.batch} images each")
        lines += [f"  {r.variant:<14} seed {r.seed:<4} {r.state:<24} {r.path}" for r, _ in self.runs]
        lines += self.criteria
        if self.options.data == "cifar" and any(t.net is None for t in self.teachers.values()):
            lines += [self.ablation.cifar.help_with_teachers()]
        return "\n".join(lines)

    def begin(self, world: World) -> Callable[[], None]:
        """See `Plan.begin`. Each run takes its own folder, and its teacher's training too."""
        open_ablation_folder(self.path, dict(self.record), write=world.is_main)
        evaluation: Evaluation | None = None
        if self.local is None:
            evaluation = self.options.evaluation(self.comparison, world)
        elif self.local.by_options is None:
            evaluation = self.local.evaluation(self.options.eval_images, self.options.metrics)
        return partial(self._train, evaluation, world)

    def _train(self, evaluation: Evaluation | None, world: World) -> None:
        if world.is_main:
            print(*(f"{line}\n" for line in self.criteria), sep="", end="")
        found, metric = self._run(self._by_features(world) if evaluation is None else evaluation, world)
        if world.is_main:
            self.conclude(found, metric)

    def _by_features(self, world: World) -> Evaluation:
        """The evaluation where what images are compared by may have to be trained first: it is a part of the record."""
        local = self.local
        assert local is not None and local.by_options is not None
        with user_input():
            features = local.by_options.features(self.options, local.dataset, self.path, world)
            record = {**self.record, "features": features.name}
            check_ablation_folder(self.path, record)
        world.barrier()
        open_ablation_folder(self.path, record, write=world.is_main)
        return local.evaluation(self.options.eval_images, self.options.metrics, features=features, world=world)

    def _run(self, evaluation: Evaluation, world: World) -> tuple[dict[str, Found], str]:
        """All the runs; what was measured of each variant, and what the distance is called."""
        found: dict[str, Found] = {}
        metric, done, say = report.DISTANCE, 0, _printer(world)
        in_sets = {label for claim in self.claims if claim.criterion.sets for label in claim.criterion.variants}
        for place, teacher in self.teachers.items():
            net = teacher.net
            if net is None:
                say(f"teacher {place.name}")
                net = self._trained(teacher, world)
            its = [run for run, where in self.runs if where == place]
            net, config, steps = net.to(world.device), its[0].config, self.options.heun_steps
            set_execution(net, memory_format=config.memory_format, compiled=config.compile, device=world.device)
            distance, metric = teacher_distance(net, place, evaluation, world, steps=steps, shared=teacher.shared)
            for run in its:
                done += 1
                say(f"{run.variant}, seed {run.seed} ({done} of {len(self.runs)}): {run.state}")
                run.go(net, evaluation, world)
            for label in dict.fromkeys(run.variant for run in its):
                of_label = [run for run in its if run.variant == label]
                found[label] = Found([run.curve for run in of_label], distance)
                if label in in_sets:
                    sets = {run.seed: generator_sets(run, net, evaluation, world) for run in of_label}
                    theirs = teacher_sets(net, place, evaluation, world, steps=steps, shared=teacher.shared)
                    found[label] = replace(found[label], sets=sets, teacher_sets=theirs)
        return {label: found[label] for label in self.labels}, metric

    def _trained(self, teacher: Teacher, world: World) -> Precond:
        """The teacher that is trained here, now or before."""
        assert teacher.training is not None and self.local is not None
        with shared_training(teacher.place, world):
            done = exported_steps(teacher.place, "teacher") == teacher.training.total_steps
            if teacher.shared is not None and done:  # others may be reading it: nothing is written
                return load_teacher(teacher.place / EXPORTS["teacher"], D=teacher.network.D)
            return self.local.teacher(teacher.training, teacher.network, teacher.place, world)

    def _costs(self) -> dict[str, tuple[str, str]]:
        """Of each variant, the forward passes of an image in an iteration, and the memory of a process, predicted."""
        costs: dict[str, tuple[str, str]] = {}
        for run, place in self.runs:
            if run.variant in costs:
                continue
            network, config = trained_config(self.teachers[place].network, run.config.dropout), run.config
            budget, objective = device_budget(run_device()), config.objective(network)
            try:
                plan: MemoryPlan | None = choose_layout(config, network, ranks=launched_processes(), budget=budget).plan
            except ValueError:
                # Runs that are only read may have been made on a larger machine.
                plan = None
            phased, checkpointed = plan is not None and plan.phased, plan is not None and plan.activation_checkpointing
            passes = step_forwards(objective, network, phased=phased, checkpointed=checkpointed)
            costs[run.variant] = (f"{passes:.3g}", "-" if plan is None else size(plan.peak))
        return costs

    def conclude(self, found: Mapping[str, Found], metric: str) -> None:
        """Write what was measured: CSV, table and curves, and verdicts where claims are judged; print the tables."""
        curves = [curve for its in found.values() for curve in its.curves]
        distances = {label: its.teacher for label, its in found.items()}
        costs = self._costs() if self.ablation.costs else {}
        text = f"{report.table(curves, distances, metric, costs)}\n{report.sentence(curves)}\n"
        if verdicts := judged(self.claims, found):
            text += f"\n{verdicts_table(verdicts)}"
            write_verdicts(verdicts, self.path / "claims.csv")
        if self.options.quick:
            text += "\nMade with --quick: the numbers mean nothing.\n"
        report.write_csv(curves, self.path / "ablation.csv")
        write_distances(found, self.path / DISTANCES_FILE)
        with report.atomic_write(self.path / "ablation.md") as file:
            file.write(text.encode())
        title = f"{self.ablation.title}, {counted(len(self.options.seeds), 'seed')}"
        report.plot(curves, distances, self.path / "ablation.png", title, metric)
        print(f"\n{text}\ncurves: {self.path / 'ablation.png'}   numbers: {self.path / 'ablation.csv'}")


@dataclass(frozen=True, kw_only=True)
class Ablation(Recipe[AblationOptions]):
    """Variants of one setting on data: teachers, distillations with several seeds, and what is seen."""

    name: str
    """Ends the name of the folder, e.g. "alpha"."""
    title: str
    """What is varied, above the plot."""
    variants: tuple[Variant, ...]
    """Those that are run unless --variants names others."""
    further: tuple[Variant, ...] = ()
    """Those that are run only when --variants names them."""
    costs: bool = False
    """The table has what an iteration of each variant costs."""
    claims: tuple[Claim, ...] = ()
    """What is judged by the runs, each where all of its variants are run."""
    digits: TrainAndDistil[AblationOptions]
    """Data, teacher's training and settings of --data digits."""
    fashion: TrainAndDistil[AblationOptions] | None = None
    """Likewise of --data fashion, which there is not without."""
    cifar: DistilRecipe
    """Teachers that fit, and settings, of --data cifar."""

    @property
    def defaults(self) -> AblationOptions:
        """See `Recipe.defaults`."""
        return self.digits.base

    def plan(self, given: Given[AblationOptions]) -> AblationPlan:
        """See `Recipe.plan`. What is finished in the folder is only read; a run that diverges is a result."""
        options = self.options(given)
        begun = [name for name in ("continue_from", "student_from", "branch") if getattr(options, name) is not None]
        begun += ["init"] if options.init_from is not None else []
        for name in map(option_name, begun):
            raise ValueError(f"{name} was given, but an ablation says itself what its runs begin with")
        if options.labels is not None:
            raise ValueError("labels was given, but the runs of an ablation draw all classes alike: leave it out")
        suffix = "" if options.data == "digits" else f"-{options.data}"
        path = options.out or Path("runs") / f"ablation-{self.name}{suffix}"
        chosen, named = self._chosen(options), self._given(options)
        if "fid" not in options.metrics:
            raise ValueError(f"metrics must have fid, which variants are compared by, got {_listed(options.metrics)}")
        local = self._local(options)
        if local is not None:
            local.check_metrics(options.metrics)
        base = options.distillation()
        base.split(launched_processes())
        record = {
            "ablation": self.name,
            "data": options.data,
            "eval_images": options.eval_images,
            "reference": None if options.reference is None else options.reference.name,
        }
        if local is None or local.by_options is None:
            record["features"] = options.compared_by if local is None else "pixels"
        check_ablation_folder(path, record)
        teachers: dict[Path, Teacher] = {}
        runs: list[tuple[Run, Path]] = []
        rules: set[Rules] = set()
        distilled: set[Path] = set()
        for variant in chosen:
            place, teacher = self._teacher(variant, options, local, named, path / "teachers", teachers)
            teachers[place] = teacher
            its = complete(replace(variant.over(base), teacher=None, D=None), teacher.network, run_device())
            real = read_real(options, its, teacher.network, lambda: None if local is None else local.dataset)
            facts = {**teacher_facts(teacher.net), **real_facts(real)}
            for seed in options.seeds:
                run_path = path / variant.label / f"seed{seed}"
                config = replace(its, seed=seed, out=None, resume=True)
                # Roles are made here, so that a width that cannot be is refused before anything is trained.
                objective = config.objective(teacher.network)
                _ = objective.roles
                found = check_run_folder(run_path, "distill", config, facts)
                rules.add(found["config"]["rules"])
                if "teacher" in found:
                    distilled.add(place)
                run = Run(variant.label, seed, config, objective.nfe, run_path, real)
                if variant.after:
                    first = replace(options, init=self._first_stage(variant, seed, path, chosen))
                    run = replace(run, start=partial(read_start, first, config, folder=run_path))
                runs.append((run, place))
        for place, teacher in teachers.items():
            if teacher.training is not None and local is not None:
                # Others may have distilled a teacher that is shared.
                used = place in distilled or (
                    teacher.shared is not None and exported_steps(teacher.shared, "teacher") is not None
                )
                local.check_teaching(teacher.place, teacher.training, teacher.network, distilled=used)
        options.autoencoder(self.cifar.shape, run_device())  # refused: all are pictures
        comparison = None if local is not None else options.comparison(self.cifar.shape, run_device())
        if comparison is None and local is None and not options.dry_run:
            raise ValueError("give --reference, and --inception or --features pixels: there is nothing to measure")
        if FIRST_RULES in rules:
            # What is compared was made alike: by those rules by which version 0.1 began it.
            runs = [(run if run.path.exists() else run.by_rules(FIRST_RULES), place) for run, place in runs]
        return AblationPlan(self, options, path, teachers, runs, record, comparison, local)

    # -- the parts --------------------------------------------------------------------------------------------------

    def options(self, given: Given[AblationOptions]) -> AblationOptions:
        """The options; which data and whether --quick decide the values of those that are not given.

        Raises:
            ValueError: what the ablation varies was given.
        """
        base = self._base(given.options.data)
        if given.options.quick:
            # Teachers of CIFAR-10 are given.
            steps = {"teacher_steps": None if given.options.data == "cifar" else QUICK["teacher_steps"]}
            base = replace(base, **{**QUICK, **steps})
        options = given.over(base)
        possible = (*self.variants, *self.further)
        varied = {name for variant in possible for name in variant.settings} - {"real_data"}
        varied |= {name for name in ("D", "arch") if any(getattr(v, name) is not None for v in possible)}
        varied |= {name for name in OF_THE_OBJECTIVE if any(v.of is not None for v in possible)}
        for name in sorted(varied):
            if getattr(options, name) != getattr(base, name):
                raise ValueError(
                    f"{option_name(name)} was given, but it is what this ablation varies: choose among "
                    f"--variants {_listed(v.label for v in possible)}"
                )
        return options

    def _base(self, data: str) -> AblationOptions:
        if data == "fashion" and self.fashion is None:
            raise ValueError(f"data must be digits or cifar for {self.file}, got fashion")
        local = {"digits": self.digits, "fashion": self.fashion}.get(data)
        base = self.cifar.base if local is None else local.base
        assert isinstance(base, AblationOptions)
        return base

    def _local(self, options: AblationOptions) -> TrainAndDistil[AblationOptions] | None:
        """What trains teachers on the data that the options name; None where teachers are given.

        Raises:
            ValueError: the data cannot be used, or are not there.
        """
        if options.data == "cifar":
            return None
        return self.digits if self.fashion is None or options.data == "digits" else self.fashion.on_data_of(options)

    def _chosen(self, options: AblationOptions) -> list[Variant]:
        known = {variant.label: variant for variant in (*self.variants, *self.further)}
        labels = options.variants or tuple(variant.label for variant in self.variants)
        unknown = [label for label in labels if label not in known]
        if unknown or len(set(labels)) < len(labels):
            raise ValueError(f"variants must be different ones of {_listed(known)}, got {_listed(labels)}")
        return [known[label] for label in labels]

    def _first_stage(self, variant: Variant, seed: int, path: Path, chosen: Sequence[Variant]) -> Path:
        """The run whose generator a second stage begins with: made before it by this command, or there."""
        run = path / variant.after / f"seed{seed}"
        before = [other.label for other in chosen[: chosen.index(variant)]]
        if variant.after not in before and not exported_steps(run, "distill"):
            raise ValueError(
                f"{variant.label} begins with the generators of {variant.after}: name it among --variants too, first"
            )
        return run

    def _given(self, options: AblationOptions) -> dict[str, Path]:
        """Variant -> the teacher that was named for it."""
        chosen = {variant.label: variant for variant in self._chosen(options)}
        given: dict[str, Path] = {}
        for text in options.teachers:
            label, equals, path = text.partition("=")
            if not equals or not path or label not in chosen or label in given:
                raise ValueError(f"teachers takes one VARIANT=PATH for each of {_listed(chosen)}, got {text}")
            given[label] = Path(path).expanduser()
        kinds = {(variant.D, variant.arch) for label, variant in chosen.items() if label not in given}
        if options.teacher is not None:
            if len(kinds) > 1:
                raise ValueError(
                    f"teacher was given, but these variants need one each: give --teachers "
                    f"{_listed(f'{label}=PATH' for label in chosen)}"
                )
            given |= {label: options.teacher for label in chosen if label not in given}
        if options.data == "cifar":
            if options.teacher_steps is not None:
                raise ValueError("teacher-steps was given, but --data cifar trains no teacher")
            if (missing := [label for label in chosen if label not in given]) and not options.dry_run:
                raise BadInput(
                    f"give a teacher for {_listed(missing)}: --teacher PATH for all, or --teachers VARIANT=PATH; "
                    "--dry-run works without",
                    self.cifar.help_with_teachers(),
                )
        elif options.reference is not None:
            themselves = "the digits" if options.data == "digits" else "its images"
            raise ValueError(f"reference was given, but --data {options.data} compares with {themselves} themselves")
        return given

    def _teacher(
        self,
        variant: Variant,
        options: AblationOptions,
        local: TrainAndDistil[AblationOptions] | None,
        given: Mapping[str, Path],
        folder: Path,
        known: Mapping[Path, Teacher],
    ) -> tuple[Path, Teacher]:
        """The teacher of a variant and its place; one that another variant has too is there already."""
        D, source = options.D if variant.D is None else variant.D, given.get(variant.label)
        whose, shape = f"{self.cifar.title} is", self.cifar.shape
        if local is not None:
            whose, shape = f"the {local.title} are", local.dataset.shape
        if source is not None:
            place = folder / (variant.label if len(set(given.values())) > 1 else "given")
            if place in known:
                return place, known[place]
            net = load_teacher(source, D=D, anyway=options.teacher_anyway)
            resolve_D(D, net.config)
            check_images(net.config, shape, whose)
            if variant.arch not in (None, arch_of(net.config)):
                raise ValueError(f"{source} is a network {arch_of(net.config)}, {variant.label} needs {variant.arch}")
            return place, Teacher(net.config, place, net, None)
        arch, D = variant.arch or options.arch, D or (self.cifar.D if local is None else local.D)
        place = folder / f"{arch}-D{D:g}"
        if local is None:
            return place, Teacher(presets.get(self.cifar.preset, D=D), place, None, None)
        network = local.network(replace(options, arch=arch), D)
        training = resolve_precision(local.teaching(replace(options, D=D, resume=True)), run_device())
        training.split(launched_processes())
        shared = None if options.teachers_from is None else options.teachers_from.expanduser() / place.name
        return place, Teacher(network, place, None, training, shared)


def arch_of(network: NetworkConfig) -> Arch:
    """The family of an architecture: ADM, NCSN++ (residual encoder) or DDPM++."""
    if network.model_type == "DhariwalUNet":
        return "adm"
    return "ncsnpp" if network.encoder_type == "residual" else "ddpmpp"


def as_ablation(base: DistillationOptions, **changes: Any) -> AblationOptions:
    """The settings of a recipe as those of an ablation, with these changed."""
    values = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    options: AblationOptions = options_for(base.settings_class(), AblationOptions)(**{**values, **changes})
    return options


def _printer(world: World) -> Callable[[str], None]:
    return print if world.is_main else (lambda _: None)


def _listed(values: Any) -> str:
    return " ".join(map(str, values)) or "none"
