"""The command that makes a run again, found among this project's recipes, and those that use its network."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipfm.engine.checks import number, option_name
from ipfm.engine.commands.recipes import project_recipes
from ipfm.engine.config import FIRST_RULES, TeacherConfig, place_settings
from ipfm.engine.evaluation.metrics.measures import FID
from ipfm.engine.experiments.distil import DistilRecipe
from ipfm.engine.experiments.local import TrainAndDistil
from ipfm.engine.experiments.network_options import fitted, network_differences
from ipfm.engine.experiments.own_distil import OwnDistilRecipe
from ipfm.engine.experiments.own_teacher import FAMILIES, OwnTeacherRecipe
from ipfm.engine.experiments.teacher import TeacherRecipe
from ipfm.engine.objectives import OBJECTIVES
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.training.run_folder import ABLATION_FILE
from ipfm.engine.training.run_state import RunRecord, read_run
from ipfm.engine.training.start import Branch
from ipfm.models import NetworkConfig, presets


@dataclass(frozen=True)
class Command:
    """How to make the run again.

    Attributes:
        line: what to type, None where no recipe is known to have made the run.
        notes: sentences on what it lacks.
    """

    line: str | None
    notes: tuple[str, ...] = ()


def distillation_class(record: RunRecord) -> type[Distillation] | None:
    """The class of a distillation's settings, None for an objective that is not this project's, or a teacher's run."""
    known = record.kind == "distill" and record.config
    return OBJECTIVES.of(record.identity.get("objective"), record.config) if known else None


def settings_class(record: RunRecord) -> type[Distillation] | type[TeacherConfig] | None:
    """The class of the run's settings, None for an objective that is not this project's."""
    return TeacherConfig if record.kind == "teacher" else distillation_class(record)


def paths(record: RunRecord) -> frozenset[str]:
    """Names of the settings that are places on the machine that the run was made on."""
    kind = settings_class(record) or Distillation
    return frozenset(f.name for f in dataclasses.fields(kind) if "Path" in str(f.type))


def is_default(record: RunRecord, name: str, default: object) -> bool:
    """Whether a setting is as it is when nothing is given: `default`, or what follows from other settings."""
    value, kind = record.config[name], distillation_class(record)
    if kind is not None and default in (None, []):
        implied = kind.implied(record.config)
        return value == default or (name in implied and bool(value == implied[name]))
    return bool(value == default)


def reproduce(record: RunRecord) -> Command:
    """The command whose run has this run's settings; relative to the folder that holds recipes/."""
    if not record.config:
        return Command(None, ("The settings cannot be read.",))
    if (record.path.resolve().parent.parent / ABLATION_FILE).is_file():
        return Command(None, ("This is one run of an ablation, whose ablation.md compares all of them.",))
    if record.kind == "teacher":
        return _training(record)
    kind, D = settings_class(record), number(record.config.get("D"))
    if kind is None and isinstance(file := record.about.get("file"), str):
        line = f"It was made by {file}, a file outside of this project: `deepspeed {file}` with the settings below."
        return Command(None, (line,))
    if kind is None or not issubclass(kind, Distillation) or not D > 0:
        return Command(None, ("None of this project's recipes has these settings.",))
    found = []
    for recipe in project_recipes():
        if isinstance(recipe, (DistilRecipe, TrainAndDistil)) and recipe.base.kind == kind.kind:
            likeness = _likeness(record, recipe)
            if likeness is not None:
                options = _options(record, _base(record, recipe, D))
                found.append((likeness, len(options), recipe.file, recipe, options))
    if not found:
        return Command(
            None,
            ("The folder does not say which recipe made it: `deepspeed recipes/RECIPE.py` with the settings below.",),
        )
    likeness, *_, recipe, options = min(found, key=lambda candidate: candidate[:3])
    given, notes = _given(record, recipe)
    if likeness > 1:
        notes = ("The folder does not name its recipe: this is one whose images and settings fit.", *notes)
    folder = "recipes/" if kind.__module__.startswith("ipfm.") else ""
    return Command(shlex.join(["deepspeed", f"{folder}{recipe.file}", *given, *options]), notes)


