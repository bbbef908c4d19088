"""Features of a small classifier of the images' own classes: what Inception is to photos, for sets unlike photos.

A distance of such features means something beside others of the same classifier alone. Its weights have a digest, which
is a part of the features' name; runs, statistics and tables that carry the name are not compared with another one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipfm.models.atomic_files import atomic_write
from ipfm.models.checkpoints.recognise import missing
from ipfm.models.full_float32 import full_float32

FORMAT = "ipfm-classifier-1"
DIM = 128
LEAST_SIDE = 8


class ClassifierNetwork(nn.Module):
    """Two convolutions, each of which halves the sides, and two linear layers.

    Args:
        shape: (C, H, W) of the images.
        classes: how many.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.first = nn.Conv2d(channels, 32, 5, stride=2, padding=2)
        self.second = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.third = nn.Linear(64 * -(-height // 4) * -(-width // 4), DIM)
        self.last = nn.Linear(DIM, classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] to (B, 128)."""
        hidden = F.relu(self.second(F.relu(self.first(images))))
        return F.relu(self.third(hidden.flatten(start_dim=1)))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] to logits (B, classes)."""
        logits: Tensor = self.last(self.features(images))
        return logits


@dataclass(frozen=True)
class ClassifierFacts:
    """What a classifier's file says of it.

    Attributes:
        shape: (C, H, W) of the images.
        classes: how many.
        accuracy: share of images that it was not trained on and tells right.
        held_out: how many these are.
        trained_on: how many images it was trained on.
        seed: of its weights and of the order of the images.
    """

    shape: tuple[int, int, int]
    classes: int
    accuracy: float
    held_out: int
    trained_on: int
    seed: int


class ClassifierFeatures:
    """The features before the last layer of a classifier, (B, 128).

    Args:
        network: the classifier.
        facts: of it.
        device: where it runs; images are taken from any device.
    """

    dim = DIM

    def __init__(self, network: ClassifierNetwork, facts: ClassifierFacts, device: torch.device | str = "cpu") -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.facts, self.device = facts, torch.device(device)
        self.name = f"classifier {digest(network)}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] to (B, 128); they are compared as 8-bit pixels, as when they are written to files.

        One with a non-finite pixel, which a file cannot hold, has NaN as its features.

        Raises:
            ValueError: images of another shape.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != self.facts.shape:
            wanted = ", ".join(map(str, self.facts.shape))
            raise ValueError(f"images must have shape (B, {wanted}), got {tuple(images.shape)}")
        images = images.detach().to(self.device, torch.float32)
        pixels = (images.nan_to_num(nan=-1.0) * 127.5 + 128).clamp(0, 255).floor()
        with full_float32():
            found = self.network.features(pixels / 127.5 - 1)
        finite = torch.isfinite(images).flatten(start_dim=1).all(dim=1)
        return torch.where(finite[:, None], found, torch.nan)

    def described(self) -> str:
        """What it is, in a line for people."""
        facts = self.facts
        return (
            f"{self.name}: {100 * facts.accuracy:.1f} % of {facts.held_out:,} held-out images right, "
            f"trained on {facts.trained_on:,} of {facts.classes} classes, seed {facts.seed}"
        )


def digest(network: nn.Module) -> str:
    """Twelve digits that stand for its weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def save_classifier(path: Path, features: ClassifierFeatures) -> None:
    """Write `path`, a .safetensors with the weights and what is known of them; whole or not at all."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in features.network.state_dict().items()}
    payload = safetensors.torch.save(tensors, {"classifier": json.dumps({"format": FORMAT, **vars(features.facts)})})
    with atomic_write(path) as file:
        file.write(payload)


def load_classifier(path: Path, device: torch.device | str = "cpu") -> ClassifierFeatures:
    """What `save_classifier` wrote.

    Raises:
        ValueError: it is no such file, or damaged; one line.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file" if path.exists() else missing(path))
    made_by = "a classifier is written by recipes/fashion_ipfm.py"
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        said = json.loads(about.get("classifier", "{}"))
        if said.pop("format", None) != FORMAT:
            raise ValueError("it holds another network")
        facts = ClassifierFacts(**{**said, "shape": tuple(said["shape"])})
        network = ClassifierNetwork(facts.shape, facts.classes)
        network.load_state_dict(tensors)
        return ClassifierFeatures(network, facts, device)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} is no classifier that can be read: {reason}; {made_by}") from None
