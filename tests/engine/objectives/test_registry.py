"""Objectives by their kinds: how they are found, what folders say of them, and a third one in a file of its own."""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import launch
import prepared
import pytest
import regression
import torch
from launch import ROOT, WORKERS

from ipfm.engine import DistillConfig, PidConfig, objectives
from ipfm.engine.experiments import options_for
from ipfm.engine.objectives import DEFAULT, OBJECTIVES, declared
from ipfm.engine.objectives.base import Distillation, check_objective_says
from ipfm.engine.random_streams import ObjectiveStream, Stream
from ipfm.engine.training.resolve import complete
from ipfm.engine.training.run_folder import check_run_folder, open_run_folder
from ipfm.models import EDMPrecond, presets, save_model
from ipfm.models.facts import GeneratorFacts, read_facts
from ipfm.models.low_rank import Lora


def test_kinds_and_their_settings() -> None:
    assert (OBJECTIVES["ipfm"], OBJECTIVES["pid"], OBJECTIVES[DEFAULT]) == (DistillConfig, PidConfig, DistillConfig)
    of_the_project = {
        kind: settings for kind, settings in OBJECTIVES.items() if settings.__module__.startswith(objectives.__name__)
    }
    # What is read in the source is what the classes say.
    assert declared().keys() == of_the_project.keys() == {"cmt", "dmd", "ect", "ipfm", "pid"}
    for kind, settings in of_the_project.items():
        assert settings.kind == kind and settings.method
        assert {name: option.help for name, option in declared()[kind].offered.items()} == settings.planned
        assert declared()[kind].example == settings.plan_example
        of_factors = settings(generator="lora", max_steps=1).objective(presets.get("digits"))
        found = {role.name: role.lora for role in of_factors.roles}
        assert found == dict.fromkeys(found) | {"generator": Lora(8, 8.0)} and of_factors.title.endswith("lora8")
    assert "regression" in OBJECTIVES  # of tests/helpers, imported here
    with pytest.raises(ValueError, match=r"^generator lora was given, and \w+ trains no such network by factors"):
        check_objective_says(OBJECTIVES["regression"](max_steps=1).objective(presets.get("digits")), ("generator",))
    with pytest.raises(ValueError, match=r"^generator lora was given, and \w+ trains no such network by factors"):
        complete(OBJECTIVES["regression"](generator="lora", max_steps=1), presets.get("digits"), torch.device("cpu"))
    with pytest.raises(KeyError):
        OBJECTIVES["unknown"]


def test_options_of_recipes_are_no_objectives() -> None:
    before = dict(OBJECTIVES)
    options = options_for(PidConfig)
    assert issubclass(options, PidConfig) and options.kind == "pid"
    assert dict(OBJECTIVES) == before


def test_a_kind_belongs_to_one_class() -> None:
    with pytest.raises(ValueError, match=r"^two objectives have the kind 'pid': .*pid\.PidConfig and .*\.Second$"):

        @dataclass(frozen=True, kw_only=True)
        class Second(Distillation):
            kind: ClassVar[str] = "pid"

    assert OBJECTIVES["pid"] is PidConfig


def test_a_kind_belongs_to_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "second.py").write_text('class Second:\n    kind: ClassVar[str] = "pid"\n')
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match=r"^two objectives have the kind 'pid', the second one in second\.py$"):
        declared()


