"""Starting real processes in tests: a group of workers that form one run, and programs that are killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ROOT / "tests" / "workers"
BIN = Path(sys.executable).parent


def environment(**values: str) -> dict[str, str]:
    """The environment of a process that is not part of a run yet: one thread, no interpreter mode, no GPU assumed."""
    keep = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")
    }
    return {**keep, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{keep.get('PATH', '')}", **values}


def run_workers(script: str, processes: int, argument: Any, timeout: float = 300) -> None:
    """Run tests/workers/`script` as one group of `processes`, each given `argument` as JSON.

    Fails with the output of the workers when one of them does.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(processes):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_SIZE": str(processes)}
        started.append(
            subprocess.Popen(
                [sys.executable, str(WORKERS / script), json.dumps(argument)],
                env=environment(**group, MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = []
    try:
        for process in started:
            outputs.append(process.communicate(timeout=timeout)[0])
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    assert codes == [0] * processes, f"workers ended with {codes}\n" + "\n".join(outputs)
