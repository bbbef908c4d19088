"""What DeepSpeed's engine is here, for a single process that shares nothing: a network and its optimiser."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ipfm.kernels import AdamEMA

# fp16's loss scale: the first one (the losses are sums over an image's elements, so that 2^16 would waste steps on
# overflows), how many steps without an overflow double it, and the least one.
FIRST_SCALE, SCALE_WINDOW, LEAST_SCALE = 2**8, 500, 1
# Elements of gradients that are widened at a time: the narrow ones are freed in between.
WIDENED = 2**22
# Elements between the beginnings of two gradients: 16 bytes, which the kernels read at once.
ALIGNED = 4


class UnshardedEngine:
    """The part of `deepspeed.DeepSpeedEngine` that `TrainedNetwork` uses, without its bookkeeping.

    Args:
        model: the network; its forward and backward passes are its own.
        optimizer: takes every gradient as it is.
    """

    def __init__(self, model: nn.Module, optimizer: AdamEMA) -> None:
        self.module, self.optimizer = model, optimizer
        self.kept: Tensor | None = None
        """Where the gradients lie, 0 between the steps; None: they are made anew in each step."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.module(*args, **keywords)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        if self.kept is not None:
            self.kept.zero_()
            return
        # What zero_grad() does, which takes three times as long to find out what it should do.
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = None

    def was_step_applied(self) -> bool:
        return True

    def destroy(self) -> None:
        """Nothing was set up."""


class MasterEngine(UnshardedEngine):
    """The same for a network whose optimiser has fp32 masters: one in 16 bits, or with weights that are normalised.

    It computes what ZeRO 1 does on one process: gradients arise and add up in the network's dtype, the update is made
    in fp32, and its result is rounded. In fp16 losses are multiplied by a scale.

    Args:
        model: the network.
        optimizer: of the masters, and of the parameters that have none.
        masters: of its parameters; in 16 bits `rounded` made them, of all.
        scale: of its losses; None scales nothing.
        normalised: the parameters that the optimiser itself writes, from their masters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AdamEMA,
        masters: Mapping[nn.Parameter, Tensor],
        scale: LossScale | None,
        normalised: Container[nn.Parameter] = (),
    ) -> None:
        super().__init__(model, optimizer)
        self.masters, self.scale = masters, scale
        copied = [(p, master) for p, master in masters.items() if p not in normalised]
        self._copied: tuple[list[Tensor], list[Tensor]] = [p for p, _ in copied], [master for _, master in copied]
        self._narrow = any(p.dtype != master.dtype for p, master in masters.items())
        self._wide: list[Tensor] = []

    def keep_wide(self, flat: Tensor) -> None:
        """Let the masters' gradients lie in `flat` from now on, where those of the parameters are in 16 bits."""
        if not self._narrow:
            return
        starts = _starts(list(self.masters), ALIGNED)
        self._wide = [
            flat.as_strided(master.shape, master.stride(), start)
            for master, start in zip(self.masters.values(), starts, strict=False)
        ]
        for master, gradient in zip(self.masters.values(), self._wide, strict=True):
            master.grad = gradient

    def backward(self, loss: Tensor) -> None:
        (loss if self.scale is None else loss * self.scale.value).backward()

    @torch.no_grad()
    def step(self) -> None:
        optimizer, masters = self.optimizer, self.masters
        if not self._narrow:
            lend_gradients(masters)
        elif self.kept is None:
            for p, gradient in wide_gradients(masters):
                masters[p].grad = gradient
        else:
            torch._foreach_copy_(self._wide, [p.grad for p in masters if p.grad is not None])
        if self.scale is not None:
            given = optimizer.grad_scale
            # A power of two: nothing is rounded.
            optimizer.grad_scale = 1.0 / self.scale.value if given is None else given / self.scale.value
        optimizer.step()
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)
        if self.kept is not None:
            self.kept.zero_()
        else:
            for p in self.module.parameters():
                p.grad = None
            for master in masters.values():
                master.grad = None
        if self.scale is not None and optimizer.applied is not None:
            self.scale.update(optimizer.applied)


