"""The residual block that every U-Net here is made of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipfm.kernels._images import dense
from ipfm.models.attention import AttentionBackend, attention, head_count
from ipfm.models.frozen_ops import frozen_linear, is_frozen
from ipfm.models.initialisation import DEFAULT_INIT, ZERO_INIT, Init
from ipfm.models.layers import (
    Affine,
    Conv2d,
    GroupNorm,
    Linear,
    branch,
    cast,
    free_affine,
    free_bias,
    free_weight,
    join,
    residual,
    triton_serves,
    without_bias,
)
from ipfm.models.whole_block import Inputs, Numbers, is_plain_eager, whole_block


class Entering(NamedTuple):
    """What enters a block from outside beside its activation and the embedding; None: the block makes it."""

    projected: Tensor | None = None
    """affine(emb), and without `adaptive_scale` the bias of conv0 added: (B or 1, out_features of affine)."""
    bias: Tensor | None = None
    """The sum of the biases of conv1 and of skip, (out_channels,), or as `join` makes it."""
    norms: tuple[Affine | None, Affine | None, Affine | None] = (None, None, None)
    """Weight and bias of norm0, norm1 and norm2, as `join` makes them."""
    proj_bias: Tensor | None = None
    """The bias of proj, as `join` makes it."""


_NOTHING = Entering()


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
    returns (B, out_channels, H', W') in the dtype of x. `entering` is what `enter_together` made for this block.
    `attention_backend` may be changed at any time.

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
        self._resamples = up or down
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(
                in_channels, out_channels, kernel, up=up, down=down, resample_filter=resample_filter, init=init
            )
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = QKVProjection(out_channels, num_heads=self.num_heads, init=init_attn or init)
            self.proj = Conv2d(out_channels, out_channels, 1, init=init_zero)

    @property
    def is_plain(self) -> bool:
        """Whether it neither resamples, attends nor changes the number of channels."""
        return self.skip is None and not self.num_heads

    def forward(self, x: Tensor, emb: Tensor, entering: Entering = _NOTHING) -> Tensor:
        if not triton_serves(x):
            return self._one_by_one(x, emb)
        whole = self._whole(x, entering)
        x = self._in_parts(x, emb, entering) if whole is None else whole
        if self.num_heads:
            h, x = branch(self.norm2, x, affine=entering.norms[2])
            h, bias = without_bias(self.proj, self._attended(h))
            x = self._joined(x, h, bias if entering.proj_bias is None else entering.proj_bias)
        return x

    def _whole(self, x: Tensor, entering: Entering) -> Tensor | None:
        """What comes before the attention, as one function; None: its layers have to be called."""
        p, bias = entering.projected, entering.bias
        if p is None or self._resamples or type(self) is not UNetBlock or not is_plain_eager():
            return None
        # (Asked of every block in every pass: attributes of a module take their time.)
        modules: dict[str, Any] = self._modules
        norm0, norm1, conv0, conv1 = modules["norm0"], modules["norm1"], modules["conv0"], modules["conv1"]
        skip = modules.get("skip")
        affine0, affine1 = entering.norms[0] or free_affine(norm0), entering.norms[1] or free_affine(norm1)
        weight0, weight1 = free_weight(conv0, x), free_weight(conv1, x)
        if bias is None and skip is None:
            bias = free_bias(conv1)
        if weight0 is None or weight1 is None or affine0 is None or affine1 is None or bias is None:
            return None
        scale = shift = weight = None
        if self.adaptive_scale:
            scale, shift = p[:, :, None, None].chunk(2, dim=1)
            p = free_bias(conv0)
        if skip is not None:
            weight = free_weight(skip, x)
        if p is None or (weight is None) != (skip is None):
            return None
        numbers = Numbers(
            (norm0.num_groups, norm1.num_groups),
            (norm0.eps, norm1.eps),
            (conv0.w_pad, conv1.w_pad, 0 if skip is None else skip.w_pad),
            self.dropout if self.training else 0.0,
            self.skip_scale,
        )
        if entering.norms[0] is None:
            affine0, affine1 = ((cast(w, x), cast(b, x)) for w, b in (affine0, affine1))
        addend = p if p.ndim == 2 else cast(p, x)[None]
        bias = bias if bias.ndim == 2 else cast(bias, x)
        vectors = scale, shift, addend
        return whole_block(numbers, Inputs(dense(x), *affine0, weight0, *affine1, *vectors, weight1, bias, weight))

    def _in_parts(self, x: Tensor, emb: Tensor, entering: Entering) -> Tensor:
        """The same, layer by layer."""
        norm0, norm1, _ = entering.norms
        h, x = branch(self.norm0, x, silu=True, affine=norm0)
        h, bias = without_bias(self.conv0, h)
        p = self._projection(emb, h, bias) if entering.projected is None else entering.projected
        if self.adaptive_scale:
            scale, shift = p[:, :, None, None].chunk(2, dim=1)
            h = self.norm1(h, silu=True, scale=scale, shift=shift, addend=bias, **_given(norm1))
        else:
            h = self.norm1(h, silu=True, addend=p, **_given(norm1))
        h, bias = without_bias(self.conv1, self._dropped(h))
        x, skip_bias = (x, None) if self.skip is None else without_bias(self.skip, x)
        if entering.bias is not None:
            bias, skip_bias = entering.bias, None
        return self._joined(x, h, bias, skip_bias)

    def _one_by_one(self, x: Tensor, emb: Tensor) -> Tensor:
        """The same by layers that leave nothing to each other, as a CPU computes it fastest."""
        h = self.conv0(self.norm0(x, silu=True))
        p = self.affine(emb).to(h.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = p.chunk(2, dim=1)
            h = self.norm1(h, silu=True, scale=scale, shift=shift)
        else:
            h = self.norm1(h + p, silu=True)
        h = self.conv1(self._dropped(h))
        x = self._rescale((x if self.skip is None else self.skip(x)) + h)
        if self.num_heads:
            x = self._rescale(x + self.proj(self._attended(self.norm2(x))))
        return x

    def _dropped(self, h: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return h
        # F.dropout's own on CUDA; elsewhere that one keeps a mask as wide as the activation.
        return torch.native_dropout(h, self.dropout, True)[0]

    def _attended(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h)
        a = attention(q, k, v, backend=self.attention_backend)
        return a.reshape(h.shape[0], *h.shape[2:], self.out_channels).permute(0, 3, 1, 2)

    def _rescale(self, fresh: Tensor) -> Tensor:
        # In place: the sum was made here and no gradient needs its value.
        return fresh if self.skip_scale == 1 else fresh.mul_(self.skip_scale)

    def _joined(self, x: Tensor, h: Tensor, *biases: Tensor | None) -> Tensor:
        return residual(x, h, *biases, scale=self.skip_scale)

    def _projection(self, emb: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
        """affine(emb), and where it is added to h the bias that h lacks: (B or 1, n)."""
        p: Tensor = self.affine(emb)
        return p if bias is None or self.adaptive_scale else p + bias


def enter_together(blocks: Sequence[UNetBlock], emb: Tensor, x: Tensor) -> list[Entering]:
    """What can be made for all blocks at once, for each block; nothing on a CPU, where that is no faster.

    The layers `affine` are one matrix product, which each would else make of its own, with casts of its weight, its
    bias and its result. Layers whose calls something else follows are left to their blocks.

    Args:
        blocks: the blocks of a network.
        emb: (B or 1, emb_channels).
        x: an activation.
    """
    if not triton_serves(x):
        return [_NOTHING] * len(blocks)
    closing = _closing_biases(blocks)
    return _join(blocks, list(map(Entering, _project(blocks, emb), closing)), x)


def _closing_biases(blocks: Sequence[UNetBlock]) -> list[Tensor | None]:
    """The sums of the biases of conv1 and skip, where there are two."""
    found: list[Tensor | None] = [None] * len(blocks)
    pairs = [(i, free_bias(block.conv1), free_bias(block.skip)) for i, block in enumerate(blocks) if block.skip]
    both = [(i, own, other) for i, own, other in pairs if own is not None and other is not None]
    if both:
        places, own, other = zip(*both, strict=True)
        for i, bias in zip(places, torch._foreach_add(own, other), strict=True):
            found[i] = bias
    return found


def _join(blocks: Sequence[UNetBlock], entering: list[Entering], x: Tensor) -> list[Entering]:
    """And with it the small vectors of the blocks, where they are to have gradients.

    A compiler joins for itself what it thinks worth it.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return entering
    vectors: list[Tensor] = []

    def placed(*given: Tensor | None) -> slice | None:
        """Where they will be."""
        if given[0] is None:
            return None
        vectors.extend(vector for vector in given if vector is not None)
        return slice(len(vectors) - len(given), len(vectors))

    places = [
        (
            placed(*(free_affine(block.norm0) or (None,))),
            placed(*(free_affine(block.norm1) or (None,))),
            placed(*((free_affine(block.norm2) if block.num_heads else None) or (None,))),
            placed(free_bias(block.conv1) if given.bias is None else given.bias),
            placed(free_bias(block.proj) if block.num_heads else None),
        )
        for block, given in zip(blocks, entering, strict=True)
    ]
    if len({vector.dtype for vector in vectors}) != 1 or not any(vector.requires_grad for vector in vectors):
        return entering
    rows = join(vectors, x)

    def affine(place: slice | None) -> Affine | None:
        return None if place is None else (rows[place][0], rows[place][1])

    def row(place: slice | None) -> Tensor | None:
        return None if place is None else rows[place][0]

    return [
        Entering(given.projected, row(bias), (affine(norm0), affine(norm1), affine(norm2)), row(proj_bias))
        for given, (norm0, norm1, norm2, bias, proj_bias) in zip(entering, places, strict=True)
    ]


def _given(affine: Affine | None) -> dict[str, Affine]:
    """As keywords, of which a layer in place of `GroupNorm` need not know."""
    return {} if affine is None else {"affine": affine}


def _project(blocks: Sequence[UNetBlock], emb: Tensor) -> Sequence[Tensor | None]:
    affines = [block.affine for block in blocks]
    biases = [free_bias(affine) for affine in affines]
    added = [None if block.adaptive_scale else free_bias(block.conv0) for block in blocks]
    own, inner = ([bias for bias in each if bias is not None] for each in (biases, added))
    plain = not any(block.adaptive_scale for block in blocks)
    if len(own) < len(blocks) or len(inner) != (len(blocks) if plain else 0):
        return [None] * len(blocks)
    weight = torch.cat([affine.weight for affine in affines])
    rows = F.linear(emb, cast(weight, emb), cast(torch.cat(own), emb))
    if plain:
        # Not to the other bias: the gradients of both would be one memory.
        rows = rows + cast(torch.cat(inner), emb)
    return rows.split([affine.out_features for affine in affines], dim=1)
