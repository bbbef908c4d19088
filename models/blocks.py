"""The residual block that every U-Net here is made of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipfm.kernels._images import dense
from ipfm.models import whole_attention
from ipfm.models.attention import AttentionBackend, attention, head_count
from ipfm.models.frozen_ops import frozen_linear, is_frozen
from ipfm.models.initialisation import DEFAULT_INIT, ZERO_INIT, Init
from ipfm.models.layers import (
    Affine,
    Conv2d,
    Free,
    GroupNorm,
    Linear,
    Weight,
    branch,
    cast,
    free_parameters,
    join,
    now,
    residual,
    triton_serves,
    without_bias,
)
from ipfm.models.whole_attention import arranged
from ipfm.models.whole_block import Inputs, Numbers, is_plain_eager, whole_block


class Layers(NamedTuple):
    """Weight and bias of each of a block's layers that may be bypassed; None: it may not, or is not there."""

    norm0: Free | None
    conv0: Free | None
    affine: Free | None
    norm1: Free | None
    conv1: Free | None
    skip: Free | None
    norm2: Free | None
    proj: Free | None
    qkv: Free | None = None


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
    layers: Layers | None = None
    """The block's own."""


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
        weight = self.weight
        assert weight is not None and self.bias is not None
        tokens, bias = x.flatten(2).transpose(1, 2), self._arranged(self.bias.to(x.dtype)).flatten()
        if is_frozen(x, weight, self.bias):
            joined = frozen_linear(tokens, weight, bias, arrange=self._arranged)
        else:
            joined = F.linear(tokens, self._arranged(weight.to(x.dtype)), bias)
        q, k, v = joined.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return q, k, v

    def _arranged(self, rows: Tensor) -> Tensor:
        """(3·C, ...) in the order of checkpoints -> (3·C, n) in the order of use."""
        return arranged(rows, self.num_heads)


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
            whole = self._whole_attention(x, entering)
            if whole is not None:
                return whole
            h, x = branch(self.norm2, x, affine=entering.norms[2])
            h, bias = without_bias(self.proj, self._attended(h))
            x = self._joined(x, h, bias if entering.proj_bias is None else entering.proj_bias)
        return x

    def _whole(self, x: Tensor, entering: Entering) -> Tensor | None:
        """What comes before the attention, as one function; None: its layers have to be called."""
        p, bias, norms, layers = entering.projected, entering.bias, entering.norms, entering.layers
        if p is None or layers is None or type(self) is not UNetBlock or not is_plain_eager():
            return None
        weight0, weight1, weight = _usable(layers.conv0, x), _usable(layers.conv1, x), _usable(layers.skip, x)
        affine0, affine1 = norms[0] or _whole_affine(layers.norm0), norms[1] or _whole_affine(layers.norm1)
        modules: dict[str, Any] = self._modules
        skip: Any = modules.get("skip")
        if bias is None and skip is None and layers.conv1 is not None:
            bias = layers.conv1[1]
        if weight0 is None or weight1 is None or affine0 is None or affine1 is None or bias is None:
            return None
        scale = shift = None
        if self.adaptive_scale:
            scale, shift = p[:, :, None, None].chunk(2, dim=1)
            p = None if layers.conv0 is None else layers.conv0[1]
        if p is None or (weight is None) != (skip is None):
            return None
        norm0, conv0, norm1 = modules["norm0"], modules["conv0"], modules["norm1"]
        filters: tuple[Tensor | None, Tensor | None] = None, None
        if self._resamples:
            before = conv0.resampling(x, self.in_channels)
            after = skip.resampling(x, self.out_channels if skip.up else self.in_channels)
            if before is None or after is None:
                return None
            filters = before, after if skip.up else None
        numbers = Numbers(
            (norm0.num_groups, norm1.num_groups),
            (norm0.eps, norm1.eps),
            (conv0.w_pad, modules["conv1"].w_pad, 0 if skip is None else skip.w_pad),
            self.dropout if self.training else 0.0,
            self.skip_scale,
            conv0.up,
            conv0.f_pad,
        )
        if norms[0] is None:
            affine0, affine1 = ((cast(w, x), cast(b, x)) for w, b in (affine0, affine1))
        addend = p if p.ndim == 2 else cast(p, x)[None]
        bias = bias if bias.ndim == 2 else cast(bias, x)
        vectors = scale, shift, addend
        return whole_block(
            numbers,
            Inputs(
                dense(x), *affine0, now(weight0, x), *affine1, *vectors, now(weight1, x), bias,
                None if weight is None else now(weight, x), *filters,
            ),
        )  # fmt: skip

    def _whole_attention(self, x: Tensor, entering: Entering) -> Tensor | None:
        """The attention and what surrounds it, as few functions; None: its layers have to be called."""
        layers, bias = entering.layers, entering.proj_bias
        if layers is None or type(self) is not UNetBlock or not is_plain_eager():
            return None
        qkv, proj, affine = _usable(layers.qkv, x), _usable(layers.proj, x), entering.norms[2]
        if affine is None and layers.norm2 is not None and (own := _whole_affine(layers.norm2)) is not None:
            affine = cast(own[0], x), cast(own[1], x)
        if bias is None and (free := _bias(layers.proj)) is not None:
            bias = cast(free, x)
        qkv_bias = _bias(layers.qkv)
        if qkv is None or proj is None or affine is None or bias is None or qkv_bias is None:
            return None
        if self.attention_backend not in ("auto", "sdpa"):
            return None
        norm = self.norm2
        numbers = whole_attention.Numbers(norm.num_groups, norm.eps, self.num_heads, self.skip_scale)
        given = whole_attention.Inputs(dense(x), *affine, now(qkv, x), cast(qkv_bias, x), now(proj, x), bias)
        return whole_attention.whole_attention(numbers, given)

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
    layers = [*map(_layers, blocks)]
    return _join(blocks, layers, _project(blocks, layers, emb), _closing_biases(layers), x)


