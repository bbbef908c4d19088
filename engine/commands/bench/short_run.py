"""A short distillation as a run: in a process of its own, which may kill itself in the middle of it.

python -m ipfm.engine.commands.bench.short_run FOLDER SETTINGS
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ipfm.engine.runtime.commandline import run_command
from ipfm.engine.runtime.launcher import VARIABLES, free_port, launch_variables


@dataclass(frozen=True)
class ShortRun:
    """What is trained, and what happens on the way."""

    config: Mapping[str, Any]
    """Settings of the distillation, but for its folder."""
    steps: int
    dies: int | None = None
    """Rank of the process that kills itself."""
    at: int = 0
    """In the beginning of this step, counted from 0; its checkpoint is awaited."""
    events: str = ""
    """File to which the process that dies writes the time at which it does."""
    network: Mapping[str, Any] = field(default_factory=dict)
    """Of the teacher, beside those of `equivalence.NETWORK`."""


def train(folder: Path, run: ShortRun) -> None:
    """Train in this process, which may be one of several."""
    from dataclasses import replace

    import torch

    from ipfm.engine.commands.bench import equivalence
    from ipfm.engine.distributed.determinism import prepare_determinism
    from ipfm.engine.objectives.ipfm import DistillConfig
    from ipfm.engine.objectives.step_metrics import StepMetrics
    from ipfm.engine.training.distiller import Distiller
    from ipfm.models import build_network

    class Dying(Distiller):
        """Ends in the middle of the run."""

        def _step(self, step: int) -> StepMetrics:
            if run.dies == self.world.rank and step == run.at:
                import time

                deadline = time.monotonic() + 60
                saved = folder / "checkpoints"
                while not (saved.is_dir() and any(saved.glob("step-*"))) and time.monotonic() < deadline:
                    time.sleep(0.01)
                if run.events:
                    Path(run.events).write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._step(step)

    if run.config.get("deterministic"):
        prepare_determinism()
    torch.manual_seed(0)
    network = replace(equivalence.NETWORK, **run.network)
    net = build_network(network)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    config = DistillConfig(**{**equivalence.BASE, **run.config, "max_steps": run.steps})
    Dying(config, net.eval().requires_grad_(False)).run(folder)


def start(
    folder: Path, run: ShortRun, log: Path, *, ranks: int = 1, device: str = "cpu", **environment: str
) -> list[subprocess.Popen[bytes]]:
    """The processes of the run; what they say goes to the file `log`.

    Args:
        folder: of the run.
        run: what is trained.
        log: file that is added to.
        ranks: number of processes.
        device: "cpu" hides all GPUs.
        environment: further variables.
    """
    own = {name: value for name, value in os.environ.items() if name not in VARIABLES} | environment
    if not device.startswith("cuda"):
        own |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    started = []
    port = free_port()
    for rank in range(ranks):
        joined = launch_variables(rank, ranks, port)
        with open(log, "ab") as said:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", __name__, str(folder), json.dumps(asdict(run))],
                    env=own | (joined if ranks > 1 else {}), stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                )
            )  # fmt: skip
    return started


def wait(processes: Sequence[subprocess.Popen[bytes]], patience: float) -> list[int | None]:
    """Exit codes; None of one that had to be killed after so many seconds."""
    import time

    deadline = time.monotonic() + patience
    codes: list[int | None] = []
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
        codes.append(process.poll())
    for process in processes:
        process.kill()
        process.wait()
    return codes


def main(argv: Sequence[str]) -> None:
    """Train as the command line says."""
    folder, given = argv
    train(Path(folder), ShortRun(**json.loads(given)))


if __name__ == "__main__":
    run_command("short_run", main, sys.argv[1:])
