"""A small network with forced weight normalisation, its data, and its training with the rule in the forward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ipfm.models.edm2_layers import MPConv, mp_silu
from ipfm.models.forced_weight_norm import masters, normalised_rows, plain_weight

BATCH, PARTS = 4, 2


class Small(nn.Module):
    """Convolutions of odd sizes with a gain, and a layer that the forward pass leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = MPConv(3, 7, 3)
        self.gain = nn.Parameter(torch.tensor(0.8))
        self.linear = MPConv(7, 5, 0)
        self.logvar_linear = MPConv(6, 1, 0)
        self.conv_out = MPConv(7, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = mp_silu(self.conv_in(x.to(self.gain.dtype)))
        # An embedding is float32 whatever the network's precision: the gain is cast.
        scale = 1 + self.linear(y.mean((2, 3)).float(), gain=self.gain).mean(1).view(-1, 1, 1, 1)
        return self.conv_out(y * scale.to(y.dtype))


def small_network() -> Small:
    """Rows of different sizes."""
    torch.manual_seed(0)
    net = Small()
    scaled = {n: m * torch.rand(len(m), *[1] * (m.ndim - 1)).exp() for n, m in masters(net).items()}
    net.load_state_dict(scaled, strict=False)
    return net


def inputs(step: int) -> Tensor:
    """(PARTS, BATCH, 3, 5, 5)."""
    return torch.randn(PARTS, BATCH, 3, 5, 5, generator=torch.Generator().manual_seed(step))


def ema_decay(step: int) -> float:
    return 1 - 1 / (step + 2)


def used(name: str) -> bool:
    return name.startswith(("conv", "linear"))


def trained_in_forward(steps: int, dtype: torch.dtype = torch.float32, clip: float | None = None) -> dict[str, Tensor]:
    """What the worker leaves, from a plain loop: masters as parameters, normalised before the step's first forward."""
    net = small_network().to(dtype)
    own: dict[str, Any] = {n: p.detach().clone() for n, p in net.named_parameters()} | masters(net)
    own = {n: t.requires_grad_(True) for n, t in own.items()}
    ema = {n: t.detach().clone() for n, t in own.items()}
    adam = torch.optim.Adam(own.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-3)

    def weights() -> dict[str, Tensor]:
        return {n: t if t.ndim == 0 else plain_weight(t) for n, t in own.items()}

    for step in range(steps):
        with torch.no_grad():
            for name, t in own.items():
                if used(name):
                    t.copy_(normalised_rows(t))
        adam.zero_grad()
        for part in inputs(step).to(dtype):
            (torch.func.functional_call(net, weights(), part).square().sum() / BATCH).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([t for t in own.values() if t.grad is not None], clip)
        adam.step()
        for name, t in own.items():
            ema[name].lerp_(t.detach(), 1 - ema_decay(step))
    out = {f"weight/{n}": t.detach().clone() for n, t in own.items()} | {f"ema/{n}": t for n, t in ema.items()}
    with torch.no_grad():
        for t in (t for n, t in own.items() if used(n)):
            t.copy_(normalised_rows(t))
        out["output"] = torch.stack([torch.func.functional_call(net, weights(), part) for part in inputs(0).to(dtype)])
    return out


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[k] - t).norm() / t.norm().clamp(min=math.ulp(1.0))) for k, t in expected.items())