def use(record: RunRecord, network: str) -> tuple[tuple[str, str], ...]:
    """(what it does, command) for the network that the run left in the folder `network`."""
    place = shlex.quote(network)
    lines = [
        ("Draw images", f"ipfm sample {place} --n 64 --out samples.png"),
        ("What the network is", f"ipfm info {place}"),
    ]
    # Features that are not Inception's may be a recipe's own.
    if all(row.metric == "FID" for row in record.results):
        line = ["ipfm evaluate", place, "--reference REFERENCE --inception INCEPTION", *_metrics(record)]
        lines.append(("Measure it", " ".join(line)))
    elif str(record.identity.get("features")).startswith("classifier "):
        by = shlex.quote(f"{network.rpartition('/')[0] or '.'}/classifier.safetensors")
        line = [
            "ipfm evaluate",
            place,
            "--reference REFERENCE --features classifier --classifier",
            by,
            *_metrics(record),
        ]
        lines.append(("Measure it", " ".join(line)))
    if record.kind == "teacher":
        # Reports on runs that are older than the recipe for any size say what they said.
        recipe = "distill_ipfm.py" if "pictures" in record.identity else "RECIPE.py"
        lines.append(("Distil it", f"deepspeed recipes/{recipe} --teacher {place}"))
    return tuple(lines)


def portable(path: str) -> str:
    """A path without the folders of the machine that it was given on: a relative one as it is, else its last parts."""
    parts = Path(path).parts
    if not Path(path).is_absolute() and ".." not in parts:
        return path
    # What every run calls its network says nothing without the run.
    kept = 3 if parts[-2:] == ("teacher", "model") else 2 if parts[-1] in ("model", "generator", "teacher") else 1
    return "/".join(part for part in parts[-kept:] if part not in ("/", ".."))


def _base(record: RunRecord, recipe: DistilRecipe | TrainAndDistil, D: float) -> Any:
    """The settings of the recipe where those of the run that it does not set otherwise are given."""
    if not isinstance(recipe, DistilRecipe):
        return recipe.base
    network = _teacher(record)
    if isinstance(recipe, OwnDistilRecipe):
        return recipe.base if network is None else recipe.full(network, record.config)
    return recipe.varied(record.config, replace(network or presets.get(recipe.preset), D=D))


def _likeness(record: RunRecord, recipe: DistilRecipe | TrainAndDistil) -> int | None:
    """How much a run is like one of the recipe: the less, the more.

    0 where the folder has the name that the recipe gives it, 1 where it says that it is of the recipe's data, 2 where
    its images have their shape and nothing speaks against it, 3 where the recipe takes any; None elsewhere.
    """
    if isinstance(recipe, OwnDistilRecipe):
        # It fits whatever the images are: another recipe comes first, unless the folder's name says this one.
        # Runs without rules are older than it.
        named = record.path.resolve().name.startswith(f"{recipe.file.removesuffix('.py')}-")
        other = record.teacher or _network(record) is None or "rules" not in record.config
        # A file of one's own has the one recipe of its objective.
        own = not recipe.base.settings_class().__module__.startswith("ipfm.")
        return None if other else 0 if named or own else 3
    local = isinstance(recipe, TrainAndDistil)
    folder, network = record.path.resolve().name, _network(record)
    if isinstance(recipe, TrainAndDistil):
        named = folder.startswith(f"{recipe.file.removesuffix('.py').partition('_')[0]}-")
        if network is not None and network.image_shape != recipe.network(recipe.base, 128.0).image_shape:
            return None
    else:
        named = recipe.names(folder)
        if network is not None and not _fits(recipe, network):
            return None
    dataset = _extra(record).get("dataset")
    if isinstance(recipe, TrainAndDistil):
        trained = str(record.teacher.get("dataset", "")).partition(",")[0]
        fits = trained == recipe.title
        wrong = bool(dataset) or bool(trained and trained != recipe.title)
    else:
        fits = bool(dataset) and str(dataset).removesuffix("-cond") == recipe.dataset
        wrong = bool(record.teacher) or (dataset is not None and not fits)
    if wrong:
        return None
    possible = local and dataset == "" and network is not None
    return 0 if named else 1 if fits else 2 if possible else None


def _fits(recipe: DistilRecipe, network: NetworkConfig) -> bool:
    """Whether the network is one that the recipe distils."""
    try:
        recipe.check_network(network)
    except ValueError:
        return False
    return True


