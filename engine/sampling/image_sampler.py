"""A stored model in Python: loaded in one line, drawn from in another."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipfm.engine.noise_levels import check_sigmas
from ipfm.engine.random_streams import Stream
from ipfm.engine.runtime.host_memory import check_memory
from ipfm.engine.runtime.wording import counted, symbol
from ipfm.engine.sampling.batches import draw_images
from ipfm.engine.sampling.class_labels import ClassLabels, read_labels
from ipfm.engine.sampling.interpolation import path, usual_count
from ipfm.engine.sampling.memory_format import set_memory_format
from ipfm.engine.sampling.samplers import Solver, supported
from ipfm.engine.sampling.seeds import SampleNoise, Seeds, check_between, check_seeds, check_whole
from ipfm.engine.sampling.stored_model import (
    BoundSampler,
    Claim,
    load_denoiser,
    own_sampler,
    taken_for_granted,
)
from ipfm.models import Precond
from ipfm.models.autoencoder import is_latent
from ipfm.models.checkpoints.run_models import locate
from ipfm.models.facts import GeneratorFacts, ModelFacts
from ipfm.models.teacher import Kind

BATCH, HEUN_STEPS = 256, 18

# Messages that the command line shares speak of its options.
_IN_PYTHON = {
    "--generator": "generator=True",
    "--teacher": "load_sampler with teacher=True",
    "--sigmas": "sigmas",
    "--D": "D",
}


class ImageSampler:
    """Draws images from a generator or a teacher, as `load_generator` and `load_sampler` return it."""

    def __init__(self, net: Precond, facts: ModelFacts, path: Path, bound: BoundSampler) -> None:
        self._net, self._facts, self._path, self._bound = net, facts, path, bound

    @property
    def network(self) -> Precond:
        """The network itself, frozen and in eval mode; called with x, sigma and class labels it denoises."""
        return self._net

    @property
    def facts(self) -> ModelFacts:
        """All that its file says of it: the settings of its training, its data, where it was converted from."""
        return self._facts

    @property
    def path(self) -> Path:
        """The folder or file that it was loaded from."""
        return self._path

    @property
    def kind(self) -> Kind:
        """What it is."""
        return "generator" if isinstance(self._facts, GeneratorFacts) else "teacher"

    @property
    def D(self) -> float:
        """Auxiliary dimensions of its prior, in (0, inf]; inf is a diffusion model."""
        return self._net.D

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Its noise levels, the highest first.

        A generator's own: one an evaluation, or the start and the end of a trajectory; a teacher's: one a step.
        """
        return self._bound.sigmas

    @property
    def nfe(self) -> int:
        """Network evaluations an image."""
        return self._bound.nfe

    @property
    def classes(self) -> int:
        """Number of classes; 0 for an unconditional network."""
        return self._net.label_dim

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self._net.config.image_shape

    @property
    def value_range(self) -> tuple[float, float] | None:
        """What black and white are: -1 and 1. Values are not clipped, and may lie a little outside.

        None of a model of latents, which have no such range; `load_autoencoder` decodes them to images in [-1, 1].
        """
        return None if is_latent(self.image_shape) else (-1.0, 1.0)

    @property
    def dataset(self) -> str | None:
        """Name of the data of its training; None where its file does not say it."""
        return self._facts.dataset or None

    @property
    def objective(self) -> str | None:
        """What a generator was distilled by, such as "ipfm"; None for a teacher, or where its file does not say it."""
        return self._facts.objective if isinstance(self._facts, GeneratorFacts) else None

    @property
    def steps_trained(self) -> int | None:
        """Optimiser steps of the training of its weights; None where its file does not say them."""
        return self._facts.optimizer_steps

    @property
    def device(self) -> torch.device:
        """Where it draws, and where images come out."""
        return next(self._net.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; images are float32 always."""
        return self._net.input_dtype

    def to(self, device: str | torch.device) -> ImageSampler:
        """Move it to a device, and return it.

        Args:
            device: such as "cpu", "cuda" or "cuda:1".

        Raises:
            ValueError: there is no such device.
        """
        place = _device(device)
        set_memory_format(self._net, "auto", place)
        self._net.to(place)
        return self

    def sample(
        self,
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        class_labels: ClassLabels | None = None,
        latents: Tensor | None = None,
        *,
        first_index: int = 0,
        batch: int = BATCH,
    ) -> Tensor:
        """Images, the same as `ipfm sample` draws of this model: image i depends on the seed and i alone.

        Args:
            n: number of images; None takes that of the latents or of a list of seeds.
            seed: images first_index..first_index + n - 1 of this seed, as --seed; or a list with a seed for each image,
                which makes the first one of it, as --seeds.
            class_labels: one class for all images; classes, which are taken in turn; or a row for each image,
                (n, classes), one-hot as a rule. None draws the classes by the seed, each as likely.
            latents: (n, C, H, W), x at the highest noise level, sigmas[0], such as `draw_latents` returns: its spread
                is sigmas[0] and not 1. None draws them from the prior. The noise of a generator's later steps, and
                classes that are not given, are the seed's all the same.
            first_index: index of the first image of a seed, >= 0: images are the same whether drawn at once or in
                pieces.
            batch: images at a time. It changes rounding alone.

        Returns:
            images (n, C, H, W), float32, about [-1, 1], on `device`.

        Raises:
            ValueError: a number out of its range, latents of another shape, labels that the network does not know.
        """
        n, seed = _counted(n, seed, latents, first_index)
        return self._draw(n, seed, class_labels, latents, first_index, batch)

    def interpolate(
        self,
        first: int,
        last: int,
        n: int | None = None,
        class_labels: ClassLabels | None = None,
        *,
        through: Sequence[int] = (),
        batch: int = BATCH,
    ) -> Tensor:
        """Images along the path from the latent of a seed to that of another, as `ipfm sample --interpolate` draws it.

        Each latent on the path is distributed as the prior is, at every D: its direction is on the great circle between
        the seeds', at equal angles, and its norm between theirs in normal scores (`ipfm.engine.sampling.interpolation`
        has formulas and reasons). The noise of a generator's later steps moves the same way. The images of the seeds
        themselves are those that `sample` makes of them.

        Args:
            first: the seed of the first image.
            last: the seed of the last one.
            n: number of images, the seeds' included, as even as may be; None makes 8 from each seed to the next.
            class_labels: one class, or a row (n, classes) for each image, such as ones between two classes, which
                networks were not trained with. None takes that of the seeds, if it is the same.
            through: seeds that the path meets in between, which differ from one to the next: it is closed where `last`
                is `first`.
            batch: images at a time. It changes rounding alone.

        Returns:
            images (n, C, H, W), float32, about [-1, 1], on `device`.

        Raises:
            ValueError: a number out of its range, or seeds of different classes.
        """
        seeds = _whole_seeds([first, *through, last])
        if n is not None:
            check_whole("n", n, least=2)
        points = path(seeds, usual_count(seeds) if n is None else n)
        if class_labels is None:
            check_between(points, self.classes)
        return self._draw(len(points), points, class_labels, batch=batch)

    def draw_latents(self, n: int | None = None, seed: int | Sequence[int] = 0, *, first_index: int = 0) -> Tensor:
        """The latents of `sample`: x ~ p_r(. | 0) at the highest noise level, r = sigmas[0] sqrt(D).

        Args:
            n: as of `sample`.
            seed: as of `sample`.
            first_index: as of `sample`.

        Returns:
            (n, C, H, W), float32, on `device`.

        Raises:
            ValueError: a number out of its range.
        """
        n, seed = _counted(n, seed, None, first_index)
        level = self.sigmas[0] if self.kind == "generator" else supported(self._net, [self.sigmas[0]])[0]
        draws = SampleNoise.of(n, seed, first_index, self.device)
        zeros = torch.zeros((n, *self.image_shape), device=self.device)
        at = torch.full((n,), level, device=self.device)
        return draws.perturb(zeros, at, self.D, stream=Stream.SAMPLER_LATENT, step=0)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.image_shape))
        levels = ", ".join(f"{sigma:g}" for sigma in self.sigmas)
        if self.kind == "teacher":
            levels = f"{self.sigmas[0]:g} to {self.sigmas[-1]:g}"
        said = [
            f"{size}{f' {self.dataset}' if self.dataset else ''}",
            counted(self.classes, "class") if self.classes else "unconditional",
            f"D = {symbol(self.D)}",
            f"{counted(self.nfe, 'evaluation')} at sigma {levels}",
            *([self.objective] if self.objective else []),
            *([] if self.steps_trained is None else [counted(f"{self.steps_trained:,}", "step")]),
            str(self.device),
        ]
        return f"<{self.kind}: {'; '.join(said)}>"

    def _draw(
        self,
        n: int,
        seed: Seeds,
        class_labels: ClassLabels | None,
        latents: Tensor | None = None,
        first_index: int = 0,
        batch: int = BATCH,
    ) -> Tensor:
        check_whole("batch", batch, least=1)
        classes, rows = read_labels(class_labels, n, self.classes)
        if rows is not None:
            rows = rows.to(self.device)
        if latents is not None:
            latents = self._latents(latents, n)
        if self.device.type == "cpu":
            needed = 4 * n * math.prod(self.image_shape)
            check_memory(
                needed, f"an array of {counted(f'{n:,}', 'image')}", "draw fewer at a time, from first_index on"
            )
        images = torch.empty((n, *self.image_shape), device=self.device)
        for start in range(0, n, batch):
            part = slice(start, min(start + batch, n))
            images[part] = draw_images(
                self._bound.sampler,
                self._net,
                first_index + start,
                part.stop - start,
                seed=seed,
                classes=classes,
                labels=None if rows is None else rows[part],
                latents=None if latents is None else latents[part],
            )
        return images

    def _latents(self, latents: Tensor, n: int) -> Tensor:
        """The latents where the network is. ValueError: of another kind or shape."""
        if not isinstance(latents, Tensor) or not latents.is_floating_point():
            kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents must be a tensor of floating point numbers, got {kind}")
        shape = (n, *self.image_shape)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        # Half precision has too few digits for a state.
        found = latents.to(self.device, torch.promote_types(latents.dtype, torch.float32))
        if n and self.sigmas[0] >= 2 and self.D >= 16:
            # Where the prior's is next to never so small, at these D.
            spread = float(found.detach().square().flatten(1).mean(1).sqrt().median())
            if 0.8 < spread < 1.25:
                warnings.warn(
                    f"latents have a spread of {spread:.2g}, and this {self.kind} starts from x at sigma "
                    f"{self.sigmas[0]:g}: multiply noise of unit spread by that, or take draw_latents",
                    stacklevel=4,
                )
        return found


def _counted(
    n: int | None, seed: int | Sequence[int], latents: Tensor | None, first_index: int
) -> tuple[int, int | list[int]]:
    """How many images are meant, and the seed, or that of each, as whole numbers.

    Raises:
        ValueError: numbers that cannot be, or not together.
    """
    check_whole("first_index", first_index, least=0)
    given: object = seed.tolist() if hasattr(seed, "tolist") else seed
    several = isinstance(given, Sequence) and not isinstance(given, str)
    seeds = _whole_seeds(given if isinstance(given, Sequence) and several else [given])
    if several and first_index:
        raise ValueError("first_index is for one seed: of a list, each makes its first image")
    if n is None:
        if latents is None and not several:
            raise ValueError("give n, the number of images")
        n = len(seeds) if several or latents is None else len(latents)
    check_whole("n", n, least=0)
    if several and len(seeds) != n:
        raise ValueError(f"seed must be one number or one for each of {n} images, got {len(seeds)}")
    return int(n), seeds if several else seeds[0]


def _whole_seeds(given: Sequence[Any]) -> list[int]:
    """Seeds as they are, or as numbers of NumPy and torch. ValueError: one is none."""
    seeds: list[int] = [seed.tolist() if hasattr(seed, "tolist") else seed for seed in given]
    for seed in seeds:
        check_whole("seed", seed, least=0)
    check_seeds("seed", seeds)
    return seeds


def load_generator(
    path: str | os.PathLike[str],
    *,
    which: str | int | None = None,
    D: float | None = None,
    generator: bool = False,
    sigmas: Sequence[float] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> ImageSampler:
    """A generator, to be drawn from at its own D and noise levels; of one step, of several, or of a trajectory.

    Args:
        path: a run folder, of which a warning says what was taken; a model folder (`generator/`, `generator-best/`, a
            snapshot, an exported folder of `ipfm export`), a checkpoint of a run, of which the average is taken; or a
            file of EDM, PFGM++, SiD or of `ipfm export --format edm`, from which nothing is run.
        which: of a run: "best", "last", a step or an average; see `locate`.
        D: auxiliary dimensions of a file that does not say them.
        generator: a file is a generator, though it does not say so, as those of SiD do not.
        sigmas: noise levels of such a generator, the highest first; 2.5 when None.
        device: where it draws; None takes the GPU if there is one.
        dtype: that it computes in, such as torch.bfloat16; None leaves it to the network.

    Returns:
        The generator, frozen; `sample` and `interpolate` draw, and its attributes say what it is.

    Raises:
        ValueError: one line: there is no generator at `path`, something contradicts its file, or no such device.

    Example:
        >>> import tempfile
        >>> from ipfm.engine import load_generator
        >>> from ipfm.models import build_network, presets, save_model
        >>> folder = tempfile.mkdtemp()
        >>> net = build_network(presets.get("digits", D=128))
        >>> save_model(net, folder, extra={"task": "generator", "sigmas": [2.5]})
        >>> G = load_generator(folder, device="cpu")
        >>> G
        <generator: 1x8x8; unconditional; D = 128; 1 evaluation at sigma 2.5; cpu>
        >>> G.sample(64, seed=0).shape
        torch.Size([64, 1, 8, 8])
    """
    found, remarks = _load(
        path, which, D, device, dtype, generator=generator, levels=() if sigmas is None else check_sigmas(sigmas)
    )
    if found.kind == "teacher":
        claim = "; generator=True says that it is a generator" if found.path.is_file() else ""
        raise ValueError(
            f"{found.path} is a teacher: load_sampler draws from it by Heun's method, and load_teacher gives the "
            f"network{claim}"
        )
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)
    return found


def load_sampler(
    path: str | os.PathLike[str],
    *,
    steps: int | None = None,
    solver: Solver = "heun",
    sigmas: Sequence[float] | None = None,
    which: str | int | None = None,
    D: float | None = None,
    generator: bool = False,
    teacher: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> ImageSampler:
    """A generator or a teacher, to be drawn from at its own D; as `load_generator`, and a teacher by Heun's method.

    Args:
        path: as of `load_generator`.
        steps: of a teacher's sampler; 18, which are 35 evaluations, when None.
        solver: of a teacher's sampler, "heun" or "euler".
        sigmas: noise levels of a teacher's steps, in place of `steps`; or of a file with generator=True.
        which: as of `load_generator`.
        D: as of `load_generator`.
        generator: as of `load_generator`.
        teacher: a file is a teacher, whatever its name and place say.
        device: as of `load_generator`.
        dtype: as of `load_generator`.

    Raises:
        ValueError: as of `load_generator`; or a teacher's option for a generator.
    """
    levels = () if sigmas is None else check_sigmas(sigmas)
    found, remarks = _load(
        path, which, D, device, dtype, generator=generator, teacher=teacher, steps=steps, solver=solver, levels=levels
    )
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)
    return found


def _load(
    path: str | os.PathLike[str],
    which: str | int | None,
    D: float | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    *,
    generator: bool,
    teacher: bool = False,
    steps: int | None = None,
    solver: Solver = "heun",
    levels: tuple[float, ...] = (),
) -> tuple[ImageSampler, list[str]]:
    """The sampler, and what is to be said of it."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"path must be that of a model or a run, got {type(path).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating one of torch's, such as torch.bfloat16, got {dtype!r}")
    place = _device(device)
    taken = locate(path, which)
    try:
        claim = Claim.of(generator=generator, teacher=teacher, sigmas=levels if generator else ())
        net, facts = load_denoiser(taken.path, D=D, claim=claim)
    except ValueError as error:
        raise ValueError(_in_python(str(error))) from None
    if isinstance(facts, GeneratorFacts):
        given = {"steps": steps is not None, "solver": solver != "heun", "sigmas": bool(levels) and not generator}
        if names := ", ".join(name for name, is_given in given.items() if is_given):
            raise ValueError(f"{names} cannot be given: {taken.path} is a generator, which has levels of its own")
    elif levels and steps is not None:
        raise ValueError("sigmas and steps exclude each other: give one of them")
    net.compute_dtype = dtype
    set_memory_format(net, "auto", place)
    bound = own_sampler(
        net.to(place),
        facts,
        taken.path,
        heun_steps=HEUN_STEPS if steps is None else steps,
        sigmas=levels or None,
        solver=solver,
    )
    said = [taken.said("which={!r}")] if taken.taken else []
    said += map(_in_python, taken_for_granted(taken.path, facts, bound.sigmas, claim))
    return ImageSampler(net, facts, taken.path, bound), said


def _device(device: str | torch.device | None) -> torch.device:
    """The device. ValueError: there is none of that name."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f'device must be one of torch\'s, such as "cpu" or "cuda:0", got {device!r}') from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be one that there is: torch sees {torch.cuda.device_count()} GPUs, got {device}")
    return found


def _in_python(text: str) -> str:
    for option, argument in _IN_PYTHON.items():
        text = re.sub(rf"{option}\b", argument, text)
    return text