def test_random_streams_of_objectives_are_their_own() -> None:
    """The numbers are part of what a seed means: those of physics informed distillation are those of version 0.1."""
    streams = {kind.__qualname__: {s.name: s.value for s in kind} for kind in ObjectiveStream.__subclasses__()}
    assert streams["PidStream"] == {"LATENT": 22, "LEVEL": 23, "LABEL": 24, "DROPOUT": 25}
    numbers = [value for found in (*streams.values(), {s.name: s.value for s in Stream}) for value in found.values()]
    assert len(set(numbers)) == len(numbers)
    for number, owner in ((22, "PidStream"), (0, "Stream")):
        with pytest.raises(
            ValueError, match=rf"the random streams \[{number}\] of .*Second belong to .*\.{owner}: take"
        ):
            ObjectiveStream("Second", {"LATENT": number})


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Classes that a test has made are gone afterwards."""
    yield
    gc.collect()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"LATENT": 70_000}, r"the random streams \[70000\] of .*Third must lie in \[0, 65535\]"),
        ({"LATENT": -1}, r"the random streams \[-1\] of .*Third must lie in \[0, 65535\]"),
        (
            {"LATENT": 2000, "LABEL": 2000},
            "the random stream LABEL of .*Third has the number of LATENT: each use takes",
        ),
    ],
)
def test_a_random_stream_is_one_number_of_16_bits(numbers: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ObjectiveStream("Third", numbers)


@pytest.mark.usefixtures("forgotten")
def test_a_file_and_its_copy_outside_may_have_the_same_streams() -> None:
    one = ObjectiveStream("Fourth", {"LATENT": 3000}, module="mine")
    two = ObjectiveStream("Fourth", {"LATENT": 3000}, module="mine_too")
    assert one(3000) == two(3000)
    with pytest.raises(ValueError, match=r"\[3000\] of mine\.Fifth belong to mine\.Fourth: take"):
        ObjectiveStream("Fifth", {"LATENT": 3000}, module="mine")


# -- what a folder says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [DistillConfig(max_steps=3), PidConfig(max_steps=3)])
def test_older_folders_are_recognised_by_their_settings(settings: Distillation) -> None:
    config = settings.to_json()
    assert OBJECTIVES.of(None, config) is OBJECTIVES.of(settings.kind, config) is type(settings)
    assert OBJECTIVES.of("something new", config) is None and OBJECTIVES.of(7, config) is None
    assert OBJECTIVES.of(None, {"batch": 3}) is None
    # What the folder says counts, whatever its settings look like.
    assert OBJECTIVES.of("ipfm", {"points": 3}) is DistillConfig


def test_older_generators_are_recognised() -> None:
    for said, kind in (
        ({"task": "generator", "alpha": 1.2, "sigmas": [2.5]}, DistillConfig),
        ({"task": "generator", "parametrisation": "trajectory", "sigma_max": 80.0}, PidConfig),
        ({"task": "generator", "config": PidConfig().to_json()}, PidConfig),
        ({"task": "generator", "objective": "regression", "config": {"level": 1.0}}, regression.RegressionConfig),
        ({"task": "generator", "sigmas": [2.5]}, None),
    ):
        facts = read_facts(said)
        assert isinstance(facts, GeneratorFacts)
        found, settings = OBJECTIVES.of_generator(facts)
        assert found is kind and settings.items() >= said.get("config", {}).items()


def test_a_folder_belongs_to_its_objective(tmp_path: Path) -> None:
    config = DistillConfig(max_steps=3)
    record = check_run_folder(tmp_path / "run", "distill", config, {})
    assert record["objective"] == "ipfm"
    open_run_folder(tmp_path / "run", record, write=True)
    with pytest.raises(ValueError, match="objective is ipfm there, pid here"):
        check_run_folder(tmp_path / "run", "distill", PidConfig(max_steps=3), {})
    # A folder of a version that did not write it is taken, and has it from then on.
    del record["objective"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    assert check_run_folder(tmp_path / "run", "distill", config, {})["objective"] == "ipfm"
    with pytest.raises(ValueError, match=r"belongs to another configuration .*points is null there, 250 here"):
        check_run_folder(tmp_path / "run", "distill", PidConfig(max_steps=3), {})


# -- one file ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What a recipe and the commands print where engine/objectives/ has one file more; "out": where they wrote."""
    out = tmp_path_factory.mktemp("third")
    (out / "objectives").mkdir()
    shutil.copy(regression.__file__, out / "objectives")
    torch.manual_seed(0)
    small = replace(presets.get("digits", D=128.0), model_channels=8, channel_mult=(1,))
    save_model(EDMPrecond(small), out / "teacher", extra={"task": "teacher", "D": 128.0})
    argument = json.dumps([str(out / "objectives"), str(out / "teacher"), str(out)])
    done = prepared.run(WORKERS / "third_objective.py", argument, env=launch.environment())
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "out": str(out)}


