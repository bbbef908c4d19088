"""Reference files: stored statistics of real images, or the images themselves."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.metrics import Features, Reference, Statistics, collect
from ipfm.engine.evaluation.metrics.frechet import check_statistics
from ipfm.engine.evaluation.statistics_pickle import read_statistics
from ipfm.engine.runtime.launcher import is_first_process
from ipfm.engine.runtime.progress import ProgressBar
from ipfm.engine.runtime.remarks import Remarks
from ipfm.models.atomic_files import atomic_write
from ipfm.models.autoencoder import LATENT_CHANNELS
from ipfm.models.checkpoints.recognise import missing, user_path, what_place

# Names of an array of images in an .npz: ADM's sample and reference batches, and those of `ipfm sample`.
IMAGE_ARRAYS = ("arr_0", "images")
# That of latents, which `ipfm sample` writes where nothing makes pictures of them.
LATENTS_ARRAY = "latents"
# The name of the features beside statistics of others than Inception's: a text.
FEATURES_ARRAY = "features"


@dataclass(frozen=True, eq=False)
class ReferenceFile:
    """What the file at `path` holds: `statistics` of features, `images`, or both."""

    path: Path
    statistics: Statistics | None
    images: ImageDataset | None
    features: str | None = None
    """What features the statistics are of, where the file says so."""


def open_reference(
    path: Path | str, *, features: str = "inception", skip_unreadable: bool = False, strict: bool = False
) -> ReferenceFile:
    """Read and check a reference; no features are computed.

    Args:
        path: an .npz with `mu` (dim,) and `sigma` (dim, dim), the mean and unbiased covariance of Inception features as
            EDM publishes them; an .npz with images `arr_0` (N, H, W, C) uint8 as ADM publishes them; or a data set:
            an image folder, a zip, CIFAR-10's archive. ADM's reference batches hold statistics and images. Or a .pkl
            with the statistics of EDM2, of the features of Inception, of DINOv2 or of both.
        features: which of these are wanted.
        skip_unreadable: of a data set, as in `open_dataset`.
        strict: likewise.

    Raises:
        ValueError: there is no such file, it holds none of these, or statistics that are none; one line.
    """
    path = user_path(path)
    if _is_pickle(path):
        stored = read_statistics(path)
        if features not in stored:
            names = " and ".join(sorted(stored))
            raise ValueError(f"{path} holds statistics of the features {names}, not of {features}")
        return ReferenceFile(path, _statistics(path, stored[features]), None, features)
    _refuse_what_is_known(path)
    if not is_npz(path):
        return ReferenceFile(path, None, open_images(path, skip_unreadable=skip_unreadable, strict=strict))
    arrays = _read_npz(path, ("mu", "sigma", FEATURES_ARRAY, *IMAGE_ARRAYS, LATENTS_ARRAY))
    statistics = _statistics(path, arrays) if "mu" in arrays or "sigma" in arrays else None
    images = _images(path, arrays)
    if statistics is None and images is None:
        raise ValueError(f"{path} holds neither statistics (mu, sigma) nor images (arr_0){_arrays_of(path)}")
    return ReferenceFile(path, statistics, images, _features(arrays))


def open_images(
    path: Path | str,
    *,
    limit: int | None = None,
    seed: int = 0,
    skip_unreadable: bool = False,
    strict: bool = False,
) -> ImageDataset:
    """The images at `path`, without labels: a data set, or an .npz with `arr_0` or `images` (N, H, W, C) uint8.

    An .npz may have `latents` (N, 4, h, w) float32 instead.

    Args:
        path: the file or folder.
        limit: so many of them are taken at random where there are more; None takes all.
        seed: of the choice, in [0, 2^32).
        skip_unreadable: of a data set, as in `open_dataset`.
        strict: likewise.

    Raises:
        ValueError: there are none; one line.
    """
    # Here, for a run that compares with statistics needs no reader of images.
    from ipfm.engine.data.open_dataset import Subset, open_dataset

    path = user_path(path)
    _refuse_what_is_known(path)
    if not is_npz(path):
        return open_dataset(
            path, labels=False, max_images=limit, seed=seed, skip_unreadable=skip_unreadable, strict=strict
        )
    images = _images(path, _read_npz(path, (*IMAGE_ARRAYS, LATENTS_ARRAY)))
    if images is None:
        raise ValueError(f"{path} holds no images (arr_0){_arrays_of(path)}")
    assert isinstance(images.images, torch.Tensor)
    kept = Subset(limit, seed)
    said = kept.said(path, len(images))
    for remark in said if is_first_process() else ():
        Remarks().add(remark)
    return replace(images, images=images.images[kept.of(len(images))], remarks=tuple(said))


def _is_pickle(path: Path) -> bool:
    if path.suffix.lower() == ".npz":
        return False
    try:
        with path.open("rb") as file:
            return file.read(1) == b"\x80"
    except OSError:
        return False


def _refuse_what_is_known(path: Path) -> None:
    """ValueError: a pointer, a web page, a pickle, or a folder of this project, which are no images."""
    if what := what_place(path):
        is_no = "is no readable .npz" if path.suffix.lower() == ".npz" else "holds neither images nor statistics"
        raise ValueError(f"{path} {is_no}: {what}")


def _arrays_of(path: Path) -> str:
    """What an .npz holds instead, the second half of a message."""
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    if {"mu", "sigma"} <= set(names):
        return ", but statistics (mu, sigma), which are a reference"
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:4])
    return f", but {shown}{', …' if len(names) > 4 else ''}" if names else "; it is empty"


def is_npz(path: Path) -> bool:
    """Whether a file is an .npz, by its name, in small or capital letters, or by its content."""
    if path.suffix.lower() == ".npz":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
    # A set of latents lies in numbered folders.
    return bool(names) and all(name.endswith(".npy") and "/" not in name for name in names)


def make_reference(
    file: ReferenceFile, features: Features, world: World, *, keep_features: bool = False, batch: int = 256
) -> Reference:
    """The reference for these features; those of its images are shared out over the ranks, each of which calls it.

    Args:
        file: from `open_reference`. Its statistics are taken as they are; where it has none, those of all its images.
        features: the extractor.
        world: the run's ranks.
        keep_features: keep what the kernel distance and precision and recall need, 4·N·dim bytes, where there are
            images.
        batch: images that a rank handles at a time.

    Raises:
        ValueError: fewer than two images, or images of a shape that the features do not take.
    """
    if file.images is None or not (keep_features or file.statistics is None):
        assert file.statistics is not None
        return Reference(file.statistics)
    images = file.images
    # Ranks have almost equal shares; rank 0 speaks for all.
    bar = ProgressBar("reference", -(-len(images) // world.size), enabled=world.is_main)

    def take(first: int, count: int) -> Tensor:
        bar.advance(count)
        return images.take(first, count).to(world.device)

    try:
        with bar:
            found = collect(
                take,
                len(images),
                features,
                batch=batch,
                rank=world.rank,
                world_size=world.size,
                keep_features=keep_features,
            )
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    statistics = found.moments.statistics if file.statistics is None else file.statistics
    # On the host: the device is wanted for the networks.
    return Reference(statistics, None if found.features is None else found.features.cpu())


def save_statistics(path: Path | str, statistics: Statistics, features: str = "inception") -> None:
    """Write an .npz with `mu` and `sigma`, float64, as EDM publishes them; replaced whole or not at all.

    Args:
        path: the file.
        statistics: what it is to hold.
        features: their name, which is stored with them; Inception's go without, as EDM's.
    """
    named = {} if features == "inception" else {FEATURES_ARRAY: np.array(features)}
    with atomic_write(path) as file:
        np.savez(file, mu=statistics.mean.cpu().numpy(), sigma=statistics.covariance.cpu().numpy(), **named)  # type: ignore[arg-type]


def _features(arrays: dict[str, np.ndarray]) -> str | None:
    found = arrays.get(FEATURES_ARRAY)
    return None if found is None or found.ndim or found.dtype.kind != "U" else str(found)[:100]


def _read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of these names that the file has; objects, which would have to be unpickled, are refused."""
    if not path.is_file():
        raise ValueError(f"{path} is no file" if path.exists() else missing(path))
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with archive:
            return {name: archive[name] for name in names if name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, zipfile.BadZipFile):
            cut = "it is cut short or damaged, as after a download that was interrupted: fetch it again"
            raise ValueError(f"{path} is no readable .npz: {cut}") from None
        raise ValueError(
            f"{path} is no readable .npz: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None


def _statistics(path: Path, arrays: dict[str, np.ndarray]) -> Statistics:
    for name in ("mu", "sigma"):
        if name not in arrays:
            raise ValueError(f"{path} lacks {name}: statistics are mu (dim,) and sigma (dim, dim)")
        if arrays[name].dtype.kind not in "fiu":
            raise ValueError(f"{path}: {name} must hold numbers, got {arrays[name].dtype}")
    mean, covariance = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
    try:
        check_statistics(Statistics(mean, covariance), "stored")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Statistics(mean, covariance)


def _images(path: Path, arrays: dict[str, np.ndarray]) -> ImageDataset | None:
    name = next((name for name in IMAGE_ARRAYS if name in arrays), None)
    if name is None:
        return _latents(path, arrays)
    pixels = arrays[name]
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or pixels.dtype != np.uint8 or not len(pixels):
        raise ValueError(
            f"{path}: {name} must be images (N, H, W, 1 or 3) uint8, got {pixels.dtype} {tuple(pixels.shape)}"
        )
    return ImageDataset(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), name=path.name)


def _latents(path: Path, arrays: dict[str, np.ndarray]) -> ImageDataset | None:
    found = arrays.get(LATENTS_ARRAY)
    if found is None:
        return None
    if found.ndim != 4 or found.shape[1] != LATENT_CHANNELS or found.dtype.kind != "f" or not len(found):
        raise ValueError(
            f"{path}: {LATENTS_ARRAY} must be (N, {LATENT_CHANNELS}, h, w) float32, got {found.dtype} "
            f"{tuple(found.shape)}"
        )
    return ImageDataset(torch.from_numpy(found.astype(np.float32)), name=path.name, latents=True)
