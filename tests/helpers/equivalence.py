"""The engine against a plain PyTorch loop: the settings that are compared, how, and the table (`make equivalence`)."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import launch
import plain_loop
import torch
from safetensors.torch import load_file
from torch import Tensor

from ipfm.engine import DistillConfig
from ipfm.models import EDMPrecond, NetworkConfig, load_teacher, save_model

STAGES, RANKS, BACKWARD, ACCUMULATION = (0, 1, 2, 3), (1, 2), ("joint", "phased"), (1, 2)
LIMIT = 1e-5
# A large epsilon: with a small one Adam turns the rounding noise of near-zero gradients into whole steps.
BASE: dict[str, Any] = {
    "batch": 8, "max_steps": 20, "lr": 1e-3, "eps": 1e-2, "ema_kimg": 0.05, "alpha": 1.0, "seed": 3,
    "activation_checkpointing": "off",
}  # fmt: skip


class Difference(NamedTuple):
    """Largest ||difference|| / ||parameter|| over the parameters of a network."""

    student: float
    generator: float
    ema: float


def make_teacher(folder: Path) -> Path:
    """A small conditional NCSN++ with attention, a Fourier buffer and weights that matter everywhere; D = 16."""
    torch.manual_seed(0)
    net = EDMPrecond(
        NetworkConfig(
            img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1,
            attn_resolutions=(4,), embedding_type="fourier", encoder_type="residual", channel_mult_noise=2,
            resample_filter=(1, 3, 3, 1), dropout=0.0, label_dim=3, augment_dim=9, D=16.0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save_model(net, folder / "model")
    return folder / "model"


def grid(ranks: int) -> dict[str, dict[str, Any]]:
    """Every stage, backward mode and accumulation, by name: what the table shows for `ranks` processes."""
    return {
        f"k1-z{stage}-{backward}-a{parts}": {
            **BASE, "zero": stage, "backward": backward, "micro_batch": BASE["batch"] // ranks // parts,
        }
        for stage in STAGES
        for backward in BACKWARD
        for parts in ACCUMULATION
    }  # fmt: skip


def run(
    teacher: Path,
    out: Path,
    ranks: int,
    cases: Mapping[str, Mapping[str, Any]],
    steps: int,
    *,
    start: bool = False,
    whole: int = 0,
) -> dict[str, dict]:
    """The engine's tensors after `steps` in each case, from one group of `ranks` processes.

    `start`: before the steps too, under the name with -start. `whole`: parameters of up to so many elements are not
    sharded at stage 3.
    """
    more = {"steps": steps, "start": start, "persistent": whole}
    jobs = [{"name": name, "config": config, **more} for name, config in cases.items()]
    launch.run_workers("distill_steps.py", ranks, {"teacher": str(teacher), "out": str(out), "cases": jobs}, 900)
    names = [*cases, *(f"{name}-start" for name in cases if start)]
    return {name: load_file(out / f"{name}-{ranks}.safetensors") for name in names}


def difference(plain: plain_loop.Plain, found: Mapping[str, Tensor]) -> Difference:
    """How far the engine's weights and average are from the plain loop's."""

    def largest(expected: Mapping[str, Tensor], prefix: str) -> float:
        return max(
            float((found[prefix + name] - tensor.detach()).norm() / tensor.detach().norm())
            for name, tensor in expected.items()
        )

    return Difference(
        largest(dict(plain.student.named_parameters()), "student/weight/"),
        largest(dict(plain.generator.named_parameters()), "generator/weight/"),
        largest(plain.ema, "generator/ema/"),
    )


def main() -> int:
    """Print the table; 1 when any row is beyond the limit."""
    steps = BASE["max_steps"]
    print(f"Weights after {steps} steps against a plain PyTorch loop: largest relative difference of a parameter")
    print("| ZeRO | ranks | backward | accumulation | student | generator | EMA | |\n|---|---|---|---|---|---|---|---|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        teacher = make_teacher(Path(folder))
        plain = plain_loop.distill(load_teacher(teacher), DistillConfig(**BASE), steps)
        start = {n: p.detach() for n, p in load_teacher(teacher).named_parameters()}
        final = plain.generator.state_dict()
        moved = max(float((final[name] - p).norm() / p.norm()) for name, p in start.items())
        for ranks in RANKS:
            for name, found in run(teacher, Path(folder), ranks, grid(ranks), steps).items():
                row = difference(plain, found)
                worst = max(worst, *row)
                _, stage, backward, parts = name.split("-")
                cells = [stage[1:], str(ranks), backward, parts[1:], *(f"{value:.1e}" for value in row)]
                print(f"| {' | '.join(cells)} | {'ok' if max(row) <= LIMIT else 'WRONG'} |", flush=True)
    print(f"largest of all: {worst:.1e} (limit {LIMIT:g}); the generator's parameters moved by up to {moved:.1e}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
