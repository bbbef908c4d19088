"""Runs, checkpoints and models that version 0.1.0 wrote: this version goes on with them, to the same numbers.

tests/fixtures/version-0.1.0 holds them, with the program that made them and what that version said and drew.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_values
import torch

from ipfm.engine import DistillConfig, Distiller, Evaluation, PidConfig, TeacherConfig, TeacherTraining
from ipfm.engine.commands.main import _main as ipfm
from ipfm.engine.data.dataset import digits
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.metrics import PixelFeatures, dataset_statistics
from ipfm.engine.evaluation.results import EvaluationHistory
from ipfm.engine.runtime.files import StepLog
from ipfm.engine.sampling.stored_model import sample_model
from ipfm.engine.training.set_aside import read_set_aside
from ipfm.engine.training.snapshots import read_best
from ipfm.models import NetworkConfig, build_network, load_model, load_teacher
from ipfm.recipes import digits_ipfm, digits_pid

FIXTURE = Path(__file__).parents[2] / "fixtures" / "version-0.1.0"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
RUNS = ("teacher", "ipfm", "pid")
MODELS = ("teacher/model", "ipfm/generator", "pid/generator")
COMMON: dict[str, Any] = {
    "batch": 8, "log_every": 1, "checkpoint_every": 4, "keep_checkpoints": 1, "eval_every": 2, "lr": 1e-3,
    "ema_kimg": 0.05, "ema_rampup": 1.0, "zero": 0, "precision": "fp32",
}  # fmt: skip
CONFIGS = {
    "ipfm": DistillConfig(max_steps=8, alpha=1.0, steps=2, **COMMON),
    "pid": PidConfig(max_steps=8, points=20, **COMMON),
}
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what version 0.1.0 left; the working directory."""
    shutil.copytree(FIXTURE, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    data = digits()
    features = PixelFeatures(data.shape)
    return Evaluation(features, dataset_statistics(data, features), images=64, batch=64)


@pytest.fixture(scope="module")
def images() -> Mapping[str, np.ndarray]:
    with np.load(FIXTURE / "images.npz") as file:
        return dict(file)


def drawn(model: Path, heun_steps: int = 5) -> np.ndarray:
    return sample_model(model, CPU, heun_steps=heun_steps, seed=1).draw(0, 4).numpy()


def agrees(found: Any, before: Any, where: str = "") -> None:
    """Everything that was said before is said still; more may be. Numbers to the rounding of another processor."""
    if isinstance(before, dict):
        assert isinstance(found, dict) and not before.keys() - found.keys(), f"{where}: {before.keys() - found.keys()}"
        for name, value in before.items():
            agrees(found[name], value, f"{where}.{name}")
    elif isinstance(before, list):
        assert isinstance(found, list) and len(found) == len(before), where
        for index, pair in enumerate(zip(found, before, strict=True)):
            agrees(*pair, f"{where}[{index}]")
    elif isinstance(before, float):
        assert math.isclose(found, before, rel_tol=1e-12), f"{where}: {found} instead of {before}"
    else:
        assert found == before, f"{where}: {found!r} instead of {before!r}"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("path", [*RUNS, *MODELS])
def test_info_says_the_same(capsys: pytest.CaptureFixture[str], path: str) -> None:
    ipfm(["info", path, "--json"])
    agrees(json.loads(capsys.readouterr().out), EXPECTED["info"][path])


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("run", RUNS)
def test_report_says_the_same(capsys: pytest.CaptureFixture[str], run: str) -> None:
    ipfm(["report", run, "--json"])
    # Version and time of the report itself are new.
    before = {name: value for name, value in EXPECTED["report"][run].items() if name != "made"}
    agrees(json.loads(capsys.readouterr().out), before)


@pytest.mark.usefixtures("folder")
def test_a_page_is_made_of_an_older_run() -> None:
    ipfm(["report", "ipfm"])
    assert (Path("ipfm") / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("run", CONFIGS)
def test_a_distillation_is_resumed_to_the_same_end(
    folder: Path, run: str, evaluation: Evaluation, images: Mapping[str, np.ndarray]
) -> None:
    """From the checkpoint of step 4 to step 8: losses, distances and images as that version's own continuation."""
    teacher = load_teacher(folder / "teacher" / "model")
    Distiller(CONFIGS[run], teacher, evaluation=evaluation, dataset="digits", world=ALONE).run(folder / run)
    lines, before = StepLog(folder / run / "metrics.jsonl", None).read(), EXPECTED["metrics"][run]
    assert [line["step"] for line in lines] == [line["step"] for line in before] == list(range(8))
    for line, expected in zip(lines, before, strict=True):
        assert line.keys() == expected.keys()
        for name in line:
            if name.endswith(("_loss", "_bad")):
                assert line[name] == pytest.approx(expected[name], rel=1e-4), name
    distances = [tuple(point) for point in EXPECTED["distances"][run]]
    assert EvaluationHistory(folder / run).points == [(s, pytest.approx(d, rel=1e-4)) for s, d in distances]
    np.testing.assert_allclose(drawn(folder / run / "generator"), images[f"{run}-8"], atol=1e-4)
    # Its best is one whose network is at hand: from the checkpoint on.
    at_hand = {step: distance for step, distance in distances if step >= 4}
    best = read_best(folder / run, "distill")
    assert best is not None and best.step == min(at_hand, key=lambda step: at_hand[step])
    assert best.distance == pytest.approx(at_hand[best.step], rel=1e-4)


@pytest.mark.parametrize(("run", "recipe"), [("ipfm", digits_ipfm), ("pid", digits_pid)])
def test_a_distillation_is_branched_and_goes_back(folder: Path, run: str, recipe: Any) -> None:
    """The branch makes the same steps; the run goes back to its start, and what it was is put aside with all it had."""
    had = {path.relative_to(folder / run) for path in (folder / run).rglob("*") if path.is_file()}
    words = ["--heun-steps", "1", "--eval-images", "64"]
    recipe.main(["--branch", run, "--teacher", "teacher/model", "--max-steps", "8", "--out", "new", *words])
    lines, before = StepLog(folder / "new" / "metrics.jsonl", None).read(), EXPECTED["metrics"][run][4:]
    for line, expected in zip(lines, before, strict=True):
        assert all(line[name] == pytest.approx(expected[name], rel=1e-4) for name in line if name.endswith("_loss"))
    config = replace(CONFIGS[run], max_steps=1, from_step=0)
    Distiller(config, load_teacher(folder / "teacher" / "model"), world=ALONE).run(folder / run)
    (one,) = read_set_aside(folder / run)
    assert (one.step, had - {path.relative_to(one.path) for path in one.path.rglob("*")}) == (4, set())


def weights(run: Distiller | TeacherTraining) -> dict[str, torch.Tensor]:
    """All that is trained, by network, kind and name."""
    return {
        f"{which}/{kind}/{name}": tensor.detach().clone()
        for which, network in run.networks.items()
        for kind in network.state_kinds
        for name, tensor in network.full(kind)
    }


def without_rules(run: Path) -> None:
    """The folder as a version left it that had no rules to name."""
    record = json.loads((run / "config.json").read_text(encoding="utf-8"))
    del record["config"]["rules"]
    (run / "config.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize("kind", ["ipfm", "pid", "teacher"])
def test_dropout_augmentation_and_ema_go_on_as_they_began(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was left half-way before the rules changed ends as by the first ones; a new one goes by the second."""
    network = NetworkConfig(
        img_resolution=8, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
        augment_dim=9, D=16.0,
    )  # fmt: skip
    teacher = build_network(network).eval().requires_grad_(False)
    random_values.randomise(teacher)
    common = {**COMMON, "batch": 4, "checkpoint_every": 1, "eval_every": 0, "dropout": 0.3, "max_steps": 3, "lr": 1e-2}

    def trained(rules: int, *folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
        settings: dict[str, Any] = {**common, "rules": rules, **changes}
        run: Distiller | TeacherTraining
        if kind == "teacher":
            run = TeacherTraining(TeacherConfig(augment=0.9, **settings), network, digits(), world=ALONE)
        else:
            config = DistillConfig(augment=0.9, **settings) if kind == "ipfm" else PidConfig(points=5, **settings)
            run = Distiller(config, teacher, world=ALONE)
        for path in folder:
            run.run(path)
        for step in range(0 if folder else settings["max_steps"]):
            run.iteration(step)
        return weights(run)

    before, now = trained(1), trained(2)
    trained(1, tmp_path, max_steps=1)
    without_rules(tmp_path)
    capsys.readouterr()
    resumed = trained(2, tmp_path)
    assert f"ipfm: {tmp_path} goes on by rules 1, as it began; see --rules\n" in capsys.readouterr().err
    assert all(torch.equal(resumed[name], before[name]) for name in before)
    assert any(not torch.equal(now[name], before[name]) for name in before)
    for file in (tmp_path / "config.json", next(tmp_path.glob("[gm]*/config.json"))):
        said = json.loads(file.read_text(encoding="utf-8"))
        assert said.get("extra", said)["config"]["rules"] == 1


def test_a_teacher_is_resumed(folder: Path, evaluation: Evaluation) -> None:
    """A finished training is only read again; a longer one goes on where it was."""
    network = load_teacher(folder / "teacher" / "model").config
    before = StepLog(folder / "teacher" / "metrics.jsonl", None).read()
    for steps in (6, 8):
        config = TeacherConfig(max_steps=steps, lr_rampup_kimg=0.01, **COMMON)
        TeacherTraining(config, network, digits(), evaluation=evaluation, world=ALONE).run(folder / "teacher")
        lines = StepLog(folder / "teacher" / "metrics.jsonl", None).read()
        assert len(lines) == steps and lines[:6] == before


@pytest.mark.parametrize("run", CONFIGS)
def test_a_run_of_other_settings_is_refused_as_before(folder: Path, run: str, evaluation: Evaluation) -> None:
    teacher = load_teacher(folder / "teacher" / "model")
    other = Distiller(replace(CONFIGS[run], lr=2e-3), teacher, evaluation=evaluation, world=ALONE)
    with pytest.raises(ValueError, match=r"belongs to another configuration \(lr is 0.001 there, 0.002 here\)"):
        other.run(folder / run)


@pytest.mark.parametrize(("model", "name"), [(MODELS[0], "teacher"), (MODELS[1], "ipfm-4"), (MODELS[2], "pid-4")])
def test_models_draw_the_same_images(images: Mapping[str, np.ndarray], model: str, name: str) -> None:
    np.testing.assert_allclose(drawn(FIXTURE / model), images[name], atol=1e-4)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("model", MODELS)
def test_models_are_exported(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str) -> None:
    """The export compares what it wrote with the network, whose images are those of before."""
    ipfm(["export", model, str(tmp_path / "hub"), "--samples", "0", "--json"])
    assert json.loads(capsys.readouterr().out)["difference"] <= 1e-5
    mine, theirs = load_model(tmp_path / "hub").state_dict(), load_model(Path(model)).state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
