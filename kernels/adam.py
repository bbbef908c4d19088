"""Adam with the exponential moving average (EMA) of the weights as part of its own state.

The distillation runs with beta1 = 0, where Adam's first moment equals the gradient: no buffer is kept for it then.
Because the EMA lives in the optimiser's state, whatever shards that state (ZeRO) shards the EMA with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AdamEMA(torch.optim.Optimizer):
    """Adam [Kingma & Ba 2015, algorithm 1] with decoupled EMA, on-device gradient scale and finite check.

    One step, with g = grad_scale * grad and t the number of steps applied:

        m = beta1 m + (1 - beta1) g          (no buffer at beta1 = 0)
        v = beta2 v + (1 - beta2) g^2
        w = w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
        e = e + (1 - ema_decay) (w - e)      (only with ``ema=True``)

    A step whose gradients hold any non-finite number changes nothing: not w, m, v, e, nor t. The check and the count
    stay on the device, so that no step waits for the host.

    Args:
        params: float32 or float64 tensors that require gradients (under ZeRO: the flat partitions).
        lr: learning rate, > 0 or 0.
        betas: (beta1, beta2), each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: L2 term added to the gradient, >= 0.
        ema: keep an average of the weights, starting from the weights themselves.

    Attributes:
        ema_decay: decay of the EMA for the next step (the half-life schedule changes it each step).
        grad_scale: 0-d tensor that multiplies the gradients of the next step, or None for 1.
        applied: 0-d bool tensor: whether the last step changed the weights.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema: bool = False,
    ) -> None:
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"lr must be a finite number >= 0, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        if not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps must be a finite number >= 0, got {eps}")
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay must be a finite number >= 0, got {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema": ema})
        self.ema_decay = 0.0
        self.grad_scale: Tensor | None = None
        self.applied: Tensor | None = None
        self.steps_applied: Tensor | None = None

    @torch.no_grad()
    def create_state(self) -> None:
        """Allocate every buffer now, so that it can be gathered, loaded or counted before the first step."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "exp_avg_sq" not in state:
                    if group["betas"][0] > 0:
                        state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                if group["ema"] and "ema" not in state:
                    state["ema"] = p.detach().clone()
        if self.steps_applied is None:
            device = self.param_groups[0]["params"][0].device
            self.steps_applied = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def restart_ema(self) -> None:
        """Set the EMA to the weights as they are now."""
        for group in self.param_groups:
            for p in group["params"]:
                if "ema" in self.state[p]:
                    self.state[p]["ema"].copy_(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient. Gradients are overwritten.

        Raises:
            ValueError: a closure is given (gradients come from outside here).
        """
        if closure is not None:
            raise ValueError("AdamEMA takes no closure: compute the gradients, then call step()")
        self.create_state()
        assert self.steps_applied is not None
        groups = [(g, [p for p in g["params"] if p.grad is not None]) for g in self.param_groups]
        grads: list[Tensor] = [p.grad for _, params in groups for p in params if p.grad is not None]
        if not grads:
            return
        if self.grad_scale is not None:
            torch._foreach_mul_(grads, self.grad_scale.to(grads[0].dtype))
        finite = _all_finite(grads)
        for grad in grads:
            grad.masked_fill_(~finite, 0)
        self.applied = finite
        self.steps_applied += finite
        for group, params in groups:
            if params:
                self._update(group, params, finite)

    def _update(self, group: dict[str, Any], params: list[Tensor], finite: Tensor) -> None:
        assert self.steps_applied is not None
        beta1, beta2 = group["betas"]
        dtype = params[0].dtype
        grads = [p.grad for p in params if p.grad is not None]
        states = [self.state[p] for p in params]
        if group["weight_decay"]:
            torch._foreach_add_(grads, torch._foreach_mul(params, finite.to(dtype)), alpha=group["weight_decay"])

        def unless_skipped(value: Tensor | float, otherwise: float) -> Tensor:
            return (otherwise + finite.to(torch.float64) * (value - otherwise)).to(dtype)

        # t = 0 only while every step so far was skipped; the factor then multiplies zeros.
        t = self.steps_applied.clamp(min=1)
        first = grads
        if beta1 > 0:
            first = [state["exp_avg"] for state in states]
            torch._foreach_mul_(first, unless_skipped(beta1, 1))
            torch._foreach_add_(first, grads, alpha=1 - beta1)
        second = [state["exp_avg_sq"] for state in states]
        torch._foreach_mul_(second, unless_skipped(beta2, 1))
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)

        root = torch._foreach_sqrt(second)
        torch._foreach_div_(root, (1 - beta2**t).sqrt().to(dtype))
        torch._foreach_add_(root, group["eps"])
        # An element that never saw a gradient divides 0 by eps, which may be 0.
        update = torch._foreach_div(first, root) if group["eps"] else [_ratio(f, r) for f, r in zip(first, root)]
        torch._foreach_mul_(update, unless_skipped(-group["lr"] / (1 - beta1**t), 0))
        torch._foreach_add_(params, update)

        if group["ema"]:
            emas = [state["ema"] for state in states]
            gap = torch._foreach_sub(params, emas)
            torch._foreach_mul_(gap, unless_skipped(1 - self.ema_decay, 0))
            torch._foreach_add_(emas, gap)


def _all_finite(tensors: list[Tensor]) -> Tensor:
    """0-d bool: every element is finite (a norm is non-finite when an element is, or when the square overflows)."""
    peaks = torch._foreach_norm(tensors, float("inf"))
    return torch.stack([torch.isfinite(peak) for peak in peaks]).all()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(numerator == 0, torch.zeros_like(numerator), numerator / denominator)
