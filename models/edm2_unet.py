"""EDM2's U-Net: the magnitude-preserving network of Karras et al. (2024)."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ipfm.kernels.mp_cat_silu import unchecked_mp_cat_silu
from ipfm.kernels.mp_silu import unchecked_mp_silu
from ipfm.kernels.mp_sum import unchecked_mp_sum
from ipfm.kernels.pixel_norm_silu import unchecked_pixel_norm_silu
from ipfm.kernels.qkv_norm import unchecked_qkv_norm
from ipfm.models.attention import AttentionBackend, attention, head_count
from ipfm.models.edm2_layers import MPConv, MPFourier, MPQKVProjection, mp_silu, mp_sum, resample
from ipfm.models.layers import cast, stored_weight, triton_serves
from ipfm.models.unet import Backbone, Logits, encoder_logits
from ipfm.models.unet_layout import Entry, edm2_unet_layout


class EDM2Block(nn.Module):
    """Residual block that preserves magnitudes, with an embedding input and optional resampling and self-attention.

    In the encoder x = n(skip(resample(x))), each pixel of size 1 over the channels; in the decoder x = resample(x), and
    skip(x) in the sum. y = conv_res1(dropout(mp_silu(conv_res0(mp_silu(x)) c))) with c = 1 + emb_gain emb_linear(emb);
    x = mp_sum(x, y). With attention x = mp_sum(x, attn_proj(attention(n(attn_qkv(x))))), each q, k and v of size 1. At
    last x is clamped.

    It is called with x (B, in_channels, H, W) in the compute dtype and emb (B or 1, emb_channels) in its own, and
    returns (B, out_channels, H', W') in the dtype of x. Who has mp_silu(x) at hand gives it to a block of the decoder
    that does not resample as `activated`. `attention_backend` may be changed at any time.

    Args:
        in_channels: channels of x.
        out_channels: channels of the result.
        emb_channels: width of the embedding.
        encoder: a block of the encoder.
        up: double the resolution.
        down: halve the resolution.
        attention: attend over the pixels of the result.
        channels_per_head: width of an attention head; narrower blocks do not attend.
        dropout: probability, while training.
        res_balance: share of y in its sum with x.
        attn_balance: share of the attention in its sum with x.
        clip_act: largest magnitude of an element of the result.
        resample_filter: as in `resample`.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        encoder: bool,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float = 256.0,
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.emb_channels = emb_channels
        self.encoder = encoder
        self.up = up
        self.down = down
        self.num_heads = head_count(out_channels, channels_per_head=channels_per_head) if attention else 0
        self.dropout = dropout
        self.res_balance = res_balance
        self.attn_balance = attn_balance
        self.clip_act = clip_act
        self.resample_filter = tuple(resample_filter)
        self.attention_backend: AttentionBackend = "auto"

        # The order of the parameters is the order of the state dict, and so of optimizer states in checkpoints.
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if encoder else in_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels, 0)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attn_qkv = MPQKVProjection(out_channels, num_heads=self.num_heads) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, 1) if self.num_heads else None

    @property
    def is_plain(self) -> bool:
        """Whether it neither resamples, attends nor changes the number of channels."""
        return self.conv_skip is None and not (self.num_heads or self.up or self.down)

    def forward(self, x: Tensor, emb: Tensor, activated: Tensor | None = None) -> Tensor:
        serves = triton_serves(x)
        if self.up and not self.encoder and len(set(self.resample_filter)) == 1 and len(self.resample_filter) == 2:
            # Copies of pixels: each is activated once.
            activated = resample(unchecked_mp_silu(x, triton_runs=serves), self.resample_filter, up=True)
        if self.up or self.down:
            x = resample(x, self.resample_filter, up=self.up)
        if self.encoder:
            x = x if self.conv_skip is None else self.conv_skip(x)
            x, activated = unchecked_pixel_norm_silu(x, triton_runs=serves)
        elif activated is None:
            activated = unchecked_mp_silu(x, triton_runs=serves)
        y = self.conv_res0(activated)
        c = self.emb_linear(emb, self.emb_gain) + 1
        dropout = self.dropout if self.training else 0.0
        y = self.conv_res1(unchecked_mp_silu(y, c, dropout=dropout, triton_runs=serves))
        if not self.encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        # Where attention follows, it is its sum that is cut.
        clip = self.clip_act if self.attn_qkv is None else math.inf
        x = unchecked_mp_sum(x, y, self.res_balance, clip=clip, triton_runs=serves)
        if self.attn_qkv is not None and self.attn_proj is not None:
            q, k, v = unchecked_qkv_norm(self.attn_qkv(x), self.num_heads, triton_runs=serves)
            a = attention(q, k, v, backend=self.attention_backend)
            a = a.reshape(x.shape[0], *x.shape[2:], self.out_channels).permute(0, 3, 1, 2)
            x = unchecked_mp_sum(x, self.attn_proj(a), self.attn_balance, clip=self.clip_act, triton_runs=serves)
        return x


