"""The state of a run is decided in one place: what `ipfm info` and `ipfm report` say of the same folder."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ipfm.engine.commands.info import Info
from ipfm.engine.commands.report.command import Report
from ipfm.engine.evaluation.results import EvaluationHistory
from ipfm.engine.experiments.ablation_runs import Run
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.runtime.commandline import BadInput
from ipfm.engine.runtime.files import StepLog
from ipfm.engine.training.checkpoint import Draft
from ipfm.engine.training.run_folder import check_run_folder, open_run_folder
from ipfm.engine.training.run_state import FAILED_FILE, read_run
from ipfm.models import EDMPrecond, save_model
from ipfm.models.facts import GeneratorFacts

NET = EDMPrecond(img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, D=128.0)


def make(folder: Path, *, steps: int, total: int, exported: int | None = None) -> None:
    """A run of `total` steps as a process leaves it after `steps` of them, its network exported after `exported`.

    This process uses the folder from now on.
    """
    config = DistillConfig(batch=8, max_steps=total, D=128.0)
    open_run_folder(folder, check_run_folder(folder, "distill", config, {}), write=True)
    log = StepLog(folder / "metrics.jsonl", None)
    for step in range(steps):
        log.append(step, {"student_loss": 2.0, "generator_loss": math.nan})
    log.flush()
    Draft(folder / "checkpoints", steps).finish()
    EvaluationHistory(folder, 0).add(steps, 3.5, images=64, seconds=1.0)
    if exported is not None:
        facts = GeneratorFacts(sigmas=(2.5,), D=128.0, optimizer_steps=exported, settings=config.to_json())
        save_model(NET, folder / "generator", extra=facts.to_json())


def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What info and report say of it in JSON."""
    capsys.readouterr()
    Info(model=folder, json=True).run()
    info = json.loads(capsys.readouterr().out)
    Report(run_folder=folder, json=True).run()
    return info, json.loads(capsys.readouterr().out)


