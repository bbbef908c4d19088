"""Images, predictions of them, and the preconditioning of their denoisers, for tests of the losses' kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def preconditioned(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    raw: torch.dtype | None = None,
    *,
    seed: int = 5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """t, s, y, sigma, and x, c_skip and c_out by name; the predictions t and s in `raw`, where it is given."""
    generator = torch.Generator().manual_seed(seed)
    t, s, y, noise = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    sigma = torch.exp(torch.randn(shape[0], generator=generator, dtype=torch.float64))
    skip, out = 0.25 / (sigma**2 + 0.25), sigma / (2 * (sigma**2 + 0.25).sqrt())
    x = y + sigma.view(-1, *[1] * (y.ndim - 1)) * noise
    t, s = (v.to(device, raw or dtype) for v in (t, s))
    known = {"x": x.to(device, dtype), "c_skip": skip.to(device), "c_out": out.to(device)}
    return t, s, y.to(device, dtype), sigma.to(device), known
