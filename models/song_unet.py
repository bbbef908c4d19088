"""SongUNet: the DDPM++ and NCSN++ networks of Song et al. (2021), in the form of the EDM family."""

import math
from collections.abc import Sequence
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipfm.models.blocks import UNetBlock
from ipfm.models.embeddings import FourierEmbedding, PositionalEmbedding
from ipfm.models.initialisation import Init
from ipfm.models.layers import Conv2d, GroupNorm, Linear
from ipfm.models.unet import UNet
from ipfm.models.unet_layout import DecoderType, EmbeddingType, EncoderType, Entry, check_choice, song_unet_layout

_EPS = 1e-6
_INIT = Init("xavier_uniform")
_INIT_ZERO = Init("xavier_uniform", weight=1e-5)
_INIT_ATTN = Init("xavier_uniform", weight=math.sqrt(0.2))


class SongUNet(UNet):
    """U-Net F(x; noise label, class label, augment label).

    DDPM++: the defaults. NCSN++: `embedding_type="fourier"`, `encoder_type="residual"`, `channel_mult_noise=2`,
    `resample_filter=(1, 3, 3, 1)`. Names and order of the state dict are those of EDM checkpoints.

    Args:
        img_resolution: side of the images in pixels; divisible by 2^(levels - 1).
        in_channels: channels of the images given.
        out_channels: channels of the images returned.
        label_dim: width of class labels, 0 for none.
        augment_dim: width of augment labels, 0 for none.
        model_channels: base width.
        channel_mult: multiplies the base width at each level, highest resolution first.
        channel_mult_emb: width of the embedding, in model_channels.
        num_blocks: residual blocks of each level (one more in the decoder).
        attn_resolutions: sides at which the blocks attend; the innermost block always does.
        dropout: probability inside the residual blocks, while training.
        label_dropout: probability of dropping a class label, while training.
        embedding_type: of the noise label: "positional" or "fourier".
        channel_mult_noise: width of the noise embedding, in model_channels.
        encoder_type: how the image enters further levels: "standard" (it does not), "skip" or "residual".
        decoder_type: how the image leaves: "standard" (from the last level) or "skip" (from all).
        resample_filter: as in `Conv2d`.

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
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: EmbeddingType = "positional",
        channel_mult_noise: int = 1,
        encoder_type: EncoderType = "standard",
        decoder_type: DecoderType = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        check_choice("embedding_type", embedding_type, get_args(EmbeddingType))
        layout = song_unet_layout(
            img_resolution=img_resolution,
            in_channels=in_channels,
            out_channels=out_channels,
            model_channels=model_channels,
            channel_mult=channel_mult,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
            encoder_type=encoder_type,
            decoder_type=decoder_type,
            resample_filter=resample_filter,
        )
        super().__init__(layout, label_dropout)
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise

        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, init=_INIT) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=_INIT) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=_INIT)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=_INIT)

        self._resample_filter = tuple(resample_filter)
        self._make(
            partial(
                UNetBlock,
                emb_channels=emb_channels,
                num_heads=1,
                dropout=dropout,
                skip_scale=math.sqrt(0.5),
                eps=_EPS,
                resample_filter=resample_filter,
                resample_proj=True,
                adaptive_scale=False,
                init=_INIT,
                init_zero=_INIT_ZERO,
                init_attn=_INIT_ATTN,
            )
        )

    def _make_other(self, entry: Entry) -> nn.Module:
        if entry.kind == "aux_norm":
            return GroupNorm(entry.in_channels, eps=_EPS)
        return Conv2d(
            entry.in_channels,
            entry.out_channels,
            {"aux_down": 0, "aux_up": 0, "aux_skip": 1}.get(entry.kind, 3),
            up=entry.up,
            down=entry.down,
            resample_filter=self._resample_filter,
            fused_resample=entry.kind == "aux_residual",
            init=_INIT_ZERO if entry.kind == "aux_conv" else _INIT,
        )

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        cosines, sines = self.map_noise(noise_labels).chunk(2, dim=1)
        emb = torch.cat([sines, cosines], dim=1)
        if self.map_label is not None and class_labels is not None:
            labels = self._dropped(class_labels) * math.sqrt(self.map_label.in_features)
            emb = emb + self.map_label(labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer0(emb))
        return F.silu(self.map_layer1(emb))

    def _finish(self, x: Tensor, image: Tensor | None) -> Tensor:
        assert image is not None  # every decoder ends with an auxiliary entry
        return image
