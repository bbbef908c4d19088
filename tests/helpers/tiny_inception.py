"""A small TorchScript network with the interface of the published Inception file."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

DIM, CLASSES = 12, 7


class TinyInception(nn.Module):
    """uint8 images (B, 3, H, W) of any size to features (B, DIM), or to class probabilities (B, CLASSES)."""

    def __init__(self, *, normalised: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("filters", torch.randn(DIM, 3, 3, 3, generator=generator))
        self.register_buffer("weight", torch.randn(CLASSES, DIM, generator=generator))
        self.register_buffer("bias", torch.randn(CLASSES, generator=generator))
        self.normalised = normalised

    def forward(
        self, images: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        if images.dtype != torch.uint8:
            raise ValueError("images must be uint8")
        x = nn.functional.interpolate(images.float(), size=[9, 9], mode="bilinear", align_corners=False)
        features = nn.functional.conv2d((x - 128) / 128, self.filters).relu().mean(dim=[2, 3])
        if return_features:
            return features
        logits = features @ self.weight.t()
        if not no_output_bias:
            logits = logits + self.bias
        return logits.softmax(dim=1) if self.normalised else logits


class WithoutClasses(nn.Module):
    """Takes the first of the two calls only."""

    def forward(self, images: Tensor, return_features: bool) -> Tensor:
        return images.float().mean(dim=[2, 3])


class WithoutFeatures(nn.Module):
    """Takes neither of the two calls."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float()


class FlatFeatures(nn.Module):
    """Takes the call, but its answer is no table."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return images.float().mean()


def write(path: Path, net: nn.Module | None = None) -> Path:
    """Script `net`, by default the whole interface, to a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(TinyInception() if net is None else net).save(str(path))
    return path
