"""Worker: a run of two processes that get stuck, in its step 3, as in a call of a device.

There are two gloo groups: the run's own, and one for the data, of which nothing is heard in Python when it is blocked.
Where it is, the processes watch each other as under NCCL.

    blocked_device.py OUT WHERE SECONDS

WHERE:
    collective  process 0 waits for the other one, which sleeps
    forks       the same; process 1 has a child that outlives it
    writing     the same, while the writing of a checkpoint takes SECONDS
    alone       process 1 fails
    slow        nobody is stuck: a step takes a while, and the gathering of a checkpoint SECONDS
    disk        nobody is stuck: a step takes a while, and the writing of a checkpoint SECONDS and more
    input       process 1 finds something to complain of, and process 0 does SECONDS later
    end         process 1 is done, process 0 SECONDS later
    script      the same without a command around it
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ipfm.engine.config import TeacherConfig
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed import world as world_module
from ipfm.engine.distributed.launch_environment import watch_times
from ipfm.engine.distributed.world import start_world
from ipfm.engine.experiments import run_command
from ipfm.engine.objectives.step_metrics import StepMetrics
from ipfm.engine.runtime.commandline import BadInput
from ipfm.engine.training import checkpoint_writer
from ipfm.engine.training.checkpoint import Draft
from ipfm.engine.training.teacher import TeacherTraining
from ipfm.models import NetworkConfig

NETWORK = NetworkConfig(
    img_resolution=4, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(), D=64.0
)
HOUR = timedelta(hours=1)


def main(argv: list[str]) -> None:
    out, where, seconds = Path(argv[0]), argv[1], float(argv[2])
    if where in ("collective", "forks", "alone"):
        world_module.watch_times = lambda raises: watch_times(raises=False)  # type: ignore[assignment]
    world = start_world()
    data = dist.new_group(backend="gloo", timeout=HOUR)
    if where == "input":
        world.barrier()
        time.sleep(0.0 if world.rank else seconds)
        raise BadInput("a setting does not fit this machine")
    if where in ("end", "script"):
        world.barrier()
        time.sleep(0.0 if world.rank else seconds)
        return
    config = TeacherConfig(
        D=64.0, batch=4, max_steps=1000, zero=0, eval_every=0, log_every=1, micro_batch=2, precision="fp32",
        checkpoint_every=1000 if where == "slow" else 2,
    )  # fmt: skip
    images = ImageDataset(torch.zeros(16, 1, 4, 4, dtype=torch.uint8))
    training = TeacherTraining(config, NETWORK, images, world=world)
    usual = training._step

    def step(number: int) -> StepMetrics:
        if number == 3 and (world.rank, where) != (0, "disk"):
            (out / f"stuck-{world.rank}").touch()
        if number >= 3:
            stick(world.rank, where, data)
        return usual(number)

    if where in ("writing", "disk"):
        finish = Draft.finish

        def write_slowly(draft: Draft) -> Path:
            if where == "disk":
                # The other one waits for this by now.
                time.sleep(1.5)
                (out / "stuck-0").touch()
            time.sleep(seconds)
            return finish(draft)

        Draft.finish = write_slowly  # type: ignore[method-assign]
    if where == "slow":
        gather = checkpoint_writer._gather

        def gather_slowly(*what: Any) -> dict[str, Tensor]:
            time.sleep(seconds)
            return gather(*what)

        checkpoint_writer._gather = gather_slowly
    training._step = step  # type: ignore[method-assign]
    training.run(out / "run")


def stick(rank: int, where: str, data: dist.ProcessGroup) -> None:
    if where in ("slow", "disk"):
        time.sleep(0.2)
        return
    if rank == 1 and where == "alone":
        raise TypeError("a defect of one")
    if rank == 1 and where == "forks" and not os.fork():
        time.sleep(60)
        os._exit(0)
    if rank == 1:
        time.sleep(3600)
    try:
        dist.all_reduce(torch.zeros(1), group=data)
    except RuntimeError:
        # gloo tells that the other end has gone; a device would wait on.
        dist.HashStore().wait(["nothing"], HOUR)


if __name__ == "__main__":
    if sys.argv[2] == "script":
        main(sys.argv[1:])
    else:
        run_command(os.path.basename(__file__), main, sys.argv[1:])
