"""What samples are measured against: by a run while it trains, and by `ipfm evaluate`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.data.latents import decoded
from ipfm.engine.distributed.signals import check_stop
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.metrics import (
    BlockFeatures,
    Features,
    FrechetResult,
    InceptionFeatures,
    Metric,
    PixelFeatures,
    Reference,
    Statistics,
    evaluate_images,
)
from ipfm.engine.evaluation.metrics.blocks import block_side
from ipfm.engine.evaluation.metrics.classifier import ClassifierFeatures, load_classifier
from ipfm.engine.evaluation.metrics.collection import MOST_IMAGES
from ipfm.engine.evaluation.metrics.dinov2 import WHERE_TO_GET_DINOV2, DinoFeatures
from ipfm.engine.evaluation.metrics.evaluate import PR_IMAGES, check_metrics
from ipfm.engine.evaluation.metrics.features import WHERE_TO_GET_INCEPTION, Classifier
from ipfm.engine.evaluation.reference_data import ReferenceFile, make_reference, open_reference
from ipfm.engine.runtime.wording import counted
from ipfm.engine.sampling.batches import sample_teacher
from ipfm.models import Precond
from ipfm.models.autoencoder import SHOWS, Autoencoder, is_latent
from ipfm.models.checkpoints.recognise import missing

FeatureName = Literal["inception", "dinov2", "pixels", "blocks", "classifier"]
# Those that need no network; and those that take images of one size.
OF_PIXELS = ("pixels", "blocks")
SAME_SIZE = (*OF_PIXELS, "classifier")


@dataclass(frozen=True)
class Evaluation:
    """What is measured of samples, and against what.

    Samples come from a function of the caller, which draws them at the model's own D: a generator of finite D that is
    given Gaussian latents sees radii that spread by 1.3 % instead of the 6.4 % of D = 128 at 3×32×32.

    Args:
        features: what images are compared by.
        reference: real images by their features; None for the Inception score alone.
        images: how many samples are drawn, by all ranks together.
        batch: images that a rank draws at a time.
        seed: of the samples; fixed, so that evaluations compare.
        metrics: the Fréchet distance alone by default.
        pr_images: images of each set that precision and recall are measured on.
        data: the real images, for pictures that show them beside samples; None where they are not at hand.
        autoencoder: makes pictures of the samples, which are latents; None measures samples as they are.

    Raises:
        ValueError: numbers out of range, or a metric that the features or the reference do not allow.
    """

    features: Features
    reference: Reference | Statistics | None
    images: int
    batch: int = 512
    seed: int = 10_000
    metrics: tuple[Metric, ...] = ("fid",)
    pr_images: int = PR_IMAGES
    data: ImageDataset | None = None
    autoencoder: Autoencoder | None = None

    def __post_init__(self) -> None:
        real = None if self._reference is None or self._reference.features is None else len(self._reference.features)
        check_sizes(self.metrics, self.images, self.batch, self.pr_images, real)
        check_metrics(self.metrics, self.features, self._reference)

    def measure(
        self,
        sample: Callable[[int, int], Tensor],
        world: World,
        *,
        first_index: int = 0,
        leave_out: bool = False,
    ) -> FrechetResult:
        """The metrics of samples, which are shared out over the ranks; every rank calls it.

        Args:
            sample: sample(first index, count) draws images (count, C, H, W) in [-1, 1], or latents, which each rank
                decodes of its share.
            world: the run's ranks.
            first_index: index of the first image; another one measures other images of the same seed.
            leave_out: count samples that are not finite instead of refusing them, see `evaluate_images`.

        Raises:
            ValueError: a sample is not finite, unless these are left out.
            StopRequested: a run's process received a signal.
            Exception: what `sample` raises, on every rank.
        """

        def drawn(first: int, count: int) -> Tensor:
            check_stop(world)
            images = sample(first_index + first, count)
            return images if self.autoencoder is None else self.autoencoder.decode(images)

        return evaluate_images(
            drawn,
            self.images,
            self.features,
            self._reference,
            batch=self.batch,
            rank=world.rank,
            world_size=world.size,
            metrics=self.metrics,
            pr_images=self.pr_images,
            leave_out=leave_out,
        )

    @property
    def statistics(self) -> Statistics:
        """Those of the reference.

        Raises:
            ValueError: there is none.
        """
        if self._reference is None:
            raise ValueError("this evaluation has no reference")
        return self._reference.statistics

    @property
    def _reference(self) -> Reference | None:
        return Reference(self.reference) if isinstance(self.reference, Statistics) else self.reference


def open_features(
    name: FeatureName,
    inception: Path | None,
    shape: tuple[int, int, int],
    device: torch.device,
    classifier: Path | None = None,
    dinov2: Path | None = None,
) -> Features:
    """The extractor: the Inception network in the file `inception`, or the pixels of images (C, H, W) = `shape`.

    "blocks" compares the means and deviations of blocks of them, see `BlockFeatures`; "classifier" the features of the
    network in the file `classifier`, see `ClassifierFeatures`; "dinov2" those of the network in the file `dinov2`, see
    `DinoFeatures`.

    Raises:
        ValueError: Inception features or those of a classifier without a file, others with one, or a file that is no
            such network, or one of images of another shape; one line, which says where the file is found.
    """
    if classifier is not None and name != "classifier":
        raise ValueError(f"classifier was given, but features is {name}: give --features classifier")
    if dinov2 is not None and name != "dinov2":
        raise ValueError(f"dinov2 was given, but features is {name}: give --features dinov2")
    if name == "dinov2":
        if inception is not None or dinov2 is None:
            raise ValueError(f"features dinov2 needs --dinov2 FILE alone ({WHERE_TO_GET_DINOV2})")
        return DinoFeatures(dinov2, device)
    if name == "classifier":
        if inception is not None or classifier is None:
            raise ValueError("features classifier needs --classifier FILE, the classifier.safetensors of a run folder")
        found = load_classifier(classifier, device)
        if found.facts.shape != shape:
            sizes = ["x".join(map(str, one)) for one in (found.facts.shape, shape)]
            raise ValueError(
                f"{classifier} is a classifier of images {sizes[0]}, those that are measured are {sizes[1]}"
            )
        return found
    if name in OF_PIXELS:
        if inception is not None:
            raise ValueError(f"inception was given, but features is {name}: leave one of them out")
        return PixelFeatures(shape) if name == "pixels" else BlockFeatures(shape, block_side(shape[1]))
    if inception is None:
        raise ValueError(
            f"inception must be given for Inception features ({WHERE_TO_GET_INCEPTION}); or take features pixels "
            "or blocks"
        )
    return InceptionFeatures(inception, device)


def check_sizes(
    metrics: tuple[Metric, ...], images: int, batch: int = 1, pr_images: int = PR_IMAGES, real: int | None = None
) -> None:
    """ValueError where there are too few images or too many, of `real` ones too where their number is known."""
    if images > MOST_IMAGES:
        raise ValueError(f"an evaluation takes at most {MOST_IMAGES:,} images, got {images:,}")
    if images < 2 or batch < 1:
        raise ValueError(f"an evaluation needs at least 2 images and a positive batch, got {images} and {batch}")
    fewest = min(pr_images, images, images if real is None else real)
    if "pr" in metrics and fewest < 4:
        raise ValueError(f"precision and recall need at least 4 images, real ones too, got {fewest}")
    if "is" in metrics and images < 10:
        raise ValueError(f"the Inception score needs at least 10 images, got {images}")


@dataclass(frozen=True, eq=False)
class Comparison:
    """An evaluation whose files are open and checked, but whose reference may still have to be computed."""

    features: Features
    file: ReferenceFile | None
    metrics: tuple[Metric, ...]
    autoencoder: Autoencoder | None = None
    """Of samples that are latents."""

    def evaluation(
        self, world: World, *, images: int, batch: int = 256, seed: int = 10_000, pr_images: int = PR_IMAGES
    ) -> Evaluation:
        """The evaluation with `images` samples; where the reference is images, their features are computed here.

        Every rank calls it.

        Args:
            world: the run's ranks.
            images: as in `Evaluation`.
            batch: as in `Evaluation`, and images of the reference that a rank handles at a time.
            seed: as in `Evaluation`.
            pr_images: as in `Evaluation`.

        Raises:
            ValueError: too few images, or reference images that do not fit the features.
        """
        real = None if self.file is None or self.file.images is None else len(self.file.images)
        check_sizes(self.metrics, images, batch, pr_images, real)
        reference = None
        if self.file is not None:
            keep = bool({"kid", "pr"} & set(self.metrics))
            reference = make_reference(self.file, self.features, world, keep_features=keep, batch=batch)
        data = None if self.file is None else self.file.images
        return Evaluation(
            self.features, reference, images, batch, seed, self.metrics, pr_images, data, self.autoencoder
        )

    def kept_bytes(self, images: int, batch: int) -> int:
        """Bytes, at least, that are kept of `images` samples and of the reference's until they are compared.

        Args:
            images: number of samples.
            batch: images that a process handles at a time.
        """
        width = self.features.dim if {"kid", "pr"} & set(self.metrics) else 0
        real = 0 if self.file is None or self.file.images is None else len(self.file.images)
        if "is" in self.metrics and isinstance(self.features, Classifier):
            width += self.features.classes
        # The first index and the number of each batch; float32 features, which are put together in a second place.
        return 128 * (images // batch) + 8 * width * (images + real)

    @property
    def said(self) -> tuple[str, ...]:
        """What opening the reference said on stderr."""
        return () if self.file is None or self.file.images is None else self.file.images.remarks

    def remarks(self, shape: tuple[int, int, int], images: int) -> list[str]:
        """What to know of a distance that is measured all the same, a line each.

        Args:
            shape: (C, H, W) of the samples.
            images: number of samples.
        """
        said = []
        shape = shape if self.autoencoder is None else self.autoencoder.shape_of_pictures(shape)
        if "fid" in self.metrics:
            dim = self.features.dim
            sets = {"": images}
            if self.file is not None and self.file.statistics is None and self.file.images is not None:
                sets[" of the reference"] = len(self.file.images)
            said += [
                f"{counted(count, 'image')}{whose}, no more than the {dim:,} features: their covariance is singular, "
                "and the distance larger than that of many images"
                for whose, count in sets.items()
                if count <= dim
            ]
        # Pixels of another size are an error.
        if (
            self.file is not None
            and self.features.name in ("inception", "dinov2")
            and (words := _other_size(self.file, shape))
        ):
            said.append(words)
        return said


def _other_size(file: ReferenceFile, shape: tuple[int, int, int]) -> str | None:
    """Says so where the reference has images of another size than (C, H, W) = `shape`, or its name says it has."""
    own = "x".join(map(str, shape))
    if file.images is not None:
        found = "x".join(map(str, file.images.shape))
        return None if found == own else f"the images of {file.path} are {found}, those that are measured {own}"
    named = re.search(r"(?<!\d)(\d{2,4})x\1(?!\d)", file.path.name)
    if named is None or int(named[1]) == shape[2]:
        return None
    return f"by its name {file.path} is of images {named[0]}, those that are measured are {own}"


def open_comparison(
    reference: Path | None,
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    features: FeatureName = "inception",
    inception: Path | None = None,
    metrics: tuple[Metric, ...] = ("fid",),
    skip_unreadable: bool = False,
    strict: bool = False,
    images: ImageDataset | None = None,
    classifier: Path | None = None,
    autoencoder: Autoencoder | None = None,
    dinov2: Path | None = None,
) -> Comparison:
    """Open and check what samples (C, H, W) = `shape` are to be compared with.

    Args:
        reference: statistics or images, see `open_reference`; None for the Inception score alone.
        shape: of the samples.
        device: where features are computed.
        features: the extractor, see `open_features`.
        inception: its file, see `open_features`.
        metrics: what is measured.
        skip_unreadable: of reference images, as in `open_dataset`.
        strict: likewise.
        images: those of `reference`, where they are open already.
        classifier: its file, see `open_features`.
        dinov2: its file, see `open_features`.
        autoencoder: makes pictures of latents, of the samples and of the reference.

    Raises:
        ValueError: a file that cannot be used, latents that nothing makes pictures of, statistics of other features, or
            a metric that features or reference do not allow.
    """
    if reference is not None and not reference.exists():
        raise ValueError(f"{missing(reference)}: a reference is an .npz with mu and sigma, EDM2's .pkl, or a data set")
    of_samples = autoencoder if is_latent(shape) else None
    if of_samples is not None:
        shape = of_samples.shape_of_pictures(shape)
    elif is_latent(shape) and features not in OF_PIXELS:
        raise ValueError(f"what is measured are latents, which {features} cannot compare: {SHOWS}")
    extractor = open_features(features, inception, shape, device, classifier, dinov2)
    if reference is None:
        check_metrics(metrics, extractor, None)
        _check_use(autoencoder, shape, used=of_samples is not None)
        return Comparison(extractor, None, metrics, of_samples)
    if "is" in metrics:
        check_metrics(("is",), extractor, None)
    if images is not None:
        file = ReferenceFile(reference, None, images)
    else:
        file = open_reference(reference, features=features, skip_unreadable=skip_unreadable, strict=strict)
    latents = file.images is not None and file.images.latents
    _check_use(autoencoder, shape, used=of_samples is not None or latents)
    if file.images is not None and latents and not is_latent(shape):
        if autoencoder is None:
            raise ValueError(f"{file.path} holds latents, and what is measured are pictures: {SHOWS}")
        file = replace(file, images=decoded(file.images, autoencoder))
    if file.statistics is None and file.images is not None and len(file.images) < 2:
        raise ValueError(f"{file.path} holds one image; a reference has at least two")
    if features in SAME_SIZE and file.images is not None and (words := _other_size(file, shape)):
        raise ValueError(f"{words}; {features} can be compared of one size alone")
    if file.statistics is not None:
        _check_whose(file, extractor)
    if file.images is None and file.statistics is not None:
        check_metrics(metrics, extractor, Reference(file.statistics))
    return Comparison(extractor, file, metrics, of_samples)


def _check_use(autoencoder: Autoencoder | None, shape: tuple[int, int, int], *, used: bool) -> None:
    """ValueError where an autoencoder was given that has nothing to decode."""
    if autoencoder is not None and not used:
        autoencoder.shape_of_pictures(shape)


def _check_whose(file: ReferenceFile, extractor: Features) -> None:
    """ValueError where stored statistics are of other features: as many of another network would pass for them."""
    if file.features is not None and file.features != extractor.name:
        raise ValueError(f"{file.path} holds statistics of the features {file.features}, not of {extractor.name}")
    if file.features is None and isinstance(extractor, (ClassifierFeatures, DinoFeatures)):
        raise ValueError(f"{file.path} does not say that its statistics are of {extractor.name}: give images instead")


def evaluate_teacher(net: Precond, evaluation: Evaluation, world: World, *, D: float, steps: int) -> FrechetResult:
    """The metrics of a teacher's samples; those that are not finite are left out and counted."""

    def sample(first: int, count: int) -> Tensor:
        return sample_teacher(net, first, count, D=D, steps=steps, seed=evaluation.seed)

    return evaluation.measure(sample, world, leave_out=True)
