"""DhariwalUNet: the ADM network of Dhariwal and Nichol (2021), in the form of the EDM family."""

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from ipfm.models.blocks import UNetBlock
from ipfm.models.embeddings import PositionalEmbedding
from ipfm.models.initialisation import Init
from ipfm.models.layers import Conv2d, GroupNorm, Linear
from ipfm.models.unet import UNet
from ipfm.models.unet_layout import CHANNELS_PER_HEAD, Entry, dhariwal_unet_layout

_EPS = 1e-5
_INIT = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
_INIT_ZERO = Init("kaiming_uniform", weight=0.0)


class DhariwalUNet(UNet):
    """U-Net F(x; noise label, class label, augment label) with attention of 64 channels a head.

    A block's embedding becomes a scale and a shift of its activation. A block that attends has width // 64 heads: none,
    and so no attention, below 64 channels. Names and order of the state dict are those of EDM checkpoints.

    The arguments are those of `SongUNet`; at the sides `attn_resolutions` all blocks attend, and the innermost block
    always does.

    Raises:
        ValueError: numbers that make no such network, with what was given and what is possible.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        layout = dhariwal_unet_layout(
            img_resolution=img_resolution,
            in_channels=in_channels,
            model_channels=model_channels,
            channel_mult=channel_mult,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
        )
        super().__init__(layout, label_dropout)
        emb_channels = model_channels * channel_mult_emb

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, init=_INIT_ZERO) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init=_INIT)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=_INIT)
        # Standard normal entries: the multiplier undoes the fan of the mode.
        label_init = Init("kaiming_normal", weight=math.sqrt(label_dim))
        self.map_label = Linear(label_dim, emb_channels, bias=False, init=label_init) if label_dim else None

        self._make(
            partial(
                UNetBlock,
                emb_channels=emb_channels,
                channels_per_head=CHANNELS_PER_HEAD,
                dropout=dropout,
                eps=_EPS,
                init=_INIT,
                init_zero=_INIT_ZERO,
            )
        )
        last = layout.decoder[-1].out_channels
        self.out_norm = GroupNorm(last, eps=_EPS)
        self.out_conv = Conv2d(last, out_channels, 3, init=_INIT_ZERO)

    def _make_other(self, entry: Entry) -> nn.Module:
        return Conv2d(entry.in_channels, entry.out_channels, 3, init=_INIT)

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(self._dropped(class_labels))
        return F.silu(emb)

    def _finish(self, x: Tensor, image: Tensor | None) -> Tensor:
        return self.out_conv(self.out_norm(x, silu=True))