def states(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    info, report = said(folder, capsys)
    assert (info["steps_done"], info["steps_total"]) == (report["steps_done"], report["total_steps"])
    assert (info["distance"], info["results"]) == (report["evaluations"][-1]["frechet"], report["results"])
    return info["state"], report["state"]


def test_a_lengthened_run_that_was_killed_before_its_export_is_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last checkpoint is there, and the network of the run's earlier end."""
    make(tmp_path / "held", steps=400, total=400, exported=200)
    shutil.copytree(tmp_path / "held", tmp_path / "run")
    assert states(tmp_path / "run", capsys) == ("stopped", "stopped")
    Info(model=tmp_path / "run").run()
    assert "stopped; the same command continues" in capsys.readouterr().out
    _, report = said(tmp_path / "run", capsys)
    assert "stopped before its end, at 400 steps" in report["summary"]
    save_model(NET, tmp_path / "run" / "generator", extra=GeneratorFacts(optimizer_steps=400).to_json())
    assert states(tmp_path / "run", capsys) == ("finished", "finished")


def test_an_ablation_exports_a_lengthened_run_too(tmp_path: Path) -> None:
    """It was killed after its last evaluation, and left the network of the earlier end."""
    make(tmp_path / "a", steps=8, total=8, exported=4)
    run = Run("alpha1", 0, DistillConfig(batch=8, max_steps=8, D=128.0), 1, tmp_path / "a")
    assert run.state == "measured up to step 8"
    save_model(NET, tmp_path / "a" / "generator", extra=GeneratorFacts(optimizer_steps=8).to_json())
    assert run.state == "finished"


def failed(folder: Path) -> None:
    (folder / FAILED_FILE).write_text('{"step": 3, "reason": "not finite"}')


def without_end(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "generator_lo')


def without_steps(folder: Path) -> None:
    save_model(NET, folder / "generator", extra=GeneratorFacts(others={"optimizer_steps": "many"}).to_json())


def damaged_network(folder: Path) -> None:
    (folder / "generator" / "config.json").write_text("[]")


def no_length(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    record["config"] |= {"max_steps": None, "kimg": "many"}
    (folder / "config.json").write_text(json.dumps(record))


CASES: dict[str, tuple[dict[str, Any], Callable[[Path], object] | None, str]] = {
    "stopped": ({"steps": 3, "total": 8}, None, "stopped"),
    "stopped before the export": ({"steps": 8, "total": 8}, None, "stopped"),
    "finished": ({"steps": 8, "total": 8, "exported": 8}, None, "finished"),
    "shortened": ({"steps": 8, "total": 6, "exported": 8}, None, "finished"),
    "lengthened": ({"steps": 8, "total": 12, "exported": 8}, None, "stopped"),
    "lengthened and at its end": ({"steps": 12, "total": 12, "exported": 8}, None, "stopped"),
    "diverged": ({"steps": 3, "total": 8}, failed, "diverged"),
    "cut log": ({"steps": 8, "total": 8, "exported": 8}, without_end, "finished"),
    "network that does not say its steps": ({"steps": 8, "total": 8, "exported": 8}, without_steps, "finished"),
    "the same, stopped": ({"steps": 3, "total": 8, "exported": 2}, without_steps, "stopped"),
    "damaged network": ({"steps": 8, "total": 8, "exported": 8}, damaged_network, "stopped"),
    "unknown length": ({"steps": 8, "total": 8, "exported": 8}, no_length, "finished"),
}


@pytest.mark.parametrize("case", CASES)
def test_info_and_report_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    """Running while a process has the folder, then as it was left; in the words of each command."""
    made, change, state = CASES[case]
    make(tmp_path / "held", **made)
    if change is not None:
        change(tmp_path / "held")
    if state != "diverged":
        assert states(tmp_path / "held", capsys) == ("running", "going on")
    shutil.copytree(tmp_path / "held", tmp_path / "run")
    assert read_run(tmp_path / "run").state == state
    assert states(tmp_path / "run", capsys) == (state, state)


def test_what_is_damaged_is_said_by_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Info says so, a line each, and goes on; what the logs no longer say is not known to either."""
    make(tmp_path / "held", steps=3, total=8)
    shutil.copytree(tmp_path / "held", tmp_path / "run")
    (tmp_path / "run" / "evaluations.jsonl").unlink()
    (tmp_path / "run" / "evaluations.jsonl").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('no json\n{"step": 1, "student_loss": "x"}\n')
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    info, report = said(tmp_path / "run", capsys)
    assert set(info["remarks"]) == {
        f"{tmp_path}/run/metrics.jsonl: 1 unreadable lines were left out",
        f"{tmp_path}/run/evaluations.jsonl cannot be read: Is a directory",
    }
    Info(model=tmp_path / "run").run()
    assert capsys.readouterr().err.splitlines() == [f"ipfm: note: {remark}" for remark in info["remarks"]]
    assert (info["state"], info["steps_done"]) == (report["state"], report["steps_done"]) == ("stopped", 2)
    assert info["distances"] == report["evaluations"] == []
    assert "Evaluations.jsonl cannot be read: Is a directory." in report["missing"]


@pytest.mark.parametrize("text", ['{"kind": ["distill"]}', '{"kind": {}}', '{"kind"', "[]", "{}", None])
def test_a_run_whose_config_was_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None) -> None:
    """The report shows what there is; info names it, or says what else the folder holds."""
    make(tmp_path / "held", steps=3, total=8, exported=2)
    shutil.copytree(tmp_path / "held", tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.unlink() if text is None else config.write_text(text)
    with pytest.raises(BadInput) as refused:
        Info(model=tmp_path / "run").run()
    report = "is the folder of a run, but its config.json is missing or damaged: ipfm report shows what there is"
    assert report in str(refused.value) or "holds the model folder 'generator'" in str(refused.value)
    assert (report in str(refused.value)) == (text in ('{"kind"', "[]", None))
    Report(run_folder=tmp_path / "run", json=True).run()
    missing = "is missing" if text is None else "cannot be read as a run's settings"
    assert f"Config.json {missing}." in json.loads(capsys.readouterr().out)["missing"]
