"""Adam with exponential moving averages (EMA) of the weights as part of its own state.

The distillation runs with beta1 = 0, where Adam's first moment equals the gradient: no buffer is kept for it then.
Because an EMA lives in the optimiser's state, whatever shards that state (ZeRO) shards the EMA with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ipfm.kernels._dense import same_order
from ipfm.kernels._dispatch import Backend, use_triton
from ipfm.kernels.adam_fused import MOST_AVERAGES, FusedAdam, Group
from ipfm.kernels.adam_reference import reference_step
from ipfm.kernels.fused_rows import FusedRows, fits
from ipfm.kernels.weight_rows import WeightRows, write_plain


class AdamEMA(torch.optim.Optimizer):
    """Adam [Kingma & Ba 2015, algorithm 1] with an EMA of the weights, on-device gradient scale and finite check.

    One step, with g = c * grad_scale * grad + weight_decay * w, c = min(1, clip_norm / ||grad_scale * grad||) over all
    parameters together, and t the number of steps applied, this one included:

        m = beta1 m + (1 - beta1) g          (no buffer at beta1 = 0)
        v = beta2 v + (1 - beta2) g^2
        w = w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
        e = e + (1 - ema_decay) (w - e)      (for each average)

    `rectified` makes it Rectified Adam [Liu et al. 2020, algorithm 2], as torch.optim.RAdam has it, in place of line 3:

        w = w - lr (m / (1 - beta1^t)) r sqrt(1 - beta2^t) / (sqrt(v) + eps)    where rho > 5, else
        w = w - lr (m / (1 - beta1^t))                                         (t <= 5 at beta2 = 0.999)

    with rho_inf = 2 / (1 - beta2) - 1, rho = rho_inf - 2 t beta2^t / (1 - beta2^t) and
    r^2 = (rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho). Which of the two it is, the device decides.

    A step in which the square of any scaled gradient is not finite, or with clip_norm their sum (in the reference, that
    of any tensor always), changes nothing: not w, m, v, e, nor t. The check and the count stay on the device, so that
    no step waits for the host. At eps = 0, elements whose v is 0 stay.

    State: 4 bytes a float32 parameter for v ("exp_avg_sq"), 4 more for m ("exp_avg") at beta1 > 0, 4 more for each
    average ("ema", "ema_1", ...). The Triton kernels need no temporaries, and as many launches for one tensor as for
    thousands. The reference overwrites gradients. On a CPU it is torch's own fused Adam; where that does not go (on
    another device, rectified, at eps = 0, or where strides differ) it works on 2^24 elements at a time, with three
    temporaries.

    Bytes moved by the kernels, for a float32 parameter at beta1 = 0 with one average: 4 to measure g, 28 to update
    (g, w, v, e read, w, v, e written); 8 more for m, 8 for each further average. A tensor whose elements have gaps, or
    another order than its parameter's, goes through a copy.

    Weights under forced weight normalisation [Karras et al. 2024, section 2.3] are named by `normalise_rows`: the
    optimiser's parameters are their masters M, gradients are those of the plain weights w = n(n(M)) / √K that a forward
    pass uses, n(M) = M / (1e-4 + ‖M‖ / √K) for each row of K elements. A step is then, in this order: M <- n(M); the
    gradients turned into those of n(M), as the rule inside the forward pass gives them; all of the above, where norm
    and finite check are of these gradients; and w written from the new M. Averages are of M as the step leaves it. A
    step that changes nothing leaves M as it is.

    CUDA graphs: a step can be captured after one like it outside the graph. Give lr and ema_decay as tensors, which
    replays read anew: Python numbers stay as they were captured. Parameters, state and grad_scale must stay where they
    are, and gradients too, unless the graph computes them itself.

    Args:
        params: float32 or float64 tensors, or groups of them, on one device (under ZeRO: the flat partitions).
        lr: learning rate, > 0 or 0; a number or a 0-d float64 tensor on the parameters' device, not checked then.
        betas: (beta1, beta2), each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: L2 term added to the gradient, >= 0.
        rectified: Rectified Adam.
        ema: number of EMAs of the weights to keep, up to 4, each starting from the weights themselves; True for 1.
        clip_norm: largest L2 norm of the scaled gradient, > 0; None sets no limit.
        backend: "auto" (Triton for CUDA parameters, the reference elsewhere), "triton" or "reference".

    Attributes:
        ema_decay: decay of the averages in the next step (the half-life schedule changes it each step): a number for
            all of them, or a number for each, or a float64 tensor of one for each on the parameters' device (0-d for
            one). Groups that keep fewer averages take the first ones.
        grad_scale: 0-d tensor that multiplies the gradients of the next step, or None for 1.
        sum_over_shards: where each rank holds a shard of the parameters: sums a float64 tensor over the ranks, in
            place (an all-reduce), so that norm and finite check are those of all shards together. None: nothing is
            sharded.
        applied: 0-d bool tensor: whether the last step changed the weights; None before the first. A new tensor each
            step, but for the replays of a graph.
        steps_applied: 0-d float64 tensor, t; None before the state exists. Changed in place.

    Raises:
        ValueError: a setting out of its range, parameters of another dtype, or a backend that cannot run on them.

    Example:
        >>> import torch
        >>> from ipfm.kernels import AdamEMA
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdamEMA([weight], lr=0.5, ema=True)
        >>> optimizer.ema_decay = 0.5
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.detach(), optimizer.state[weight]["ema"]
        (tensor([0.5000, 0.5000]), tensor([0.7500, 0.7500]))
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rectified: bool = False,
        ema: bool | int = False,
        clip_norm: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        if clip_norm is not None and not (math.isfinite(clip_norm) and clip_norm > 0):
            raise ValueError(f"clip_norm must be a finite number > 0 or None, got {clip_norm}")
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rectified": rectified}
        super().__init__(params, {**adam, "ema": ema})
        use_triton("AdamEMA", backend, self.param_groups[0]["params"][0].device)
        self.backend = backend
        self.ema_decay: float | Sequence[float] | Tensor = 0.0
        self.clip_norm = clip_norm
        self.grad_scale: Tensor | None = None
        self.sum_over_shards: Callable[[Tensor], object] | None = None
        self.applied: Tensor | None = None
        self.steps_applied: Tensor | None = None
        self._fused = FusedAdam()
        self._rows: dict[Tensor, WeightRows] = {}
        self._cut_rows = 0
        self._fused_rows = FusedRows({}, 0)

    def normalise_rows(self, rows: Mapping[Tensor, WeightRows], *, cut_rows: int = 0) -> None:
        """Keep weights under forced weight normalisation from now on; `write_plain` writes the first plain weights.

        Args:
            rows: of each of the optimiser's tensors that has some; those keep their dtype, device and place.
            cut_rows: how many rows shards cut, over all of them.
        """
        self._rows, self._cut_rows = dict(rows), cut_rows
        self._fused_rows = FusedRows(self._rows, cut_rows)

    @torch.no_grad()
    def write_plain(self) -> None:
        """Write the plain weights of the masters as they are now, as a step does; every shard's process calls it."""
        if self._rows and self._rows_are_fused(next(iter(self._rows)).device):
            self._fused_rows.write_plain(self.sum_over_shards)
        elif self._rows:
            write_plain(self._rows, self._cut_rows, self.sum_over_shards)

    def _rows_are_fused(self, device: torch.device) -> bool:
        return use_triton("AdamEMA", self.backend, device) and fits(self._rows)

    def _fused_step(self, groups: Sequence[Group], steps: Tensor, **more: Any) -> Tensor:
        """The step by kernels, with rows under the rule."""
        gradients: dict[Tensor, Tensor] = {}
        for group in groups:
            for i, w in enumerate(group.columns[0]):
                if w in self._rows:
                    if not same_order(group.gradients[i], w):
                        group.gradients[i] = torch.empty_like(w).copy_(group.gradients[i])
                    gradients[w] = group.gradients[i]
        self._fused_rows.gradients_of_masters(gradients, self.sum_over_shards)
        applied = self._fused.step(groups, steps, before_update=self._fused_rows.normalise, **more)
        self._fused_rows.write_plain(self.sum_over_shards)
        return applied

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own, as in `torch.optim.Optimizer`.

        Raises:
            ValueError: as in the class.
        """
        super().add_param_group(param_group)
        self._complete = False
        _check_group(self.param_groups[-1])

    def state_dict(self) -> dict[str, Any]:
        """As in `torch.optim.Optimizer`, with "steps_applied" beside "state" and "param_groups"."""
        return {**super().state_dict(), "steps_applied": self.steps_applied}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set what `state_dict` gave.

        Raises:
            KeyError: the state of another kind of optimiser.
        """
        count = state_dict["steps_applied"]
        super().load_state_dict(state_dict)
        self._complete = False
        for group in self.param_groups:
            # A state from before this setting existed.
            group.setdefault("rectified", False)
        if count is None:
            self.steps_applied = None
        else:
            self.steps_applied = count.detach().clone().to(self.param_groups[0]["params"][0].device)

    # Whether every parameter has had its state made.
    _complete = False

    @torch.no_grad()
    def create_state(self) -> None:
        """Allocate every buffer now, so that it can be gathered, loaded or counted before the first step."""
        for group in self.param_groups:
            averages = ema_entries(group["ema"])
            for p in group["params"]:
                state = self.state[p]
                if "exp_avg_sq" not in state:
                    if group["betas"][0] > 0:
                        state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                for entry in averages:
                    if entry not in state:
                        state[entry] = p.detach().clone()
        if self.steps_applied is None:
            device = self.param_groups[0]["params"][0].device
            self.steps_applied = torch.zeros((), dtype=torch.float64, device=device)
        self._complete = True

    @torch.no_grad()
    def restart_ema(self) -> None:
        """Set each EMA to the weights as they are now; an EMA that does not exist yet starts from them anyway."""
        # Not by way of the groups: under ZeRO 3 they are empty between the steps.
        for p, state in self.state.items():
            for entry in ema_entries(MOST_AVERAGES):
                if entry in state:
                    state[entry].copy_(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient. Gradients may be overwritten.

        Raises:
            ValueError: a closure is given (gradients come from outside here), or lr or ema_decay has another form than
                described above.
            RuntimeError: a CUDA graph is captured, and no step outside it was taken with the same parameters before.
        """
        if closure is not None:
            raise ValueError("AdamEMA takes no closure: compute the gradients, then call step()")
        if not self._complete or self.steps_applied is None:
            self.create_state()
        assert self.steps_applied is not None
        try:
            groups = [*filter(None, map(self._columns, self.param_groups))]
        except KeyError:  # of which somebody has taken a part
            self.create_state()
            groups = [*filter(None, map(self._columns, self.param_groups))]
        if not groups:
            self.applied = torch.zeros((), dtype=torch.bool, device=self.steps_applied.device)
            return
        device = groups[0].gradients[0].device
        step: Callable[..., Tensor] = partial(reference_step, rows=self._rows, cut_rows=self._cut_rows)
        if not self._rows and use_triton("AdamEMA", self.backend, device):
            step = self._fused.step
        elif (
            self._rows
            and self._rows_are_fused(device)
            and all(w.grad is not None for w, own in self._rows.items() if any(block.used for block in own.blocks))
        ):
            step = self._fused_step
        self.applied = step(
            groups,
            self.steps_applied,
            grad_scale=self.grad_scale,
            clip_norm=self.clip_norm,
            ema_decay=_decays(self.ema_decay, max(int(g["ema"]) for g in self.param_groups), device),
            sum_over_shards=self.sum_over_shards,
        )

    def _columns(self, group: dict[str, Any]) -> Group | None:
        """A group's settings and tensors, of the parameters that have a gradient; None: none has."""
        params = group["params"]
        given = [p.grad for p in params]
        if any(gradient is None for gradient in given):
            params = [p for p, gradient in zip(params, given, strict=True) if gradient is not None]
            given = [gradient for gradient in given if gradient is not None]
        if not given:
            return None
        lr = group["lr"]
        if isinstance(lr, Tensor):
            _check_on_device("lr", lr, params[0].device)
        states = [*map(self.state.__getitem__, params)]
        columns = [[state[entry] for state in states] for entry in ("exp_avg_sq", *ema_entries(group["ema"]))]
        columns.insert(1, [state["exp_avg"] for state in states] if group["betas"][0] > 0 else [])
        settings = (group["betas"], group["eps"], group["weight_decay"], group["rectified"])
        return Group(lr, *settings, given, [[*params], *columns])


def ema_entries(ema: bool | int) -> list[str]:
    """Names of the state's entries that hold that many averages: "ema", "ema_1", ..."""
    return [f"ema_{i}" if i else "ema" for i in range(int(ema))]


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if name == "lr" and isinstance(group["lr"], Tensor):
            # Its value is the device's.
            if group["lr"].dtype != torch.float64 or group["lr"].ndim:
                raise ValueError(f"lr as a tensor must be 0-d float64, got {_described(group['lr'])}")
        elif not (math.isfinite(group[name]) and group[name] >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, got {group[name]}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
    if not isinstance(group["rectified"], bool):
        raise ValueError(f"rectified must be True or False, got {group['rectified']!r}")
    if not (isinstance(group["ema"], int) and 0 <= group["ema"] <= MOST_AVERAGES):
        raise ValueError(f"ema must be a number of averages from 0 to {MOST_AVERAGES}, got {group['ema']}")
    for p in group["params"]:
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"params must be float32 or float64, got {p.dtype}")


def _decays(given: float | Sequence[float] | Tensor, averages: int, device: torch.device) -> Tensor | list[float]:
    """A decay for each average."""
    if isinstance(given, Tensor):
        if given.dtype != torch.float64 or given.shape not in {(averages,), ()} or given.numel() != averages:
            raise ValueError(f"ema_decay as a tensor must be ({averages},) float64, got {_described(given)}")
        _check_on_device("ema_decay", given, device)
        return given.reshape(averages)
    if not isinstance(given, Sequence):
        return [given] * averages
    if len(given) != averages:
        raise ValueError(f"ema_decay must be a number or {averages}, one for each average, got {len(given)}")
    return list(given)


def _check_on_device(name: str, given: Tensor, device: torch.device) -> None:
    if given.device != device:
        raise ValueError(f"{name} as a tensor must be on the parameters' device {device}, got {given.device}")


def _described(given: Tensor) -> str:
    return f"{tuple(given.shape)} {str(given.dtype).removeprefix('torch.')}"
