"""The lock on a run folder, and noticing that the launcher is gone."""

from __future__ import annotations

import ast
import errno
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import launch
import pytest

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.main import _main
from ipfm.engine.distributed.world import start_world
from ipfm.engine.runtime import launcher
from ipfm.engine.runtime.commandline import run_command
from ipfm.engine.runtime.launcher import Launcher
from ipfm.engine.training.run_folder import lock_folder
from ipfm.models import build_network, presets

HOLDER = """
import sys, time
from pathlib import Path
from ipfm.engine.training.run_folder import lock_folder
lock_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


def _hold(folder: Path) -> subprocess.Popen:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], env=launch.environment(), stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_folder_in_use_is_refused_and_names_its_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = _hold(tmp_path)
    try:
        with pytest.raises(ValueError, match=f"in use by process {holder.pid}: stop it, or choose another --out"):
            lock_folder(tmp_path, patience=0.5)
    finally:
        holder.kill()
        holder.wait()
    assert "waiting for it to stop" in capsys.readouterr().err
    # A killed process leaves no lock behind; the same process may take it twice.
    lock_folder(tmp_path, patience=5)
    lock_folder(tmp_path, patience=0)
    assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"


def test_a_process_that_ends_says_nothing_of_its_lock(tmp_path: Path) -> None:
    script = HOLDER.replace("time.sleep(100)", "")
    words = [sys.executable, "-W", "always::ResourceWarning", "-c", script, str(tmp_path)]
    done = subprocess.run(words, env=launch.environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "held\n") and "run.lock" not in done.stderr


def test_a_lock_that_cannot_be_noted_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk is full, say: a later start in this process takes it anew."""
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
        with pytest.raises(OSError, match="no space"):
            lock_folder(tmp_path, patience=0)
    holder = _hold(tmp_path)  # another one can have it
    holder.kill()
    holder.wait()


def test_a_start_waits_for_processes_that_are_leaving(tmp_path: Path) -> None:
    holder = _hold(tmp_path)
    started = time.monotonic()
    waiter = _later(1.0, holder)
    lock_folder(tmp_path, patience=60)
    assert 0.5 < time.monotonic() - started < 30
    waiter.wait()
    holder.wait()


def _later(seconds: float, victim: subprocess.Popen) -> subprocess.Popen:
    return subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -9 {victim.pid}"])


def test_a_process_started_by_hand_has_no_launcher() -> None:
    assert not Launcher(launched=False).gone()


def test_a_dead_launcher_is_noticed(tmp_path: Path) -> None:
    """parent -> child; the parent is killed and the child says so."""
    child = textwrap.dedent("""
        import sys, time
        from ipfm.engine.runtime.launcher import Launcher
        launcher = Launcher(launched=True)
        assert not launcher.gone()
        open(sys.argv[1], "w").write("ready")
        for _ in range(600):
            if launcher.gone():
                open(sys.argv[1], "w").write("gone")
                break
            time.sleep(0.1)
    """)
    (tmp_path / "child.py").write_text(child)
    report = tmp_path / "report"
    parent = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])",
         str(tmp_path / "child.py"), str(report)], env=launch.environment(),
    )  # fmt: skip

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 60
        while not (report.exists() and report.read_text() == text):
            assert time.monotonic() < deadline, f"never {text}"
            time.sleep(0.05)

    wait_for("ready")
    parent.kill()
    parent.wait()
    wait_for("gone")


