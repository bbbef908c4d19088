"""Sampling from a stored model with its own D and noise levels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ipfm.engine.noise_levels import NoiseLevels, check_sigmas
from ipfm.engine.sampling.batches import Sampler, draw_images
from ipfm.engine.sampling.class_labels import check_classes
from ipfm.engine.sampling.denoisers import check_guidance, check_guide
from ipfm.engine.sampling.memory_format import set_memory_format
from ipfm.engine.sampling.samplers import (
    SIGMA_MAX,
    SIGMA_MIN,
    Churn,
    Solver,
    generate,
    heun_sample,
    nfe,
    trajectory_sample,
    usual_range,
)
from ipfm.engine.sampling.seeds import Seeds, check_between
from ipfm.engine.sampling.trajectory import trajectory_network
from ipfm.models import NetworkConfig, Precond, read_config
from ipfm.models.checkpoints.reader import check_D, open_checkpoint
from ipfm.models.checkpoints.run_models import locate
from ipfm.models.facts import GeneratorFacts, ModelFacts, TeacherFacts
from ipfm.models.store import CONFIG_FILE
from ipfm.models.teacher import Kind, load_from_checkpoint, load_from_folder, load_teacher

T = TypeVar("T")


class SampledModel(NamedTuple):
    """A stored model, ready to be sampled."""

    draw: Callable[[int, int], Tensor]
    """(first index, count) -> images (count, C, H, W) in [-1, 1] on the device asked for."""
    network: NetworkConfig
    """Its architecture and D."""
    facts: ModelFacts
    """What it says of itself; a checkpoint only which file it is."""
    nfe: int
    """Network evaluations an image."""
    path: Path
    """Where it was loaded from."""
    sigmas: tuple[float, ...]
    """Its noise levels, the highest first: those of a generator, or of a teacher's steps before what churn adds."""
    remarks: tuple[str, ...] = ()
    """What was taken for granted, a line each."""


