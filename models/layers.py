"""Layers of the U-Nets: linear, convolution with resampling, group normalisation.

Parameters keep their own dtype (float32, float64, or bfloat16 where low-precision weights are kept) and are cast to
the dtype of the incoming activation at each use, so one set of master weights serves every compute dtype.
"""

from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipfm.kernels._dispatch import TRITON_DEVICES
from ipfm.kernels.group_norm import branching_group_norm_silu, unchecked_group_norm_silu
from ipfm.kernels.residual import unchecked_residual_sum
from ipfm.models.frozen_ops import (
    doubled_conv2d,
    frozen_conv2d,
    frozen_conv_transpose2d,
    is_frozen,
    mean_2x2,
    repeat_2x2,
)
from ipfm.models.initialisation import DEFAULT_INIT, Init
from ipfm.models.weight_order import orderly, weight_of

# A weight and a bias.
Affine = tuple[Tensor, Tensor]
# A weight, or what makes it.
Weight = Tensor | Callable[[], Tensor]
# The same of a layer that may lack either.
Free = tuple[Weight | None, Tensor | None]


def cast(parameter: Tensor, like: Tensor) -> Tensor:
    """The parameter in the dtype of `like`; small networks make thousands of these calls."""
    return parameter if parameter.dtype == like.dtype else parameter.to(like.dtype)


