"""Worker: bytes of live tensors that one network in training holds, at every stage. Argument (JSON): {"out": file}."""

import gc
import json
import math
import sys
import time

import torch

from ipfm.engine.config import RunConfig
from ipfm.engine.distributed import zero
from ipfm.engine.distributed.precision import apply_precision
from ipfm.engine.distributed.world import start_world
from ipfm.engine.memory.live import tensor_bytes
from ipfm.engine.runtime.launcher import stop_world
from ipfm.models import build_network, presets


def settled_bytes() -> int:
    """Live bytes once the threads of the last messages have let go of theirs."""
    last, found = -1, 0
    while found != last:
        time.sleep(0.05)
        gc.collect()
        last, found = found, tensor_bytes()
    return found


def main() -> None:
    job = json.loads(sys.argv[1])
    # Small buckets: what is counted is what a parameter costs.
    zero.BUCKET_ELEMENTS, zero.PERSISTENT_ELEMENTS = 10, 0
    world = start_world()
    # What is imported stays: DeepSpeed and this program look for garbage often.
    gc.freeze()
    found = []
    for precision in ("fp32", "bf16"):
        for stage in (0, 1, 2, 3):
            for offload in ("none", "optimizer"):
                if stage == 0 and (offload != "none" or (precision == "bf16" and world.size > 1)):
                    continue
                if precision == "bf16" and offload != "none":
                    continue
                before = settled_bytes()
                config = RunConfig(eps=1e-3, zero=stage, precision=precision, offload=offload)
                settings = config.laid_out(D=math.inf, stage=stage, micro_batch=1, phased=False, checkpointed=False)
                trained = zero.TrainedNetwork(
                    apply_precision(build_network(presets.get("digits")), precision), settings, world=world, lr=1e-3,
                    beta1=0.0, ema=True,
                )  # fmt: skip
                trained.backward(trained(torch.zeros(1, 1, 8, 8), torch.ones(1)).square().sum())
                gc.collect()
                grads = tensor_bytes() - before
                trained.step(lr=1e-3, ema_decay=0.5)
                gc.collect()
                case = {"stage": stage, "precision": precision, "offload": offload}
                found.append({**case, "grads": grads, "after": tensor_bytes() - before})
                trained.engine.destroy()
                del trained
    if world.is_main:
        torch.save(found, job["out"])
    stop_world()


main()