@dataclass(frozen=True)
class Schedule:
    """The grid of a teacher's steps [Karras et al. 2022, eq. 5]; what is None is as usual.

    Raises:
        ValueError: a number out of its range, or a range that is empty.
    """

    sigma_min: float | None = None
    """Lowest noise level; None: 0.002, or the lowest that the network knows."""
    sigma_max: float | None = None
    """Highest noise level, where the prior is drawn; None: 80, or the highest that the network knows."""
    rho: float | None = None
    """Exponent: sigma^(1/rho) is spaced evenly; None: 7."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {value:g}")
        low, high = self.sigma_min, self.sigma_max
        if low is not None and high is not None and not low < high:
            raise ValueError(f"sigma_min must be below sigma_max, got {low:g} and {high:g}")

    def named(self) -> dict[str, float]:
        """What it has of its own, by the option's name: another rho than 7, ends other than 0.002 and 80."""
        usual = {"sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX, "rho": NoiseLevels().rho}
        given = {name: getattr(self, name) for name in usual}
        return {name: value for name, value in given.items() if value is not None and value != usual[name]}

    def of(self, net: Precond) -> NoiseLevels:
        """Its ends and rho for a network.

        Raises:
            ValueError: an end that was given lies outside of what the network knows, or leaves no range.
        """
        low, high = usual_range(net)
        # The usual ends, given or not, are clipped to what the network knows.
        own = self.named()
        for name, value in own.items():
            if name != "rho" and not net.sigma_min <= value <= net.sigma_max:
                raise ValueError(
                    f"{name} must lie in what the network knows, [{net.sigma_min:g}, {net.sigma_max:g}], got {value:g}"
                )
        return NoiseLevels(**{"sigma_min": low, "sigma_max": high, **own})


USUAL = Schedule()

# At which SiD's generators are evaluated (Zhou et al. 2024), and IPFM's of one step.
ONE_STEP = (2.5,)


@dataclass(frozen=True)
class Claim:
    """What a user says of a checkpoint that does not say it itself.

    Attributes:
        kind: whether it is a generator or a teacher; None takes what file, name and place say.
        sigmas: noise levels of a generator, the highest first; 2.5 for one that the file says none of.

    Raises:
        ValueError: levels that cannot be, or of what is not said to be a generator.
    """

    kind: Kind | None = None
    sigmas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.sigmas:
            check_sigmas(self.sigmas)
            if self.kind != "generator":
                raise ValueError("sigmas are a generator's: give --generator too, if the checkpoint is one")

    @classmethod
    def of(cls, *, generator: bool, teacher: bool, sigmas: tuple[float, ...] = ()) -> Claim:
        """The claim of two options.

        Args:
            generator: whether --generator was given.
            teacher: whether --teacher was given.
            sigmas: those of a generator.

        Raises:
            ValueError: both were given, or the levels cannot be.
        """
        if generator and teacher:
            raise ValueError("generator and teacher exclude each other: give one of them")
        return cls("generator" if generator else "teacher" if teacher else None, sigmas)


NO_CLAIM = Claim()


@dataclass(frozen=True)
class Guidance:
    """What guides a teacher while it is sampled, see `GuidedDenoiser`.

    Attributes:
        guide: the weaker network, frozen, where images are drawn.
        weight: how far from it; 1 is without.
        path: where it was loaded from.
        remarks: which network of a run was taken.

    Raises:
        ValueError: the weight is no finite number >= 0.
    """

    guide: Precond
    weight: float
    path: Path
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_guidance(self.weight)

    @property
    def networks(self) -> int:
        """Evaluated at each noise level."""
        return 1 if self.weight == 1 else 2


def load_guidance(path: Path | None, weight: float | None, device: torch.device) -> Guidance | None:
    """What the options --guide and --guidance ask for; None without them.

    Args:
        path: of the weaker network: as a teacher's, or a run.
        weight: how far from it.
        device: where images are drawn.

    Raises:
        ValueError: one without the other, a number out of its range, or `path` is no teacher.
    """
    if path is None:
        if weight is not None:
            raise ValueError(f"guidance {weight:g} was given without a guide: give the network that guides as --guide")
        return None
    if weight is None:
        raise ValueError(f"guide {path} was given without guidance: give its factor too, such as --guidance 1.4")
    check_guidance(weight)
    taken = locate(path, teacher=True)
    guide = load_teacher(taken.path)
    set_memory_format(guide, "auto", device)
    return Guidance(guide.to(device), weight, taken.path, (taken.said(),) if taken.taken else ())


def sample_model(
    path: Path,
    device: torch.device,
    *,
    heun_steps: int,
    seed: Seeds,
    D: float | None = None,
    claim: Claim = NO_CLAIM,
    sigmas: tuple[float, ...] | None = None,
    schedule: Schedule = USUAL,
    solver: Solver = "heun",
    churn: Churn | None = None,
    guidance: Guidance | None = None,
    classes: Sequence[int] | None = None,
) -> SampledModel:
    """The model at `path`, to be drawn from.

    A generator is evaluated at the noise levels stored with it, one of a trajectory as its end, from its sigma_max to
    its sigma_min; a teacher is sampled by Heun's method; all at their own D.

    Args:
        path: a model folder, a checkpoint of a run, or a teacher's checkpoint of EDM, EDM2, PFGM++ or SiD.
        device: where images are drawn.
        heun_steps: of a teacher's sampler.
        seed: of the images; of several seeds, image i is the first one of seed[i], or between the first ones of two.
        D: auxiliary dimensions, for a checkpoint that does not say them.
        claim: what a checkpoint is, likewise.
        sigmas: noise levels of a teacher's sampler, in place of heun_steps; see `heun_sample`.
        schedule: ends and rho of the grid of a teacher's sampler, where sigmas are not given.
        solver: of a teacher's sampler, likewise.
        churn: of a teacher's sampler, likewise.
        guidance: of a teacher's sampler, likewise; the guide is on `device`.
        classes: image i is of class classes[i modulo their number]; None draws the classes at random.

    Raises:
        ValueError: there is no such model, D or the claim contradicts it, its stored noise levels are unusable, it is a
            generator in a file without noise levels, of which nothing is claimed, or sigmas or classes are not what the
            network knows.
    """
    net, facts = load_denoiser(path, D=D, claim=claim)
    set_memory_format(net, "auto", device)
    model = sample_network(
        net.to(device),
        facts,
        path,
        heun_steps=heun_steps,
        seed=seed,
        sigmas=sigmas,
        schedule=schedule,
        solver=solver,
        churn=churn,
        guidance=guidance,
        classes=classes,
    )
    remarks = guidance.remarks if guidance is not None else ()
    return model._replace(remarks=(*remarks, *taken_for_granted(path, facts, model.sigmas, claim)))


def taken_for_granted(path: Path, facts: ModelFacts, sigmas: Sequence[float], claim: Claim) -> tuple[str, ...]:
    """What neither the file nor the user says of a checkpoint that is drawn from, a line each.

    Args:
        path: the checkpoint; of a folder there is nothing to say.
        facts: from `load_denoiser`.
        sigmas: the levels that are drawn at.
        claim: what the user says.
    """
    if "unsaid" in facts.source and not facts.order:
        return (
            f"{path.name} holds an average alone, as snapshots of SiD's generators do: it is taken for a teacher; "
            "give --generator if it is one",
        )
    # What a file says of itself has an order.
    if claim.kind != "generator" or facts.order:
        return ()
    levels = ", ".join(f"{sigma:g}" for sigma in sigmas)
    unsaid = {} if claim.sigmas else {"--sigmas": f"sigma {levels}"}
    if facts.source.get("D") == "assumed":
        unsaid["--D"] = f"D = {facts.D:g}"
    if not unsaid:
        return ()
    others = "says another" if len(unsaid) == 1 else "say others"
    return (f"{path.name} is drawn from at {' and '.join(unsaid.values())}; {' and '.join(unsaid)} {others}",)


def sample_network(
    net: Precond,
    facts: ModelFacts,
    path: Path,
    *,
    heun_steps: int,
    seed: Seeds,
    sigmas: tuple[float, ...] | None = None,
    schedule: Schedule = USUAL,
    solver: Solver = "heun",
    churn: Churn | None = None,
    guidance: Guidance | None = None,
    classes: Sequence[int] | None = None,
) -> SampledModel:
    """A network that has been loaded, to be drawn from where it lies; as `sample_model`.

    Args:
        net: from `load_denoiser`.
        facts: from `load_denoiser`.
        path: where it was loaded from.
        heun_steps: of a teacher's sampler.
        seed: of the images.
        sigmas: noise levels of a teacher's sampler.
        schedule: ends and rho of its grid, where sigmas are not given.
        solver: of a teacher's sampler.
        churn: of a teacher's sampler.
        guidance: of a teacher's sampler.
        classes: of the images.

    Raises:
        ValueError: its stored noise levels are unusable, sigmas or classes are not what the network knows, or an image
            lies between two seeds of different classes.
    """
    if classes is not None:
        check_classes(classes, net.label_dim)
    else:
        check_between(seed, net.label_dim)
    sampler, nfe, levels = own_sampler(
        net,
        facts,
        path,
        heun_steps=heun_steps,
        sigmas=sigmas,
        schedule=schedule,
        solver=solver,
        churn=churn,
        guidance=guidance,
    )
    return SampledModel(
        lambda first, count: draw_images(sampler, net, first, count, seed=seed, classes=classes),
        net.config,
        facts,
        nfe,
        path,
        levels,
    )


class BoundSampler(NamedTuple):
    """How a network is sampled."""

    sampler: Sampler
    """With its network, D and noise levels."""
    nfe: int
    """Network evaluations an image."""
    sigmas: tuple[float, ...]
    """As `SampledModel.sigmas`."""


def own_sampler(
    net: Precond,
    facts: ModelFacts,
    path: Path,
    *,
    heun_steps: int,
    sigmas: tuple[float, ...] | None = None,
    schedule: Schedule = USUAL,
    solver: Solver = "heun",
    churn: Churn | None = None,
    guidance: Guidance | None = None,
) -> BoundSampler:
    """The sampler of a network that has been loaded: a generator's own, or a teacher's.

    Args:
        net: from `load_denoiser`.
        facts: from `load_denoiser`.
        path: where it was loaded from.
        heun_steps: of a teacher's sampler.
        sigmas: noise levels of a teacher's sampler.
        schedule: ends and rho of its grid, where sigmas are not given.
        solver: of a teacher's sampler.
        churn: of a teacher's sampler.
        guidance: of a teacher's sampler.

    Raises:
        ValueError: its stored noise levels are unusable, sigmas are not what the network knows, or the guide does not
            fit it.
    """
    if isinstance(facts, GeneratorFacts):
        return _generator_sampler(net, facts, facts_file(path))
    return _teacher_sampler(net, heun_steps, sigmas, schedule, solver, churn, guidance)


def load_denoiser(
    path: Path, *, D: float | None, claim: Claim = NO_CLAIM
) -> tuple[Precond, TeacherFacts | GeneratorFacts]:
    """A stored network, frozen and in eval mode, on the CPU, and what it says of itself.

    Args:
        path: a model folder, a checkpoint of a run, or a checkpoint of EDM, EDM2, PFGM++ or SiD.
        D: the auxiliary dimensions it is expected to be trained for; None takes what it says.
        claim: what a checkpoint is.

    Raises:
        ValueError: there is no such network, D or the claim contradicts it, or it is a generator in a checkpoint, which
            holds no noise levels, and nothing is claimed of it.
    """
    if path.is_file():
        checkpoint = open_checkpoint(path)
        name = checkpoint.choose()
        if claim.kind is None and checkpoint.facts is None and (why := checkpoint.why_generator(name)):
            raise ValueError(
                f"{checkpoint.where}: {name} is a generator, {why}, whose noise levels the file does not hold: give "
                f"--generator, which draws in one step at {ONE_STEP[0]:g}, or at those of --sigmas; --teacher if it is "
                "a teacher after all"
            )
        says_levels = claim.kind != "generator" or isinstance(checkpoint.facts, GeneratorFacts)
        sigmas = claim.sigmas or (() if says_levels else ONE_STEP)
        net = load_from_checkpoint(checkpoint, D=D, network=name, kind=claim.kind, sigmas=sigmas)
        assert net.facts is not None
        return net, net.facts
    check_D(D)
    stored = read_config(path)
    if claim.kind is not None:
        own = "generator" if isinstance(stored.facts, GeneratorFacts) else "teacher"
        raise ValueError(f"{claim.kind} was given, but {path} is a model folder, which says that it is a {own}")
    net = load_from_folder(stored, D=D)
    return net, net.facts or stored.facts


def facts_file(path: Path) -> Path:
    """The file that says what a stored network is: the config.json of a folder, or the checkpoint itself."""
    return path if path.is_file() else path / CONFIG_FILE


def fingerprint(path: Path) -> str:
    """SHA-256 of the weights of a model folder, or of a checkpoint's file: the same for a copy of it.

    Raises:
        ValueError: there is no such model.
    """
    if not path.is_file():
        return read_config(path).sha256
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _teacher_sampler(
    net: Precond,
    steps: int,
    sigmas: tuple[float, ...] | None,
    schedule: Schedule,
    solver: Solver,
    churn: Churn | None,
    guidance: Guidance | None,
) -> BoundSampler:
    guide: dict[str, Any] = {}
    each = 1
    if guidance is not None:
        check_guide(net, guidance.guide)
        guide = {"guide": guidance.guide, "guidance": guidance.weight}
        each = guidance.networks
    bound = partial(heun_sample, net, D=net.D, solver=solver, churn=churn, **guide)
    if sigmas is None:
        noise = schedule.of(net)
        ends = {"sigma_min": noise.sigma_min, "sigma_max": noise.sigma_max, "rho": noise.rho}
        grid = tuple(noise.karras(steps)[:-1].tolist())
        return BoundSampler(partial(bound, steps=steps, **ends), each * nfe(steps, solver), grid)
    levels = check_sigmas(sigmas)
    if not (net.sigma_min <= levels[-1] and levels[0] <= net.sigma_max):
        raise ValueError(
            f"sigmas must lie in what the network knows, [{net.sigma_min:g}, {net.sigma_max:g}], "
            f"got {', '.join(f'{sigma:g}' for sigma in levels)}"
        )
    return BoundSampler(partial(bound, sigmas=levels), each * nfe(len(levels), solver), levels)


def _generator_sampler(net: Precond, facts: GeneratorFacts, where: Path) -> BoundSampler:
    """The sampler that the config.json at `where` says."""
    levels = generator_levels(net, facts, where)
    if isinstance(levels, NoiseLevels):
        sampler = partial(trajectory_sample, net, D=net.D, sigma_max=levels.sigma_max, sigma_min=levels.sigma_min)
        return BoundSampler(sampler, 1, (levels.sigma_max, levels.sigma_min))
    return BoundSampler(partial(generate, net, D=net.D, sigmas=levels), len(levels), levels)


def generator_levels(net: Precond, facts: GeneratorFacts, where: Path) -> tuple[float, ...] | NoiseLevels:
    """The levels of a generator's evaluations, or the ends of the trajectory that it knows.

    Args:
        net: the generator.
        facts: what it says of itself.
        where: the config.json, for the messages.

    Raises:
        ValueError: `facts` hold no usable levels, or ones for another kind of network.
    """
    kind = facts.others.get("parametrisation", facts.parametrisation)
    if kind not in (None, "trajectory"):
        raise ValueError(f"{where}: parametrisation {kind!r} is unknown; possible: trajectory, or none for a denoiser")
    if kind is not None:
        trajectory_network(net)
    try:
        if kind is None:
            return check_sigmas(tuple(_stored(facts, "sigmas", facts.sigmas)))
        return NoiseLevels(
            sigma_max=_stored(facts, "sigma_max", facts.sigma_max),
            sigma_min=_stored(facts, "sigma_min", facts.sigma_min),
        )
    except KeyError as error:
        raise ValueError(f"{where} holds no usable noise levels of a generator: no {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} holds no usable noise levels of a generator: {error}") from error


def _stored(facts: GeneratorFacts, key: str, value: T | None) -> T:
    """`value`, or for the check that refuses it whatever the file has instead. KeyError: it has nothing there."""
    return facts.others[key] if value is None else value
