"""The kernels: against float64, and beside a copy of the same bytes. Without a GPU they are compiled for one."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch._functorch.config
from torch import Tensor, nn

from ipfm.engine.commands.bench.plain_step import PlainGroupNorm
from ipfm.engine.commands.doctor.place import OK, OutOfTime, Place, Row, failed, judged, tried, within
from ipfm.kernels._dispatch import INTERPRETED
from ipfm.kernels.bench.cases import Case, cases
from ipfm.kernels.bench.fake_driver import fake_cuda
from ipfm.kernels.bench.measurement import ALLOWED_UNITS, copy_quantiles, error_units, quantiles
from ipfm.kernels.bench.micro import measure
from ipfm.kernels.bench.providers import EAGER, TRITON
from ipfm.models import NetworkConfig, build_network, presets
from ipfm.models.layers import GroupNorm

# Network, images: of a GPU's share.
NETWORKS = (("ncsnpp", 256), ("ddpmpp", 256), ("adm", 32), ("ffhq64-ddpmpp", 64), ("ncsnpp", 32))


def rows(place: Place) -> Iterator[Row]:
    """What was compiled, where there is no GPU; then the operations, then the normalisations of the networks."""
    device = torch.device(place.device)
    if not place.cuda:
        yield from _compiled(place)
    # Each kind of operation has its share of the time.
    with torch._functorch.config.patch(donated_buffer=False):
        for case in _until(cases(device, quick=not place.cuda or place.quick), place, 0.45):
            yield from _operation(case, device)
    # What a run takes first: on a GPU each needs two kernels that are compiled when they are first used, and then kept.
    dtypes = (torch.bfloat16, torch.float32) if place.cuda else (torch.float32,)
    norms = [(norm, dtype, last) for dtype in dtypes for last in (True, False) for norm in _norms(place)]
    left_out = ""
    try:
        for norm, dtype, last in within(place, norms, "normalisations", 0.95):
            yield tried(norm.row(dtype, last), lambda n=norm, d=dtype, la=last: _norm(n, d, la, device))  # type: ignore[misc]
    except OutOfTime as over:
        left_out = str(over)
    if place.cuda:
        yield from launched()
    if left_out:
        raise OutOfTime(left_out)


def _until(every: Iterator[Case], place: Place, share: float) -> Iterator[Case]:
    for number, case in enumerate(every):
        if number and place.over(share):
            return
        yield case


# -- what is compiled without a GPU ------------------------------------------------------------------------------------


def _compiled(place: Place) -> Iterator[Row]:
    if INTERPRETED:
        yield {"operation": "all", "what": "compiled", "verdict": "left out: TRITON_INTERPRET=1 compiles nothing"}
        return
    from ipfm.kernels.bench.compile_report import report_rows
    from ipfm.kernels.bench.variants import cases

    every = cases(quick=True)
    for case in within(place, every[: 1 if place.quick else None], "variants", 0.8):
        row: Row = {"operation": case.kernel, "what": case.variant, "mode": "compiled for sm_90"}
        try:
            (found,) = report_rows([case], "sm_90")
        except Exception as error:
            yield row | {"verdict": failed(f"{type(error).__name__}: {error}")}
            continue
        yield row | {
            "registers": found.registers,
            "spills": found.spills,
            "verdict": judged(not found.spills, f"{found.spills} instructions spill registers"),
        }


# -- what runs ---------------------------------------------------------------------------------------------------------


def _operation(case: Case, device: torch.device) -> Iterator[Row]:
    """Eager PyTorch and the kernel; what torch.compile makes of it is `ipfm bench`'s."""
    about: Row = {"operation": case.op, "what": case.variant, "shape": case.shape}
    try:
        found = measure(case, device, quick=True, providers=(EAGER, TRITON))
    except Exception as error:  # the other operations are measured too
        yield about | {"verdict": failed(f"{type(error).__name__}: {error}")}
        return
    for row in found:
        yield about | {
            "dtype": row.dtype,
            "mode": row.mode,
            "by": row.provider,
            "µs": None if row.us_50 is None else round(row.us_50, 1),
            "of copy": "" if row.share_of_copy is None else f"{row.share_of_copy:.0%}",
            "times eager": "" if row.speedup is None else round(row.speedup, 2),
            "error over allowed": "" if row.error_over_allowed is None else f"{row.error_over_allowed:.3f}",
            "verdict": judged(row.correct, row.note or "wrong"),
        }


