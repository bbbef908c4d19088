"""What `ipfm evaluate` measures: a model's samples, or images that exist already."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ipfm.engine.checks import option_name
from ipfm.engine.evaluation.reference_data import is_npz, open_images
from ipfm.engine.objectives import OBJECTIVES
from ipfm.engine.objectives.published import paper_result
from ipfm.engine.runtime.files import read_json
from ipfm.engine.sampling.stored_model import NO_CLAIM, USUAL, Claim, Guidance, Schedule, sample_model
from ipfm.models import NetworkConfig
from ipfm.models.checkpoints.recognise import image_kind, is_checkpoint, missing
from ipfm.models.checkpoints.run_models import locate
from ipfm.models.facts import GeneratorFacts, ModelFacts
from ipfm.models.store import CONFIG_FILE

# Beside the images of `ipfm sample`: what made them. Hidden: no data set takes it for a part of itself.
SAMPLES_FILE = ".ipfm-samples.json"
IMAGE_SUFFIXES = (".npz", ".zip", ".gz", ".tgz", ".tar")


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured.

    Attributes:
        kind: "images", "generator" or "teacher".
        draw: (first index, count) -> images (count, C, H, W) in [-1, 1] on the run's device.
        shape: (C, H, W).
        available: how many images there are, None for a model, which has as many as are asked for.
        D: at which a model is sampled, None for images.
        nfe: network evaluations an image, None for images.
        paper: the published FID as text, if any.
        remarks: what to know of it, a line each.
        said: what opening it said on stderr.
        path: where a model was loaded from.
    """

    kind: str
    draw: Callable[[int, int], Tensor]
    shape: tuple[int, int, int]
    available: int | None = None
    D: float | None = None
    nfe: int | None = None
    paper: str | None = None
    remarks: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    path: Path | None = None


def open_subject(
    path: Path,
    device: torch.device,
    *,
    heun_steps: int,
    seed: int,
    schedule: Schedule = USUAL,
    guidance: Guidance | None = None,
    D: float | None = None,
    which: str | None = None,
    claim: Claim = NO_CLAIM,
    limit: int | None = None,
    skip_unreadable: bool = False,
    strict: bool = False,
) -> Subject:
    """What is at `path`: a model folder, a data set or .npz of images, or a checkpoint of EDM, EDM2, PFGM++ or SiD.

    Args:
        path: a folder with config.json is a model or a run, a checkpoint of a run its average, any other folder a data
            set.
        device: where images are drawn.
        heun_steps: of a teacher's sampler; a generator has its own noise levels.
        seed: of a model's samples, and of the choice among images.
        schedule: of a teacher's sampler: ends and rho of its grid.
        guidance: of a teacher's sampler, its guide on `device`.
        D: auxiliary dimensions of a checkpoint that does not say them; None takes what the model says.
        which: of a run folder: "best", "last", a step or an average; see `locate`.
        claim: whether a checkpoint is a generator or a teacher, likewise.
        limit: so many images of a set that has more are drawn at random; None takes all.
        skip_unreadable: of images, as in `open_dataset`.
        strict: likewise.

    Raises:
        ValueError: there is nothing to measure, or D contradicts it; a schedule or a guide for what is no teacher.
    """
    if not path.exists():
        raise ValueError(f"{missing(path)}: give a model folder, a checkpoint, a data set or an .npz of images")
    taken = locate(path, which)
    path = taken.path
    stored = (path / CONFIG_FILE).is_file() or is_checkpoint(path)
    if not stored and (path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES or is_npz(path)):
        if D is not None:
            raise ValueError(f"D was given, but {path} holds images, not a model")
        if claim.kind is not None:
            raise ValueError(f"{claim.kind} was given, but {path} holds images, not a model")
        if own := _listed(schedule, guidance):
            raise ValueError(f"{own} given, but {path} holds images, not a teacher: leave it out")
        images = open_images(path, limit=limit, seed=seed, skip_unreadable=skip_unreadable, strict=strict)
        if limit is not None and len(images) < limit:
            raise ValueError(f"images must be at most {len(images)}, as many as {path} holds, got {limit}")
        if len(images) < 2:
            raise ValueError(f"{path} holds one image; what is measured are at least two")
        mixed = (read_json(path / SAMPLES_FILE) or {}).get("mixed") is True
        return Subject(
            "images",
            lambda i, n: images.take(i, n).to(device),
            images.shape,
            len(images),
            remarks=(f"{path} holds images of several models: they were put together with --add",) if mixed else (),
            said=images.remarks,
        )
    if image := _single_image(path):
        raise ValueError(f"{path} is a single image ({image}); give the folder that it lies in")
    model = sample_model(
        path, device, heun_steps=heun_steps, seed=seed, schedule=schedule, guidance=guidance, D=D, claim=claim
    )
    draw, network, facts, nfe = model.draw, model.network, model.facts, model.nfe
    shape = network.image_shape
    if isinstance(facts, GeneratorFacts):
        if own := _listed(schedule, guidance):
            raise ValueError(f"{own} given, but {path} is a generator, which has noise levels of its own: leave it out")
        kind, paper = "generator", _generator_paper(facts, network, nfe)
    else:
        kind, paper = "teacher", None if schedule.named() or guidance else _teacher_paper(facts, network, nfe)
    remarks = ((taken.said(),) if taken.taken else ()) + model.remarks
    return Subject(kind, draw, shape, None, network.D, nfe, paper, remarks=remarks, path=path)


def _listed(schedule: Schedule, guidance: Guidance | None) -> str:
    """What was given for a teacher's sampler: "rho was", "sigma-min, guide were"; nothing where nothing was."""
    given = [option_name(name) for name, value in vars(schedule).items() if value is not None]
    given += ["guide"] if guidance is not None else []
    return f"{', '.join(given)} {'was' if len(given) == 1 else 'were'}" if given else ""


def _single_image(path: Path) -> str | None:
    """The format of a file that is one image; None of anything else."""
    if not path.is_file():
        return None
    with contextlib.suppress(OSError), path.open("rb") as file:
        return image_kind(file.read(32))
    return None


def _generator_paper(facts: GeneratorFacts, network: NetworkConfig, nfe: int) -> str | None:
    """The published figure for a generator that says on what data, by which objective and how it was distilled."""
    objective, settings = OBJECTIVES.of_generator(facts)
    if objective is None or facts.dataset is None:
        return None
    found = objective.figure(facts.dataset, {"steps": nfe, **settings}, network)
    return None if found is None else str(found)


def _teacher_paper(facts: ModelFacts, network: NetworkConfig, nfe: int) -> str | None:
    # The teacher's figure stands beside every result of its D.
    found = None if facts.dataset is None else paper_result(facts.dataset, network.D, 1.0, 1)
    return None if found is None else found.teacher(network, nfe)