def _given(record: RunRecord, recipe: DistilRecipe | TrainAndDistil) -> tuple[list[str], tuple[str, ...]]:
    """The options that are no settings: teacher and reference; and what of them the folder does not record."""
    options: list[str] = []
    notes: list[str] = []
    images = next((e.images for e in reversed(record.evaluations) if e.images is not None), None)
    base = recipe.base
    if record.teacher:
        steps = _flat_number(record.teacher.get("config"), "max_steps")
        if math.isfinite(steps) and steps != base.teacher_steps:
            options += ["--teacher-steps", f"{steps:g}"]
        notes.append("It trains the teacher first, as this run did.")
        network = _network(record)
        if isinstance(recipe, TrainAndDistil) and network != recipe.network(base, number(record.config.get("D"))):
            notes.append("The teacher's network is not the recipe's default: give the options that name it too.")
    elif branch_of(record) is not None:
        began, its_notes = _began(record)
        options, notes = [*options, *began], [*notes, *its_notes]
    else:
        began, its_notes = _began(record)
        options, notes = [*options, *began], [*notes, *its_notes]
        its = _teacher(record)
        options += recipe.size_options(its) if isinstance(recipe, DistilRecipe) and its is not None else []
        options += ["--teacher", portable(str(record.config.get("teacher") or "TEACHER"))]
        notes.append("Give the teacher where it lies on your machine.")
    if images is not None and isinstance(recipe, DistilRecipe):
        fid = not record.results or record.results[0].metric == "FID"
        own = isinstance(recipe, OwnDistilRecipe)  # which compares blocks of pixels where nothing else is said
        without = [] if own else ["--features", "pixels"]
        options += ["--reference", "REFERENCE", *(["--inception", "INCEPTION"] if fid else without)]
        notes.append("The folder does not record what the samples were compared with: give --reference.")
    if isinstance(recipe, OwnDistilRecipe) and branch_of(record) is None:
        options += ["--scale", "full"]
        notes.append("The options after --scale are what differs from the settings by the rule of sizes for a GPU.")
    if record.identity.get("real_data") is not None and branch_of(record) is None:
        given = str(record.config.get("real_data") or "DATA")
        options += ["--real-data", portable(given)]
        notes += [] if given == "own" else ["Give the real images where they lie on your machine."]
    if images is not None and images != base.eval_images:
        options += ["--eval-images", str(images)]
    options += _metrics(record)
    return options, tuple(notes)


def _began(record: RunRecord) -> tuple[list[str], list[str]]:
    """The option that names what a run went on from or took over, and what to know of it; nothing for most."""
    said = record.identity.get("start")
    start = said if isinstance(said, dict) else {}
    if record.identity.get("transfers"):
        note = "It began with weights of another network: give that where it lies on your machine."
        return ["--transfer", str(start.get("source", "MODEL"))], [note]
    if (branch := branch_of(record)) is not None:
        note = (
            "It is a branch of another run, whose settings are the defaults: give that where it lies on your machine."
        )
        return ["--branch", f"{branch.run}:{branch.step}", "--out", record.path.resolve().name], [note]
    if record.identity.get("continues"):
        note = "It went on from another training: give that where it lies on your machine."
        student = ["--student-from", str(start["student_source"])] if start.get("student_source") else []
        option = "--student-from" if start.get("networks") == ["student"] else "--continue-from"
        option = "--init" if start.get("stage") is True else option
        return [option, str(start.get("source", "TRAINING")), *student], [note]
    return [], []


def branch_of(record: RunRecord) -> Branch | None:
    """The run that this one went on from with its settings; None without one."""
    said = record.identity.get("start")
    return Branch.read(said.get("branch")) if isinstance(said, dict) else None


def _metrics(record: RunRecord) -> list[str]:
    """The option that names what the run measures, where it is not the distance alone."""
    asked = record.evaluations[-1].metrics if record.evaluations else ("fid",)
    return [] if asked == ("fid",) else ["--metrics", *asked]


