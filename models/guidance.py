"""Guidance: a denoiser that is driven away from a weaker one (Ho & Salimans 2022; Karras et al. 2024).

T_w(x; σ) = T_g(x; σ) + w·(T(x; σ) - T_g(x; σ)). With a T_g that knows no classes this is classifier-free guidance; with
a T_g of the same task that was trained less, or has fewer parameters, autoguidance. At no D and no w but 0 and 1 is T_w
the denoiser of a distribution.
"""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from ipfm.models.unet import Attending, Backbone


class GuidedUNet(Backbone):
    """F_w = F_g + w·(F - F_g), in place of the inner U-Net F of a preconditioned network; inputs as of the U-Nets.

    With scalings in common, as `NetworkConfig.guide` demands, that is T_w within them. The weights are those of both.

    Args:
        strong: F.
        weak: F_g.
        weight: w.
        classes: F_g knows classes: it is told them.
        augmentation: F_g knows augmentation labels, likewise.
    """

    def __init__(self, strong: Backbone, weak: Backbone, weight: float, *, classes: bool, augmentation: bool) -> None:
        super().__init__(strong.layout)
        self.strong, self.weak, self.weight = strong, weak, weight
        self._classes, self._augmentation = classes, augmentation

    @property
    def blocks(self) -> Iterator[Attending]:
        """Every residual block of both."""
        return chain(self.strong.blocks, self.weak.blocks)

    @property
    def first_weight(self) -> Tensor:
        """That of F."""
        return self.strong.first_weight

    @property
    def activation_checkpointing(self) -> bool:
        """See `Backbone`."""
        return self.strong.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self.strong.activation_checkpointing = self.weak.activation_checkpointing = on

    @property
    def channels_last(self) -> bool:
        """See `Backbone`."""
        return self.strong.channels_last

    @channels_last.setter
    def channels_last(self, on: bool) -> None:
        self.strong.channels_last = self.weak.channels_last = on

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """F_w (B, out_channels, R, R) in the dtype of x."""
        strong = self.strong(x, noise_labels, class_labels, augment_labels)
        weak = self.weak(
            x,
            noise_labels,
            class_labels if self._classes else None,
            augment_labels if self._augmentation else None,
        )
        guided: Tensor = torch.lerp(weak, strong, self.weight)
        return guided