def test_a_third_objective_has_a_recipe(said: Mapping[str, str]) -> None:
    text = " ".join(re.sub("[│|]", " ", said["help"]).split())
    assert "--level FLOAT Noise level at which the generator learns the teacher's denoising. (default: 2.5)" in text
    assert said["refused"] == "--level must be a finite number > 0, got 0.0\n"
    assert "Fréchet distance in pixel space" in said["recipe"]


def test_a_third_objective_is_planned(said: Mapping[str, str]) -> None:
    text = " ".join(re.sub("[│|]", " ", said["plan --help"]).split())
    assert "By what: cmt, dmd, ect, ipfm, pid, regression." in text
    assert "--level FLOAT Of regression: its noise level. Default: 2.5." in text
    assert "pupil: forward and backward" in said["plan"]
    plan = json.loads(said["plan --json"])
    assert plan["objective"] == "regression" and set(plan["phases"]) == {
        "pupil: forward and backward",
        "pupil: optimiser",
    }
    assert said["plan of another"] == "only the objective regression has level: leave it out\n"


def test_a_third_objective_is_reported(said: Mapping[str, str]) -> None:
    facts = json.loads(said["report --json"])
    words = "regression on the teacher's denoising"
    assert facts["title"] == "Regression on the teacher's denoising, D = 128"
    assert facts["objective"] == f"{words} at σ = 1.5" and facts["loss_reading"].startswith("pupil_loss is a squared")
    assert f"a generator that makes an image in 1 network evaluation at D = 128, by {words} at" in facts["summary"]
    assert {"name": "level", "value": "1.5", "default": "2.5", "changed": True} in facts["settings"]
    assert "The folder does not say which recipe made it" in facts["command"]["notes"][0]
    page = Path(said["out"], "run", "report.html").read_text(encoding="utf-8")
    assert "Regression on the teacher&#39;s denoising" in page and "Teacher" not in facts["title"]


def test_info_knows_a_third_objective(said: Mapping[str, str]) -> None:
    facts = json.loads(said["info --json"])
    assert facts["objective"] == "regression" and facts["steps_done"] == 4 and facts["config"]["level"] == 1.5
    assert re.search(r"^objective +regression on the teacher's denoising$", said["info"], re.M)
    assert re.search(r"^distilled by +regression on the teacher's denoising$", said["info of the generator"], re.M)


def test_a_third_objective_is_exported(said: Mapping[str, str]) -> None:
    out = Path(said["out"])
    assert json.loads(said["export"])["difference"] < 1e-4 and (out / "hub" / "generator.pt2").is_file()
    card = (out / "hub" / "README.md").read_text(encoding="utf-8")
    assert "| distilled by | regression on the teacher's denoising |" in card
    assert "| level of the regression | 1.5 |" in card and "α" not in card
    stored = json.loads((out / "hub" / "config.json").read_text(encoding="utf-8"))
    assert stored["extra"]["objective"] == "regression" and stored["extra"]["sigmas"] == [1.5]
    assert json.loads((out / "run" / "config.json").read_text(encoding="utf-8"))["objective"] == "regression"


# The public names that `ipfm.engine` has, which type checkers read.
NAMED_IN = {"engine/objectives/pid.py", "engine/__init__.py"}
NAMES = re.compile(
    r"""\bPID\b|\bPid[A-Z]\w*|objectives\.pid|["'`]pid["'`]|[Pp]hysics.informed|\bpid_|objective pid\b"""
)


def test_one_file_names_an_objective() -> None:
    """What the project has to know of physics informed distillation stands in its file."""
    files = [path for folder in ("engine", "kernels", "models") for path in sorted((ROOT / folder).rglob("*"))]
    texts = {path.relative_to(ROOT).as_posix(): path for path in files if path.suffix in (".py", ".j2")}
    naming = {name for name, path in texts.items() if NAMES.search(path.read_text(encoding="utf-8"))}
    assert naming == NAMED_IN
