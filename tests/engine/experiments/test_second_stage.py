"""A second stage: a generator from another run's average, a student from the teacher, and the student first."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import equivalence
import official_files
import pytest
import torch

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench import plain_loop
from ipfm.engine.commands.bench.equivalence import BASE, LIMIT, NETWORK, difference, trained_tensors
from ipfm.engine.commands.report.facts import facts_of
from ipfm.engine.commands.report.reproduce import _began
from ipfm.engine.distributed.world import World
from ipfm.engine.experiments.gpu_costs import Run
from ipfm.engine.experiments.options import options_for
from ipfm.engine.experiments.starts import described_start, read_start
from ipfm.engine.objectives.initial_networks import trained_config
from ipfm.engine.objectives.pid import PidConfig
from ipfm.engine.runtime.commandline import BadInput
from ipfm.engine.training.resolve import complete
from ipfm.engine.training.run_state import read_run
from ipfm.engine.training.start import DistillationStart
from ipfm.models import EDMPrecond, Precond, load_model, load_teacher, save_model
from ipfm.recipes import ablation_alpha

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
# A batch of 8: 16 images are two steps.
FIRST: dict[str, Any] = {**BASE, "max_steps": 4, "zero": 0, "backward": "joint", "log_every": 1, "precision": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return equivalence.make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Precond:
    return load_teacher(folder)


@pytest.fixture(scope="module")
def first(teacher: Precond, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended, whose generator has left the teacher."""
    path = tmp_path_factory.mktemp("runs") / "first"
    Distiller(DistillConfig(**{**FIRST, "max_steps": 2, "lr": 1e-2}), teacher, world=ALONE).run(path)
    return path


def start_of(
    config: Any, teacher: Precond | None, path: Path, folder: Path | None = None, **more: Any
) -> DistillationStart:
    options = options_for(type(config))(**{**vars(config), "init": path}, **more)
    assert options.distillation() == config
    found = read_start(options, complete(config, NETWORK, CPU), teacher, folder)
    assert found is not None
    return found


def test_a_second_stage_is_the_plain_loops(teacher: Precond, first: Path) -> None:
    """The first run's average, a student from the teacher, two steps of the student alone, then both; fresh Adams."""
    more = {"student_updates": 2, "student_lr": 5e-4, "lr_schedule": "linear", "lr_warmup": 2}
    config = DistillConfig(**FIRST, **more, student_first_kimg=0.016)
    start = start_of(config, teacher, first)
    average = load_model(first / "generator")
    betas = {"lr": 1.0, "betas": (0.0, 0.999)}
    students, generators = (copy.deepcopy(net).requires_grad_(True) for net in (teacher, average))
    fresh = (torch.optim.Adam(net.parameters(), eps=config.eps, **betas).state_dict() for net in (students, generators))
    plain = plain_loop.distill(teacher, config, 4, plain_loop.Begun(students, generators, generators, *fresh, 0))

    run = Distiller(config, teacher, start=start, world=ALONE)
    assert run.first_step == 0 and run.generator.steps_applied == 0
    before = trained_tensors(run)
    for name, p in average.named_parameters():
        assert torch.equal(before[f"generator/weight/{name}"], p) and torch.equal(before[f"generator/ema/{name}"], p)
    measured = [run.iteration(step) for step in range(2)]
    alone = trained_tensors(run)
    assert all(torch.equal(alone[name], value) for name, value in before.items() if name.startswith("generator/"))
    assert [set(one.sums) for one in measured] == [{"student_loss"}] * 2
    assert run.generator.rates == {}
    for step in (2, 3):
        assert set(run.iteration(step).sums) == {"student_loss", "generator_loss"}
        assert run.generator.rates["lr"] == pytest.approx(config.lr_at(step))
    assert max(difference(plain, trained_tensors(run))) <= LIMIT
    # Neither the schedule nor the first weights are without effect.
    other = Distiller(replace(config, student_first_kimg=0.0), teacher, start=start, world=ALONE)
    for step in range(4):
        other.iteration(step)
    assert max(difference(plain, trained_tensors(other))) > 50 * LIMIT


def test_a_run_that_goes_on_without_the_first_one(teacher: Precond, first: Path, tmp_path: Path) -> None:
    """In one go, in two parts, and from a step in which the student learns alone: the same bits, without the file."""
    settings = {**FIRST, "student_first_kimg": 0.016, "lr_schedule": "rsqrt", "lr_decay_batches": 1, "lr_warmup": 3}
    settings |= {"checkpoint_every": 1, "keep_checkpoints": 5}
    gone, parts = tmp_path / "first", tmp_path / "parts"

    def run(end: int, path: Path, init: Path, **more: Any) -> dict[str, torch.Tensor]:
        config = DistillConfig(**settings | {"max_steps": end} | more)
        distiller = Distiller(config, teacher, start=start_of(config, teacher, init, path), world=ALONE)
        distiller.run(path)
        return trained_tensors(distiller)

    expected = run(4, tmp_path / "whole", first)
    run(3, parts, first)
    # The first run is elsewhere by now; or it has gone on, and its average is another.
    shutil.copytree(first, went_on := tmp_path / "other" / "first")
    save_model(teacher, went_on / "generator")
    for more, init in (({}, gone), ({"from_step": 1}, went_on)):
        found = run(4, parts, init, **more)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    named = {"generator_loss", "generator_bad", "generator_lr"}
    assert [line.keys() & named for line in lines] == [set(), set(), named, named]
    assert [line["student_lr"] for line in lines] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3 / 2**0.5, 1e-3 / 3**0.5])
    record = json.loads((tmp_path / "whole" / "config.json").read_text())
    said = {"source": "first/generator", "images_seen": 0, "stage": True, "networks": ["generator"]}
    assert record["start"] == said and record["config"]["init"] == "auto" and record["continues"]
    other = start_of(DistillConfig(**settings), teacher, gone, parts)
    assert described_start(other, DistillConfig(**settings))[0].startswith("second stage: the generator begins with ")


