"""What images are compared by: the features of a network given as a file, or the pixels themselves."""

import warnings
import zipfile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ipfm.models.checkpoints.recognise import missing, what_pointer, what_zip
from ipfm.models.full_float32 import full_float32

INCEPTION_FILE = "inception-2015-12-05.pt"
WHERE_TO_GET_INCEPTION = (
    f"{INCEPTION_FILE}, a TorchScript file, is published by NVIDIA with the StyleGAN2-ADA (PyTorch) project, "
    "in the metrics part of its model store"
)


class Features(Protocol):
    """Maps images (B, C, H, W) in [-1, 1] to features (B, dim) of a floating dtype."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def __call__(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class Classifier(Protocol):
    """Features that come with class probabilities: (B, C, H, W) in [-1, 1] to (B, classes)."""

    @property
    def classes(self) -> int:
        """How many classes; 0 where this network has none after all."""
        ...

    def probabilities(self, images: Tensor) -> Tensor: ...


class PixelFeatures:
    """The pixels themselves as features: for small images, and where no feature network is at hand.

    Args:
        shape: (C, H, W) of the images.

    Raises:
        ValueError: it is no such shape.
    """

    name = "pixels"

    def __init__(self, shape: tuple[int, int, int]) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape must be (C, H, W), got {tuple(shape)}")
        self.shape = tuple(shape)
        self.dim = shape[0] * shape[1] * shape[2]

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C·H·W), same dtype.

        Raises:
            ValueError: images of another shape.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"images must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(images.shape)}"
            )
        return images.flatten(start_dim=1)


class InceptionFeatures:
    """Features of the Inception-v3 network that FID is defined by [Heusel et al., arXiv 1706.08500], from a file.

    The file is a TorchScript network with the interface of the published one: images (B, 3, H, W) uint8 in 0…255, of
    any size, are resized and normalised inside; `net(images, return_features=True)` gives features (B, 2048) and
    `net(images, no_output_bias=True)` class probabilities (B, 1008). A network whose second output is not normalised
    is taken to give logits, and a softmax follows. It computes in float32, without TF32.

    Args:
        path: the file.
        device: where the network runs; images are taken from any device.

    Raises:
        ValueError: there is no such file, it is no TorchScript network, or it lacks the first of the two calls; without
            the second there are no `classes`, and no Inception score.
    """

    name = "inception"

    def __init__(self, path: Path | str, device: torch.device | str = "cpu") -> None:
        self.path, self.device = Path(path), torch.device(device)
        self._net = load_script(self.path, self.device)
        grey = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8, device=self.device)
        try:
            with torch.no_grad():
                found = self._net(grey, return_features=True)
        except (RuntimeError, TypeError, ValueError, torch.jit.Error) as error:
            raise ValueError(
                f"{self.path} does not take images as net(images, return_features=True): {last_line(error)}; "
                f"{WHERE_TO_GET_INCEPTION}"
            ) from None
        if not _is_table(found):
            raise ValueError(f"{self.path} gives no features (B, dim) of 2 images, but {_described(found)}")
        self.dim: int = found.shape[1]
        self.classes, self._normalised = self._probe_classes(grey)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) in [-1, 1] to (B, dim); a grey image counts as one of three equal channels.

        Images become 8-bit pixels first, clip(127.5·x + 128, 0, 255) truncated, as when they are written to files. One
        with a non-finite pixel, which a file cannot hold, has NaN as its features.

        Raises:
            ValueError: images of another shape.
        """
        return self._apply(images, return_features=True)

    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (B, classes) of images as above.

        Raises:
            ValueError: the network has none, or images of another shape.
        """
        if not self.classes:
            raise ValueError(
                f"{self.path} gives no class probabilities: it does not take net(images, no_output_bias=True)"
            )
        found = self._apply(images, no_output_bias=True)
        return found if self._normalised else found.softmax(dim=1)

    @torch.no_grad()
    def _apply(self, images: Tensor, **options: bool) -> Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must have shape (B, 1 or 3, H, W), got {tuple(images.shape)}")
        images = images.detach().to(self.device, torch.float32)
        with full_float32():
            found = self._net(levels(images).expand(-1, 3, -1, -1), **options)
        finite = torch.isfinite(images).flatten(start_dim=1).all(dim=1)
        return torch.where(finite[:, None], found, torch.nan)

    def _probe_classes(self, images: Tensor) -> tuple[int, bool]:
        """Number of classes, and whether the network normalises their probabilities; 0 without such an output."""
        try:
            with torch.no_grad():
                found = self._net(images, no_output_bias=True)
        except (RuntimeError, TypeError, ValueError, torch.jit.Error):
            return 0, False
        if not _is_table(found):
            return 0, False
        normalised = bool((found >= 0).all() and ((found.double().sum(dim=1) - 1).abs() < 1e-3).all())
        return found.shape[1], normalised


def levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as pixels, uint8: clip(127.5·x + 128, 0, 255), truncated; NaN becomes 0."""
    return (images.nan_to_num(nan=-1.0) * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def _no_program(path: Path) -> str | None:
    """What a zip is that holds no program, in place of the library's own words; None of any other file."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return "it is a damaged zip, as after a download that was interrupted: fetch it again"
    if any(name.endswith("/constants.pkl") for name in names):
        return None
    return "it is a checkpoint of torch.save" if any(n.endswith("/data.pkl") for n in names) else what_zip(names)


def is_program(path: Path) -> bool:
    """Whether a file is a zip with a program, as TorchScript's are."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def load_script(path: Path, device: torch.device, where: str = WHERE_TO_GET_INCEPTION) -> Any:
    """The TorchScript network in a file, in eval mode.

    Args:
        path: the file.
        device: where it is to compute.
        where: what is wanted, and where it is found, for messages.

    Raises:
        ValueError: it holds none; one line.
    """
    if not path.is_file():
        raise ValueError(f"{f'{path} is no file' if path.exists() else missing(path)}: {where}")
    with path.open("rb") as file:
        # The first byte of every pickle since protocol 2.
        start = file.read(512)
    if what := what_pointer(start):
        raise ValueError(f"{path} is no TorchScript network: {what}; {where}")
    if start.startswith(b"\x80"):
        raise ValueError(
            f"{path} is a pickled network, which runs code of its own when it is opened, and is not read here: {where}"
        )
    if what := _no_program(path):
        raise ValueError(f"{path} is no TorchScript network: {what}; {where}")
    try:
        with warnings.catch_warnings():
            # TorchScript is on its way out of PyTorch, the published file is not.
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, torch.jit.Error) as error:
        raise ValueError(f"{path} is no TorchScript network: {last_line(error)}; {where}") from None


def _is_table(found: object) -> bool:
    """Whether a network's answer to two images is a row for each."""
    if not isinstance(found, Tensor) or not found.is_floating_point():
        return False
    return found.ndim == 2 and len(found) == 2 and found.shape[1] > 0


def _described(found: object) -> str:
    return f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__


def last_line(error: BaseException) -> str:
    """What an error of TorchScript says without its listing of code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("The following")), type(error).__name__)[:200]