def _training(record: RunRecord) -> Command:
    """As `reproduce`, of a teacher's run."""
    parent = record.path.resolve().parent
    if record.path.resolve().name == "teacher" and (parent / "config.json").is_file():
        try:
            made = reproduce(read_run(parent))
        except ValueError:
            made = Command(None)
        if made.line is not None:
            return Command(made.line, ("This teacher is the first part of the distillation beside it.",))
    network, D = _network(record), number(record.config.get("D"))
    for recipe in project_recipes():
        if not isinstance(recipe, TeacherRecipe) or network is None or not D > 0:
            continue
        for arch, preset in recipe.presets.items():
            plain, base = replace(fitted(presets.get(preset), recipe.shape), D=D), recipe.base
            scale = ["--scale", "full"] * (isinstance(recipe, OwnTeacherRecipe) and branch_of(record) is None)
            if isinstance(recipe, OwnTeacherRecipe):
                # A training that is older than the recipe was not its.
                if FAMILIES.get(network.family) != arch or "pictures" not in record.identity:
                    continue
                images = record.identity.get("images")
                plain, base = recipe.full(network, images if isinstance(images, int) else None)
                plain = replace(plain, D=D)
            named = network_differences(network, plain)
            if named is None:
                continue
            options = ["--data", "DATA"]
            if not record.identity.get("continues"):  # which says what the network is
                options += ["--arch", arch, *named, *["--conditional"] * bool(network.label_dim)]
            options += scale
            options += ["--xflip"] if record.identity.get("xflip") is True else []
            notes = ["Give the data where they lie on your machine."]
            began, its_notes = _began(record)
            options, notes = [*options, *began], [*notes, *its_notes]
            if record.evaluations:
                # Without Inception it is compared with its data where nothing else is said.
                own = isinstance(recipe, OwnTeacherRecipe) and record.metric != FID
                options += [] if own else ["--reference", "REFERENCE", "--inception", "INCEPTION"]
                images = record.evaluations[-1].images
                options += ["--eval-images", f"{images}"] if own and images is not None else []
                options += _metrics(record)
            line = ["deepspeed", f"recipes/{recipe.file}", *options, *_options(record, base)]
            return Command(shlex.join(line), tuple(notes))
    return Command(None, ("None of this project's recipes is known to have trained this network.",))


def _options(record: RunRecord, base: Any) -> list[str]:
    """The settings of the run that differ from those of a recipe, as they are typed."""
    kind = settings_class(record)
    assert kind is not None
    branch = branch_of(record)
    defaults = {**base.to_json(), **({} if branch is None else branch.settings)}
    defaults = {name: value for name, value in defaults.items() if name in {f.name for f in dataclasses.fields(kind)}}
    defaults |= {f"noise.{name}": value for name, value in defaults.pop("noise", {}).items()}
    # Those that change nothing of the result, but for the evaluations' steps and what repeats it bit for bit.
    unsaid = (place_settings(kind) | paths(record)) - {"eval_every", "deterministic"}
    options: list[str] = []
    for name in sorted(defaults, key=lambda name: name != "D"):
        if name in unsaid or name not in record.config or is_default(record, name, defaults[name]):
            continue
        if name in ("max_steps", "kimg") and record.config[name] is None:
            continue  # the other one is given
        options += _typed(name, record.config[name])
    # A run that is older than this setting went by the first ones.
    return options if "rules" in record.config else [*options, *_typed("rules", FIRST_RULES)]


def _typed(name: str, value: object) -> list[str]:
    option = option_name(name)
    if isinstance(value, bool):
        prefix, dot, last = option.rpartition(".")
        return [f"--{option}" if value else f"--{prefix}{dot}no-{last}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{option}", *(f"{v:g}" if isinstance(v, float) and float(f"{v:g}") == v else str(v) for v in values)]


def _network(record: RunRecord) -> NetworkConfig | None:
    """The teacher's architecture, or that of the exported network; None where none can be read."""
    own = record.identity if record.kind == "teacher" else record.teacher
    for data in (own.get("network"), record.export.get("network")):
        try:
            if data is not None:
                return NetworkConfig.from_json(data)
        except (ValueError, TypeError):
            continue
    return None


def _teacher(record: RunRecord) -> NetworkConfig | None:
    """The teacher's architecture, where the exported network is narrower or wider: with its channels."""
    network, width = _network(record), number(record.config.get("width", 1.0))
    if network is None or record.kind == "teacher" or record.teacher or width == 1 or not 0 < width < math.inf:
        return network
    try:
        return replace(network, model_channels=round(network.model_channels / width))
    except ValueError:
        return network


def _extra(record: RunRecord) -> Mapping[str, Any]:
    extra = record.export.get("extra")
    return extra if isinstance(extra, dict) else {}


def _flat_number(config: object, name: str) -> float:
    return number(config.get(name)) if isinstance(config, dict) else math.nan
