"""What a network is sampled with unless it is asked otherwise: the D, the noise levels and the labels it was made with.

A network that was read from disk knows what it is (`Precond.facts`): what it was not made with is refused there, unless
the caller overrides it. Any other network takes what it is given, and its own D where none is.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ipfm.engine.noise_levels import check_sigmas
from ipfm.engine.sampling.seeds import SampleNoise
from ipfm.models.facts import GeneratorFacts, TeacherFacts

ASK = "give override=True for another"


def facts_of(net: object) -> TeacherFacts | GeneratorFacts | None:
    """What the file of a network says of it; None for a network that was not read from one."""
    found = getattr(net, "facts", None)
    return found if isinstance(found, (TeacherFacts, GeneratorFacts)) else None


def check_given(net: object, latents: object, class_labels: object) -> None:
    """Check that a sampler was given a network, and tensors where it takes tensors.

    Raises:
        ValueError: something else, such as the path of a network.
    """
    if isinstance(net, (str, os.PathLike)):
        raise ValueError(
            f"the samplers take a network, got the path {os.fspath(net)!r}: load it first, a generator or a model "
            "folder by load_model, a teacher by load_teacher"
        )
    # A network's class is callable too.
    if isinstance(net, type) or not (callable(net) and hasattr(net, "img_channels") and hasattr(net, "img_resolution")):
        kind = f"the class {net.__name__}" if isinstance(net, type) else type(net).__name__
        raise ValueError(f"the samplers take a network with img_channels and img_resolution, got {kind}")
    for name, value, more in (
        ("latents", latents, ""),
        ("class_labels", class_labels, "; numbers of classes become rows by one_hot"),
    ):
        if value is not None and not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}{more}")


def own_D(net: object, D: float | None, *, override: bool) -> float:
    """`D`, or the network's own.

    Raises:
        ValueError: it has none and none is given, or it was made for another one.
    """
    own = getattr(net, "D", None)
    if D is None:
        if own is None:
            raise ValueError("give D, the auxiliary dimensions of the prior: the network does not say them")
        return float(own)
    if not isinstance(D, numbers.Real):
        raise ValueError(f"D must be a number in (0, inf], got {D!r}")
    facts = facts_of(net)
    if override or own is None or facts is None or _same(D, own):
        return D
    if facts.source.get("D") == "assumed":
        way = "which is assumed, for its file says none: load it with the D that it was trained for"
        raise ValueError(f"the network has D = {own:g}, {way}, or {ASK}; got D = {D:g}")
    raise ValueError(f"the network was made for D = {own:g}, got D = {D:g}: leave D out, or {ASK}")


def own_levels(net: object, sigmas: Sequence[float] | None, *, override: bool) -> tuple[float, ...]:
    """`sigmas`, or those of a generator's evaluations.

    Raises:
        ValueError: none are given to a network that has none, or others than its own; the network is sampled in another
            way.
    """
    facts = facts_of(net)
    if isinstance(facts, GeneratorFacts) and facts.is_trajectory and not override:
        raise ValueError("the network knows trajectories: draw from it with trajectory_sample")
    own = facts.sigmas if isinstance(facts, GeneratorFacts) else None
    if sigmas is None:
        if own is None:
            raise ValueError("give sigmas, the noise levels of its evaluations: the network does not say them")
        return check_sigmas(own)
    levels = check_sigmas(sigmas)
    if override or own is None or (len(own) == len(levels) and all(map(_same, own, levels))):
        return levels
    raise ValueError(
        f"the generator was made for sigmas {_listed(own)}, got {_listed(levels)}: leave them out, or {ASK}"
    )


def own_ends(net: object, high: float | None, low: float | None, *, override: bool) -> tuple[float, float]:
    """`high` and `low`, or the ends of the trajectory that the network knows; 80 and 0.002 where it does not say them.

    Raises:
        ValueError: others than its own, or a generator that knows no trajectory.
    """
    facts = facts_of(net)
    if isinstance(facts, GeneratorFacts) and not facts.is_trajectory and not override:
        raise ValueError("the generator knows no trajectory: draw from it with generate")

    def end(name: str, given: float | None, usual: float) -> float:
        own: float | None = getattr(facts, name, None)
        if given is None:
            return usual if own is None else own
        if not isinstance(given, numbers.Real):
            raise ValueError(f"{name} must be a number > 0, got {given!r}")
        if own is not None and not override and not _same(given, own):
            raise ValueError(f"the network was made for {name} = {own:g}, got {given:g}: leave it out, or {ASK}")
        return given

    return end("sigma_max", high, 80.0), end("sigma_min", low, 0.002)


def own_labels(net: object, labels: Tensor | None, draws: SampleNoise) -> Tensor | None:
    """`labels`, or for a conditional network that was read from disk some that are drawn, as `ipfm sample` does.

    Raises:
        ValueError: labels for one that knows no classes.
    """
    if facts_of(net) is None:
        return labels
    classes = getattr(net, "label_dim", 0)
    if labels is None:
        return draws.labels(classes)
    if not classes and labels.numel():
        raise ValueError("class_labels were given, but the network is unconditional: leave them out")
    return labels


def check_denoiser(net: object, *, override: bool) -> None:
    """Check that a network is no generator, which knows its own noise levels alone.

    Raises:
        ValueError: it is one.
    """
    facts = facts_of(net)
    if isinstance(facts, GeneratorFacts) and not override:
        how = "trajectory_sample" if facts.is_trajectory else "generate"
        raise ValueError(
            f"the network is a generator, which knows its own noise levels alone: draw from it with {how}, or give "
            "override=True to sample it as a teacher"
        )


def _same(a: object, b: object) -> bool:
    if not all(isinstance(value, (int, float)) for value in (a, b)):
        return False
    return a == b or math.isclose(a, b, rel_tol=1e-6)  # type: ignore[arg-type]


def _listed(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:g}" if isinstance(sigma, (int, float)) else repr(sigma) for sigma in sigmas)