def _trained(layers: Layers) -> bool:
    """Whether a parameter in them is to have a gradient."""
    return any(isinstance(t, Tensor) and t.requires_grad for own in layers if own is not None for t in own)


def _layers(block: UNetBlock) -> Layers:
    qkv = free_parameters(block._modules["qkv"], _PROJECTIONS) if block.num_heads else None
    return Layers._make([*map(free_parameters, map(block._modules.get, _LAYERS)), qkv])


_LAYERS, _PROJECTIONS = Layers._fields[:-1], frozenset((QKVProjection,))


def _bias(layer: Free | None) -> Tensor | None:
    return None if layer is None else layer[1]


def _whole_affine(norm: Free | None) -> Affine | None:
    if norm is None or not isinstance(norm[0], Tensor) or norm[1] is None:
        return None
    return norm[0], norm[1]


def _usable(conv: Free | None, x: Tensor) -> Weight | None:
    """The weight of a convolution, in the dtype of x where it is not made anew at each use; None: there is none."""
    weight = None if conv is None else conv[0]
    if not isinstance(weight, Tensor):
        return weight
    return None if weight.dtype != x.dtype or hasattr(weight, "ds_id") else weight


def _closing_biases(blocks: Sequence[Layers]) -> list[Tensor | None]:
    """The sums of the biases of conv1 and skip, where there are two."""
    found: list[Tensor | None] = [None] * len(blocks)
    pairs = [(i, _bias(block.conv1), _bias(block.skip)) for i, block in enumerate(blocks) if block.skip is not None]
    both = [(i, own, other) for i, own, other in pairs if own is not None and other is not None]
    if both:
        places, own, other = zip(*both, strict=True)
        for i, bias in zip(places, torch._foreach_add(own, other), strict=True):
            found[i] = bias
    return found


def _join(
    blocks: Sequence[UNetBlock],
    layers: Sequence[Layers],
    projected: Sequence[Tensor | None],
    closing: Sequence[Tensor | None],
    x: Tensor,
) -> list[Entering]:
    """What enters each block, with its small vectors joined to the others' where they are to have gradients.

    A compiler joins for itself what it thinks worth it.
    """
    apart = [
        Entering(p, bias, layers=own) for p, bias, own in zip(projected, closing, layers, strict=True)
    ]  # fmt: skip
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not any(map(_trained, layers)):
        return apart
    vectors: list[Tensor] = []

    def placed(*given: Tensor | None) -> slice | None:
        """Where they will be."""
        if given[0] is None:
            return None
        vectors.extend(vector for vector in given if vector is not None)
        return slice(len(vectors) - len(given), len(vectors))

    places = [
        (
            placed(*(_whole_affine(own.norm0) or (None,))),
            placed(*(_whole_affine(own.norm1) or (None,))),
            placed(*(_whole_affine(own.norm2) or (None,))),
            placed(_bias(own.conv1) if bias is None else bias),
            placed(_bias(own.proj)),
        )
        for own, bias in zip(layers, closing, strict=True)
    ]
    if len({vector.dtype for vector in vectors}) != 1 or not any(vector.requires_grad for vector in vectors):
        return apart
    rows = join(vectors, x)

    def affine(place: slice | None) -> Affine | None:
        return None if place is None else (rows[place.start], rows[place.start + 1])

    def row(place: slice | None) -> Tensor | None:
        return None if place is None else rows[place.start]

    return [
        Entering(p, row(bias), (affine(norm0), affine(norm1), affine(norm2)), row(proj_bias), own)
        for p, own, (norm0, norm1, norm2, bias, proj_bias) in zip(projected, layers, places, strict=True)
    ]


def _given(affine: Affine | None) -> dict[str, Affine]:
    """As keywords, of which a layer in place of `GroupNorm` need not know."""
    return {} if affine is None else {"affine": affine}


def _project(blocks: Sequence[UNetBlock], layers: Sequence[Layers], emb: Tensor) -> Sequence[Tensor | None]:
    affines = [own.affine for own in layers]
    added = [None if block.adaptive_scale else _bias(own.conv0) for block, own in zip(blocks, layers, strict=True)]
    weights = [weight for weight, _ in filter(None, affines) if weight is not None]
    own, inner = ([bias for bias in each if bias is not None] for each in (map(_bias, affines), added))
    plain = not any(block.adaptive_scale for block in blocks)
    if len(own) < len(blocks) or len(inner) != (len(blocks) if plain else 0):
        return [None] * len(blocks)
    made = [weight if isinstance(weight, Tensor) else weight() for weight in weights]
    rows = F.linear(emb, cast(torch.cat(made), emb), cast(torch.cat(own), emb))
    if plain:
        # Not to the other bias: the gradients of both would be one memory.
        rows = rows + cast(torch.cat(inner), emb)
    return rows.split([len(bias) for bias in own], dim=1)
