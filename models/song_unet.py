"""SongUNet: the DDPM++ and NCSN++ networks of Song et al. (2021), in the form of the EDM family."""

import math
from collections.abc import Iterator, Sequence
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import AttentionBackend, check_attention_backend
from .blocks import UNetBlock
from .embeddings import FourierEmbedding, PositionalEmbedding
from .init import Init
from .layers import Conv2d, GroupNorm, Linear
from .layout import DecoderType, EmbeddingType, EncoderType, Entry, check_choice, song_unet_layout

_EPS = 1e-6
_INIT = Init("xavier_uniform")
_INIT_ZERO = Init("xavier_uniform", weight=1e-5)
_INIT_ATTN = Init("xavier_uniform", weight=math.sqrt(0.2))


class SongUNet(nn.Module):
    """U-Net F(x; noise label, class label, augment label).

    DDPM++: the defaults. NCSN++: `embedding_type="fourier"`, `encoder_type="residual"`, `channel_mult_noise=2`,
    `resample_filter=(1, 3, 3, 1)`. Names and order of the state dict are those of EDM checkpoints.

    img_resolution:     side of the images; divisible by 2^(levels - 1)
    in_channels, out_channels: of the images given and returned
    label_dim:          width of class labels, 0 for none
    augment_dim:        width of augment labels, 0 for none
    model_channels:     base width; `channel_mult` multiplies it at each level, highest resolution first
    channel_mult_emb, channel_mult_noise: width of the embedding and of the noise embedding, in model_channels
    num_blocks:         residual blocks of each level (one more in the decoder)
    attn_resolutions:   sides at which the blocks attend; the innermost block always does
    dropout:            probability inside the residual blocks, while training
    label_dropout:      probability of dropping a class label, while training

    Raises ValueError with what was given and what is possible.
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
        super().__init__()
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
        self.layout = layout
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise

        self.map_noise: PositionalEmbedding | FourierEmbedding
        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, init=_INIT) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=_INIT) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=_INIT)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=_INIT)

        def build(entry: Entry) -> nn.Module:
            if entry.kind == "block":
                return UNetBlock(
                    entry.in_channels,
                    entry.out_channels,
                    emb_channels,
                    up=entry.up,
                    down=entry.down,
                    attention=entry.attention,
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
            if entry.kind == "aux_norm":
                return GroupNorm(entry.in_channels, eps=_EPS)
            return Conv2d(
                entry.in_channels,
                entry.out_channels,
                {"aux_down": 0, "aux_up": 0, "aux_skip": 1}.get(entry.kind, 3),
                up=entry.up,
                down=entry.down,
                resample_filter=resample_filter,
                fused_resample=entry.kind == "aux_residual",
                init=_INIT_ZERO if entry.kind == "aux_conv" else _INIT,
            )

        self.enc = nn.ModuleDict({entry.name: build(entry) for entry in layout.encoder})
        self.dec = nn.ModuleDict({entry.name: build(entry) for entry in layout.decoder})

    @property
    def blocks(self) -> Iterator[UNetBlock]:
        """Every residual block, in order of evaluation."""
        return (module for module in (*self.enc.values(), *self.dec.values()) if isinstance(module, UNetBlock))

    @property
    def attention_backend(self) -> AttentionBackend:
        """How the attention layers compute (see `attention`); may be set at any time."""
        return next(self.blocks).attention_backend

    @attention_backend.setter
    def attention_backend(self, backend: AttentionBackend) -> None:
        check_attention_backend(backend)
        for block in self.blocks:
            block.attention_backend = backend

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """F (B, out_channels, R, R) in the dtype of x.

        x (B, in_channels, R, R) in the compute dtype; noise_labels (B) or (1), class_labels (B or 1, label_dim) and
        augment_labels (B or 1, augment_dim), all in one dtype of at least float32, in which the mapping network
        computes.
        """
        emb = self._embed(noise_labels, class_labels, augment_labels)
        skips: list[Tensor] = []
        aux = x
        for entry, module in zip(self.layout.encoder, self.enc.values(), strict=True):
            if entry.kind == "aux_down":
                aux = module(aux)
            elif entry.kind == "aux_skip":
                x = skips[-1] = x + module(aux)
            elif entry.kind == "aux_residual":
                x = skips[-1] = aux = (x + module(aux)) / math.sqrt(2)
            else:
                x = module(x, emb) if entry.kind == "block" else module(x)
                skips.append(x)

        image: Tensor | None = None
        normed = x
        for entry, module in zip(self.layout.decoder, self.dec.values(), strict=True):
            if entry.kind == "aux_up":
                image = module(image)
            elif entry.kind == "aux_norm":
                normed = module(x)
            elif entry.kind == "aux_conv":
                part = module(F.silu(normed))
                image = part if image is None else image + part
            else:
                if entry.skip_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = module(x, emb)
        assert image is not None
        return image

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        cosines, sines = self.map_noise(noise_labels).chunk(2, dim=1)
        emb = torch.cat([sines, cosines], dim=1)
        if self.map_label is not None and class_labels is not None:
            if self.training and self.label_dropout:
                kept = torch.rand(class_labels.shape[0], 1, device=class_labels.device) >= self.label_dropout
                class_labels = class_labels * kept.to(class_labels.dtype)
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer0(emb))
        return F.silu(self.map_layer1(emb))
