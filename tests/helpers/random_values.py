"""Random tensors and weights by seed, and what a network makes of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def rand(*shape: int, seed: int) -> Tensor:
    """Standard normals, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter random values: as built, the last layers are zero or nearly so and hide the rest.

    Norm weights lie around 1; other vectors have spread 1/2, larger tensors 1/√fan_in.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(start + spread * torch.randn(parameter.shape, generator=generator))


def value_and_gradient(function: Callable[..., Tensor], x: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor]:
    """The value at x and the gradient of its product with a fixed random tensor with respect to x."""
    x = x.detach().requires_grad_()
    y = function(x, *labels)
    return y.detach(), torch.autograd.grad(y, x, rand(*y.shape, seed=9))[0]