@dataclass(frozen=True)
class Norm:
    """A normalisation of a network, on the meta device, and what it is given."""

    network: str
    module: GroupNorm
    shape: tuple[int, ...]
    silu: bool
    scaled: bool
    addend: tuple[int, ...] | None
    """Shape of what is added to the channels before; None: nothing is."""
    count: int

    def row(self, dtype: torch.dtype, last: bool) -> Row:
        """What it is, in words."""
        parts = (("silu", self.silu), ("scaled", self.scaled), ("addend", self.addend is not None))
        more = " ".join(word for word, given in parts if given)
        return {
            "operation": "group_norm_silu",
            "what": f"{self.network} ({self.count}) {more} {'channels_last' if last else 'contiguous'}",
            "shape": "x".join(map(str, self.shape)),
            "dtype": str(dtype).removeprefix("torch."),
        }


def _norms(place: Place) -> list[Norm]:
    given = NETWORKS if place.cuda else (("digits", 4),)
    found = [norm for name, images in given for norm in distinct_norms(name, presets.get(name), images)]
    return found[:1] if place.quick else found


def distinct_norms(name: str, network: NetworkConfig, images: int) -> list[Norm]:
    """The normalisations of a network that differ, the largest first."""
    seen: dict[tuple[object, ...], list[tuple[GroupNorm, tuple[int, ...], bool, bool, tuple[int, ...] | None]]] = {}

    def hook(module: nn.Module, given: tuple[Tensor, ...], keywords: dict[str, object]) -> None:
        assert isinstance(module, GroupNorm)
        added = keywords.get("addend")
        found = (
            module,
            tuple(given[0].shape),
            bool(keywords.get("silu")),
            keywords.get("scale") is not None,
            tuple(added.shape) if isinstance(added, Tensor) else None,
        )
        seen.setdefault((module.extra_repr(), *found[1:]), []).append(found)

    # The meta device passes for a GPU, where blocks leave biases to the normalisations.
    with torch.device("meta"), fake_cuda():
        net = build_network(network).eval()
        for module in net.modules():
            if isinstance(module, GroupNorm):
                module.register_forward_pre_hook(hook, with_kwargs=True)
        labels = torch.empty(images, network.label_dim) if network.label_dim else None
        with torch.no_grad():
            net(torch.empty(images, *network.image_shape), torch.empty(images), labels)
    norms = [Norm(name, *alike[0], len(alike)) for alike in seen.values()]
    return sorted(norms, key=lambda norm: -norm.count * torch.Size(norm.shape).numel())


