"""Attention by backend, at the shapes of the networks: time, error, and whether two runs give the same bits."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ipfm.engine.commands.doctor.place import Place, Row, judged, within
from ipfm.kernels.bench.measurement import ALLOWED_UNITS, error_units, quantiles
from ipfm.models.attention import attention

# (batch, tokens, heads, width of a head): CIFAR-10's networks; ImageNet's at its three resolutions.
SHAPES = ((256, 256, 1, 256), (32, 1024, 6, 64), (32, 256, 9, 64), (32, 64, 12, 64))
SHAPES_CPU = ((4, 64, 1, 64), (2, 64, 3, 64))
TORCHS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
T = TypeVar("T")
# In units in the last place: as of every kernel in fp32; twice that where the probabilities are rounded to 16 bits too.
ALLOWED = {torch.float32: ALLOWED_UNITS[torch.float32], torch.bfloat16: 2 * ALLOWED_UNITS[torch.bfloat16]}


def rows(place: Place) -> Iterator[Row]:
    """A row a shape, dtype and backend; one that does not run says why."""
    device = torch.device(place.device)
    shapes = SHAPES if place.cuda else SHAPES_CPU[: 1 if place.quick else None]
    dtypes = (torch.bfloat16, torch.float32) if place.cuda else (torch.float32,)
    cases = [(shape, dtype) for dtype in dtypes for shape in shapes]
    for shape, dtype in within(place, cases, "shapes"):
        yield from _of_shape(shape, dtype, device)


def _of_shape(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    out = attention(wide[0], wide[1], wide[2], "math")
    truth = [out, *torch.autograd.grad(out, wide, grad.double())]
    about: Row = {"shape": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch.")}
    taken = _taken(q, k, v)
    for name, call in _calls():
        chosen = name == taken
        row = about | {"backend": name, "auto": "auto" if chosen else ""}
        try:
            yield row | _measured(call, (q, k, v), grad, truth, device)
        except Exception as error:  # a backend that this GPU or build does not have
            said = f"does not run: {' '.join(str(error).split())[:160]}"
            yield row | {"note": said, "verdict": judged(not chosen, said)}


def _taken(q: Tensor, k: Tensor, v: Tensor) -> str:
    """What a network takes here."""
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as torchs:
        _quietly(lambda: attention(q, k, v))
    return "sdpa" if torchs.called else "xformers"


def _calls() -> Iterator[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
    yield "sdpa", lambda q, k, v: attention(q, k, v, "sdpa")
    for kind in TORCHS:

        def alone(q: Tensor, k: Tensor, v: Tensor, kind: SDPBackend = kind) -> Tensor:
            with sdpa_kernel([kind]):
                return attention(q, k, v, "sdpa")

        yield f"sdpa, {kind.name.lower()} alone", alone
    yield "xformers", lambda q, k, v: attention(q, k, v, "xformers")
    yield "math", lambda q, k, v: attention(q, k, v, "math")


def _measured(
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: tuple[Tensor, ...],
    grad: Tensor,
    truth: list[Tensor],
    device: torch.device,
) -> Row:
    leaves = [t.clone().requires_grad_() for t in inputs]

    def both() -> list[Tensor]:
        out = call(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    first, second = _quietly(both), both()
    units = max(error_units(first, truth).values())
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        _, forward, _ = quantiles(lambda: call(*inputs), device, quick=True)
    _, whole, _ = quantiles(both, device, quick=True)
    row: Row = {
        "forward µs": round(forward, 1),
        "with backward µs": round(whole, 1),
        "error, ulp": round(units, 2),
        "same bits twice": "yes" if same else "no",
        "verdict": judged(units <= ALLOWED[grad.dtype], f"{units:.0f} units in the last place"),
    }
    return row


def _quietly(ask: Callable[[], T]) -> T:
    """What a backend prints when it is first asked is no part of a table."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return ask()
