"""What ends a run before its time: dead and hung processes, signals, full disks. Real processes, real signals."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import launch
import prepared
import pytest
import soak
import torch
from parts import parts
from soak import Group, differences, newest, settings, wait_until

from ipfm.engine.distributed.signals import SIGNALS, StopRequested, catching_signals, check_stop
from ipfm.engine.distributed.world import World
from ipfm.engine.runtime.launcher import lost_process
from ipfm.engine.training.loop import SECONDS_TO_NOTICE

LOST = "digits_ipfm.py: failed: another process of this run has ended or does not answer ("


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return soak.make_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture
def groups() -> Iterator[list[Group]]:
    """Groups to end with the test."""
    started: list[Group] = []
    yield started
    for group in started:
        group.kill()


def run_alone(*arguments: str, **keywords) -> subprocess.CompletedProcess:
    return prepared.run(soak.RECIPE, *arguments, env=launch.environment(), timeout=200, **keywords)


# -- other processes -------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize(("launcher", "victim", "options"), [("deepspeed", 1, {}), ("forked", 0, {"zero": 0})])
def test_a_killed_process_ends_all_with_a_message(tmp_path: Path, teacher, groups, launcher, victim, options) -> None:
    out = tmp_path / "run"
    groups.append(group := Group(settings(teacher, out, 2000, **options), launcher, tmp_path / "log"))
    wait_until(lambda: newest(out) >= 2, group)
    ranks = group.ranks()
    ranks[victim].kill()
    assert soak.ended(ranks, 60)
    codes = group.wait(60)
    assert all(codes) and (launcher == "deepspeed" or codes == [-signal.SIGKILL, 1])
    (line,) = [line for line in group.output().splitlines() if line.startswith(LOST)]
    assert f"the same command continues {out} from its checkpoint step-" in line
    assert "Traceback" not in group.output()


@pytest.mark.distributed
def test_a_hung_process_is_given_up_after_the_timeout(tmp_path: Path, teacher, groups) -> None:
    """Stage 2 reduces gradients in a group of DeepSpeed's own, which has to know the time as well."""
    out = tmp_path / "run"
    arguments = settings(teacher, out, 2000, zero=2)
    groups.append(group := Group(arguments, "forked", tmp_path / "log", IPFM_TIMEOUT="5"))
    wait_until(lambda: newest(out) >= 2, group)
    waiting, hung = group.ranks()
    hung.send_signal(signal.SIGSTOP)
    assert soak.ended([waiting], 60)
    assert group.started[0].wait(1) == 1 and group.started[1].poll() is None
    assert f"{LOST}Timed out waiting 5000ms): the same command continues" in group.output()
    assert "Traceback" not in group.output()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("[x/pair.cc:553] Connection closed by peer [::1]:9. This is"), "Connection closed by peer"),
        (
            torch.distributed.DistNetworkError("timed out while trying to connect to (127.0.0.1, 1). More"),
            "timed out while trying to connect to (127.0.0.1, 1)",
        ),
        (RuntimeError("[x/unbound_buffer.cc:78] Timed out waiting 6000ms for recv"), "Timed out waiting 6000ms"),
        (RuntimeError("Application timeout caused pair closure"), "connection closed after a timeout"),
        (
            torch.distributed.DistBackendError("NCCL error in: x.cpp:1, remote process exited"),
            "NCCL error in: x.cpp:1, remote process exited",
        ),
        (RuntimeError("expected scalar type Float but found Half"), ""),
        (ValueError("Connection closed by peer"), ""),
        (ConnectionResetError("Connection reset by peer"), ""),
    ],
)
def test_errors_that_tell_of_a_lost_process(error: Exception, reason: str) -> None:
    assert lost_process(error) == reason


# -- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory, teacher) -> Path:
    """The folder of a run of two steps, to be copied."""
    out = tmp_path_factory.mktemp("two") / "run"
    done = run_alone(*settings(teacher, out, 2))
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.distributed
@pytest.mark.parametrize("background", parts(["async-checkpoints", "no-async-checkpoints"], ["no-async-checkpoints"]))
def test_a_full_disk_ends_all_processes_and_keeps_the_checkpoint(
    tmp_path: Path, teacher, two_steps, groups, background
) -> None:
    """A limit to the size of files, which the checkpoint of this network exceeds and the logs do not."""
    out = shutil.copytree(two_steps, tmp_path / "run")
    before = soak.final_state(out)
    arguments = [*settings(teacher, out, 2000), f"--{background}"]
    groups.append(group := Group(arguments, "forked", tmp_path / "log", file_size=12 * 1024))
    assert group.wait(120) == [1, 1]
    (line,) = [line for line in group.output().splitlines() if "failed" in line]
    where = f"digits_ipfm.py: failed: the checkpoint {out}/checkpoints/step-0000004 cannot be written ("
    assert line.startswith(where) and "File too large" in line
    assert re.search(rf"\); the last good one is step-0000002; best: step 2, [\d.]+: {out}/generator-best$", line)
    assert "Traceback" not in group.output()
    after = soak.final_state(out)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["latest", "step-0000002"]


