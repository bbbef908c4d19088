"""What an import brings along, and the kernels in an environment that has little else."""

from __future__ import annotations

import subprocess
import sys

import launch

HEAVY = ("deepspeed", "xformers", "matplotlib", "sklearn", "scipy", "tyro", "tensorboard", "PIL", "torch._inductor")


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=launch.environment(**environment), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_are_light() -> None:
    """Of the kernels, and then of all that users import in Python."""
    found = f"print([name for name in {HEAVY} if name in sys.modules])"
    kernels = "from ipfm.kernels import perturb"
    rest = (
        "from ipfm.models import load_model, load_teacher; from ipfm.engine import DistillConfig, Distiller, generate"
    )
    assert python(f"import sys; {kernels}; {found}; {rest}; {found}").split("\n") == ["[]", "[]"]


# Runs in a process of its own, which refuses every distribution but the three and what they need themselves.
ALONE = """
import re, sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

here, waiting = set(), ["torch", "triton", "numpy"]
while waiting:
    name = re.sub("[-_.]+", "-", waiting.pop()).lower()
    if name not in here:
        here.add(name)
        try:
            needs = [need for need in requires(name) or () if "extra ==" not in need]
        except PackageNotFoundError:
            continue
        waiting += [re.match("[A-Za-z0-9._-]+", need)[0] for need in needs]
owners = packages_distributions()

class Bare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        own = [re.sub("[-_.]+", "-", owner).lower() for owner in owners.get(name.partition(".")[0], ())]
        refused = name.startswith("ipfm.") and not name.startswith("ipfm.kernels")
        if refused or own and name.partition(".")[0] != "ipfm" and not here.intersection(own):
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
for name in ("scipy", "safetensors", "tqdm", "PIL", "deepspeed"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is not refused")

import torch
import ipfm.kernels as kernels

y, sigma, index = torch.randn(4, 3, 8, 8, requires_grad=True), torch.full((4,), 0.7), torch.arange(4)
x = kernels.perturb(y, sigma, 128.0, seed=0, stream=0, step=0, sample_index=index)
weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
out = kernels.group_norm_silu(x, 3, weight, bias)
loss = kernels.denoising_loss(out.detach(), y.detach(), sigma)
out.backward(loss.grad)
found = kernels.ipfm_loss(out.detach(), x.detach(), y.detach(), alpha=1.0)
assert all(v.isfinite().all() for v in (y.grad, weight.grad, bias.grad, found.dy)) and y.grad.abs().sum() > 0
optimiser = kernels.AdamEMA([weight, bias], lr=1e-3, ema=True)
before = weight.detach().clone()
optimiser.step()
assert bool(optimiser.applied) and not torch.equal(weight, before)
assert kernels.philox.uniform(index, 5, seed=0, stream=3, step=0).shape == (4, 5)
for name in kernels.__all__:
    exec(f"from ipfm.kernels import {name}")
print("done")
"""


def test_kernels_need_torch_triton_and_numpy_alone() -> None:
    assert python(ALONE) == "done"
