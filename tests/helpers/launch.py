"""Starting real processes in tests: a group of workers that form one run, and programs that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import gpus
import prepared

from ipfm.engine.runtime.launcher import free_port, launch_variables

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ROOT / "tests" / "workers"
BIN = Path(sys.executable).parent


def environment(*, gpu: bool = False, **values: str) -> dict[str, str]:
    """The environment of a process that is not part of a run yet: one thread, no interpreter mode, no GPU.

    Args:
        gpu: it may see the GPUs that this process sees; for tests marked `gpu`.
        values: further variables.
    """
    keep = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")
    }
    hidden = {} if gpu else gpus.HIDDEN
    return {**keep, **hidden, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{keep.get('PATH', '')}", **values}


def run_workers(script: str, processes: int, argument: Any, timeout: float = 300, *, gpu: bool = False) -> None:
    """Run tests/workers/`script` as one group of `processes`, each given `argument` as JSON; with `gpu`, on the GPUs.

    Fails with the output of the workers when one of them does.
    """
    port = free_port()
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        started = []
        for rank, output in enumerate(outputs):
            env = environment(gpu=gpu, **launch_variables(rank, processes, port))
            worker = prepared.start(WORKERS / script, json.dumps(argument), env=env, stdout=output, stderr=output)
            stack.callback(worker.kill)
            started.append(worker)
        codes = [process.wait(timeout) for process in started]
        for output in outputs:
            output.seek(0)
        said = "\n".join(output.read().decode(errors="replace") for output in outputs)
        assert codes == [0] * processes, f"workers ended with {codes}\n{said}"
