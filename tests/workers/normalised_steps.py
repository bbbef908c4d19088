"""Worker: trains a small network with forced weight normalisation for some steps, and leaves what it then is.

Argument (JSON): {"out": folder, "cases": [{"name", "config", "steps", "load"?, "save"?}]}; "load" and "save" are files
of the state, by kind and parameter.
"""

import gc
import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from normalised_network import BATCH, ema_decay, inputs, small_network

from ipfm.engine.config import RunConfig
from ipfm.engine.distributed import zero
from ipfm.engine.distributed.world import World, import_deepspeed, start_world
from ipfm.engine.runtime.launcher import stop_world


def train(case: dict, world: World) -> dict[str, torch.Tensor]:
    """Weights, moments and averages after the case's steps, and the plain weights."""
    config = RunConfig(eps=1e-3, **{"precision": "fp32", **case["config"]})
    settings = config.laid_out(D=math.inf, stage=config.zero, micro_batch=1, phased=False, checkpointed=False)
    net = zero.TrainedNetwork(small_network(), settings, world=world, lr=1e-2, beta1=0.9, ema=True, logvar=False)
    first = 0
    if "load" in case:
        state = load_file(case["load"])
        for kind in net.state_kinds:
            net.load(kind, {key.removeprefix(f"{kind}/"): t for key, t in state.items() if key.startswith(f"{kind}/")})
        net.steps_applied = first = int(state["steps"])
        scale = state["scale"].tolist()
        net.loss_scale_state = dict(zip(("scale", "steps", "last_overflow"), scale, strict=True)) if scale else {}
    of_this = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    for step in range(first, case["steps"]):
        x = inputs(step)[:, of_this]
        if case.get("overflow") == step:
            x = x * math.inf
        for part in x:
            loss = net(part).square().sum() * world.size / BATCH
            net.backward(loss)
        net.step(lr=1e-2, ema_decay=ema_decay(step))
    state = {f"{k}/{name}": t.detach().float().clone() for k in net.state_kinds for name, t in net.full(k)}
    state["steps"] = torch.tensor(float(net.steps_applied))
    state["scale"] = torch.tensor(list(net.loss_scale_state.values()), dtype=torch.float64)
    if "save" in case and world.is_main:
        save_file(state, case["save"])
    with torch.no_grad():
        state["output"] = torch.stack([net(part).float() for part in inputs(0)])
    return state


def main() -> None:
    job = json.loads(sys.argv[1])
    world = start_world()
    gc.freeze()
    torch.nn.Parameter.__repr__ = object.__repr__
    if any(case["config"].get("precision") == "fp16" for case in job["cases"]):
        import_deepspeed().accelerator.get_accelerator().is_fp16_supported = lambda: True
    for case in job["cases"]:
        zero.PERSISTENT_ELEMENTS = case.get("persistent", 0)
        zero.BUCKET_ELEMENTS = 1000
        found = train(case, world)
        if world.is_main:
            save_file(found, Path(job["out"]) / f"{case['name']}-{world.size}.safetensors")
        world.barrier()
    stop_world()


main()
