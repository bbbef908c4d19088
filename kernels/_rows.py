"""Tensors as dense rows, one a sample: what the loss kernels walk.

A sum over a sample does not care for the order of its elements, so tensors that share a memory format are walked in
memory order, whichever it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def empty_rows(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor with the layout of `like` where its samples are dense, C-contiguous where they are not."""
    out = torch.empty_like(like, dtype=dtype)
    if like.shape[0] > 1 and out.stride(0) != like.shape[1:].numel():  # another dimension lies outside the batch
        out = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    return out


def as_rows(v: Tensor, like: Tensor) -> Tensor:
    """`v`, or a copy of it, with the layout of `like`, which `empty_rows` made, inside every sample."""
    fits = v.stride()[1:] == like.stride()[1:] and (v.shape[0] <= 1 or v.stride(0) >= like.shape[1:].numel())
    return v if fits else torch.empty_strided(like.shape, like.stride(), dtype=v.dtype, device=v.device).copy_(v)