WHOLE = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the environment of a process that torchrun has started, but for what is given; None leaves it out."""

    def set_to(**changes: str | None) -> None:
        for name in launcher.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in (WHOLE | changes).items():
            if value is not None:
                monkeypatch.setenv(name, value)

    return set_to


ALONE = dict.fromkeys(WHOLE)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        (ALONE, None),
        (ALONE | {"WORLD_SIZE": "1"}, None),
        (ALONE | {"LOCAL_RANK": "1"}, None),
        (ALONE | {"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}, None),
        (
            ALONE | {"RANK": "1"},
            "the environment has RANK of a launcher but no WORLD_SIZE, MASTER_ADDR, MASTER_PORT: "
            "unset RANK for one process, or start by deepspeed or torchrun",
        ),
        (
            ALONE | {"WORLD_SIZE": "4"},
            "the environment has WORLD_SIZE of a launcher but no RANK, MASTER_ADDR, MASTER_PORT: "
            "unset WORLD_SIZE for one process, or start by deepspeed or torchrun",
        ),
        (
            {"MASTER_ADDR": ""},
            "the environment has RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_PORT of a launcher but no "
            "MASTER_ADDR: unset RANK and LOCAL_RANK and WORLD_SIZE and LOCAL_WORLD_SIZE and MASTER_PORT for one "
            "process, or start by deepspeed or torchrun",
        ),
        ({"RANK": ""}, "RANK must be a whole number >= 0, got '': unset it, or start by a launcher"),
        ({"RANK": "one"}, "RANK must be a whole number >= 0, got 'one': unset it, or start by a launcher"),
        ({"RANK": "-1"}, "RANK must be a whole number >= 0, got '-1': unset it, or start by a launcher"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number >= 1, got '0': unset it, or start by a launcher"),
        ({"LOCAL_SIZE": "2.0"}, "LOCAL_SIZE must be a whole number >= 1, got '2.0': unset it, or start by a launcher"),
        ({"RANK": "8"}, "RANK must be less than WORLD_SIZE, got 8 and 8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK must be less than LOCAL_SIZE or LOCAL_WORLD_SIZE, got 4 and 4"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT must be a whole number from 1 to 65535, got '70000'"),
    ],
)  # fmt: skip
def test_leftovers_of_a_launcher(
    launched: Callable[..., None], changes: dict[str, str | None], message: str | None
) -> None:
    launched(**changes)
    if message is None:
        launcher.check_launch()
        assert launcher.is_first_process() is ("RANK" not in os.environ)
        return
    with pytest.raises(ValueError) as error:
        launcher.check_launch()
    assert str(error.value) == message
    # No process of the run would say it otherwise.
    assert launcher.is_first_process()


def test_a_host_that_nobody_knows(launched: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    launched(MASTER_ADDR="node7")
    with pytest.raises(
        ValueError, match=r"^MASTER_ADDR must be a host that can be found, got 'node7' \(.*not known\)$"
    ):
        launcher.check_launch()
    launched(**ALONE)
    launcher.check_launch()


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--version"], 0, ""),
        (["--help"], 0, ""),
        (["sampel"], 2, "ipfm: error: "),
        (["info", "nowhere"], 2, "ipfm: error: nowhere does not exist"),
        (
            ["evaluate", "a", "--reference", "b", "--features", "pixels"],
            2,
            "ipfm: error: the environment has RANK of a",
        ),
    ],
)
def test_commands_of_one_process_always_speak(
    launched: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    code: int,
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    launched(**(ALONE | {"RANK": "1"}))
    with pytest.raises(SystemExit) as stop:
        run_command("ipfm", _main, words)
    shown = capsys.readouterr()
    assert (stop.value.code or 0) == code
    assert shown.err.startswith(line) and shown.err.count("\n") == (code != 0)
    assert bool(shown.out) == (code == 0)


def test_what_a_launcher_says_is_read_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both launchers; elsewhere a variable of theirs is set at most."""
    for name in launcher.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not launcher.is_launched() and launcher.is_first_process()
    assert (launcher.launched_rank(), launcher.local_rank(), launcher.launched_processes()) == (0, 0, 1)
    assert (launcher.local_processes(), launcher.local_processes(3)) == (1, 3)
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert launcher.is_launched() and not launcher.is_first_process()
    assert (launcher.launched_rank(), launcher.local_rank(), launcher.launched_processes()) == (5, 1, 8)
    assert launcher.local_processes(8) == 4
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert launcher.local_processes() == 2

    engine = launch.ROOT / "engine"
    named = {
        file.relative_to(engine).as_posix()
        for file in engine.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in launcher.VARIABLES
    }
    assert named == {"runtime/launcher.py"}


def test_a_free_port_is_none_that_connections_are_given() -> None:
    """Between asking for it and listening, something else would be given the same one now and then."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [launcher.free_port() for _ in range(20)]
    assert len(set(ports)) > 15 and all(10_000 <= port < max(first, 12_001) for port in ports)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", ports[0]))


@pytest.mark.distributed
def test_a_second_world_of_one_process_shards_its_networks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed keeps the first one's groups unless it is told of its end."""
    for name in launcher.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    teacher = build_network(replace(presets.get("digits", D=128.0), model_channels=4))
    form = {"backward": "joint", "activation_checkpointing": "off", "precision": "fp32"}
    for stage in (2, 1):
        world = start_world()
        try:
            config = DistillConfig(batch=2, micro_batch=2, max_steps=1, zero=stage, **form)
            Distiller(config, teacher, world=world).iteration(0)
        finally:
            launcher.stop_world()
