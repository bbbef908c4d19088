"""Dense images (B, C, H, W): their memory as kernels walk it, and the parts of it that programs take."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def part(HW, STEPS, C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """(sample, channels (CHANNELS, 1), first and last pixel) of this program: some channels, some blocks of pixels."""
    chunks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    o_c = (tl.program_id(0) % chunks) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    first = tl.program_id(1) * STEPS * BLOCK
    return i_b, o_c, first, tl.minimum(first + STEPS * BLOCK, HW)


@triton.jit
def offsets(o_c, o_hw, HW, C: tl.constexpr, LAST: tl.constexpr):
    """Where these channels and pixels lie in a sample of C channels, in channels_last or contiguous."""
    if LAST:
        return o_hw * C + o_c
    else:
        return o_c * HW + o_hw


def dense(x: Tensor) -> Tensor:
    """x as it is if it is contiguous or channels_last, else a contiguous copy."""
    # torch.vmap knows of no other memory format.
    if torch._C._are_functorch_transforms_active():
        return x.contiguous()
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def is_dense(x: Tensor) -> bool:
    """Whether x is contiguous or channels_last."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def like(x: Tensor, other: Tensor) -> Tensor:
    """x, or a copy of it, in the layout of `other`, which is dense."""
    return x if x.stride() == other.stride() else torch.empty_like(other, dtype=x.dtype).copy_(x)


def channels_last(x: Tensor) -> bool:
    """Whether a dense x is to be walked as channels_last; the strides of sides of one pixel say nothing."""
    return not x.is_contiguous()


def memory(x: Tensor) -> Tensor:
    """A dense x as a vector, in the order of its memory."""
    return x.as_strided((x.numel(),), (1,))
