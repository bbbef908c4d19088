"""The digits recipe as users run it: processes, launchers, kills, bad input. Small settings, real runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch
import numpy as np
import prepared
import pytest
import soak
import torch
from parts import parts
from PIL import Image
from safetensors.torch import load_file

from ipfm.engine.evaluation.results import read_results
from ipfm.engine.runtime.commandline import BadInput
from ipfm.models import load_model, load_teacher, read_config
from ipfm.recipes import digits_ipfm

RECIPE = str(launch.ROOT / "recipes" / "digits_ipfm.py")
DEEPSPEED = str(launch.BIN / "deepspeed")
# 8 steps of the teacher and 12 of the distillation, a checkpoint every 4.
SHORT = [
    "--teacher-steps", "8", "--max-steps", "12", "--batch", "32", "--checkpoint-every", "4", "--log-every", "4",
    "--eval-every", "6", "--eval-images", "64", "--heun-steps", "2", "--eps", "1e-3",
]  # fmt: skip
# No simulation of each: runs that choose are those of `test_the_default_start_is_deepspeed` and, thoroughly, of
# `test_a_run_that_chooses_its_layout_goes_on_with_it`.
LAYOUT = [word for name, value in soak.LAYOUT.items() for word in (f"--{name}", value)]
WHOLE = [*SHORT, *LAYOUT, "--zero", "0"]


def run(*arguments: str, launcher: tuple[str, ...] = (), check: bool = True, timeout: float = 300):
    """Run the recipe, and return the finished process, its output as text; it or its launcher is forked if it can be.

    A launcher starts its own processes as ever.
    """
    if launcher[:1] == (DEEPSPEED,):
        done = prepared.run(*launcher, RECIPE, *arguments, env=launch.environment(), timeout=timeout)
    elif launcher:
        done = subprocess.run(
            [*launcher, RECIPE, *arguments], capture_output=True, text=True, env=launch.environment(), timeout=timeout
        )
    else:
        done = prepared.run(RECIPE, *arguments, env=launch.environment(), timeout=timeout)
    assert not check or done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a finished run leaves: the export and both networks of the last checkpoint."""
    newest = max((folder / "checkpoints").glob("step-*"))
    files = [folder / "generator" / "model.safetensors", *sorted(newest.glob("*.safetensors"))]
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def equal(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """A short run from nothing, in one process, which imports what it needs itself."""
    out = tmp_path_factory.mktemp("run") / "digits"
    return out, run("--out", str(out), *WHOLE, launcher=(sys.executable,))


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained teacher of few weights."""
    return str(soak.make_teacher(tmp_path_factory.mktemp("thin") / "teacher"))


@pytest.mark.distributed
def test_leaves_the_run_folder_of_the_design(finished) -> None:
    out, done = finished
    for name in ("config.json", "environment.jsonl", "metrics.jsonl", "evaluations.jsonl", "results.json",
                 "results.txt", "convergence.png",
                 "generator/config.json", "generator/model.safetensors", "teacher/model/model.safetensors",
                 "samples/step-0000006.png", "samples/step-0000012.png", "checkpoints/latest"):  # fmt: skip
        assert (out / name).is_file(), name
    assert list(out.glob("events.out.tfevents.*")) and not (out / "tensorboard").exists()
    assert (out / "checkpoints" / "latest").read_text().strip() == "step-0000012"
    assert sorted(p.name for p in (out / "checkpoints").glob("step-*")) == ["step-0000008", "step-0000012"]
    assert not [p for p in out.rglob("*") if p.name.startswith(".")]
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(12))
    assert {"student_loss", "generator_loss", "student_bad", "generator_bad"} < lines[0].keys()
    assert all(line["student_bad"] == line["generator_bad"] == 0 for line in lines)
    with Image.open(out / "samples" / "step-0000012.png") as picture:
        assert np.asarray(picture).std() > 10
    # The table: the teacher at 2 * 2 - 1 evaluations, the generator at one.
    rows = json.loads((out / "results.json").read_text())
    assert [(row["label"], row["nfe"], row["images"]) for row in rows] == [("teacher", 3, 64), ("generator", 1, 64)]
    assert (out / "results.txt").read_text().strip() in done.stdout


@pytest.mark.distributed
def test_exports_a_generator_that_knows_its_D_and_levels(finished) -> None:
    out, _ = finished
    net, facts = load_model(out / "generator"), read_config(out / "generator").extra
    assert (net.D, facts["D"], facts["sigmas"], facts["task"]) == (128.0, 128.0, [2.5], "generator")
    teacher = load_teacher(out / "teacher" / "model")
    assert teacher.config.D == 128.0
    checkpoint = load_file(out / "checkpoints" / "step-0000012" / "generator.safetensors")
    for name, p in net.named_parameters():
        assert torch.equal(p, checkpoint[f"ema/{name}"]), "the export is the average"
    assert any(not torch.equal(p, dict(teacher.named_parameters())[name]) for name, p in net.named_parameters())


@pytest.mark.distributed
def test_same_command_again_only_reads(tmp_path: Path, finished) -> None:
    out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in (out / "checkpoints").rglob("*")} | {
        out / "metrics.jsonl": (out / "metrics.jsonl").stat().st_mtime_ns
    }
    before |= {out / "config.json": (out / "config.json").stat().st_mtime_ns}
    again = run("--out", str(out), *WHOLE)
    assert (out / "results.txt").read_text() in again.stdout
    assert f"{out} is finished: this is its result after 12 steps" in again.stderr
    assert before == {p: p.stat().st_mtime_ns for p in before}
    shutil.copytree(out, tmp_path / "longer")
    longer = run("--out", str(tmp_path / "longer"), *WHOLE[:3], "14", *WHOLE[4:])
    assert [line["step"] for line in metrics(tmp_path / "longer")] == list(range(14))
    assert "continuing at step 12" in longer.stderr


@pytest.mark.distributed
@pytest.mark.parametrize("lost", ["", "teacher", "teacher/checkpoints", "samples", "comparison.png"])
def test_a_finished_run_is_shown_whatever_else_is_gone(
    tmp_path: Path, finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    """On a disk that takes nothing, too: no process group is made, and nothing is trained, measured or written."""
    shutil.copytree(finished[0], out := tmp_path / "run")
    if lost:
        shutil.rmtree(out / lost) if (out / lost).is_dir() else (out / lost).unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr("ipfm.engine.experiments.recipe.start_world", None)
    monkeypatch.setattr(os, "access", lambda *_: False)
    digits_ipfm.main(["--out", str(out), *WHOLE])
    said = capsys.readouterr()
    assert (out / "results.txt").read_text() in said.out and f"generator: {out / 'generator'}" in said.out
    expected = [f"{out} is finished: this is its result after 12 steps, nothing is trained or measured again"]
    if lost == "teacher":
        expected.append(f"the teacher that it was distilled from is not in {out}")
    assert said.err.splitlines() == expected
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    # A longer one is none that could be shown.
    with pytest.raises(BadInput, match="cannot be written: choose another --out"):
        digits_ipfm.main(["--out", str(out), *WHOLE, "--max-steps", "14"])


@pytest.mark.distributed
@pytest.mark.parametrize("damaged", ["results.json", "generator/model.safetensors"])
def test_what_a_finished_run_lacks_of_its_result_is_made_again(tmp_path: Path, finished, damaged: str) -> None:
    """A table that cannot be read is measured, weights that are gone are stored again from the checkpoint."""
    shutil.copytree(finished[0], out := tmp_path / "run")
    (out / damaged).write_text("{") if damaged == "results.json" else (out / damaged).unlink()
    done = run("--out", str(out), *WHOLE)
    assert "nothing is trained or measured again" not in done.stderr
    assert (out / "results.txt").read_text() in done.stdout and len(read_results(out)) == 2
    assert equal(out, finished[0])


@pytest.mark.distributed
def test_another_teacher_in_the_folder_of_a_finished_run_is_none_of_its(tmp_path: Path, finished, thin: str) -> None:
    shutil.copytree(finished[0], out := tmp_path / "run")
    shutil.rmtree(out / "teacher" / "model")
    shutil.copytree(thin, out / "teacher" / "model")
    with pytest.raises(BadInput, match=r"belongs to another configuration \(teacher is .* there, .* here\)"):
        digits_ipfm.main(["--out", str(out), *WHOLE])


@pytest.mark.distributed
def test_two_processes_train_on_the_same_samples(tmp_path: Path, thin: str) -> None:
    """Two against one: the losses agree to 1e-4, metrics at the end to 1e-3."""
    settings = ["--teacher", thin, "--max-steps", "12", "--batch", "32", "--eps", "1e-3", "--eval-images", "64",
                "--heun-steps", "1", "--eval-every", "0", "--metrics", "kid", "fid", "pr", *LAYOUT]  # fmt: skip
    run("--out", str(tmp_path / "one"), *settings, "--zero", "0")
    soak.complete(["--out", str(tmp_path / "two"), *settings, "--zero", "2"], tmp_path / "log", launcher="forked")
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 12
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
    tables = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    for a, b in zip(*tables, strict=True):
        for name in ("frechet", "kid", "kid_std", "precision", "recall"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), (a["label"], name)


@pytest.mark.distributed
def test_killed_runs_continue_bit_for_bit(tmp_path: Path, finished) -> None:
    """SIGKILL in the teacher's training and in the distillation; the same command ends with the same weights."""
    whole, out = finished[0], tmp_path / "killed"
    for milestone in ("teacher/checkpoints/step-0000008", "checkpoints/step-0000008"):
        _kill_when(out / milestone, tmp_path / "log", "--out", str(out), *WHOLE)
    last = run("--out", str(out), *WHOLE)
    assert "continuing at step" in last.stderr
    assert equal(out, whole)
    assert metrics(out) == metrics(whole)
    assert metrics(out / "teacher") == metrics(whole / "teacher")


@pytest.mark.thorough
@pytest.mark.distributed
def test_a_run_that_chooses_its_layout_goes_on_with_it(tmp_path: Path, thin: str) -> None:
    """Killed in the distillation, it ends as one that is not; given once more, it is only read."""
    folders = [tmp_path / name for name in ("whole", "killed")]
    settings = [["--teacher", thin, "--out", str(folder), *SHORT] for folder in folders]
    run(*settings[0])
    _kill_when(folders[1] / "checkpoints" / "step-0000004", tmp_path / "log", *settings[1])
    assert "continuing at step" in run(*settings[1]).stderr
    assert equal(*folders) and metrics(folders[0]) == metrics(folders[1])
    recorded = (folders[1] / "config.json").read_bytes()
    assert "nothing is trained or measured again" in run(*settings[1]).stderr
    assert (folders[1] / "config.json").read_bytes() == recorded


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("signum", "code"), parts([(signal.SIGTERM, 143), (signal.SIGINT, 130)], [(signal.SIGTERM, 143)])
)
def test_signals_save_and_exit(tmp_path: Path, thin: str, signum: int, code: int) -> None:
    settings = ["--teacher", thin, "--out", str(tmp_path / "run"), *SHORT, *LAYOUT, "--zero", "0"]
    log = tmp_path / "log"
    process = _start(log, *settings, "--checkpoint-every", "100", "--max-steps", "1000")
    _wait_for(tmp_path / "run" / "metrics.jsonl", process, log)
    process.send_signal(signum)
    process.wait(timeout=120)
    stderr = log.read_text()
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    steps = len(metrics(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == f"step-{steps:07d}"


@pytest.mark.distributed
def test_a_killed_runner_does_not_leave_two_runs_in_one_folder(tmp_path: Path, thin: str) -> None:
    """SIGKILL to the program `deepspeed` alone: its processes notice, save and leave; two more go on."""
    settings = ["--teacher", thin, "--out", str(tmp_path / "run"), *SHORT, *LAYOUT, "--zero", "2"]
    settings = [*settings, "--checkpoint-every", "100", "--log-every", "2", "--eval-every", "0"]
    with open(os.devnull, "wb") as nowhere:
        runner = prepared.start(
            DEEPSPEED, "--num_accelerators", "2", RECIPE, *settings, "--max-steps", "2000", env=launch.environment(),
            stdout=nowhere, stderr=nowhere,
        )  # fmt: skip
    _wait_for(tmp_path / "run" / "metrics.jsonl", runner)
    runner.kill()
    runner.wait()
    # Forked processes are there at once, while the others are still leaving.
    soak.complete([*settings, "--max-steps", "12"], tmp_path / "log", timeout=300, launcher="forked")
    # The processes of the first start had gone on to some step; the second ends there, or at its own 12.
    steps = len(metrics(tmp_path / "run"))
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(steps))
    newest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    assert newest == f"step-{max(steps, 12):07d}"


@pytest.mark.distributed
def test_the_default_start_is_deepspeed(tmp_path: Path, thin: str) -> None:
    """`deepspeed recipes/digits_ipfm.py` without a number of processes; tests/test_package.py has one of bad input."""
    few = ["--max-steps", "4", "--eval-every", "0", "--eval-images", "16"]
    done = run("--teacher", thin, "--out", str(tmp_path / "run"), *SHORT, *few, launcher=(DEEPSPEED,))
    assert "generator" in done.stdout


def _start(log: Path, *arguments: str) -> prepared.Program | subprocess.Popen:
    """The recipe as a forked program, whose messages go to `log`."""
    with open(log, "wb") as stderr, open(os.devnull, "wb") as stdout:
        return prepared.start(RECIPE, *arguments, env=launch.environment(), stdout=stdout, stderr=stderr)


def _wait_for(
    path: Path, process: prepared.Program | subprocess.Popen, log: Path | None = None, timeout: float = 200
) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        if process.poll() is not None:
            said = log.read_text() if log else ""
            raise AssertionError(f"ended with {process.returncode} before {path}:\n{said}")
        assert time.monotonic() < deadline, f"no {path} after {timeout} s"
        time.sleep(0.02)


def _kill_when(path: Path, log: Path, *arguments: str) -> None:
    process = _start(log, *arguments)
    try:
        _wait_for(path, process, log)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
