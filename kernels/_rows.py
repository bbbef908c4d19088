"""Tensors as dense rows, one a sample: what the loss kernels walk."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(like: Tensor, *others: Tensor) -> list[Tensor]:
    """An empty output for `like`, then `like` and `others`, all with the same dense layout inside every sample.

    A sum over a sample does not care for the order of its elements, so tensors that share a memory format are walked
    in memory order, whichever it is. One that does not fit is copied; the layout is that of `like` where its samples
    are dense and C-contiguous where they are not.
    """
    out = torch.empty_like(like)
    elements = like[:1].numel()
    if len(like) > 1 and out.stride(0) != elements:  # another dimension lies outside the batch
        out = torch.empty_like(like, memory_format=torch.contiguous_format)

    def as_rows(v: Tensor) -> Tensor:
        fits = v.stride()[1:] == out.stride()[1:] and (len(v) <= 1 or v.stride(0) >= elements)
        return v if fits else torch.empty_strided(out.shape, out.stride(), dtype=v.dtype, device=v.device).copy_(v)

    return [out, as_rows(like), *map(as_rows, others)]
