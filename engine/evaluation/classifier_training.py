"""The classifier whose features images are compared by: trained once, in about a minute, and kept in a file."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.agreement import together
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.metrics.classifier import (
    LEAST_SIDE,
    ClassifierFacts,
    ClassifierFeatures,
    ClassifierNetwork,
    load_classifier,
    save_classifier,
)
from ipfm.engine.runtime.progress import ProgressBar
from ipfm.models.full_float32 import full_float32

EPOCHS, BATCH, LR = 4, 128, 2e-3
FILE = "classifier.safetensors"


def check_classes(data: ImageDataset) -> int:
    """The number of the classes that a classifier of these images would tell apart.

    Raises:
        ValueError: they have none, or are too small.
    """
    if data.labels is None or data.labels.ndim != 1 or (data.classes or 0) < 2:
        raise ValueError(
            f"{data.name} has no classes, which a classifier would learn: --features pixels or blocks needs none"
        )
    if min(data.shape[1:]) < LEAST_SIDE:
        raise ValueError(f"{data.name} has images of less than {LEAST_SIDE} pixels a side: take --features pixels")
    assert data.classes is not None
    return data.classes


def train_classifier(
    data: ImageDataset, held_out: ImageDataset, world: World, *, seed: int = 0, epochs: int = EPOCHS
) -> ClassifierFeatures:
    """Train a classifier on every image of `data`, on one process alone; every process calls it and has the same.

    Weights and order follow from the seed. Another machine or number of threads rounds otherwise, and gives another
    classifier, hence another name: keep its file to compare.

    Args:
        data: the images and their classes.
        held_out: others, of which the accuracy is measured.
        world: the run's processes.
        seed: of weights and order.
        epochs: how often every image is seen.

    Raises:
        ValueError: images without classes, or of another shape than those held out.
    """
    classes = check_classes(data)
    if held_out.labels is None or held_out.shape != data.shape or (held_out.classes or 0) > classes:
        raise ValueError(f"{held_out.name} and {data.name} have images of other shapes or classes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ClassifierNetwork(data.shape, classes)
    network.to(world.device)
    together(lambda: _fit(network, data, seed, epochs, world) if world.is_main else None, world.size)
    if world.size > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, src=0)
    accuracy = _accuracy(network, held_out, world)
    facts = ClassifierFacts(data.shape, classes, accuracy, len(held_out), len(data), seed)
    return ClassifierFeatures(network, facts, world.device)


def kept_classifier(
    folder: Path, data: ImageDataset, held_out: ImageDataset, world: World, *, file: Path | None = None, seed: int = 0
) -> ClassifierFeatures:
    """The classifier of a run: its own, else one that is given or that lies beside the run folder, else a new one.

    It is left in the run folder, from which the run goes on, and beside it, where the next runs find it.

    Args:
        folder: the run folder.
        data: as in `train_classifier`.
        held_out: as in `train_classifier`.
        world: the run's processes.
        file: of the classifier to take; None for the one beside the run folder.
        seed: as in `train_classifier`.

    Raises:
        ValueError: a file that is no classifier of such images.
    """
    shared = folder.parent / f"classifier-{_named(data)}.safetensors"
    places = [file] if file is not None else [folder / FILE, shared]
    found = together(lambda: _first(places, data, world), world.size)
    new = found is None
    if found is None:
        found = train_classifier(data, held_out, world, seed=seed)
        # A run that was started beside this one may have been faster: both are to be compared by the same.
        world.barrier()
        found = together(lambda: _first([shared], data, world), world.size) or found
    if world.is_main:
        for place in (folder / FILE, *([shared] if new else [])):
            if not place.exists():
                save_classifier(place, found)
        print(f"compared by {found.described()}", file=sys.stderr)
    world.barrier()
    return found


def _first(places: list[Path], data: ImageDataset, world: World) -> ClassifierFeatures | None:
    place = next((place for place in places if place.exists()), None)
    if place is None:
        return None
    found = load_classifier(place, world.device)
    if found.facts.shape != data.shape:
        shown = ["x".join(map(str, shape)) for shape in (found.facts.shape, data.shape)]
        raise ValueError(f"{place} is a classifier of images {shown[0]}, these are {shown[1]}")
    return found


def _named(data: ImageDataset) -> str:
    """The set's size and the digest of its images' beginning: what tells sets apart whose files have one name."""
    assert data.labels is not None
    labels = data.labels.to(torch.int32).cpu().numpy().tobytes()
    some = data.take(0, min(64, len(data))).numpy().tobytes()
    return f"{'x'.join(map(str, data.shape))}-{hashlib.sha256(labels + some).hexdigest()[:8]}"


def _fit(network: ClassifierNetwork, data: ImageDataset, seed: int, epochs: int, world: World) -> None:
    steps = -(-epochs * len(data) // BATCH)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=steps)
    index = torch.arange(min(BATCH, len(data)))
    network.train()
    with ProgressBar("classifier", steps * len(index)) as bar, torch.enable_grad(), full_float32():
        for step in range(steps):
            batch = data.batch(step, index, batch_size=len(index), seed=seed)
            assert batch.labels is not None
            images, labels = batch.images.to(world.device), batch.labels.to(world.device)
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.advance(len(index))
    network.eval()


@torch.no_grad()
def _accuracy(network: ClassifierNetwork, data: ImageDataset, world: World) -> float:
    """Share of the images that are told right; every process measures its own share of them."""
    assert data.labels is not None
    right: Tensor = torch.zeros((), dtype=torch.int64, device=world.device)
    with full_float32():
        for first in range(world.rank * 512, len(data), world.size * 512):
            count = min(512, len(data) - first)
            told = network(data.take(first, count).to(world.device)).argmax(dim=1)
            right += (told == data.labels[first : first + count].to(world.device)).sum()
    return world.all_reduce_sum_(right).item() / len(data)
