"""The residual block that every U-Net here is made of."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipfm.models.attention import AttentionBackend, attention, head_count
from ipfm.models.frozen_ops import frozen_linear, is_frozen
from ipfm.models.initialisation import DEFAULT_INIT, ZERO_INIT, Init
from ipfm.models.layers import Conv2d, GroupNorm, Linear, cast, is_bare, triton_serves


class QKVProjection(Conv2d):
    """The 1×1 convolution of an attention layer: x (B, C, H, W) -> q, k, v, each (B, H·W, heads, C/heads).

    Checkpoints hold the output channels as (head, channel of the head, q|k|v), the last running fastest. The rows are
    put in the order (q|k|v, head, channel) by permuting the weight, which is small, rather than the activation: in
    channels_last no activation is copied.

    Args:
        channels: C.
        num_heads: attention heads, a divisor of C.
        init: how weight and bias start.
    """

    def __init__(self, channels: int, *, num_heads: int, init: Init) -> None:
        super().__init__(channels, 3 * channels, 1, init=init)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        assert self.weight is not None and self.bias is not None
        tokens, bias = x.flatten(2).transpose(1, 2), self._arranged(self.bias.to(x.dtype)).flatten()
        if is_frozen(x, self.weight, self.bias):
            joined = frozen_linear(tokens, self.weight, bias, arrange=self._arranged)
        else:
            joined = F.linear(tokens, self._arranged(self.weight.to(x.dtype)), bias)
        q, k, v = joined.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return q, k, v

    def _arranged(self, rows: Tensor) -> Tensor:
        """(3·C, ...) in the order of checkpoints -> (3·C, n) in the order of use."""
        return rows.view(self.num_heads, -1, 3, rows[0].numel()).permute(2, 0, 1, 3).reshape(self.out_channels, -1)


class UNetBlock(nn.Module):
    """Residual block with an embedding input and optional resampling and self-attention.

    h = conv0(silu(norm0(x))); the embedding enters before norm1, added to h, or with `adaptive_scale` after it as a
    scale and a shift; h = conv1(dropout(silu(…))); x = (h + skip(x))·skip_scale. With attention
    x = (x + proj(attention(qkv(norm2(x)))))·skip_scale.

    It is called with x (B, in_channels, H, W) in the compute dtype and emb (B or 1, emb_channels) in its own, and
    returns (B, out_channels, H', W') in the dtype of x. `projected` is what `project_together` made of emb for this
    block, if it did. `attention_backend` may be changed at any time.

    Args:
        in_channels: channels of x.
        out_channels: channels of the result.
        emb_channels: width of the embedding.
        up: double the resolution.
        down: halve the resolution.
        attention: attend over the pixels of the result.
        num_heads: attention heads; out_channels // channels_per_head where None. If that is 0 there is no attention.
        channels_per_head: width of an attention head where `num_heads` is None.
        dropout: probability, while training.
        skip_scale: factor of each sum.
        eps: added to the variance of the normalisations.
        resample_filter: as in `Conv2d`.
        resample_proj: the skip connection is a convolution also where it only resamples.
        adaptive_scale: the embedding is a scale and a shift.
        init: how weights and biases start.
        init_zero: how those of the layers that close a residual start.
        init_attn: how those of `qkv` start; `init` where None.

    Raises:
        ValueError: the heads do not divide the channels, or GroupNorm has no group count for them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: Init = DEFAULT_INIT,
        init_zero: Init = ZERO_INIT,
        init_attn: Init | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.emb_channels = emb_channels
        self.num_heads = head_count(out_channels, num_heads, channels_per_head=channels_per_head) if attention else 0
        self.dropout = dropout
        self.skip_scale = float(skip_scale)
        self.adaptive_scale = adaptive_scale
        self.attention_backend: AttentionBackend = "auto"

        # The order of the children is the order of the state dict, and so of optimizer states in checkpoints.
        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up=up, down=down, resample_filter=resample_filter, init=init)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), init=init)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init=init_zero)
        self.skip: Conv2d | None = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(
                in_channels, out_channels, kernel, up=up, down=down, resample_filter=resample_filter, init=init
            )
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = QKVProjection(out_channels, num_heads=self.num_heads, init=init_attn or init)
            self.proj = Conv2d(out_channels, out_channels, 1, init=init_zero)

    def forward(self, x: Tensor, emb: Tensor, projected: Tensor | None = None) -> Tensor:
        h = self.conv0(self.norm0(x, silu=True))
        p = (self.affine(emb).to(h.dtype) if projected is None else projected)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = p.chunk(2, dim=1)
            h = self.norm1(h, silu=True, scale=scale, shift=shift)
        else:
            h = self.norm1(h + p, silu=True)
        if self.training and self.dropout:
            # F.dropout's own on CUDA; elsewhere that one keeps a mask as wide as the activation.
            h, _ = torch.native_dropout(h, self.dropout, True)
        h = self.conv1(h)
        x = self._rescale((x if self.skip is None else self.skip(x)) + h)
        if self.num_heads:
            q, k, v = self.qkv(self.norm2(x))
            a = attention(q, k, v, backend=self.attention_backend)
            image = a.reshape(x.shape[0], *x.shape[2:], self.out_channels).permute(0, 3, 1, 2)
            x = self._rescale(x + self.proj(image))
        return x

    def _rescale(self, fresh: Tensor) -> Tensor:
        # In place: the sum was made here and no gradient needs its value.
        return fresh if self.skip_scale == 1 else fresh.mul_(self.skip_scale)


def project_together(blocks: Sequence[UNetBlock], emb: Tensor, x: Tensor) -> Sequence[Tensor] | None:
    """What the layers `affine` of all blocks make of the embedding, as one matrix product.

    Each would else be a product of its own, with casts of its weight, its bias and its result.

    Args:
        blocks: the blocks.
        emb: (B or 1, emb_channels).
        x: an activation, whose dtype is that of the result.

    Returns:
        For each block (B or 1, out_features of its affine), strided. None where the layers must be called one by one:
        on a CPU, where that is as fast, in a graph to be exported, and where something else than they looks at them.
    """
    affines = [block.affine for block in blocks]
    if not triton_serves(x) or torch.compiler.is_exporting() or not all(map(is_bare, affines)):
        return None
    weight = torch.cat([affine.weight for affine in affines])
    bias = torch.cat([affine.bias for affine in affines if affine.bias is not None])
    rows = F.linear(emb, cast(weight, emb), cast(bias, emb))
    return rows.to(x.dtype).split([affine.out_features for affine in affines], dim=1)
