"""`ipfm sample`: images from a generator or a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ipfm.engine.commandline import user_input


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw images from a generator or a teacher.

    Example: ipfm sample runs/digits-D128-alpha1-K1/generator --n 64 --out digits.png
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Model folder, or a teacher's checkpoint of EDM, PFGM++ or SiD. A generator's D and noise levels are its own; a
    teacher is sampled with Heun's method."""
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
    D: float | None = None
    """Auxiliary dimensions of a checkpoint that does not say them."""

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
            draw, _, _ = sample_model(self.model, run_device(), heun_steps=self.heun_steps, seed=self.seed, D=self.D)
        images = torch.cat([draw(i, min(self.batch, self.n - i)).cpu() for i in range(0, self.n, self.batch)])
        with user_input():
            (save_grid if self.out.suffix == ".png" else save_images)(images, self.out)
        print(f"{self.n} images: {self.out}")
