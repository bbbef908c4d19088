"""Worker: a run of which a process can get stuck, as in a call of a device, at a step that its name says.

Two gloo groups: the run's own, and one for the data, which waits for an hour, as NCCL's would for ten minutes; gloo
itself tells of nothing there but that the other end has closed, which is left out here as NCCL leaves it out.

    blocked_device.py OUT WHERE [SECONDS]

WHERE: "collective": process 0 waits for the others in the data group from step 3 on, and they do not come;
"sleep": process 1 sleeps in step 3; "end": process 1 is done, process 0 only SECONDS later; "writing": as
"collective", while the writing of a checkpoint takes SECONDS; "alone": process 1 fails while process 0 waits;
"script": as "end", without `run_command`.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ipfm.engine.config import TeacherConfig
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.world import start_world
from ipfm.engine.experiments import run_command
from ipfm.engine.objectives.step_metrics import StepMetrics
from ipfm.engine.training import checkpoint_writer
from ipfm.engine.training.teacher import TeacherTraining
from ipfm.models import NetworkConfig

NETWORK = NetworkConfig(
    img_resolution=4, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(), D=64.0
)
HOUR = timedelta(hours=1)


def main(argv: list[str]) -> None:
    out, where, seconds = Path(argv[0]), argv[1], float(argv[2]) if len(argv) > 2 else 0.0
    world = start_world()
    device = dist.new_group(backend="gloo", timeout=HOUR)
    if where in ("end", "script"):
        world.barrier()
        time.sleep(0.0 if world.rank else seconds)
        print(f"{world.rank} done", flush=True)
        return
    config = TeacherConfig(
        D=64.0, batch=4, max_steps=1000, zero=0, eval_every=0, log_every=1, checkpoint_every=2, micro_batch=2,
        precision="fp32",
    )  # fmt: skip
    training = TeacherTraining(
        config, NETWORK, ImageDataset(torch.zeros(16, 1, 4, 4, dtype=torch.uint8)), world=world
    )
    usual = training._step

    def step(number: int) -> StepMetrics:
        if number == 3:
            (out / f"stuck-{world.rank}").touch()
            stick(world.rank, where, device)
        return usual(number)

    if where == "writing":
        finish = checkpoint_writer.Draft.finish

        def slowly(draft: checkpoint_writer.Draft) -> Path:
            time.sleep(seconds)
            return finish(draft)

        checkpoint_writer.Draft.finish = slowly
    training._step = step
    training.run(out / "run")


def stick(rank: int, where: str, device: dist.ProcessGroup) -> None:
    if rank == 1 and where == "alone":
        raise TypeError("a defect of one")
    if rank == 1:
        time.sleep(3600)
    while True:
        # A device would not say that the other end has gone.
        try:
            dist.all_reduce(torch.zeros(1), group=device)
        except RuntimeError:
            wait_as_a_device_does()


def wait_as_a_device_does() -> None:
    torch._C._distributed_c10d.HashStore().wait(["nothing"], HOUR)


if __name__ == "__main__":
    if sys.argv[2] == "script":
        main(sys.argv[1:])
    else:
        run_command(os.path.basename(__file__), main, sys.argv[1:])