def _norm(norm: Norm, dtype: torch.dtype, last: bool, device: torch.device) -> Row:
    """Ours beside a float64 truth, forward and backward, and beside PyTorch's operations in time.

    Right is what errs by no more than is allowed of every kernel, or than PyTorch's operations do in this dtype.
    """
    torch.manual_seed(0)
    ours = copy.deepcopy(norm.module).to_empty(device=device)
    ours._forward_pre_hooks.clear()
    ours._forward_pre_hooks_with_kwargs.clear()
    nn.init.normal_(ours.weight, 1.0, 0.1)
    nn.init.normal_(ours.bias, 0.0, 0.1)
    # Both get the same numbers: weights are rounded to the dtype at each use.
    for p in ours.parameters():
        p.data = p.data.to(dtype).float()
    plain = copy.deepcopy(ours)
    plain.__class__ = PlainGroupNorm
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(norm.shape, device=device).to(dtype).contiguous(memory_format=order).requires_grad_()
    rows_ = (norm.shape[0], norm.shape[1], 1, 1)
    scale, shift = ((0.1 * torch.randn(rows_, device=device)).to(dtype).requires_grad_() for _ in range(2))
    added = (0.1 * torch.randn(norm.addend or (1,), device=device)).to(dtype).requires_grad_()
    inputs = (x, scale, shift, added)
    # A part of the images, of which the truth in float64 fits: they are normalised one by one.
    part = slice(0, max(1, min(norm.shape[0], 2**24 // torch.Size(norm.shape[1:]).numel())))
    some = [(t[part] if t.dim() > 1 else t).detach().requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in some]
    grad, part_of_grad = _gradient(x), _gradient(some[0])
    truth = _run(copy.deepcopy(plain).double(), norm, wide, part_of_grad.double())
    # All of them for what each image has of its own, and the part alone for the sums over them.
    own = len(truth) - 2 - (norm.addend is not None)
    found = [t[part] for t in _run(ours, norm, inputs, grad)[:own]] + _run(ours, norm, some, part_of_grad)[own:]
    worst = error_units(found, truth)[dtype] / max(
        ALLOWED_UNITS[dtype], error_units(_run(plain, norm, some, part_of_grad), truth)[dtype]
    )
    with torch.no_grad():
        _, forward, _ = quantiles(lambda: _call(ours, norm, *inputs), device, quick=True)
    _, whole, _ = quantiles(lambda: _run(ours, norm, inputs, grad), device, quick=True)
    _, theirs_whole, _ = quantiles(lambda: _run(plain, norm, inputs, grad), device, quick=True)
    _, copied, _ = copy_quantiles(2 * x.nbytes, device, True)
    return {
        "mode": "both",
        "by": TRITON if device.type == "cuda" else "recomputed",
        "µs": round(whole, 1),
        "forward µs": round(forward, 1),
        "of copy": f"{copied / forward:.0%}",
        "times eager": round(theirs_whole / whole, 2),
        "error over allowed": f"{worst:.3f}",
        "verdict": judged(worst <= 1, f"error {worst:.3g} times what is allowed"),
    }


def _call(module: GroupNorm, norm: Norm, x: Tensor, scale: Tensor, shift: Tensor, added: Tensor) -> Tensor:
    more = {"scale": scale, "shift": shift} if norm.scaled else {}
    more |= {"addend": added} if norm.addend is not None else {}
    out: Tensor = module(x, silu=norm.silu, **more)
    return out


def _run(module: GroupNorm, norm: Norm, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The result and the gradients of all inputs: of each image's own first, then of the addend and the weights."""
    x, scale, shift, added = inputs
    out = _call(module, norm, *inputs)
    wanted = [x, *((scale, shift) if norm.scaled else ()), *((added,) if norm.addend is not None else ())]
    wanted += [module.weight, module.bias]
    # The weights' arithmetic is that of x.
    return [out.detach(), *(g.to(x.dtype) for g in torch.autograd.grad(out, wanted, grad))]


def _gradient(x: Tensor) -> Tensor:
    """Of a result like x: alike for every dtype, and for each image."""
    line = torch.linspace(-1, 1, x[0].numel(), device=x.device, dtype=torch.float32).cos()
    return torch.empty_like(x, requires_grad=False).copy_(line.view(x.shape[1:]).to(x.dtype))


# -- what was launched -------------------------------------------------------------------------------------------------


def launched() -> Iterator[Row]:
    """Registers and spills of every kernel that this process has launched, as the driver counts them."""
    from triton.runtime.jit import JITFunction

    modules = [module for name, module in sys.modules.items() if re.fullmatch(r"ipfm\.kernels\.[a-z_]+", name)]
    for module in modules:
        for name, fn in vars(module).items():
            if isinstance(fn, JITFunction) and fn.fn.__module__ == module.__name__:
                yield from of_kernel(name, fn.device_caches)


def of_kernel(name: str, caches: dict) -> Iterator[Row]:
    """A row a compiled form, from what Triton keeps of each device."""
    for cache in caches.values():
        for kernel in cache[0].values():
            kernel._init_handles()
            spills = int(kernel.n_spills)
            yield {
                "operation": name,
                "mode": "launched",
                "registers": int(kernel.n_regs),
                "spills": spills,
                "verdict": OK if not spills else failed(f"{spills} bytes a thread spill"),
            }
