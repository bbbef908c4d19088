"""One step of Adam with beta1 = 0 and EMAs of the weights: AdamEMA against PyTorch's optimisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ipfm.kernels._dispatch import Backend
from ipfm.kernels.adam import AdamEMA, ema_entries
from ipfm.kernels.bench.providers import COMPILE, EAGER, TRITON, Run, compiled, kernels_run_on

FUSED, REFERENCE = "fused", "reference"
BETA2, EPS, EMA_DECAY = 0.999, 1e-8, 0.5
# Large, so that an error in the update shows beside weights of size 1.
LR = 0.1
# The steps that are compared with the truth: gradients that change show a wrong second moment.
FACTORS = (1.0, 2.0, -0.5)


class AdamWorkload:
    """Parameters of these shapes on a device, and so many averages of them.

    eager is torch.optim.Adam with foreach operations and EMAs of the weights beside it, compile its compilation,
    fused torch's fused Adam with the same EMAs; then AdamEMA by its reference, and on CUDA by its Triton kernels.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device, averages: int = 1) -> None:
        self.averages = averages
        generator = torch.Generator(device).manual_seed(0)
        self.device = device
        self.weights, self.grads = (
            [torch.randn(shape, generator=generator, device=device) for shape in shapes] for _ in range(2)
        )

    def providers(self) -> Sequence[str]:
        return [EAGER, FUSED, COMPILE, REFERENCE, *([TRITON] if kernels_run_on(self.device) else [])]

    def prepare(self, provider: str) -> Mapping[str, Run]:
        params = [w.clone().requires_grad_() for w in self.weights]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad.clone()
        if provider in (TRITON, REFERENCE):
            backend: Backend = "triton" if provider == TRITON else "reference"
            optimizer = AdamEMA(params, lr=LR, betas=(0.0, BETA2), eps=EPS, ema=self.averages, backend=backend)
            optimizer.ema_decay = _decays(self.averages)
            optimizer.create_state()
            averages = [[optimizer.state[p][entry] for p in params] for entry in ema_entries(self.averages)]
            step: Callable[[], None] = optimizer.step
        else:
            averages = [[w.clone() for w in self.weights] for _ in range(self.averages)]
            step = _torch_adam(params, averages, fused=provider == FUSED)
            if provider == COMPILE:
                step = compiled(step)

        def result() -> list[Tensor]:
            for factor in FACTORS:
                for param, grad in zip(params, self.grads, strict=True):
                    assert param.grad is not None
                    param.grad.copy_(factor * grad)
                step()
            return [_flat(params), *map(_flat, averages)]

        return {"step": Run(step, result)}

    def truth(self, mode: str) -> list[Tensor]:
        """Weights and averages after the steps, written out in float64."""
        w, g = _flat(self.weights).double(), _flat(self.grads).double()
        v, averages = torch.zeros_like(w), [w.clone() for _ in range(self.averages)]
        for t, factor in enumerate(FACTORS, 1):
            grad = factor * g
            v = BETA2 * v + (1 - BETA2) * grad.square()
            w = w - LR * grad / ((v / (1 - BETA2**t)).sqrt() + EPS)
            averages = [e + (1 - decay) * (w - e) for e, decay in zip(averages, _decays(self.averages), strict=True)]
        return [w, *averages]


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([v.detach().flatten() for v in values])


def _decays(averages: int) -> list[float]:
    return [EMA_DECAY ** (i + 1) for i in range(averages)]


def _torch_adam(params: list[Tensor], averages: list[list[Tensor]], *, fused: bool) -> Callable[[], None]:
    kind = {"fused": True} if fused else {"foreach": True}
    optimizer = torch.optim.Adam(params, lr=LR, betas=(0.0, BETA2), eps=EPS, **kind)

    def step() -> None:
        optimizer.step()
        with torch.no_grad():
            for average, decay in zip(averages, _decays(len(averages)), strict=True):
                torch._foreach_lerp_(average, params, 1 - decay)

    return step
