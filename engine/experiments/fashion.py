"""What a recipe of Fashion-MNIST, and of sets like it, needs: its images, and what samples are compared by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.data.mnist import mnist_part
from ipfm.engine.data.open_dataset import open_dataset
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.classifier_training import check_classes, kept_classifier
from ipfm.engine.evaluation.evaluation import open_features
from ipfm.engine.evaluation.metrics import Features
from ipfm.engine.experiments.options import DistillationOptions
from ipfm.engine.experiments.own_images import slug
from ipfm.models.checkpoints.recognise import user_path

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""
SHAPE = (1, 28, 28)
TITLE, FIRST = "clothes", (9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 0, 9)
"""What Fashion-MNIST is called wherever it lies, and the classes that its training set begins with."""
WHERE_TO_GET = (
    "Fashion-MNIST is Debian's package dataset-fashion-mnist (apt-get install dataset-fashion-mnist), or the folder "
    "data/fashion of its authors' repository zalandoresearch/fashion-mnist: give that as --data"
)


@dataclass(frozen=True, kw_only=True)
class FashionOptions(DistillationOptions):
    """Options of a recipe of Fashion-MNIST and sets of its kind, beside those of its objective."""

    FEATURES: ClassVar[tuple[str, ...]] = ("classifier", "pixels", "blocks")

    data: Path | None = None
    """Grey images of 28x28 in MNIST's format, or a zip or folder of such. Default: Debian's Fashion-MNIST."""
    features: Literal["classifier", "pixels", "blocks"] = "classifier"  # type: ignore[assignment]
    """What images are compared by. classifier: the features of a small classifier of this set, which is trained first;
    pixels: the images themselves; blocks: means and deviations of blocks of pixels."""
    classifier: Path | None = None
    """The classifier.safetensors of another run folder, to compare with its distances. Default: the one that lies
    beside the run folder, which the first run trains."""
    conditional: bool = False
    """Train the teacher with labels."""
    arch: Literal["ddpmpp", "ncsnpp"] = "ddpmpp"
    """Architecture of the teacher that is trained: DDPM++ or NCSN++."""
    channels: int | None = None
    """Its base width. Default: 16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inception is not None:
            raise ValueError(
                f"inception was given, but this recipe compares by {self.features}: ipfm evaluate takes it"
            )
        if self.classifier is not None and self.features != "classifier":
            raise ValueError(f"classifier was given, but features is {self.features}: leave one of them out")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels must be at least 1, got {self.channels}")
        for name in ("arch", "channels", "conditional"):
            if self.teacher is not None and getattr(self, name) != getattr(FashionOptions, name):
                raise ValueError(f"{name} was given, but the teacher says what the network is")

    @property
    def compared_with(self) -> Path:
        """See `EvaluationOptions.compared_with`: the data."""
        return self.place

    @property
    def place(self) -> Path:
        """Where the data are."""
        return DEBIAN if self.data is None else user_path(self.data)


def training_images(options: FashionOptions) -> ImageDataset:
    """The images that a teacher learns.

    Raises:
        ValueError: there are none, with how to get them; images of another size, or without the classes that are asked
            for.
    """
    if options.data is None and not DEBIAN.exists():
        raise ValueError(f"{DEBIAN} is not there: {WHERE_TO_GET}")
    part = mnist_part(options.place)
    found = open_dataset(
        options.place if part is None else part.file,
        skip_unreadable=options.skip_unreadable,
        strict=options.strict,
    )
    if found.shape != SHAPE:
        shown = ["x".join(map(str, shape)) for shape in (found.shape, SHAPE)]
        raise ValueError(
            f"{options.place} has images {shown[0]}, this recipe takes {shown[1]}: train_teacher.py and "
            "distill_ipfm.py take images of any size"
        )
    if found.labels is not None and found.labels[: len(FIRST)].tolist() == list(FIRST):
        found = replace(found, name=TITLE)
    if options.features == "classifier":
        check_classes(found)
        if options.classifier is not None:
            open_features("classifier", None, SHAPE, torch.device("cpu"), options.classifier)
    if options.conditional and found.labels is None:
        raise ValueError(f"conditional was given, but {options.place} has no labels")
    return found


def data_name(path: Path | None) -> str:
    """How the names of run folders begin: "fashion", or a name made of that of other data."""
    return slug(path, "fashion")


def how_compared(options: FashionOptions) -> str:
    """What images are compared by, for people."""
    blocks = "of the means and deviations of blocks of pixels"
    return {"classifier": "of a classifier's features", "pixels": "in pixel space"}.get(options.features, blocks)


def compared_by(options: FashionOptions, data: ImageDataset, folder: Path, world: World) -> Features:
    """What the images of a run are compared by; a classifier is trained here where there is none yet.

    Args:
        options: of the run.
        data: the training images.
        folder: the run folder.
        world: the run's processes, each of which calls it.

    Raises:
        ValueError: a classifier's file that is none of such images.
    """
    if options.features == "pixels" or options.features == "blocks":
        return open_features(options.features, None, data.shape, world.device)
    learnt, held_out = _parts(options.place, data)
    return kept_classifier(folder, learnt, held_out, world, file=options.classifier)


def _parts(place: Path, data: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
    """What a classifier learns and what it is tried on: the set's test images, else every tenth image."""
    part = mnist_part(place)
    if part is not None and part.others:
        test = open_dataset(part.others[0])
        if test.labels is not None:
            return data, test
    index = torch.arange(len(data))
    return _some(data, index[index % 10 != 0]), _some(data, index[index % 10 == 0])


def _some(data: ImageDataset, index: Tensor) -> ImageDataset:
    images = data.images[index] if isinstance(data.images, Tensor) else data.images.read(index)
    assert data.labels is not None
    return replace(data, images=images, labels=data.labels[index])