class EDM2UNet(Backbone):
    """U-Net F(x; noise label, class label) that preserves magnitudes. There are no augment labels.

    To the image a channel of ones is appended, which stands in for biases. Names and order of the state dict are those
    of EDM2 checkpoints.

    Args:
        img_resolution: side of the images in pixels; divisible by 2^(levels - 1).
        in_channels: channels of the images given.
        out_channels: channels of the images returned.
        label_dim: width of class labels, 0 for none.
        model_channels: base width.
        channel_mult: multiplies the base width at each level, highest resolution first.
        channel_mult_noise: width of the noise embedding, in model_channels.
        channel_mult_emb: width of the embedding, in model_channels.
        num_blocks: residual blocks of each level (one more in the decoder).
        attn_resolutions: sides at which the blocks attend; the innermost block always does.
        channels_per_head: width of an attention head; narrower blocks do not attend.
        dropout: probability inside the residual blocks, while training.
        label_balance: share of the class label in its sum with the noise label.
        concat_balance: share of the encoder's activation where it joins the decoder's.
        res_balance: share of a block's residual.
        attn_balance: share of a block's attention.
        clip_act: largest magnitude of an element that leaves a block.
        resample_filter: as in `resample`.

    Raises:
        ValueError: numbers that make no such network, with what was given and what is possible.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int = 1,
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        channels_per_head: int = 64,
        dropout: float = 0.0,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float = 256.0,
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__(
            edm2_unet_layout(
                img_resolution=img_resolution,
                in_channels=in_channels,
                model_channels=model_channels,
                channel_mult=channel_mult,
                num_blocks=num_blocks,
                attn_resolutions=attn_resolutions,
                channels_per_head=channels_per_head,
                resample_filter=resample_filter,
            )
        )
        self.label_balance = label_balance
        self.concat_balance = concat_balance
        noise_channels, emb_channels = model_channels * channel_mult_noise, model_channels * channel_mult_emb

        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels, 0)
        self.emb_label = MPConv(label_dim, emb_channels, 0) if label_dim else None

        make = partial(
            EDM2Block,
            emb_channels=emb_channels,
            channels_per_head=channels_per_head,
            dropout=dropout,
            res_balance=res_balance,
            attn_balance=attn_balance,
            clip_act=clip_act,
            resample_filter=resample_filter,
        )

        def entry_module(entry: Entry, *, encoder: bool) -> nn.Module:
            if entry.kind == "conv":
                return MPConv(entry.in_channels, entry.out_channels, 3)
            return make(
                entry.in_channels,
                entry.out_channels,
                encoder=encoder,
                up=entry.up,
                down=entry.down,
                attention=entry.attention,
            )

        self.enc = nn.ModuleDict({entry.name: entry_module(entry, encoder=True) for entry in self.layout.encoder})
        self.dec = nn.ModuleDict({entry.name: entry_module(entry, encoder=False) for entry in self.layout.decoder})
        self.out_conv = MPConv(self.layout.decoder[-1].out_channels, out_channels, 3)

    @property
    def blocks(self) -> Iterator[EDM2Block]:
        """Every residual block, in order of evaluation."""
        return (module for module in (*self.enc.values(), *self.dec.values()) if isinstance(module, EDM2Block))

    @property
    def first_weight(self) -> Tensor:
        """See `Backbone.first_weight`."""
        return stored_weight(self.emb_noise)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        logits: Logits = "none",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """F (B, out_channels, R, R) in the dtype of x.

        The labels have one dtype of at least float32, in which the embedding is computed.

        Args:
            x: (B, in_channels, R, R), in the compute dtype.
            noise_labels: (B,) or (1,).
            class_labels: (B or 1, label_dim); None is zeros.
            augment_labels: not used.
            logits: "too": (F, `encoder_logits`); "alone": these, for which no decoder is run.
        """
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        emb = self._embed(noise_labels, class_labels)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips: list[Tensor] = []
        for module in self.enc.values():
            x = self._run(module, emb, x) if isinstance(module, EDM2Block) else module(x)
            skips.append(x)
        seen = None if logits == "none" else encoder_logits(x)
        if seen is not None and logits == "alone":
            return seen
        for entry, module in zip(self.layout.decoder, self.dec.values(), strict=True):
            x = self._run(module, emb, *((x, skips.pop()) if entry.skip_channels else (x,)))
        out: Tensor = self.out_conv(x, self.out_gain)
        return out if seen is None else (out, seen)

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None) -> Tensor:
        """The embedding (B or 1, emb_channels) that enters every block."""
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            width = self.emb_label.in_channels
            labels = emb.new_zeros(1, width) if class_labels is None else class_labels * math.sqrt(width)
            emb = mp_sum(emb, self.emb_label(cast(labels, emb)), self.label_balance)
        return mp_silu(emb)

    def _run(self, block: nn.Module, emb: Tensor, *parts: Tensor) -> Tensor:
        """A residual block of the joined `parts`."""

        def run(emb: Tensor, *parts: Tensor) -> Any:
            if len(parts) == 2:
                serves = triton_serves(parts[0])
                x, activated = unchecked_mp_cat_silu(*parts, self.concat_balance, triton_runs=serves)
                return block(x, emb, activated)
            return block(*parts, emb)

        assert isinstance(block, EDM2Block)
        # The concatenation is made again too: its parts are the outputs of other blocks, which are kept anyway.
        return self._checkpointed(run, block, block.dropout, emb, *parts, tensors=(emb, *parts))
