"""Figures for files need no backend of the surroundings."""

import os
import subprocess
import sys
from pathlib import Path

DRAW = """
import os, sys
from ipfm.engine.runtime.figures import file_figure
figure = file_figure(figsize=(1, 1))
figure.add_subplot().plot([0, 1])
figure.savefig(sys.argv[1])
print(os.environ["MPLBACKEND"])
"""


def test_a_backend_that_is_not_installed_is_none_of_a_files_business(tmp_path: Path) -> None:
    """As where a notebook starts a run; programs that are started from here find the variable as it was."""
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(tmp_path / "x.png")], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == env["MPLBACKEND"] and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