# -- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_a_signal_within_an_evaluation_saves_and_stops_and_the_evaluation_is_made_up_for(
    tmp_path: Path, teacher, groups
) -> None:
    """To one of two processes, in an evaluation that would take hours; SIGUSR1 as Slurm sends it."""
    out = tmp_path / "run"
    forever = settings(teacher, out, 3, eval_every=1, eval_images=50_000_000, checkpoint_every=1000)
    groups.append(group := Group(forever, "forked", tmp_path / "log"))
    wait_until(lambda: (out / "metrics.jsonl").exists(), group)
    group.ranks()[1].send_signal(signal.SIGUSR1)
    assert group.wait(60) == [128 + signal.SIGUSR1] * 2
    assert f"digits_ipfm.py: stopped by SIGUSR1, state saved in {out}; the same command continues" in group.output()
    assert newest(out) == 1 and not (out / "samples").exists()
    done = run_alone(*settings(teacher, out, 3, eval_every=1, checkpoint_every=1000))
    assert done.returncode == 0, done.stderr
    assert [p.name for p in sorted((out / "samples").iterdir())] == [f"step-000000{n}.png" for n in (1, 2, 3)]
    assert len((out / "evaluations.jsonl").read_text().splitlines()) == 3
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.distributed
def test_slow_steps_are_stopped_within_seconds(tmp_path: Path, teacher, groups) -> None:
    """Logging is minutes away, at steps of half a second; SIGTERM twice, as launchers send it, to one process."""
    out = tmp_path / "run"
    arguments = settings(teacher, out, 2000, log_every=1000, checkpoint_every=1000)
    slow = launch.ROOT / "tests" / "workers" / "slow_recipe.py"
    groups.append(group := Group(arguments, "forked", tmp_path / "log", script=slow))
    wait_until(lambda: (out / "metrics.jsonl").exists(), group)
    first = group.ranks()[0]
    for _ in range(2):
        first.send_signal(signal.SIGTERM)
    assert group.wait(60 + SECONDS_TO_NOTICE) == [143, 143]
    steps = len((out / "metrics.jsonl").read_text().splitlines())
    assert newest(out) == steps < 1000


class _Gone:
    def __init__(self) -> None:
        self.is_gone = False

    def gone(self) -> bool:
        return self.is_gone


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """Signals do what they do in a terminal, also where the tests were started under nohup or in the background."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {signum: signal.signal(signum, handler) for signum, handler in usual.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("signum", SIGNALS)
def test_signals_are_noted_and_raised_where_it_is_safe(signum: int) -> None:
    alone, before = World(0, 1, torch.device("cpu")), signal.getsignal(signum)
    check_stop(alone)
    with catching_signals(_Gone()) as noted:
        check_stop(alone)
        assert noted.signum == 0
        signal.raise_signal(signum)
        assert noted.signum == signum
        with pytest.raises(StopRequested) as asked:
            check_stop(alone)
        assert asked.value.signum == signum
        if signum == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signum)
        else:
            signal.raise_signal(signum)
    assert signal.getsignal(signum) == before
    check_stop(alone)


def test_the_end_of_the_launcher_is_like_a_signal() -> None:
    launcher = _Gone()
    with catching_signals(launcher) as noted:
        assert noted.signum == 0
        launcher.is_gone = True
        assert noted.signum == signal.SIGTERM


# -- everything ------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_a_small_soak(tmp_path: Path, teacher) -> None:
    """A kill of all processes within the writing of a checkpoint; `make soak` has fifty kills of every kind."""
    out, whole = tmp_path / "killed", tmp_path / "whole"
    kills = soak.Soak(settings(teacher, out, 12), out, seed=1, log=tmp_path / "log")
    assert kills.kill_once("forked", "all", "writing")
    assert kills.counts["kills"] == 1 and newest(out) < 12
    soak.complete(kills.arguments, kills.log, launcher="forked")
    soak.complete(settings(teacher, whole, 12, checkpoint_every=1000), tmp_path / "log", launcher="forked")
    assert differences(whole, out) == []


# -- one process alone -----------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_what_fails_on_one_of_two_processes_stops_or_warns_both(tmp_path: Path) -> None:
    """A file that it cannot read saves the state; features that it cannot take cost the evaluation alone."""
    launch.run_workers("failing_rank.py", 2, {"out": str(tmp_path)}, timeout=60)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    run = tmp_path / "run"
    assert {**first, "alone": ""} == {**second, "alone": ""} == {
        "alone": "",
        "stopped": "/data/7.png: Input/output error; the state is saved: the same command continues "
        f"{run} from its checkpoint step-0000003",
        "finished": "",
    }  # fmt: skip
    # What no process but the one knows ends the others too, which lose it.
    assert re.fullmatch(
        r"process 1 of 2: TypeError: a defect of one \(.*traceback-1\.txt\): the same command continues .*run from its "
        r"last checkpoint", second["alone"]
    )  # fmt: skip
    assert "has ended or does not answer" in first["alone"] and (run / "traceback-1.txt").exists()
    assert newest(run) == 4 and not (run / "evaluations.jsonl").exists()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
