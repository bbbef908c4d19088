"""How the elements of tensors lie in memory."""

from __future__ import annotations

from torch import Tensor


def is_dense(t: Tensor) -> bool:
    """Whether the elements lie in memory without gaps, in whatever order of the dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def same_order(t: Tensor, like: Tensor) -> bool:
    """Elements of the same index lie at the same place, and are of one dtype."""
    if t.dtype != like.dtype or t.shape != like.shape:
        return False
    return t.stride() == like.stride() or (t.is_contiguous() and like.is_contiguous())