def _cast(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    return None if parameter is None else cast(parameter, like)


def triton_serves(x: Tensor) -> bool:
    """Whether the Triton kernels take such a tensor here, and with it what is made for a GPU."""
    return x.device.type in TRITON_DEVICES and not torch.compiler.is_exporting()


class Linear(nn.Module):
    """x @ weightᵀ + bias over the last axis; `weight` (out, in), `bias` (out).

    Args:
        in_features: width of x.
        out_features: width of the result.
        bias: whether there is one.
        init: how weight and bias start.
    """

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, init: Init = DEFAULT_INIT) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        fans = (in_features, out_features)
        self.weight = nn.Parameter(init.draw_weight((out_features, in_features), *fans))
        self.register_parameter("bias", nn.Parameter(init.draw_bias((out_features,), *fans)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, cast(self.weight, x), _cast(self.bias, x))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Conv2d(nn.Module):
    """A convolution (B, C, H, W) -> (B, C', H', W') that may also halve or double the resolution.

    The bias is added last.

    Args:
        in_channels: C.
        out_channels: C'.
        kernel: side of the kernel, odd; 0 only resamples, with no weight or bias.
        bias: whether there is one.
        up: double the resolution.
        down: halve the resolution.
        resample_filter: the 1-D low-pass f of even length L: the buffer of that name is outer(f, f) / (Σf)², present
            exactly when `up` or `down` is set, and it is applied to every channel alike.
        fused_resample: not fused, the filter comes before the convolution; fused, going down it filters the
            convolution's output (another function of x), going up it moves padding from the convolution to the filter.
        init: how weight and bias start.

    Raises:
        ValueError: `up` with `down`, an odd or empty filter, or a resampling that changes the channels.
    """

    weight: Tensor | None
    bias: Tensor | None
    resample_filter: Tensor | None
    by_pixel: bool = False
    """Whether the weight is stored so, see `weight_order`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused_resample: bool = False,
        init: Init = DEFAULT_INIT,
    ) -> None:
        super().__init__()
        if up and down:
            raise ValueError("a convolution resamples either up or down, got both")
        if kernel == 0 and in_channels != out_channels:
            raise ValueError(f"kernel 0 keeps the channel count, got {in_channels} -> {out_channels}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel = kernel
        self.up = up
        self.down = down
        self.fused_resample = fused_resample
        fans = (in_channels * kernel**2, out_channels * kernel**2)
        weight = nn.Parameter(init.draw_weight((out_channels, in_channels, kernel, kernel), *fans)) if kernel else None
        self.register_parameter("weight", weight)
        self.register_parameter(
            "bias", nn.Parameter(init.draw_bias((out_channels,), *fans)) if kernel and bias else None
        )
        taps = check_resample_filter(resample_filter)
        self.w_pad = kernel // 2
        self.f_pad = (len(taps) - 1) // 2
        # Two equal taps are a 2×2 mean going down and a copy going up, for which there are faster operations.
        self._box = len(taps) == 2 and taps[0] == taps[1]
        self._taps = taps
        self._made: tuple[Tensor, tuple[Any, ...], Tensor] | None = None
        self.register_buffer("resample_filter", _filter_2d(taps) if up or down else None)

    def forward(self, x: Tensor, *, add_bias: bool = True) -> Tensor:
        """The result; `add_bias=False` leaves its bias to the caller."""
        if not self.kernel:
            return self._double(x) if self.up else self._halve(x) if self.down else x
        weight = weight_of(self)
        bias = self.bias if add_bias else None
        if self.up and self.fused_resample and not self._box:
            # (A copy of the pixels needs no padding that could be moved.)
            x = self._double(x, padding=max(self.f_pad - self.w_pad, 0))
            return _convolve(x, weight, bias, max(self.w_pad - self.f_pad, 0))
        if self.up and self.kernel == 1:
            # A 1×1 convolution commutes with the filter: on the small image it costs a quarter.
            return _plus(self._double(_convolve(x, weight, None, 0)), bias)
        if self.down and self.fused_resample:
            return _plus(self._halve(_convolve(x, weight, None, self.w_pad + self.f_pad), padding=0), bias)
        if self.up:
            return self._convolve_doubled(x, weight, bias)
        if self.down:
            x = self._halve(x)
        return _convolve(x, weight, bias, self.w_pad)

    def _convolve_doubled(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._box and self.kernel % 2:
            return doubled_conv2d(x, weight, bias)
        return _convolve(self._double(x), weight, bias, self.w_pad)

    def resampling(self, x: Tensor, channels: int) -> Tensor | None:
        """The filter (channels, 1, L, L) of a depthwise convolution that halves or, transposed, doubles x.

        None: it is done in another way.
        """
        return None if self._box or self.fused_resample else self._depthwise(x, 4 if self.up else 1, channels)

    def _depthwise(self, x: Tensor, gain: float = 1, channels: int | None = None) -> Tensor:
        source = self.resample_filter
        assert source is not None
        channels = x.shape[1] if channels is None else channels
        if not triton_serves(x) or torch.compiler.is_compiling() or type(source) is not Tensor or source.is_inference():
            return (gain * source.to(x.dtype)).expand(channels, -1, -1, -1)
        # The filter never changes: on a GPU, where its making would be three launches at each use, it is kept.
        key = (source._version, x.dtype, channels, gain)
        if self._made is None or self._made[0] is not source or self._made[1] != key:
            with torch.inference_mode(False):
                made = (gain * source.to(x.dtype)).expand(channels, -1, -1, -1).contiguous()
            self._made = (source, key, made)
        return self._made[2]

    def _halve(self, x: Tensor, padding: int | None = None) -> Tensor:
        padding = self.f_pad if padding is None else padding
        if self._box:
            return mean_2x2(x)
        return frozen_conv2d(x, self._depthwise(x), stride=2, padding=padding, groups=x.shape[1])

    def _double(self, x: Tensor, padding: int | None = None) -> Tensor:
        padding = self.f_pad if padding is None else padding
        if self._box:
            return repeat_2x2(x)
        return frozen_conv_transpose2d(x, self._depthwise(x, 4), stride=2, padding=padding, groups=x.shape[1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The filter belongs to the architecture; another one in a file would mean that the two do not fit.
        given = state_dict.get(prefix + "resample_filter")
        if given is not None and self.resample_filter is not None and given.shape == self.resample_filter.shape:
            with torch.device("cpu"):
                expected = _filter_2d(self._taps)
            if not torch.allclose(given.detach().float().cpu(), expected, rtol=1e-2):
                error_msgs = args[-1]
                error_msgs.append(f"{prefix}resample_filter is not the one of the taps {list(self._taps)}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel={self.kernel}, bias={self.bias is not None}"
        if self.up or self.down:
            text += f", {'up' if self.up else 'down'}, taps={list(self._taps)}, fused={self.fused_resample}"
        return text


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    if is_frozen(x, weight, bias):
        return frozen_conv2d(x, weight, bias, padding=padding)
    return F.conv2d(x, cast(weight, x), _cast(bias, x), padding=padding)


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + cast(bias, x).view(1, -1, 1, 1)


def without_bias(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(what the convolution makes of x, the bias that is still to be added to it, in its dtype).

    On a GPU a bias is a pass over the data of its own, which what comes next can spare. None: it has been added, or
    there is none.
    """
    bias = free_bias(conv) if triton_serves(x) else None
    return (conv(x), None) if bias is None else (conv(x, add_bias=False), cast(bias, x))


def residual(a: Tensor, b: Tensor, *biases: Tensor | None, scale: float) -> Tensor:
    """(a + b + biases)·scale; a and b (B, C, H, W) of one dtype, a bias (C,) of theirs, or one as `join` makes it."""
    given = [bias for bias in biases if bias is not None]
    bias = given[0] + given[1] if len(given) == 2 else given[0] if given else None
    return unchecked_residual_sum(a, b, bias, scale=scale, triton_runs=triton_serves(a))


def join(vectors: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Weights and biases (C,) as the Triton kernels take them most cheaply: (B, C), rows alike, of float32 at least.

    Their gradients arrive by sample. What else is a cast and a sum for each is one for all. Values are those in the
    dtype of x.

    Args:
        vectors: of one dtype and device.
        x: (B, C, H, W), an activation.
    """
    row = cast(torch.cat(list(vectors)), x).to(torch.promote_types(x.dtype, torch.float32))
    return row.expand(len(x), -1).split([len(vector) for vector in vectors], dim=1)


def orders_weights(device: torch.device) -> bool:
    """Whether convolutions there take their weights in the order of the activations."""
    return device.type in TRITON_DEVICES


def lay_out_weights(net: nn.Module) -> None:
    """Store the weights of convolutions in the memory format of channels_last activations, where a GPU computes.

    cuDNN copies a weight in another one at each use, forward and backward, and autograd copies its gradient back.
    Names, shapes and values stay, and so does what is saved. For parameters that are parts of a flat buffer there is
    `weight_order.keep_by_pixel`.
    """
    for module in net.modules():
        weight = orderly(module)
        if weight is not None and orders_weights(weight.device):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def free_parameters(layer: nn.Module | None, kinds: Container[object] | None = None) -> Free | None:
    """Weight and bias of a layer that may be bypassed and its parameters used elsewhere; None: it may not.

    It may where it is of a class of this file (or of `kinds`), also with factors, not of one in its place, and nothing
    hooks on to its calls, as ZeRO 3 does to gather its parameters. A weight with factors is made when it is asked for.
    """
    # (Asked of every layer in every pass.)
    if (
        layer is None
        or not _is_of(type(layer), kinds or _BYPASSED)
        or (layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks)
    ):
        return None
    parameters = layer._parameters
    if "weight" not in parameters:
        # Another network's.
        own = layer.__dict__
        return partial(weight_of, layer) if "base" in own else own.get("weight"), own.get("bias")
    weight = weight_of(layer) if "by_pixel" in layer.__dict__ else parameters["weight"]
    return weight, parameters["bias"]


def _is_of(kind: type[nn.Module], kinds: Container[object]) -> bool:
    """Whether it is one of these classes, or one of them with factors on another layer's weight (`low_rank`)."""
    return kind in kinds or getattr(kind, "computes_as", None) in kinds


def now(weight: Weight, x: Tensor) -> Tensor:
    """A weight in the dtype of x, made where it has to be."""
    return cast(weight if isinstance(weight, Tensor) else weight(), x)


def is_watched(module: nn.Module) -> bool:
    """Whether a call of it is more than one of its `forward`: hooks, of its own or of all modules, or a compiler."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or module._compiled_call_impl
        or torch.nn.modules.module._has_any_global_hook()
        or torch._C._get_tracing_state()
    )


def free_bias(layer: nn.Module | None) -> Tensor | None:
    """The bias of a layer whose parameters may be used elsewhere; None: there is none, or it may not."""
    found = free_parameters(layer)
    return None if found is None else found[1]


def stored_weight(layer: nn.Module) -> Tensor:
    """A linear layer's weight as it is stored; of one on another's weight that one, without its factors."""
    # (Past its name, which ZeRO 3 would take for a use, and a layer with factors for the sum.)
    weight = layer._parameters.get("weight")
    if weight is None:
        weight = layer.__dict__.get("base")
    found = layer.weight if weight is None else weight
    assert isinstance(found, Tensor)
    return found


def check_resample_filter(taps: Sequence[float]) -> tuple[float, ...]:
    """`taps` as floats.

    Raises:
        ValueError: an odd number of them, or none, or a sum that is zero or not finite.
    """
    taps = tuple(float(tap) for tap in taps)
    if not taps or len(taps) % 2:
        raise ValueError(f"resample_filter must have an even number of taps such as [1, 1], got {list(taps)}")
    if not 0 < abs(sum(taps)) < float("inf"):
        raise ValueError(f"resample_filter must have a finite sum that is not zero, got {list(taps)}")
    return taps


def _filter_2d(taps: Sequence[float]) -> Tensor:
    """(1, 1, L, L) float32: outer(f, f) / (Σf)²."""
    f = torch.tensor(taps, dtype=torch.float32)
    if f.is_meta:  # no values, and arithmetic takes long there
        return torch.empty(1, 1, len(taps), len(taps), dtype=torch.float32)
    return (torch.outer(f, f) / f.sum() ** 2)[None, None]


class GroupNorm(nn.Module):
    """Group normalisation with min(num_groups, channels // min_channels_per_group) groups, in the activation's dtype.

    Its parameters are `weight` and `bias`, each (channels,).

    Args:
        num_channels: channels of what is normalised.
        num_groups: most groups.
        min_channels_per_group: fewest channels of a group.
        eps: added to the variance.

    Raises:
        ValueError: that group count does not divide the channels.
    """

    def __init__(
        self, num_channels: int, *, num_groups: int = 32, min_channels_per_group: int = 4, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.num_groups = group_count(num_channels, num_groups, min_channels_per_group)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(
        self,
        x: Tensor,
        *,
        silu: bool = False,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        addend: Tensor | None = None,
        branching: bool = False,
        affine: Affine | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The normalised x; with `silu` after it SiLU, before which it may be scaled by scale + 1 and shifted.

        Args:
            x: (B, C, H, W).
            silu: whether SiLU follows.
            scale: (B or 1, C, 1, 1), in the dtype of x; given with shift or not at all.
            shift: (B or 1, C, 1, 1), in the dtype of x.
            addend: (B or 1, C) or (C,), in the dtype of x: is added to x before.
            branching: as `branch` asks for it, of x alone and where the Triton kernels serve.
            affine: weight and bias in place of its own, which they are: (B, C), the rows alike; for the Triton kernels.

        Returns:
            (B, C, H, W) in the dtype of x; with `branching` x too.

        Raises:
            ValueError: scale or shift alone, or either without `silu`.
        """
        if not silu and not (scale is None and shift is None):
            raise ValueError("scale and shift are for normalisation with SiLU, got silu=False")
        weight, bias = affine or (cast(self.weight, x), cast(self.bias, x))
        if (scale is None) != (shift is None):
            raise ValueError(f"scale and shift go together, got {'scale' if shift is None else 'shift'} alone")
        if branching:
            return branching_group_norm_silu(x, self.num_groups, weight, bias, eps=self.eps, activation=silu)
        return unchecked_group_norm_silu(
            x,
            self.num_groups,
            weight,
            bias,
            scale=scale,
            shift=shift,
            addend=addend,
            eps=self.eps,
            activation=silu,
            triton_runs=triton_serves(x),
        )

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, groups={self.num_groups}, eps={self.eps}"


def branch(norm: nn.Module, x: Tensor, *, silu: bool = False, affine: Affine | None = None) -> tuple[Tensor, Tensor]:
    """(norm(x), x for what else is made of it); `affine` as in `GroupNorm`.

    On a GPU the gradient of the latter is added in the backward pass of the normalisation, not in a pass of its own.
    """
    watched = norm._forward_hooks or norm._backward_pre_hooks or norm._backward_hooks
    if type(norm) is GroupNorm and not watched and triton_serves(x) and torch.is_grad_enabled():
        both: tuple[Tensor, Tensor] = norm(x, silu=silu, branching=True, affine=affine)
        return both
    return norm(x, silu=silu), x


def group_count(num_channels: int, num_groups: int = 32, min_channels_per_group: int = 4) -> int:
    """Groups of a normalisation over `num_channels`: min(num_groups, num_channels // min_channels_per_group).

    Raises:
        ValueError: they do not divide the channels.
    """
    groups = min(num_groups, num_channels // min_channels_per_group)
    if groups < 1 or num_channels % groups:
        raise ValueError(
            f"GroupNorm cannot divide {num_channels} channels into {max(groups, 1)} groups; possible: at least "
            f"{min_channels_per_group} channels, divisible by min({num_groups}, channels // {min_channels_per_group})"
        )
    return groups


_BYPASSED = frozenset((Linear, Conv2d, GroupNorm))


class Float32Buffers(nn.Module):
    """A module whose own buffers stay float32 under every cast of it; they follow it to other devices.

    For constants that low precision would spoil and that are defined by their float32 values.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Buffers":
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            before = kept[name]
            if buffer is not None and before is not None and buffer.dtype != torch.float32:
                self._buffers[name] = before.to(buffer.device)
        return self