def test_what_is_said_of_it(teacher: Precond, first: Path) -> None:
    """Of a run what `ipfm sample` takes, in a line; of another number of steps a remark."""
    config = DistillConfig(**FIRST, steps=2)
    assert described_start(start_of(config, teacher, first), config) == (
        "second stage: the generator begins with first/generator, at step 0",
        f"  generator: {first / 'generator'}, with which its fresh average begins, a fresh optimiser",
        f"  of {first} the generator at its end (step 2) is taken",
        "  it was distilled at the noise levels 2.5, this run has 2.5, 1.25",
        "  student: starts from the teacher, with a fresh optimiser",
    )


def test_what_else_may_be_named(teacher: Precond, folder: Path, first: Path, tmp_path: Path) -> None:
    """A checkpoint's average, a model folder, another teacher, a file; and a student beside."""
    config = DistillConfig(**FIRST)
    average = load_model(first / "generator").state_dict()
    stored = official_files.official(load_model(first / "generator"), pfgmpp=True, D=16.0)
    snapshot = official_files.write_pickle(tmp_path / "network-snapshot-1.0-000001.pkl", {"ema": stored})
    for path in (first / "checkpoints" / "step-0000002", first / "generator", snapshot):
        weights = start_of(config, teacher, path).networks["generator"].weights
        assert all(torch.equal(weights[name], average[name]) for name in average)
    assert start_of(config, teacher, folder).source == f"{folder.parent.name}/model"
    both = start_of(config, teacher, first, student_from=first)
    assert both.stage and both.networks["student"].adam is None
    # A report names both, and the command that repeats the run.
    facts = both.facts()
    assert facts["start"]["student_source"] == "first" and facts["start"]["networks"] == ["generator", "student"]
    shutil.copytree(first, tmp_path / "second")
    record = json.loads((first / "config.json").read_text()) | facts
    (tmp_path / "second" / "config.json").write_text(json.dumps(record))
    found = read_run(tmp_path / "second")
    assert _began(found)[0] == ["--init", "first/generator", "--student-from", "first"]
    said = "It is a second stage: its generator began with first/generator, and its student with first."
    assert said in facts_of(found).summary
    assert "student_source" not in start_of(config, teacher, first).facts()["start"]


def refused(config: Any, teacher: Precond | None, path: Path, **more: Any) -> str:
    with pytest.raises(ValueError) as error:
        start_of(config, teacher, path, **more)
    return str(error.value)


def test_what_is_refused(teacher: Precond, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DistillConfig(**FIRST)
    said = refused(config, teacher, tmp_path / "techer")
    assert said.startswith(
        "init takes auto, teacher, random, or a run folder, a model folder or a checkpoint file, and "
    )
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(config, teacher, tmp_path / "empty")
    assert refused(config, None, first) == (
        "init was given: give the teacher that it was distilled from too, as --teacher"
    )
    assert refused(config, teacher, first, continue_from=first) == (
        "init was given, but continue-from says what the first weights are"
    )
    trajectory = PidConfig(**{n: v for n, v in FIRST.items() if n != "alpha"}, points=5)
    assert "is a generator by evaluations at noise levels, which physics" in refused(trajectory, teacher, first)
    for changes, differs in (
        ({"D": 64.0}, "D is 16.0 there, 64.0 here"),
        ({"label_dim": 0}, "label_dim is 3 there, 0 here"),
    ):
        other = EDMPrecond(replace(NETWORK, **changes))
        assert f"is another network than the generator of this run ({differs})" in refused(config, other, first)
    narrow = replace(config, width=0.5)
    assert refused(narrow, teacher, first).endswith(": --width says how wide it is")
    with pytest.raises(BadInput, match=r"^init was given, but an ablation says itself what its runs begin with$"):
        ablation_alpha.main(["--init", str(first), "--dry-run"])
    with pytest.raises(
        ValueError, match=r"^student-first-kimg 0\.032 are 4 steps of the run's 4, which leave none for "
    ):
        replace(config, student_first_kimg=0.032)
    # Where a discriminator's warm-up is the longer one, that is not said of this setting.
    later = replace(config, student_first_kimg=0.008, discriminator="encoder", discriminator_kimg=(1.0, 1.0))
    assert later.first_whole_step == 125


def test_plans_count_the_students_own_steps(teacher: Precond) -> None:
    """4 passes of 11: 100 of 200 such steps cost as 36.4."""
    network = trained_config(teacher.config, 0.0)
    config = complete(DistillConfig(batch=8, max_steps=200, student_first_kimg=0.8, precision="fp32"), network, CPU)
    assert config.first_whole_step == 100
    assert Run(config, network).steps_from() == pytest.approx(100 + 100 * 4 / 11)
    assert Run(config, network).steps_from(50) == pytest.approx(100 + 50 * 4 / 11)
    assert [Run(config, network).steps_from(first) for first in (100, 150)] == [100, 50]
    assert Run(replace(config, student_first_kimg=0.0), network).steps_from() == 200
