"""`ipfm sample`: images from a generator or a teacher."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from ipfm.engine.checks import option_name
from ipfm.engine.commands.processes import joined
from ipfm.engine.runtime.commandline import user_input
from ipfm.engine.runtime.json_output import output
from ipfm.engine.runtime.launcher import forget_launch, is_launched, launched_processes, launched_rank

if TYPE_CHECKING:
    from ipfm.engine.commands.sample.destination import Destination
    from ipfm.engine.distributed.world import World
    from ipfm.engine.runtime.progress import ProgressBar
    from ipfm.engine.sampling.interpolation import Between
    from ipfm.engine.sampling.samplers import Churn
    from ipfm.engine.sampling.stored_model import Claim, Guidance, SampledModel, Schedule
    from ipfm.models import NetworkConfig
    from ipfm.models.autoencoder import Autoencoder


IMAGES, HEUN_STEPS = 64, 18
# The largest numbers that are taken: above them is a slip of the keyboard.
MOST = {"n": 10**12, "batch": 10**12, "heun_steps": 100_000}
# The ends of EDM's names for what churn is made of, and of these.
CHURN = {"churn": "", "min": "-min", "max": "-max", "noise": "-noise"}
SCHEDULE = ("sigma_min", "sigma_max", "rho")
# Options of a teacher's sampler; a generator's is its own.
OF_A_TEACHER = (
    *("heun_steps", "solver", "sigmas", *SCHEDULE, "churn", "churn_min", "churn_max", "churn_noise"),
    *("guide", "guidance"),
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw images from a generator or a teacher.

    Example: ipfm sample runs/digits-D128-alpha1-K1/generator --n 64 --out digits.png
    """

    ELSEWHERE: ClassVar[Mapping[str, str]] = {
        "steps": "the number of steps is a generator's own; --heun-steps is for a teacher",
        "network": "the model comes first, without an option",
        "gnet": "the network that guides is --guide",
        "init-sigma": "it is --sigmas, for a checkpoint that is a --generator",
        **{f"S-{end}": f"it is --churn{own}" for end, own in CHURN.items()},
        "disc": "the levels are EDM's own, by --rho, --sigma-min and --sigma-max, or those of --sigmas",
        **dict.fromkeys(("schedule", "scaling"), "a teacher is sampled by EDM's own schedule and scaling"),
    }

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Model or run folder, or a checkpoint: of a run, EDM, EDM2, PFGM++ or SiD. A generator's D and noise levels are
    its own; a teacher is sampled with Heun's method."""
    out: Path = Path("samples.png")
    """A .png (one grid), a .npz (images NHWC, uint8), or a folder: one PNG an image, named by its seed or index, which
    several processes share (deepspeed .venv/bin/ipfm sample ...)."""
    add: bool = False
    """Put images into a folder with others; they replace those of their names."""
    subdirs: bool = False
    """Put each 1000 images into a sub-folder: 000000, 001000, ..."""
    n: int | None = None
    """Number of images. Default: 64."""
    seed: int | None = None
    """Image i of a seed is the same whatever number and batch. Default: 0."""
    seeds: Annotated[str | None, tyro.conf.arg(metavar="0,3,7-12")] = None
    """The first image of each of these seeds, in place of --n and --seed."""
    interpolate: Annotated[tuple[int, ...], tyro.conf.arg(metavar="0 1 ...")] = ()
    """--n images (8) from seed to seed, by latents of the prior's law."""
    classes: Annotated[str | None, tyro.conf.arg(metavar="0,1,2")] = None
    """Classes of the images, in turn, or one for all. Default: drawn at random."""
    batch: int = 256
    """Images at a time."""
    heun_steps: int | None = None
    """Steps of a teacher's sampler. Default: 18, of 35 network evaluations."""
    solver: Literal["heun", "euler"] | None = None
    """Of a teacher: heun, the default, is of second order; euler of first, with one network evaluation a step."""
    sigmas: tuple[float, ...] = ()
    """Noise levels, highest first: of a teacher's steps, or of --generator."""
    sigma_min: float | None = None
    """Lowest noise level of a teacher's steps. Default: 0.002 or the network's."""
    sigma_max: float | None = None
    """Highest, where the prior is drawn. Default: 80 or the network's."""
    rho: float | None = None
    """Spacing of the levels: more puts more of them at low noise. Default: 7."""
    churn: float | None = None
    """Sample a teacher stochastically, S_churn of EDM; exact at D = inf alone."""
    churn_min: float | None = None
    """S_tmin, the lowest noise level that noise is added to. Default: 0."""
    churn_max: float | None = None
    """S_tmax, the highest. Default: inf."""
    churn_noise: float | None = None
    """S_noise, factor of the noise added. Default: 1."""
    guide: Annotated[Path | None, tyro.conf.arg(metavar="MODEL")] = None
    """Guide a teacher by this weaker one: without classes, or trained less."""
    guidance: Annotated[float | None, tyro.conf.arg(metavar="W")] = None
    """How far from --guide, such as 1.4; 1 is without. Twice the evaluations."""
    D: float | None = None
    """Auxiliary dimensions of a checkpoint that does not say them."""
    which: Annotated[str | None, tyro.conf.arg(metavar="WHICH")] = None
    """Of a run: best, last, a step, ema0.05. Default: the end's, else the best."""
    generator: bool = False
    """The checkpoint is a generator: one step at sigma 2.5, or at --sigmas."""
    teacher: bool = False
    """The checkpoint is a teacher, whatever its name and place say."""
    vae: Annotated[Path | None, tyro.conf.arg(metavar="VAE")] = None
    """Of a model of latents: the AutoencoderKL that makes pictures of them."""
    json: bool = False
    """Print JSON: files, seeds, nfe, D, sigmas, non-finite images, remarks, seconds, images/s."""

    def run(self) -> None:
        """Write the images to `out`."""
        from ipfm.engine.distributed.device import run_device
        from ipfm.engine.distributed.launch_environment import check_environment, environment_remarks
        from ipfm.engine.runtime.host_memory import enough_memory
        from ipfm.engine.runtime.progress import ProgressBar
        from ipfm.engine.runtime.remarks import Remarks
        from ipfm.engine.runtime.wording import counted
        from ipfm.engine.sampling.stored_model import load_guidance, sample_model
        from ipfm.models.autoencoder import load_autoencoder
        from ipfm.models.checkpoints.run_models import locate

        with user_input():
            self._check()
            if is_launched():
                check_environment()
            alone = self._alone()
            if alone and launched_rank():
                return
            seeds = None if self.seeds is None else self._seeds(self.seeds)
            points = self._points()
            classes = self._classes()
            churn = self._churn()
            guidance = load_guidance(self.guide, self.guidance, run_device())
            taken = locate(self.model, self.which)
            model = sample_model(
                taken.path,
                run_device(),
                heun_steps=HEUN_STEPS if self.heun_steps is None else self.heun_steps,
                seed=points or seeds or self.seed or 0,
                D=self.D,
                claim=self._claim(),
                sigmas=self.sigmas or None,
                schedule=self._schedule(),
                solver=self.solver or "heun",
                churn=churn,
                guidance=guidance,
                classes=classes,
            )
            self._check_model(model)
            autoencoder = None if self.vae is None else load_autoencoder(self.vae, run_device())
            model, shape = _shown(model, autoencoder)
            names = seeds or range(len(points) or self.n or IMAGES)
            self._check_memory(model.network, len(names))
            destination = self._destination(model, guidance, names, shape, autoencoder)
        remarks = Remarks()
        if alone:
            forget_launch()
        # Waits for all processes, so that each has seen the folder as it was.
        with user_input():
            world = joined()
        said = (taken.said(),) if taken.taken else ()
        remarked = (*alone, *said, *environment_remarks(), *model.remarks, *destination.remarks)
        remarked += () if autoencoder is None else autoencoder.remarks
        for remark in remarked if world.is_main else ():
            remarks.add(remark)
        with output(as_json=self.json) as write:
            # Whole batches, so that an image is the same to the bit however many processes there are.
            starts = range(world.rank * self.batch, len(names), world.size * self.batch)
            total = len(starts) * self.batch - max(0, starts[-1] + self.batch - len(names)) if starts else 0
            bar = ProgressBar("sample", total, enabled=world.is_main)
            with bar, enough_memory("give a smaller --batch"):
                seconds, bad = self._write(model, starts, len(names), destination, bar, world)
            if not world.is_main:
                return
            if bad:
                remarks.add(
                    f"{counted(bad, 'image')} of {len(names):,} {'is' if bad == 1 else 'are'} not finite, and black "
                    "where that is so"
                )
            more = {"non_finite": bad, "remarks": list(remarks)}
            facts = self._facts(model, seeds, points, destination, names, seconds) if self.json else {}
            write(facts | more, self._text(model, len(names), seconds))

    def _check(self) -> None:
        """ValueError: options that cannot be, or not together."""
        from ipfm.engine.noise_levels import check_sigmas
        from ipfm.engine.runtime.files import unwritable_ancestor
        from ipfm.engine.sampling.seeds import check_seeds

        for name in ("n", "batch", "heun_steps"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST[name]:
                limit = "at least 1" if value < 1 else f"at most {MOST[name]:,}"
                raise ValueError(f"{option_name(name)} must be {limit}, got {value}")
        check_seeds("seed", [self.seed or 0])
        for name, others in (
            ("seeds", ("n", "seed")),
            ("interpolate", ("seed", "seeds", "churn")),
            ("sigmas", ("heun_steps", *SCHEDULE)),
        ):
            both = [other for other in others if name in self._given() and other in self._given()]
            if both:
                raise ValueError(f"{name} and {option_name(both[0])} exclude each other: give one of them")
        if self.sigmas:
            check_sigmas(self.sigmas)
        if not self._is_folder() and self._suffix() not in (".png", ".npz"):
            raise ValueError(f"out must end in .png or .npz, or be a folder (no suffix), got {self.out}")
        if self.add and not self._is_folder():
            raise ValueError(f"add is for folders, got the file {self.out}, which is replaced")
        if self.subdirs and not self._is_folder():
            raise ValueError(f"subdirs is for folders, got the file {self.out}: name a folder (no suffix) as --out")
        if self._is_folder() and self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out must end in .png or .npz, or be a folder, got the file {self.out}")
        if (above := unwritable_ancestor(self.out if self.out.is_dir() else self.out.absolute().parent)) is not None:
            raise ValueError(f"out cannot be written to {self.out}: {above} is no folder that takes files")

    def _given(self) -> set[str]:
        """The options that may be left out and were not."""
        return {
            name
            for name in ("n", "seed", "seeds", "interpolate", *OF_A_TEACHER)
            if getattr(self, name) not in (None, ())
        }

    def _seeds(self, text: str) -> tuple[int, ...]:
        from ipfm.engine.sampling.seeds import check_seeds, read_numbers

        seeds = read_numbers("seeds", text)
        check_seeds("seeds", seeds)
        if self._is_folder() and len(set(seeds)) < len(seeds):
            twice = Counter(seeds).most_common(1)[0][0]
            raise ValueError(f"seeds must differ where each names a file in a folder, got {twice} twice")
        return seeds

    def _points(self) -> tuple[int | Between, ...]:
        """The path of --interpolate, a point for each image; () without it."""
        from ipfm.engine.sampling.interpolation import path, usual_count
        from ipfm.engine.sampling.seeds import check_seeds

        if not self.interpolate:
            return ()
        check_seeds("interpolate", self.interpolate)
        return path(self.interpolate, usual_count(self.interpolate) if self.n is None else self.n)

    def _classes(self) -> tuple[int, ...] | None:
        from ipfm.engine.sampling.seeds import read_numbers

        classes = None if self.classes is None else read_numbers("classes", self.classes)
        if classes is not None and self.interpolate and len(set(classes)) > 1:
            raise ValueError(
                f"interpolate is within one class, as the network knows nothing between classes: got {self.classes}"
            )
        return classes

    def _schedule(self) -> Schedule:
        from ipfm.engine.sampling.stored_model import Schedule

        return Schedule(sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)

    def _churn(self) -> Churn | None:
        from ipfm.engine.sampling.samplers import Churn

        values = {"sigma_min": self.churn_min, "sigma_max": self.churn_max, "noise": self.churn_noise}
        given = {name: value for name, value in values.items() if value is not None}
        if self.churn is not None:
            return Churn(amount=self.churn, **given)
        if given:
            raise ValueError("churn-min, churn-max and churn-noise need churn: give --churn too, or leave them out")
        return None

    def _claim(self) -> Claim:
        from ipfm.engine.sampling.stored_model import Claim

        own = self.sigmas if self.generator else ()
        return Claim.of(generator=self.generator, teacher=self.teacher, sigmas=own)

    def _check_model(self, model: SampledModel) -> None:
        """ValueError: options for a teacher, and it is a generator; a picture that PNG does not know."""
        from ipfm.models.autoencoder import SHOWS, is_latent
        from ipfm.models.facts import GeneratorFacts

        own = {"sigmas"} if self.generator else set()
        given = [option_name(name) for name in OF_A_TEACHER if name in self._given() - own]
        if given and isinstance(model.facts, GeneratorFacts):
            raise ValueError(
                f"{', '.join(given)} cannot be given: {self.model} is a generator, which has noise levels of its own"
            )
        channels = model.network.img_channels
        latent = is_latent(model.network.image_shape)
        if latent and self.vae is None and (self._is_folder() or self._suffix() == ".png"):
            raise ValueError(f"out must end in .npz for latents, which {self.model} makes, got {self.out}; or {SHOWS}")
        if not latent and channels not in (1, 3) and (self._is_folder() or self._suffix() == ".png"):
            raise ValueError(f"out must end in .npz for images of {channels} channels, got {self.out}")

    def _is_folder(self) -> bool:
        return self.out.is_dir() or not self.out.suffix

    def _suffix(self) -> str:
        return self.out.suffix.lower()

    def _check_memory(self, network: NetworkConfig, count: int) -> None:
        """ValueError: not even a layer of the network fits into the host's memory for a batch."""
        from ipfm.engine.distributed.device import run_device
        from ipfm.engine.runtime.host_memory import check_memory

        channels, height, width = network.image_shape
        size = min(self.batch, count)
        # The images, and where the network is on the host too its input and an activation of the first level.
        each = 4 * channels + (4 * (channels + 2 * network.model_channels) if run_device().type == "cpu" else 0)
        check_memory(size * height * width * each, f"a batch of {size:,} images", "give a smaller --batch")

    def _destination(
        self,
        model: SampledModel,
        guidance: Guidance | None,
        names: Sequence[int],
        shape: tuple[int, int, int],
        autoencoder: Autoencoder | None,
    ) -> Destination:
        """Where the images go. ValueError: they would be mixed with others, or do not fit there."""
        from ipfm.engine.commands.sample.destination import Array, Folder, Picture

        if self._is_folder():
            return Folder(
                self.out,
                names,
                self._made_by(model, guidance, len(names), autoencoder),
                add=self.add,
                subdirs=self.subdirs,
            )
        if self._suffix() == ".png":
            return Picture(self.out, len(names), shape, in_a_row=bool(self.interpolate))
        return Array(self.out, len(names), shape)

    def _made_by(
        self, model: SampledModel, guided: Guidance | None, count: int, autoencoder: Autoencoder | None
    ) -> dict[str, object]:
        """All that changes an image but its number."""
        from ipfm.engine.runtime.json_output import plain
        from ipfm.engine.sampling.stored_model import fingerprint

        seed: object = (self.seed or 0) if self.seeds is None else "each its own"
        if self.interpolate:
            seed = f"{count} images through {', '.join(map(str, self.interpolate))}"
        own = {name: getattr(self, name) for name in ("solver", "churn", "churn_min", "churn_max", "churn_noise")}
        made = {
            "model": fingerprint(model.path),
            "D": model.network.D,
            "sigmas": model.sigmas,
            "classes": self.classes,
            "seed": seed,
            **{name: value for name, value in own.items() if value is not None},
            **({} if autoencoder is None else {"vae": fingerprint(autoencoder.file)}),
            **self._schedule().named(),
            **({"guide": fingerprint(guided.path), "guidance": guided.weight} if guided is not None else {}),
        }
        return {name: plain(value) for name, value in made.items()}

    def _alone(self) -> list[str]:
        """Says that one of several processes draws all images, where they go into one file; else nothing."""
        if self._is_folder() or launched_processes() == 1:
            return []
        return [
            f"one of {launched_processes()} processes draws all images of {self.out}: several share those of a folder"
        ]

    def _write(
        self,
        model: SampledModel,
        starts: range,
        count: int,
        destination: Destination,
        bar: ProgressBar,
        world: World,
    ) -> tuple[float, int]:
        """Draw the batches that begin at `starts` of `count` images.

        Returns:
            the most seconds that a process took, and how many images of all processes are not finite.
        """
        from torch import tensor

        seconds, bad = 0.0, 0
        with destination.opened():
            for first in starts:
                started = time.perf_counter()
                # On the host: what draws is done with them.
                images = model.draw(first, min(self.batch, count - first)).cpu()
                seconds += time.perf_counter() - started
                bad += int((~images.isfinite()).flatten(1).any(1).sum())
                destination.write(first, images)
                bar.advance(len(images))
        longest = world.all_reduce_max_(tensor(seconds, device=world.device))
        return float(longest), int(world.all_reduce_sum_(tensor(bad, device=world.device)))

    def _facts(
        self,
        model: SampledModel,
        seeds: tuple[int, ...] | None,
        points: tuple[int | Between, ...],
        destination: Destination,
        names: Sequence[int],
        seconds: float,
    ) -> dict[str, object]:
        from ipfm.engine.commands.sample.destination import Folder
        from ipfm.engine.sampling.interpolation import shares
        from ipfm.models.facts import GeneratorFacts

        count, place = len(names), destination
        files = [place.file(index) for index in range(count)] if isinstance(place, Folder) else [self.out]
        return {
            "model": self.model,
            "taken": model.path,
            "kind": "generator" if isinstance(model.facts, GeneratorFacts) else "teacher",
            "files": files,
            "images": count,
            "seed": None if seeds or points else self.seed or 0,
            "seeds": seeds,
            "interpolated": [shares(point) for point in points] or None,
            "classes": self.classes,
            "nfe": model.nfe,
            "D": model.network.D,
            "sigmas": model.sigmas,
            "guide": self.guide,
            "guidance": self.guidance,
            "seconds": seconds,
            "images_per_second": count / max(seconds, 1e-9),
            **({} if self.vae is None else {"vae": self.vae}),
        }

    def _text(self, model: SampledModel, count: int, seconds: float) -> str:
        from ipfm.engine.runtime.wording import counted, significant

        each = f"{counted(model.nfe, 'network evaluation')} each"
        speed = f"{significant(count / max(seconds, 1e-9))} images/s"
        return f"{count} images, {each}, {speed}: {self.out}"


def _shown(model: SampledModel, autoencoder: Autoencoder | None) -> tuple[SampledModel, tuple[int, int, int]]:
    """The model, drawing the pictures of its latents where there is an autoencoder; and (C, H, W) of what it draws.

    Raises:
        ValueError: an autoencoder for a model that makes no latents.
    """
    shape = model.network.image_shape
    if autoencoder is None:
        return model, shape
    draw, decode = model.draw, autoencoder.decode
    return model._replace(draw=lambda first, count: decode(draw(first, count))), autoencoder.shape_of_pictures(shape)
