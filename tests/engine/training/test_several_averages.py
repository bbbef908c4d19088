"""Several averages of one training: each is measured, one is exported, all are kept and go on after a stop."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ipfm.engine import DistillConfig, Distiller, TeacherConfig
from ipfm.engine.commands.main import _main
from ipfm.engine.commands.report.facts import facts_of
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.evaluation import Evaluation
from ipfm.engine.evaluation.metrics import FrechetResult, PixelFeatures, Statistics
from ipfm.engine.evaluation.results import EvaluationHistory, read_results
from ipfm.engine.runtime.commandline import run_command
from ipfm.engine.training.run_folder import release_folder
from ipfm.engine.training.run_state import read_run
from ipfm.engine.training.snapshots import all_snapshots_in, read_best
from ipfm.engine.training.teacher import TeacherTraining
from ipfm.models import NetworkConfig, Precond, build_network, load_model
from ipfm.models.store import read_config

ALONE = World(0, 1, torch.device("cpu"))
NETWORK = NetworkConfig(
    img_resolution=4, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(), D=64.0
)
EVALUATION = Evaluation(PixelFeatures((1, 4, 4)), Statistics(torch.zeros(16), torch.eye(16)), images=16, batch=16)
NAMES = ("ema0.001k", "ema1k", "ema0.1")
BASE: dict[str, Any] = {
    "batch": 2, "max_steps": 6, "eval_every": 2, "checkpoint_every": 4, "log_every": 1, "heun_steps": 1, "zero": 0,
    "precision": "fp32", "ema_kimg": (1e-3, 1.0), "ema": (0.1,), "lr": 1e-2, "ema_rampup": 2.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> Precond:
    torch.manual_seed(0)
    return build_network(NETWORK).eval()


@pytest.fixture
def made(teacher: Precond, tmp_path: Path) -> Iterator[Callable[..., Distiller]]:
    """Makes a distillation, whose averages may be given distances by step and name."""

    def make(distances: dict[int, tuple[float, ...]] | None = None, **given: Any) -> Distiller:
        release_folder(tmp_path / "run")
        distiller = Distiller(DistillConfig(**{**BASE, **given}), teacher, evaluation=EVALUATION, world=ALONE)
        if distances is not None:
            found = (one for step in sorted(distances) for one in distances[step])
            distiller.evaluate = lambda: FrechetResult(next(found), 16, 0.1, 160.0)  # type: ignore[method-assign]
        return distiller

    yield make
    release_folder(tmp_path / "run")


def state(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step-{step:07d}"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def averages(distiller: Distiller) -> dict[str, dict[str, torch.Tensor]]:
    net = distiller.generator
    return {name: dict(net.full(kind)) for name, kind in zip(net.averages, net.average_kinds, strict=True)}


def is_average(model: Path, tensors: dict[str, torch.Tensor]) -> bool:
    own = load_model(model).state_dict()
    return all(torch.equal(own[name], tensor.to(own[name].dtype)) for name, tensor in tensors.items())


def test_each_is_measured_and_the_best_is_exported(made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    distiller = made({2: (3.0, 1.0, 2.0), 4: (3.0, 4.0, 0.5), 6: (0.8, 0.7, 0.9)})
    distiller.run(run)
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["average"], line["frechet"]) for line in lines] == [("ema1k", 1.0), ("ema0.1", 0.5), ("ema1k", 0.7)]
    assert [line["averages"]["ema0.1"]["frechet"] for line in lines] == [2.0, 0.5, 0.9]
    history = EvaluationHistory(run)
    assert history.averages == list(NAMES) and history.points == [(2, 1.0), (4, 0.5), (6, 0.7)]
    assert history.points_of("frechet", "ema0.001k") == [(2, 3.0), (4, 3.0), (6, 0.8)]
    best = read_best(run, "distill")
    assert best is not None and (best.step, best.distance) == (4, 0.5)
    assert read_config(best.path).extra["average"] == "ema0.1"
    kept = averages(distiller)
    assert read_config(run / "generator").extra["average"] == "ema1k" and is_average(run / "generator", kept["ema1k"])
    assert not is_average(run / "generator", kept["ema0.1"])
    labels = [(row.label, row.frechet) for row in read_results(run)]
    assert labels[1:] == [("generator", 0.7), ("ema0.001k", 0.8), ("ema1k", 0.7), ("ema0.1", 0.9)]
    told = capsys.readouterr().err
    # What the commands say of it.
    record = read_run(run)
    words = "ema0.001k 0.8000, ema1k 0.7000, ema0.1 0.9000"
    assert record.averages_in_words == words
    assert f"Of its averages at the last evaluation: {words}." in facts_of(record).summary
    assert facts_of(record).to_json()["averages"]["ema0.1"][1]["frechet"] == 0.5
    for place, said in ((run, words), (run / "generator", "ema1k")):
        run_command("ipfm", _main, ["info", str(place)])
        assert re.search(rf"^averages?:? +{re.escape(said)}$", capsys.readouterr().out, re.M)
    assert "step 4, ema0.1: Fréchet distance 0.5000" in told and "step 4: ema0.1 is the best" in told


def test_a_named_one_is_exported_whatever_is_measured(made, tmp_path: Path) -> None:
    run = tmp_path / "run"
    distiller = made({2: (3.0, 1.0, 2.0), 4: (3.0, 4.0, 0.5), 6: (0.8, 0.7, 0.9)}, export_ema="ema0.001k")
    distiller.run(run)
    assert EvaluationHistory(run).points == [(2, 3.0), (4, 3.0), (6, 0.8)]
    assert is_average(run / "generator", averages(distiller)["ema0.001k"])
    # Of the finished run another one, by the same command with another name; and the best again.
    for name in ("ema0.1", "best"):
        again = made({}, export_ema=name)
        again.run(run)
        assert is_average(run / "generator", averages(again)[name if name != "best" else "ema1k"])


def test_a_run_that_was_stopped_ends_as_one_that_was_not(made, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    made().run(whole)
    release_folder(whole)
    made(max_steps=4).run(run)
    made().run(run)
    assert state(run, 6) == state(whole, 6) and len(state(run, 6)) == 2
    assert (run / "generator" / "model.safetensors").read_bytes() == (
        whole / "generator" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(ValueError, match=r"ema is \[0\.1\] there, \[0\.2\] here"):
        made(ema=(0.2,)).run(run)


def test_settings_of_snapshots_where_none_are_kept_are_said_to_act_on_nothing(
    made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(max_steps=1, eval_every=0, keep_snapshots=3, snapshot_precision="fp16").run(tmp_path / "run")
    said = "ipfm: --keep-snapshots and --snapshot-precision act on nothing without --snapshot-every"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("background", [False, True])
def test_snapshots_of_each_are_kept_in_half_the_bits(made, tmp_path: Path, background: bool) -> None:
    run = tmp_path / "run"
    distiller = made(
        eval_every=0, snapshot_every=3, snapshot_precision="fp16", keep_snapshots=0, async_checkpoints=background
    )
    distiller.run(run)
    folders = [str(path.relative_to(run / "snapshots")) for path in all_snapshots_in(run)]
    steps = ("step-0000003", "step-0000006")
    assert folders == [*steps, *(f"{name}/{step}" for name in ("ema0.1", "ema1k") for step in steps)]
    for name, tensors in averages(distiller).items():
        place = run / "snapshots" / ("" if name == NAMES[0] else name) / "step-0000006"
        assert is_average(place, tensors) and read_config(place).extra["average"] == name
        assert {p.dtype for p in load_model(place).parameters()} == {torch.float16}
    assert {p.dtype for p in load_model(run / "generator").parameters()} == {torch.float32}


def test_a_teacher_without_an_evaluation_exports_the_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = ImageDataset(torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8), None, name="noise")
    given = {name: value for name, value in BASE.items() if name != "ema_kimg"}
    config = TeacherConfig(**given, ema_kimg=0, lr_rampup_kimg=0)
    training = TeacherTraining(config, NETWORK, data, world=ALONE)
    training.run(tmp_path / "run")
    release_folder(tmp_path / "run")
    assert training.net.averages == ("ema0.1",) and training.net.state_kinds[-1] == "ema"
    assert training.net.rates["ema_decay"] == config.ema_decay(5)
    extra = read_config(tmp_path / "run" / "model").extra
    assert "average" not in extra and extra["config"]["ema"] == [0.1]
