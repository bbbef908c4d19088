"""The lock on a run folder, and noticing that the launcher is gone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import launch
import pytest

from ipfm.engine.runtime import launcher
from ipfm.engine.runtime.launcher import Launcher
from ipfm.engine.training.run_folder import lock_folder

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


def test_what_a_launcher_says_is_read_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both launchers; elsewhere a variable of theirs is set at most."""
    for name in launcher.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not launcher.is_launched() and launcher.is_first_process()
    assert (launcher.launched_rank(), launcher.local_rank(), launcher.launched_processes()) == (0, 0, 1)
    assert (launcher.local_processes(), launcher.local_processes(3)) == (1, 3)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
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
    # DeepSpeed wants LOCAL_RANK of a process that nobody has launched too.
    assert named == {"runtime/launcher.py", "distributed/world.py"}
    world = (engine / "distributed" / "world.py").read_text(encoding="utf-8")
    assert [line.strip() for line in world.splitlines() if any(f'"{name}"' in line for name in launcher.VARIABLES)] == [
        'os.environ.setdefault("LOCAL_RANK", str(rank % torch.cuda.device_count() if cuda else rank))'
    ]
