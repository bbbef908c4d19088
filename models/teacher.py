"""A network from wherever it is stored: a folder of our own format, or a checkpoint of EDM, EDM2, PFGM++ or SiD."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ipfm.models.checkpoints.reader import Checkpoint, ImportedNetwork, check_D, open_checkpoint
from ipfm.models.checkpoints.recognise import models_in
from ipfm.models.facts import GeneratorFacts, TeacherFacts
from ipfm.models.forced_weight_norm import PlainWeight
from ipfm.models.precond import Precond, build_network
from ipfm.models.store import StoredConfig, load_stored, located, read_config

Kind = Literal["generator", "teacher"]
_NO_TEACHER = "which knows its own few noise levels alone, and no teacher, a denoiser at all levels"


def load_teacher(
    path: str | os.PathLike[str],
    *,
    D: float | None = None,
    network: str | None = None,
    anyway: bool = False,
    which: str | int | None = None,
) -> Precond:
    """The teacher at `path`, frozen and in eval mode, on the CPU; `.config` describes it.

    Args:
        path: as of `load_network`.
        D: as of `load_network`.
        network: as of `load_network`.
        anyway: a checkpoint's network is a teacher, also where its name or place says that it is a generator.
        which: as of `load_network`.

    Raises:
        ValueError: as of `load_network`; or it says of itself that it is a generator, which knows its own few noise
            levels alone and cannot be distilled from.
    """
    place = located(path, which, teacher=True)
    if anyway and place.is_file():
        check_D(D)
        return load_from_checkpoint(open_checkpoint(place), D=D, network=network, kind="teacher")
    return load_network(place, D=D, network=network, teacher=True)


def load_network(
    path: str | os.PathLike[str],
    *,
    D: float | None = None,
    network: str | None = None,
    teacher: bool = False,
    which: str | int | None = None,
) -> Precond:
    """The network at `path`, a teacher or a generator, frozen and in eval mode, on the CPU; `.config` describes it.

    Args:
        path: a folder with config.json and model.safetensors, or a checkpoint file of EDM, EDM2, PFGM++ or SiD
            (network snapshot or training state), from which nothing is run; or a checkpoint of a run, of which the
            average is taken, or a run folder, of which a warning says what was taken.
        D: the auxiliary dimensions it is expected to be trained for (inf: diffusion). None takes what the file says,
            and inf for a checkpoint that says nothing.
        network: which of a checkpoint's networks. None takes the average of the weights where there is one
            (`Checkpoint.choose`).
        teacher: it is to be a teacher; of a distillation's folder, the one that it trained.
        which: of a run: "best", "last" or a step; see `locate`.

    Raises:
        ValueError: one line that names the file, where `path` is anything else, is damaged, has no such network, was
            trained for another D, or is a generator where a teacher is wanted.
    """
    check_D(D)
    place = located(path, which, teacher=teacher)
    if place.is_file():
        checkpoint = open_checkpoint(place)
        if teacher and (why := checkpoint.why_generator(name := checkpoint.choose(network))):
            raise ValueError(
                f"{checkpoint.where}: {name} is a generator ({checkpoint.origin}), {_NO_TEACHER}; it is known {why}: "
                "if it is a teacher after all, --teacher-anyway, or in Python anyway=True"
            )
        return load_from_checkpoint(checkpoint, D=D, network=network)
    stored = read_config(place)
    if teacher and isinstance(stored.facts, GeneratorFacts):
        raise ValueError(f"{stored.folder} is a generator, {_NO_TEACHER}{_teacher_beside(stored.folder)}")
    if network is not None:
        raise ValueError(f"{place} holds one network, from which none can be chosen, but {network!r} was asked for")
    return load_from_folder(stored, D=D)


def load_from_checkpoint(
    checkpoint: Checkpoint,
    *,
    D: float | None = None,
    network: str | None = None,
    kind: Kind | None = None,
    sigmas: Sequence[float] = (),
) -> Precond:
    """A network of an opened checkpoint; as `load_network`.

    Args:
        checkpoint: from `open_checkpoint`.
        D: the auxiliary dimensions it is expected to be trained for.
        network: which of its networks.
        kind: what it is, whatever the file and its name say; None goes by these.
        sigmas: noise levels of a generator. Without them `facts` is None, unless the file says them.

    Raises:
        ValueError: one line that names the file.
    """
    imported = checkpoint.read(network, D=D)
    net, known = build(imported).requires_grad_(False), checkpoint.facts
    source: dict[str, str] = {"file": Path(checkpoint.where).name, "D": imported.D_source}
    source |= checkpoint.source_facts(imported)
    if kind is None and checkpoint.may_be_generator(imported.key):
        source["unsaid"] = "generator or teacher"
    generator = checkpoint.is_generator(imported.key) if kind is None else kind == "generator"
    if not generator:
        net.facts = known if isinstance(known, TeacherFacts) else TeacherFacts(source=source)
    elif isinstance(known, GeneratorFacts):
        net.facts = replace(known, sigmas=list(sigmas)) if sigmas else known
    elif sigmas:
        net.facts = GeneratorFacts(D=net.D, sigmas=list(sigmas), source=source)
    return net


def check_teacher(net: Precond) -> None:
    """Check that a network does not say of itself that it is a generator, which cannot be distilled from.

    Args:
        net: a network, read from disk or not.

    Raises:
        ValueError: it does.
    """
    if isinstance(net.facts, GeneratorFacts):
        raise ValueError(f"the teacher given is a generator, {_NO_TEACHER}")


def _teacher_beside(folder: Path) -> str:
    """Where the teacher lies whose run the generator in `folder` is from."""
    teacher = next((place for place in models_in(folder.absolute().parent) if place.name == "model"), None)
    return "" if teacher is None else f"; the teacher of its run is {teacher}"


def load_from_folder(stored: StoredConfig, *, D: float | None = None) -> Precond:
    """The network of a model folder whose config.json has been read; as `load_network`.

    Args:
        stored: from `read_config`.
        D: the auxiliary dimensions it is expected to be trained for.

    Raises:
        ValueError: one line that names the file.
    """
    if D is not None and D != stored.network.D:
        raise ValueError(f"{stored.folder} was trained for D = {stored.network.D:g}, but D = {D:g} was asked for")
    return load_stored(stored).requires_grad_(False)


def build(imported: ImportedNetwork) -> Precond:
    """The network of a checkpoint on the CPU, in eval mode, which takes the weights over without copying them.

    Layers under forced weight normalisation turn theirs into plain weights, in place: `imported` then has none left.

    Args:
        imported: from `Checkpoint.read`.

    Raises:
        ValueError: the weights do not fit.
    """
    with torch.device("meta"):
        net = build_network(imported.config)
    try:
        if imported.config.is_edm2:
            _take_over(net, imported.weights)
        else:
            net.load_state_dict(imported.weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"network {imported.key!r} does not fit: {' '.join(str(error).split())}") from None
    return net.eval()


def _take_over(net: Precond, weights: dict[str, Tensor]) -> None:
    """Load `weights`, which fit, part by part, and empty it."""
    for path, part in net.named_modules():
        names = {name: f"{path}.{name}" if path else name for name in (*part._parameters, *part._buffers)}
        own = {name: weights.pop(whole) for name, whole in names.items() if whole in weights}
        if isinstance(part, PlainWeight):
            part.take_master(own["weight"])
        elif own:
            part.load_state_dict(own, strict=False, assign=True)
