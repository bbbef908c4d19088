"""Worker: an fp16 network whose gradients overflow, then hold a NaN.

Argument (JSON): {"out": file, "stages": some of 1 to 3}
"""

import json
import math
import sys

import torch

from ipfm.engine.config import RunConfig
from ipfm.engine.distributed.world import World, import_deepspeed, start_world
from ipfm.engine.distributed.zero import TrainedNetwork
from ipfm.engine.runtime.launcher import stop_world


def steps(stage: int, world: World) -> list[list]:
    torch.manual_seed(0)
    config = RunConfig(eps=1e-3, zero=stage, precision="fp16")
    settings = config.laid_out(D=math.inf, stage=stage, micro_batch=1, phased=False, checkpointed=False)
    trained = TrainedNetwork(torch.nn.Linear(4, 4), settings, world=world, lr=1e-2, beta1=0.0, ema=True)

    def weights() -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for _, p in trained.full("weight")])

    found = []
    # 300 x the scale of 256 does not fit into 16 bits; 1 does. On one process alone: all have to agree. NaN looks the
    # same, until no scale is left to blame.
    for factor in (300.0, 1.0, *[math.nan] * 9, 1.0):
        before, scale = weights(), trained.loss_scale
        y = trained(torch.ones(1, 4, dtype=torch.float16))
        trained.backward((y * (factor if world.rank == 0 else 1.0)).sum())
        good = trained.step(lr=1e-2, ema_decay=0.5)
        moved = not torch.equal(weights(), before)
        found.append([factor, scale, trained.loss_scale, bool(good), moved])
    return found


def main() -> None:
    job = json.loads(sys.argv[1])
    world = start_world()
    # Processors without fast fp16 can do it too, slowly.
    import_deepspeed().accelerator.get_accelerator().is_fp16_supported = lambda: True
    found = {stage: steps(stage, world) for stage in job["stages"]}
    if world.is_main:
        torch.save(found, job["out"])
    stop_world()


main()
