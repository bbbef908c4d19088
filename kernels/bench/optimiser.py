"""One step of Adam with beta1 = 0 and an EMA of the weights: AdamEMA against PyTorch's optimisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ipfm.kernels._dispatch import Backend
from ipfm.kernels.adam import AdamEMA
from ipfm.kernels.bench.providers import COMPILE, EAGER, TRITON, Run, compiled, kernels_run_on

FUSED, REFERENCE = "fused", "reference"
BETA2, EPS, EMA_DECAY = 0.999, 1e-8, 0.5
# Large, so that an error in the update shows beside weights of size 1.
LR = 0.1
# The steps that are compared with the truth: gradients that change show a wrong second moment.
FACTORS = (1.0, 2.0, -0.5)


class AdamWorkload:
    """Parameters of these shapes on a device.

    eager is torch.optim.Adam with foreach operations and an EMA of the weights beside it, compile its compilation,
    fused torch's fused Adam with the same EMA; then AdamEMA by its reference, and on CUDA by its Triton kernels.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
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
            optimizer = AdamEMA(params, lr=LR, betas=(0.0, BETA2), eps=EPS, ema=True, backend=backend)
            optimizer.ema_decay = EMA_DECAY
            optimizer.create_state()
            averages = [optimizer.state[p]["ema"] for p in params]
            step: Callable[[], None] = optimizer.step
        else:
            averages = [w.clone() for w in self.weights]
            step = _torch_adam(params, averages, fused=provider == FUSED)
            if provider == COMPILE:
                step = compiled(step)

        def result() -> list[Tensor]:
            for factor in FACTORS:
                for param, grad in zip(params, self.grads, strict=True):
                    assert param.grad is not None
                    param.grad.copy_(factor * grad)
                step()
            return [_flat(params), _flat(averages)]

        return {"step": Run(step, result)}

    def truth(self, mode: str) -> list[Tensor]:
        """Weights and averages after the steps, written out in float64."""
        w, g = _flat(self.weights).double(), _flat(self.grads).double()
        v, average = torch.zeros_like(w), w.clone()
        for t, factor in enumerate(FACTORS, 1):
            grad = factor * g
            v = BETA2 * v + (1 - BETA2) * grad.square()
            w = w - LR * grad / ((v / (1 - BETA2**t)).sqrt() + EPS)
            average = average + (1 - EMA_DECAY) * (w - average)
        return [w, average]


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([v.detach().flatten() for v in values])


def _torch_adam(params: list[Tensor], averages: list[Tensor], *, fused: bool) -> Callable[[], None]:
    kind = {"fused": True} if fused else {"foreach": True}
    optimizer = torch.optim.Adam(params, lr=LR, betas=(0.0, BETA2), eps=EPS, **kind)

    def step() -> None:
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 1 - EMA_DECAY)

    return step