class LossScale:
    """What fp16's losses are multiplied by; it adapts on the device, by DeepSpeed's rule, and nobody waits for it.

    It halves at a step with a gradient that is not finite, and doubles after `SCALE_WINDOW` ones without.

    Args:
        device: where the network is trained.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), float(FIRST_SCALE), device=device)
        """0-d float32, changed in place."""
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        self._last = torch.full((), -1, dtype=torch.int64, device=device)

    def update(self, applied: Tensor) -> None:
        """Adapt to a step; `applied`: 0-d bool, whether it could be taken."""
        self._last.copy_(torch.where(applied, self._last, self._steps))
        stable = self._steps - self._last - 1
        doubles = applied & (stable > 0) & (stable % SCALE_WINDOW == 0)
        lower = (self.value / 2).clamp(min=LEAST_SCALE)
        self.value.copy_(torch.where(applied, torch.where(doubles, self.value * 2, self.value), lower))
        self._steps += 1

    @property
    def state(self) -> dict[str, float]:
        """What it remembers, as `TrainedNetwork.loss_scale_state` has it. Waits for the device."""
        return {"scale": float(self.value), "steps": int(self._steps), "last_overflow": int(self._last)}

    @state.setter
    def state(self, state: Mapping[str, float]) -> None:
        self.value.fill_(state["scale"])
        self._steps.fill_(int(state["steps"]))
        self._last.fill_(int(state["last_overflow"]))


def rounded(module: nn.Module, dtype: torch.dtype) -> dict[nn.Parameter, Tensor]:
    """Round a network's parameters and buffers to 16 bits, in place.

    Args:
        module: the network; float32 parameters.
        dtype: bfloat16 or float16.

    Returns:
        The masters: of each parameter the float32 tensor that it was.
    """
    masters = {p: p.detach() for p in module.parameters()}
    module.to(dtype)
    return masters


def keep_gradients(engines: Sequence[UnshardedEngine]) -> None:
    """Let the gradients stay where they are from now on, for as long as the networks live, 0 between the steps.

    So do their wide copies of 16 bits. The networks share the memory: they are trained one after the other.

    Args:
        engines: of networks whose parameters have one dtype and device.
    """
    parameters = [list(engine.module.parameters()) for engine in engines]
    places = [_starts(some, 2 * ALIGNED) for some in parameters]
    like = parameters[0][0]
    flat = torch.zeros(max(starts[-1] for starts in places), dtype=like.dtype, device=like.device)
    wide = torch.empty(len(flat) if like.element_size() < 4 else 0, device=like.device)
    for engine, some, starts in zip(engines, parameters, places, strict=True):
        engine.kept = flat[: starts[-1]]
        if isinstance(engine, MasterEngine):
            engine.keep_wide(wide)
        for p, start in zip(some, starts, strict=False):
            p.grad = flat.as_strided(p.shape, p.stride(), start)


def _starts(parameters: Sequence[nn.Parameter], aligned: int) -> list[int]:
    """Where each begins in a flat tensor, and where the last one ends, in elements."""
    starts = [0]
    for p in parameters:
        starts.append(starts[-1] + -(-p.numel() // aligned) * aligned)
    return starts


def lend_gradients(masters: Mapping[nn.Parameter, Tensor]) -> None:
    """Let masters of the parameters' own dtype have their gradients."""
    for p, master in masters.items():
        master.grad = p.grad


def wide_gradients(masters: Mapping[nn.Parameter, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The parameters that have a gradient, with it in float32 and in its master's order; theirs are freed.

    Args:
        masters: float32 tensors of the parameters' shapes.
    """
    for some in _in_pieces(p for p in masters if p.grad is not None):
        starts = _starts(some, ALIGNED)
        flat = torch.empty(starts[-1], device=some[0].device)
        wide = [flat.as_strided(p.shape, masters[p].stride(), start) for p, start in zip(some, starts, strict=False)]
        torch._foreach_copy_(wide, [p.grad for p in some if p.grad is not None])
        for p in some:
            p.grad = None
        yield from zip(some, wide, strict=True)


def _in_pieces(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Some parameters at a time, of about `WIDENED` elements."""
    piece: list[nn.Parameter] = []
    elements = 0
    for p in parameters:
        if piece and elements + p.numel() > WIDENED:
            yield piece
            piece, elements = [], 0
        piece.append(p)
        elements += p.numel()
    if piece:
        yield piece
