"""`ipfm info`: runs in every state, models of every kind, and JSON that a machine can read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipfm.engine.commands.describe import architecture, computed, images
from ipfm.engine.commands.info import Info
from ipfm.engine.commands.report.command import Report
from ipfm.engine.config import TeacherConfig
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.results import EvaluationHistory, EvaluationRow, write_results
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.objectives.pid import PidConfig
from ipfm.engine.runtime.commandline import BadInput
from ipfm.engine.runtime.files import StepLog
from ipfm.engine.runtime.json_output import output
from ipfm.engine.training.checkpoint import Draft
from ipfm.engine.training.environment import log_start
from ipfm.engine.training.run_folder import check_run_folder, open_run_folder
from ipfm.models import EDMPrecond, presets, save_model

SMALL = {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "channel_mult": (1,), "num_blocks": 1}
CONFIG = DistillConfig(batch=64, kimg=1.28, sigmas=(2.5, 1.25))


def described(capsys: pytest.CaptureFixture[str], path: Path) -> tuple[dict, dict[str, str]]:
    """The JSON, and the lines of the text by their names."""
    Info(model=path, json=True).run()

    def unknown(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    facts = json.loads(capsys.readouterr().out, parse_constant=unknown)
    Info(model=path).run()
    lines = [line.split("  ", 1) for line in capsys.readouterr().out.partition("\n\n")[0].splitlines()]
    return facts, {name: value.strip() for name, value in lines}


def run_folder(path: Path, config: DistillConfig | PidConfig | TeacherConfig, *, kind: str, steps: int) -> None:
    """As a run leaves it that was stopped after `steps` steps, the checkpoint one step before."""
    open_run_folder(path, check_run_folder(path, kind, config, {}), write=True)
    log = StepLog(path / "metrics.jsonl", None)
    for step in range(steps):
        log.append(step, {"student_loss": 2.0 / (step + 1), "generator_loss": float("nan")})
    log.flush()
    if steps > 1:
        Draft(path / "checkpoints", steps - 1).finish()


def test_a_run_that_goes_on_and_one_that_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path / "a", CONFIG, kind="distill", steps=5)
    history = EvaluationHistory(tmp_path / "a", 0)
    for step, distance in ((2, 3.25), (4, float("nan")), (5, 4.5)):
        history.add(step, distance)
    # This process holds the folder, as one that trains there does; nobody holds a copy.
    facts, text = described(capsys, tmp_path / "a")
    assert (facts["state"], text["state"]) == ("running", "running")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    facts, text = described(capsys, tmp_path / "b")
    assert (facts["kind"], facts["state"], facts["steps_done"], facts["steps_total"]) == ("distill", "stopped", 5, 20)
    assert facts["checkpoint"] == str(tmp_path / "b" / "checkpoints" / "step-0000004")
    assert (facts["distance"], facts["distance_step"]) == (4.5, 5)
    assert facts["distances"] == [[2, 3.25], [4, None], [5, 4.5]]
    assert facts["network"] is None and facts["last"]["student_loss"] == 0.4
    assert facts["config"] == CONFIG.to_json()
    assert text["state"] == "stopped; the same command continues" and text["steps"] == "5 of 20"
    assert text["Fréchet distance"] == "4.500 at step 5; smallest 3.250 at step 2"
    assert text["objective"] == "inverse Poisson flow matching, alpha = 1, 2 steps" and text["sigmas"] == "2.5, 1.25"
    assert text["losses"] == "student 0.4" and text["generator"] == "not exported yet"


@pytest.mark.quick
def test_a_finished_run_and_its_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = PidConfig(batch=64, max_steps=3, D=32.0)
    run_folder(tmp_path / "a", config, kind="distill", steps=3)
    extra = {"task": "generator", "dataset": "cifar10", "parametrisation": "trajectory", "sigma_max": 80.0}
    extra |= {"sigma_min": 0.002, "optimizer_steps": 3, "config": config.to_json()}
    net = EDMPrecond(**SMALL, D=32.0)
    save_model(net, tmp_path / "a" / "generator", extra=extra)
    write_results(tmp_path / "a", [EvaluationRow("generator", 1, 1, 2.5, 100, 50.0, None, "FID")])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    facts, text = described(capsys, tmp_path / "b")
    assert (facts["state"], facts["network"]) == ("finished", str(tmp_path / "b" / "generator"))
    assert (facts["objective"], facts["metric"], facts["results"][0]["frechet"]) == ("pid", "FID", 2.5)
    assert text["objective"] == "physics informed distillation, first difference, l2, N = 250"

    facts, text = described(capsys, tmp_path / "b" / "generator")
    count = sum(p.numel() for p in net.parameters())
    assert {name: facts[name] for name in ("kind", "architecture", "resolution", "D", "parameters", "nfe")} == {
        "kind": "generator", "architecture": "ddpm++", "resolution": 8, "D": 32.0, "parameters": count, "nfe": 1
    }  # fmt: skip
    assert facts["sigmas"] == [80.0, 0.002] and facts["training"] == extra
    assert text["distilled by"].startswith("physics informed") and text["dataset"] == "cifar10"
    assert text["training"].startswith("3 steps, batch 64, lr 1e-05")


def test_a_teachers_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path / "a", TeacherConfig(batch=8, max_steps=4, D=float("inf")), kind="teacher", steps=0)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    facts, text = described(capsys, tmp_path / "b")
    assert (facts["kind"], facts["state"], facts["steps_done"], facts["checkpoint"]) == ("teacher", "stopped", 0, None)
    assert facts["D"] == "inf" and text["D"] == "inf (diffusion)" and text["teacher"] == "not exported yet"


def test_how_a_run_and_its_network_were_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DistillConfig(batch=8, max_steps=1, D=32.0, cuda_graphs="on", deterministic=True, compile=True)
    run_folder(tmp_path / "a", config, kind="distill", steps=1)
    said = {"task": "generator", "sigmas": [2.5], "config": config.to_json()}
    save_model(EDMPrecond(**SMALL, D=32.0), tmp_path / "a" / "generator", extra=said)
    for place in (tmp_path / "a", tmp_path / "a" / "generator"):
        _, text = described(capsys, place)
        assert text["computed"] == "with CUDA graphs, compiled, deterministic algorithms"
    # What "auto" has come to, where the run says it.
    run_folder(tmp_path / "b", replace(config, cuda_graphs="auto"), kind="distill", steps=1)
    assert described(capsys, tmp_path / "b")[1]["computed"].startswith("CUDA graphs auto, ")
    log_start(tmp_path / "b", 0, World(0, 1, torch.device("cpu")), graphs=True)
    assert described(capsys, tmp_path / "b")[1]["computed"].startswith("with CUDA graphs, ")
    assert computed({"cuda_graphs": "off", "deterministic": False}) == "without CUDA graphs, fastest algorithms"
    assert computed({"cuda_graphs": "auto"}) == "CUDA graphs auto" and computed({}) == ""


def test_a_folder_of_runs_is_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_folder(tmp_path / "runs" / name, CONFIG, kind="distill", steps=1)
    message = f"{tmp_path / 'runs'} is no run folder, it has 2 runs in it: give one, such as {tmp_path / 'runs' / 'a'}"
    for command in (Info(model=tmp_path / "runs"), Report(run_folder=tmp_path / "runs")):
        with pytest.raises(BadInput) as refused:
            command.run()
        assert str(refused.value) == f"{message}; ipfm compare {tmp_path / 'runs'} takes them all"


def test_a_folder_that_is_neither(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"kind": "distill", "config": 3}')
    with pytest.raises(BadInput, match="holds no run"):
        Info(model=tmp_path).run()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config\.json"):
        Info(model=tmp_path).run()


def test_architectures_have_their_names() -> None:
    known = {name: presets.get(name).family for name in presets.names()}
    families = {"ddpmpp": "ddpm++", "ncsnpp": "ncsn++", "adm": "ADM", "edm2": "EDM2"}
    assert {name: found for name, found in known.items() if "-" in name} == {
        name: families[next(part for part in name.split("-") if part in families)]
        for name in presets.names()
        if "-" in name
    }
    ncsnpp = presets.get("cifar10-ncsnpp-cond")
    assert architecture(ncsnpp) == "ncsn++, 256, 256, 256 channels, 4 blocks a level"
    assert images(ncsnpp) == "3x32x32, 10 classes"
    assert replace(ncsnpp, encoder_type="standard").family == "SongUNet (fourier, standard, standard)"


def test_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"path": Path("a"), "D": float("inf"), "loss": float("nan"), "sigmas": (2.5,), "row": torch.Size((2,))}
    with output(as_json=True) as write:
        print("for people")
        write(values, "text")
        print("more")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"path": "a", "D": "inf", "loss": None, "sigmas": [2.5], "row": [2]}
    assert err == "for people\nmore\n"
    with output(as_json=False) as write:
        print("before")
        write(values, "text")
    assert capsys.readouterr() == ("before\ntext\n", "")
