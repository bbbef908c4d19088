"""The `ipfm` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ipfm.engine.commandline import parse, run_command, user_input

DESCRIPTION = """Inverse Poisson flow matching: distils PFGM++ and diffusion models into one- to four-step generators.

Training is done by the recipes: `deepspeed recipes/digits_ipfm.py --help`."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw images from a generator or a teacher.

    Example: ipfm sample runs/digits-D128-alpha1-K1/generator --n 64 --out digits.png
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Model folder. A generator's D and noise levels are its own; a teacher is sampled with Heun's method."""
    out: Path = Path("samples.png")
    """A .png (one grid) or a .npz (images NHWC, uint8)."""
    n: int = 64
    """Number of images."""
    seed: int = 0
    """Image i of a seed is the same whatever the number and the batch."""
    batch: int = 256
    """Images at a time."""
    heun_steps: int = 18
    """Steps of a teacher's sampler; 18 are 35 network evaluations."""

    def run(self) -> None:
        """Write the images to `out`."""
        import torch

        from ipfm.engine.pictures import save_grid, save_images
        from ipfm.engine.resolve import run_device
        from ipfm.engine.sampling import sample_model

        with user_input():
            for name in ("n", "batch", "heun_steps"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
            if self.out.suffix not in (".png", ".npz"):
                raise ValueError(f"out must end in .png or .npz, got {self.out}")
            draw = sample_model(self.model, run_device(), heun_steps=self.heun_steps, seed=self.seed)
        images = torch.cat([draw(i, min(self.batch, self.n - i)).cpu() for i in range(0, self.n, self.batch)])
        with user_input():
            (save_grid if self.out.suffix == ".png" else save_images)(images, self.out)
        print(f"{self.n} images: {self.out}")


@dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a model folder: architecture, D, parameters, training facts.

    Example: ipfm info runs/digits-D128-alpha1-K1/generator
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Model folder."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Print what is known of the model."""
        from ipfm.models import load_teacher, read_config

        with user_input():
            stored = read_config(self.model)
            net = load_teacher(self.model)
        parameters = sum(p.numel() for p in net.parameters())
        parts = {"network": stored.network.to_json(), "training": dict(stored.extra)}
        if self.json:
            print(json.dumps({"parameters": parameters, **parts}, indent=1))
            return
        print(f"parameters: {parameters:,}")
        for part, facts in parts.items():
            print(f"{part}:")
            for name, value in facts.items():
                print(f"  {name:<18} {value}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predict the memory that a distillation needs on each process.

    Example: ipfm plan --model cifar10-ncsnpp --batch 256 --ranks 8 --zero 2 --precision bf16 --gpu-memory 24
    """

    model: str
    """Name of a network preset, or a model folder."""
    batch: int = 256
    """Global batch."""
    ranks: int = 1
    """Number of processes."""
    micro_batch: int | None = None
    """Images one process handles at a time. Default: its whole share of the batch."""
    zero: Literal[0, 1, 2] = 0
    """ZeRO stage."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks."""
    gpu_memory: float | None = None
    """Memory of one GPU in GB; decides between the joint and the phased backward pass."""

    def run(self) -> None:
        """Print the plan."""
        from ipfm.engine.config import DistillConfig
        from ipfm.engine.memory import USABLE, plan_memory
        from ipfm.models import presets, read_config

        with user_input():
            if self.ranks < 1:
                raise ValueError(f"ranks must be at least 1, got {self.ranks}")
            if self.gpu_memory is not None and not self.gpu_memory > 0:
                raise ValueError(f"gpu-memory must be > 0, got {self.gpu_memory}")
            folder = Path(self.model)
            network = read_config(folder).network if folder.is_dir() else presets.get(self.model)
            config = DistillConfig(
                batch=self.batch, micro_batch=self.micro_batch, zero=self.zero, precision=self.precision
            )
            plan = plan_memory(
                network,
                micro_batch=config.split(self.ranks)[1],
                ranks=self.ranks,
                stage=self.zero,
                precision=self.precision,
                budget=None if self.gpu_memory is None else int(USABLE * self.gpu_memory * 1e9),
            )
        print(plan)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure the kernels, or compile them for GPUs that are not here.

    Example: ipfm bench --offline --out build/bench
    """

    out: Path = Path("bench")
    """Folder for the tables."""
    offline: bool = False
    """Compile every kernel for sm_80, sm_90 and sm_100 and report registers, spills and access widths; needs no GPU."""
    quick: bool = False
    """Small shapes and few repetitions."""

    def run(self) -> None:
        """Write the tables to `out` and print a summary."""
        from ipfm.kernels import bench

        with user_input():
            self.out.mkdir(parents=True, exist_ok=True)
        run = bench.run_offline if self.offline else bench.run_microbenchmarks
        table = run(self.out, quick=self.quick)
        print(table.with_suffix(".md").read_text(encoding="utf-8"))
        print(table)


Command = (
    Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def _main(argv: Sequence[str]) -> None:
    parse(Command, list(argv) or ["--help"], prog="ipfm", description=DESCRIPTION).run()  # type: ignore[arg-type]


def main() -> None:
    """Entry point of the `ipfm` command."""
    run_command("ipfm", _main, sys.argv[1:])
