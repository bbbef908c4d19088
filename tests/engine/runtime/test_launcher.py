"""The lock on a run folder, and noticing that the launcher is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import launch
import pytest

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
