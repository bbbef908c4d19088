"""`ipfm bench --memory`: networks, the table and its promises, and a whole run on a small network."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import launch
import prepared
import pytest

from ipfm.engine.commands.bench import memory, memory_step
from ipfm.engine.commands.bench.memory import bench_network, report, run_memory
from ipfm.engine.commands.bench.memory_step import StepRow
from ipfm.engine.commands.main import _main
from ipfm.engine.memory import plan_memory, plan_teacher_training
from ipfm.engine.runtime.commandline import run_command
from ipfm.models import presets

GIGA = 2**30


def row(step: str, live: float, rss: float, predicted: float | None = None) -> StepRow:
    state = GIGA // 10
    live, rss, predicted = (round(value * GIGA) for value in (live, rss, live if predicted is None else predicted))
    return StepRow(step, live, rss, predicted, state, live - state, "generator: backward", 1.0)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are forked, and not started."""

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", memory_step.__name__]
        return prepared.run(memory_step.__file__, *command[3:], env=env)

    monkeypatch.setattr(memory, "subprocess", types.SimpleNamespace(run=run))
    for name, value in launch.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def ipfm(*arguments: object) -> None:
    run_command("ipfm", _main, [str(argument) for argument in arguments])


def test_networks():
    for family, name in presets.FAMILIES.items():
        published = presets.get(name)
        assert bench_network(family) == bench_network(name) == replace(published, dropout=0.0)
        assert bench_network(family, 32) == replace(published, dropout=0.0, model_channels=32)
    assert {bench_network(family).img_resolution for family in ("ncsnpp", "ddpmpp")} == {32}
    assert bench_network("adm").img_resolution == 64


@pytest.mark.parametrize(
    ("model", "channels", "message"),
    [
        (
            "unet",
            None,
            r"network preset 'unet' is unknown; possible: edm2.*, cifar10-ddpmpp, .*digits, ncsnpp, ddpmpp, adm, edm2",
        ),
        ("ncsnpp", 0, r"ncsnpp cannot have 0 channels: model_channels must be .* at least 1, got 0"),
        ("adm", 3, r"adm cannot have 3 channels: .*3.*"),
        ("digits", -4, r"digits cannot have -4 channels: .*"),
    ],
)
def test_networks_that_are_not(model: str, channels: int | None, message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        bench_network(model, channels)


def test_a_report_of_kept_promises():
    text = report([row("teacher", 2, 2.1), row("joint", 5, 5.2), row("phased", 2.09, 2.2, 2.2)], "a network")
    lines = text.splitlines()
    assert lines[0] == "Memory of a network" and "warning" not in text
    (phased,) = [line for line in lines if line.startswith("| phased |")]
    assert phased.split(" | ")[1:] == ["2.09 GiB", "2.20 GiB", "2.20 GiB", "-5.0 %", "1.045", "1.048 |"]


@pytest.mark.parametrize(
    ("phased", "words"),
    [
        (row("phased", 2.2, 2.1), ["1.100 times the live memory"]),
        (row("phased", 2.0, 2.3), ["1.095 times the resident memory"]),
        (row("phased", 2.0, 2.1, 1.7), [r"\+17.6 % of what was predicted"]),
        (row("phased", 2.0, 2.1, 2.5), ["-20.0 % of what was predicted"]),
        (row("phased", 3.0, 3.3, 2.5), [r"\+20.0 %", "1.500 times the live", "1.571 times the resident"]),
    ],
)
def test_a_report_of_broken_promises(phased: StepRow, words: list[str]):
    rows = [row("teacher", 2, 2.1), row("joint", 9, 9), phased]
    warnings = [line for line in report(rows, "a network").splitlines() if line.startswith("warning: phased: ")]
    assert len(warnings) == len(words)
    assert all(re.search(word, line) for word, line in zip(words, warnings, strict=True))


def test_the_joint_form_promises_no_ratio_but_a_prediction():
    text = report([row("teacher", 2, 2), row("joint", 6, 6, 5), row("phased", 2, 2)], "a network")
    (warning,) = [line for line in text.splitlines() if line.startswith("warning")]
    assert warning.startswith("warning: joint: measured +20.0 %")


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Each row in its own process, the numbers as the plan says; a group's variables do not reach the processes."""
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("WORLD_SIZE", "8")
    # The first process alone prints.
    monkeypatch.setattr("ipfm.engine.runtime.launcher.is_first_process", lambda: True)
    batch = 8
    ipfm("bench", "--memory", "--model", "digits", "--batch", batch, "--quick", "--out", tmp_path)
    printed = capsys.readouterr().out
    with (tmp_path / "memory.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[:4] == ["step", "live_bytes", "rss_bytes", "predicted_bytes"]
    rows = {line["step"]: line for line in table}
    assert list(rows) == ["teacher", "joint", "phased"]
    network = bench_network("digits")
    plans = {
        "teacher": plan_teacher_training(network, micro_batch=batch),
        **{kind: plan_memory(network, micro_batch=batch, backward=kind) for kind in ("joint", "phased")},
    }
    for kind, plan in plans.items():
        assert int(rows[kind]["predicted_bytes"]) == plan.peak
        assert int(rows[kind]["live_bytes"]) == pytest.approx(plan.peak, rel=0.1)
        assert int(rows[kind]["state_bytes"]) == pytest.approx(plan.state, rel=0.1)
        assert int(rows[kind]["state_bytes"]) + int(rows[kind]["activation_bytes"]) == int(rows[kind]["live_bytes"])
        assert int(rows[kind]["rss_bytes"]) > 0.5 * plan.peak
        assert (tmp_path / f"timeline-{kind}.png").read_bytes().startswith(b"\x89PNG")
        assert f"| {kind} |" in printed
    assert int(rows["phased"]["live_bytes"]) < int(rows["joint"]["live_bytes"])


@pytest.mark.usefixtures("forked")
def test_a_row_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IPFM_TIMEOUT", "soon")
    with pytest.raises(
        RuntimeError, match=r"^the step teacher ended with 1: ValueError: IPFM_TIMEOUT must be a number"
    ):
        run_memory(tmp_path, bench_network("digits"), batch=1, quick=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "--metrics"], "metrics and memory exclude each other: give one of them"),
        (["--memory", "--offline"], "offline and memory exclude each other: give one of them"),
        (["--memory", "--batch", "0"], "batch must be an integer >= 1, got 0"),
        (["--memory", "--batch", "10" + "0" * 12], "of the host's memory, of which "),
        (["--memory", "--model", "vgg"], "network preset 'vgg' is unknown; possible: edm2-img512-SIZE (xs, "),
        (["--memory", "--channels", "3"], "ncsnpp cannot have 3 channels"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        ipfm("bench", *arguments, "--out", tmp_path / "out")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("ipfm: error: ") and message in line
    assert not (tmp_path / "out").exists()
