"""Worker: a frozen network whole and sharded (ZeRO 3): its gradient, and the bytes that are kept for it.

Argument (JSON): {"out": folder}. Rank 0 leaves out/gradients.safetensors and out/facts.json, by case.
"""

import copy
import gc
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from random_values import randomise

from ipfm.engine.distributed import zero
from ipfm.engine.distributed.world import start_world
from ipfm.engine.memory.live import LiveBytes
from ipfm.engine.runtime.launcher import stop_world
from ipfm.models import EDMPrecond, Precond

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(net: Precond, dtype: torch.dtype, again: bool) -> tuple[torch.Tensor, dict[str, int]]:
    net.compute_dtype, net.activation_checkpointing = dtype, again
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    sigma, labels = torch.full((2,), 2.0), torch.eye(3)[:2]
    with LiveBytes() as live:
        y = net(x, sigma, labels)
        kept = live.current
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return gradient, {"kept": kept, "present": sum(p.numel() for p in net.parameters())}


def main() -> None:
    out = Path(json.loads(sys.argv[1])["out"])
    world = start_world()
    # What is imported stays: DeepSpeed and this program look for garbage often.
    gc.freeze()
    zero.PERSISTENT_ELEMENTS = 0
    net = EDMPrecond(
        img_resolution=8, img_channels=1, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,),
        embedding_type="fourier", encoder_type="residual", resample_filter=(1, 3, 3, 1), label_dim=3,
    )  # fmt: skip
    randomise(net)
    net.model.map_noise.freqs.copy_(torch.linspace(-8, 8, net.model.map_noise.freqs.numel()))
    net.eval().requires_grad_(False)
    nets: dict[str, nn.Module] = {"whole": net, "sharded": zero.shard_frozen(copy.deepcopy(net))}
    gradients, facts = {}, {"weights": sum(p.numel() * p.element_size() for p in net.parameters())}
    for where, each in nets.items():
        for name, dtype in DTYPES.items():
            for again in (False, True):
                for _ in range(2):  # DeepSpeed learns the order of the modules in the first pass
                    gradient, fact = measure(each, dtype, again)
                case = f"{where}-{name}{'-checkpointed' if again else ''}"
                gradients[case], facts[case] = gradient, fact
    if world.is_main:
        save_file(gradients, out / "gradients.safetensors")
        (out / "facts.json").write_text(json.dumps(facts))
    stop_world()


main()
