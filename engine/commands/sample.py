"""`ipfm sample`: images from a generator or a teacher."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ipfm.engine.runtime.commandline import user_input
from ipfm.engine.runtime.json_output import output

if TYPE_CHECKING:
    from ipfm.engine.runtime.progress import ProgressBar
    from ipfm.engine.sampling.samplers import Churn
    from ipfm.engine.sampling.stored_model import SampledModel


IMAGES, HEUN_STEPS = 64, 18
# Options of a teacher's sampler; a generator's is its own.
OF_A_TEACHER = ("heun_steps", "solver", "sigmas", "churn", "churn_min", "churn_max", "churn_noise")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw images from a generator or a teacher.

    Example: ipfm sample runs/digits-D128-alpha1-K1/generator --n 64 --out digits.png
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Model folder, or a teacher's checkpoint of EDM, PFGM++ or SiD. A generator's D and noise levels are its own; a
    teacher is sampled with Heun's method."""
    out: Path = Path("samples.png")
    """A .png (one grid), a .npz (images NHWC, uint8), or a folder: one PNG an image, named by its seed or index."""
    n: int | None = None
    """Number of images. Default: 64."""
    seed: int | None = None
    """Image i of a seed is the same whatever the number and the batch. Default: 0."""
    seeds: Annotated[str | None, tyro.conf.arg(metavar="0,3,7-12")] = None
    """The first image of each of these seeds, in place of --n and --seed."""
    classes: Annotated[str | None, tyro.conf.arg(metavar="0,1,2")] = None
    """Classes of the images, in turn; one for all of one class. Default: drawn at random."""
    batch: int = 256
    """Images at a time."""
    heun_steps: int | None = None
    """Steps of a teacher's sampler; 18, the default, are 35 network evaluations."""
    solver: Literal["heun", "euler"] | None = None
    """Of a teacher: heun, the default, is of second order; euler of first, with one network evaluation a step."""
    sigmas: tuple[float, ...] = ()
    """Noise levels of a teacher's steps, highest first, in place of --heun-steps."""
    churn: float | None = None
    """Sample a teacher stochastically: S_churn of EDM's algorithm 2. Exact at D = inf, an approximation below."""
    churn_min: float | None = None
    """S_tmin, the lowest noise level that noise is added to. Default: 0."""
    churn_max: float | None = None
    """S_tmax, the highest. Default: inf."""
    churn_noise: float | None = None
    """S_noise, factor of the noise added. Default: 1."""
    D: float | None = None
    """Auxiliary dimensions of a checkpoint that does not say them."""
    json: bool = False
    """Print JSON: files, seeds, nfe, D, sigmas, seconds, images/s."""

    def run(self) -> None:
        """Write the images to `out`."""
        from ipfm.engine.distributed.world import run_device
        from ipfm.engine.runtime.progress import ProgressBar
        from ipfm.engine.sampling.seeds import read_numbers
        from ipfm.engine.sampling.stored_model import sample_model

        with user_input():
            self._check()
            seeds = None if self.seeds is None else self._seeds(self.seeds)
            churn = self._churn()
            model = sample_model(
                self.model,
                run_device(),
                heun_steps=HEUN_STEPS if self.heun_steps is None else self.heun_steps,
                seed=(self.seed or 0) if seeds is None else seeds,
                D=self.D,
                sigmas=self.sigmas or None,
                solver=self.solver or "heun",
                churn=churn,
                classes=None if self.classes is None else read_numbers("classes", self.classes),
            )
            self._check_model(model)
        names = range(IMAGES if self.n is None else self.n) if seeds is None else seeds
        with output(as_json=self.json) as write:
            files = [self.out / f"{name:06d}.png" for name in names] if self._is_folder() else [self.out]
            with ProgressBar("sample", len(names)) as bar:
                seconds = self._write(model, len(names), files, bar)
            write(self._facts(model, seeds, files, len(names), seconds), self._text(model, len(names), seconds))

    def _check(self) -> None:
        """ValueError: options that cannot be, or not together."""
        from ipfm.engine.noise_levels import check_sigmas
        from ipfm.engine.runtime.files import unwritable_ancestor
        from ipfm.engine.sampling.seeds import check_seeds

        for name in ("n", "batch", "heun_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_typed(name)} must be at least 1, got {value}")
        check_seeds("seed", [self.seed or 0])
        for name, others in (("seeds", ("n", "seed")), ("sigmas", ("heun_steps",))):
            both = [other for other in others if name in self._given() and other in self._given()]
            if both:
                raise ValueError(f"{name} and {_typed(both[0])} exclude each other: give one of them")
        if self.sigmas:
            check_sigmas(self.sigmas)
        if not self._is_folder() and self.out.suffix not in (".png", ".npz"):
            raise ValueError(f"out must end in .png or .npz, or be a folder (no suffix), got {self.out}")
        if self._is_folder() and self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out must end in .png or .npz, or be a folder, got the file {self.out}")
        if (above := unwritable_ancestor(self.out if self.out.is_dir() else self.out.absolute().parent)) is not None:
            raise ValueError(f"out cannot be written to {self.out}: {above} is no folder that takes files")

    def _given(self) -> set[str]:
        """The options that may be left out and were not."""
        return {name for name in ("n", "seed", "seeds", *OF_A_TEACHER) if getattr(self, name) not in (None, ())}

    def _seeds(self, text: str) -> tuple[int, ...]:
        from ipfm.engine.sampling.seeds import check_seeds, read_numbers

        seeds = read_numbers("seeds", text)
        check_seeds("seeds", seeds)
        twice = [seed for seed, count in Counter(seeds).items() if count > 1]
        if self._is_folder() and twice:
            raise ValueError(f"seeds must differ where each names a file in a folder, got {twice[0]} twice")
        return seeds

    def _churn(self) -> Churn | None:
        from ipfm.engine.sampling.samplers import Churn

        values = {"sigma_min": self.churn_min, "sigma_max": self.churn_max, "noise": self.churn_noise}
        given = {name: value for name, value in values.items() if value is not None}
        if self.churn is not None:
            return Churn(amount=self.churn, **given)
        if given:
            raise ValueError("churn-min, churn-max and churn-noise need churn: give --churn too, or leave them out")
        return None

    def _check_model(self, model: SampledModel) -> None:
        """ValueError: options for a teacher, and it is a generator; a picture that PNG does not know."""
        from ipfm.models.facts import GeneratorFacts

        given = [_typed(name) for name in OF_A_TEACHER if name in self._given()]
        if given and isinstance(model.facts, GeneratorFacts):
            raise ValueError(
                f"{', '.join(given)} cannot be given: {self.model} is a generator, which has noise levels of its own"
            )
        channels = model.network.img_channels
        if channels not in (1, 3) and (self._is_folder() or self.out.suffix == ".png"):
            raise ValueError(f"out must end in .npz for images of {channels} channels, got {self.out}")

    def _is_folder(self) -> bool:
        return self.out.is_dir() or not self.out.suffix

    def _batches(self, count: int) -> list[tuple[int, int]]:
        return [(i, min(self.batch, count - i)) for i in range(0, count, self.batch)]

    def _write(self, model: SampledModel, count: int, files: list[Path], bar: ProgressBar) -> float:
        """Draw `count` images into `files`, one each or all in one; the seconds that drawing them took."""
        import torch

        from ipfm.engine.data.image_grid import save_grid, save_images, save_pngs

        seconds, kept = 0.0, []
        for first, size in self._batches(count):
            started = time.perf_counter()
            # On the host: what draws is done with them.
            images = model.draw(first, size).cpu()
            seconds += time.perf_counter() - started
            if self._is_folder():
                # Each batch as it is drawn: a folder may hold more than memory does.
                with user_input():
                    save_pngs(images, files[first : first + size])
            else:
                kept.append(images)
            bar.advance(size)
        if kept:
            with user_input():
                (save_grid if self.out.suffix == ".png" else save_images)(torch.cat(kept), self.out)
        return seconds

    def _facts(
        self, model: SampledModel, seeds: tuple[int, ...] | None, files: list[Path], count: int, seconds: float
    ) -> dict[str, object]:
        from ipfm.models.facts import GeneratorFacts

        return {
            "model": self.model,
            "kind": "generator" if isinstance(model.facts, GeneratorFacts) else "teacher",
            "files": files,
            "images": count,
            "seed": (self.seed or 0) if seeds is None else None,
            "seeds": seeds,
            "classes": self.classes,
            "nfe": model.nfe,
            "D": model.network.D,
            "sigmas": model.sigmas,
            "seconds": seconds,
            "images_per_second": count / max(seconds, 1e-9),
        }

    def _text(self, model: SampledModel, count: int, seconds: float) -> str:
        from ipfm.engine.runtime.wording import counted, significant

        each = f"{counted(model.nfe, 'network evaluation')} each"
        speed = f"{significant(count / max(seconds, 1e-9))} images/s"
        return f"{count} images, {each}, {speed}: {self.out}"


def _typed(name: str) -> str:
    return name.replace("_", "-")
