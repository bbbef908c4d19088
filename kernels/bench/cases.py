"""What is measured: the shapes of the recipes and of their networks, odd ones, and on CUDA ones of 2^25 elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ipfm.kernels import group_norm_reference, reference
from ipfm.kernels._dispatch import row_config
from ipfm.kernels.bench.optimiser import AdamWorkload
from ipfm.kernels.bench.providers import EAGER, FunctionWorkload, Workload
from ipfm.kernels.denoising_loss import DenoisingLoss, denoising_loss
from ipfm.kernels.generator_loss import IpfmLoss, ipfm_loss
from ipfm.kernels.group_norm import group_norm_silu, kernel_for
from ipfm.kernels.mp_cat_silu import mp_cat_silu, unchecked_mp_cat_silu
from ipfm.kernels.mp_silu import mp_silu, unchecked_mp_silu
from ipfm.kernels.mp_sum import mp_sum, unchecked_mp_sum
from ipfm.kernels.perturbation import perturb
from ipfm.kernels.pixel_norm_silu import pixel_norm_silu, unchecked_pixel_norm_silu
from ipfm.kernels.qkv_norm import qkv_norm, unchecked_qkv_norm
from ipfm.kernels.residual import residual_sum, unchecked_residual_sum
from ipfm.kernels.row_normalise import row_normalise, unchecked_row_normalise

LARGE = 1 << 25
GROUPS = 32
# CIFAR-10's batch; one of ImageNet's micro-batches; the batch of FFHQ and AFHQv2; an odd one; two large ones.
CUDA_IMAGES = [
    (256, 3, 32, 32),
    (32, 3, 64, 64),
    (512, 3, 64, 64),
    (13, 3, 31, 29),
    (10923, 3, 32, 32),
    (2731, 3, 64, 64),
]
CPU_IMAGES = [(64, 3, 32, 32), (16, 3, 64, 64), (13, 3, 31, 29)]
# (channels, height, width, samples on CUDA, samples on the CPU): ncsn++ on CIFAR-10, ADM on ImageNet, an odd one.
NCSNPP_LEVELS = [(256, 32, 32, 256, 4), (256, 16, 16, 256, 8), (256, 8, 8, 256, 16)]
ADM_LEVELS = [(192, 64, 64, 64, 2), (384, 32, 32, 32, 2), (576, 16, 16, 32, 4), (768, 8, 8, 32, 8)]
# EDM2 of size S: the largest images, and where its attention is.
EDM2_LEVELS = [(192, 64, 64, 64, 1), (576, 16, 16, 64, 2)]
# Of its weights: a projection, whose rows wait in registers, and its longest rows. The third has 2^25 elements.
EDM2_WEIGHTS = [(2304, 768, 1, 1), (768, 1536, 3, 3)]
LARGE_WEIGHT = (8192, 4096)
ODD_LEVEL = (96, 7, 5, 13, 5)


@dataclass(frozen=True)
class Bytes:
    """Bytes that any implementation must move, and those that the Triton kernels move."""

    needed: int
    kernel: int


@dataclass(frozen=True)
class Case:
    """An operation on given inputs; `bytes` names its modes: forward, backward, both, or step."""

    op: str
    variant: str
    shape: str
    dtype: torch.dtype
    elements: int
    bytes: Mapping[str, Bytes]
    workload: Workload


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Every case for a device, made one after the other: their tensors together would fill it. `quick`: one an op."""
    cuda = device.type == "cuda"
    images = CUDA_IMAGES if cuda else CPU_IMAGES
    for shape in images[: 1 if quick else None]:
        main = not quick and (shape == images[0] or math.prod(shape) >= LARGE)
        for dtype in [torch.float32, torch.bfloat16] if cuda and main else [torch.float32]:
            yield from perturb_cases(device, shape, dtype, every_variant=main)
            yield from loss_cases(device, shape, dtype, raw=not quick and dtype == torch.float32)
    levels = [*NCSNPP_LEVELS, *ADM_LEVELS, ODD_LEVEL]
    for channels, height, width, on_cuda, on_cpu in levels[1:2] if quick else levels:
        shape = (on_cuda if cuda else on_cpu, channels, height, width)
        for dtype in [torch.bfloat16, torch.float32] if cuda and not quick else [torch.float32]:
            for last in [False] if quick or not (cuda or channels == 256) else [False, True]:
                yield group_norm_case(device, shape, dtype, last=last, scaled=True)
            if (channels, height) == (256, 32):
                yield group_norm_case(device, shape, dtype, last=False, scaled=False)
                yield residual_case(device, shape, dtype, last=cuda)
    for channels, height, width, on_cuda, on_cpu in [] if quick else EDM2_LEVELS:
        shape = (on_cuda if cuda else on_cpu, channels, height, width)
        yield from edm2_cases(device, shape, torch.bfloat16 if cuda else torch.float32)
    weights: list[tuple[int, ...]] = [*EDM2_WEIGHTS, LARGE_WEIGHT] if cuda else [*EDM2_WEIGHTS]
    for weight in [] if quick else weights:
        yield row_normalise_case(device, weight)
    # About as many parameters as ncsn++ has: 56 million.
    width, convolutions, vectors = (256, 95, 405) if cuda else (32, 32, 32)
    shapes: list[tuple[int, ...]] = [(width, width, 3, 3)] * convolutions
    shapes += [(width,)] * vectors
    yield adam_case(device, [(sum(map(math.prod, shapes)),)], "one flat tensor")
    if not quick:
        yield adam_case(device, shapes, f"{len(shapes)} tensors")
        yield adam_case(device, shapes, f"{len(shapes)} tensors, 3 averages", averages=3)


def perturb_cases(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, *, every_variant: bool
) -> Iterator[Case]:
    """D = 128; with `every_variant` also the Gaussian kernel, channels_last, and c_in·x in bfloat16."""
    generator = torch.Generator(device).manual_seed(0)
    y = torch.randn(shape, generator=generator, device=device).to(dtype)
    sigma = torch.rand(shape[0], generator=generator, device=device) + 0.1
    position = {"seed": 1, "stream": 0, "step": 7, "sample_index": torch.arange(shape[0], device=device)}
    size = y.nbytes
    once = {"forward": Bytes(2 * size, 2 * size)}

    def make(variant: str, bytes_: Mapping[str, Bytes], y: Tensor, D: float, arguments: Mapping[str, Any]) -> Case:
        work = FunctionWorkload({EAGER: reference.perturb}, perturb, (y, sigma, D), arguments)
        return Case("perturb", variant, _name(shape), dtype, y.numel(), bytes_, work)

    yield make("D=128", once, y, 128.0, position)
    if not every_variant:
        return
    yield make("D=inf", once, y, math.inf, position)
    yield make("D=128 channels_last", once, y.to(memory_format=torch.channels_last), 128.0, position)
    half = 2 * y.numel()
    # The way back is PyTorch's, whose bytes are counted as they run.
    modes = {
        "forward": Bytes(2 * size + half, 2 * size + half),
        "backward": Bytes(2 * size + half, 0),
        "both": Bytes(2 * (2 * size + half), 2 * size + half),
    }
    arguments = {**position, "c_in": 1 / (sigma.square() + 0.25).sqrt(), "out_dtype": torch.bfloat16}
    yield make("D=128 c_in bf16", modes, y.clone().requires_grad_(), 128.0, arguments)


def loss_cases(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, *, raw: bool = False
) -> Iterator[Case]:
    """The losses with their gradients; a row too long for the registers is read twice.

    `raw`: and those of raw outputs in bfloat16, beside images in `dtype`.
    """
    generator = torch.Generator(device).manual_seed(0)
    t, s, y = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    sigma = torch.rand(shape[0], generator=generator, device=device) + 0.1
    size, row = y.nbytes, y[0].numel()
    reads = 1 if row_config(row)[0] >= row else 2
    make = partial(Case, shape=_name(shape), dtype=dtype, elements=y.numel())
    work = FunctionWorkload({EAGER: reference.ipfm_loss}, ipfm_loss, (t, s, y), {"alpha": 1.0})
    yield make("ipfm_loss", "alpha=1", bytes={"forward": Bytes(6 * size, (3 + 3 * reads) * size)}, workload=work)
    work = FunctionWorkload({EAGER: reference.denoising_loss}, denoising_loss, (t, y, sigma), {})
    yield make("denoising_loss", "", bytes={"forward": Bytes(3 * size, (1 + 2 * reads) * size)}, workload=work)
    if not raw:
        return
    # The preconditioning within the losses, of raw outputs in bfloat16, against the same around them.
    raw_t, raw_s, half = t.bfloat16(), s.bfloat16(), y.numel() * 2
    c_out = sigma / (sigma.square() + 0.25).sqrt() / 2
    given = {"x": y + sigma.view(-1, 1, 1, 1) * s, "c_skip": 0.25 / (sigma.square() + 0.25), "c_out": c_out}
    reading, writing = 2 * half + 2 * size, 2 * half + size
    eager: dict[str, Callable[..., Any]] = {EAGER: preconditioned_ipfm_loss}
    keywords = {"alpha": 1.0, **given}
    work = FunctionWorkload(eager, ipfm_loss, (raw_t, raw_s, y), keywords, oracle=reference.ipfm_loss)
    moved = {"forward": Bytes(reading + writing, reads * reading + writing)}
    yield make("ipfm_loss", "alpha=1 raw bf16", bytes=moved, workload=work)
    real = {**keywords, "real_weights": (0.92, 0.94)}
    work = FunctionWorkload(
        {EAGER: ipfm_loss_of_targets}, ipfm_loss, (raw_t, raw_s, y), real, oracle=reference.ipfm_loss
    )
    yield make("ipfm_loss", "alpha=1 raw bf16 real", bytes=moved, workload=work)
    weighed = {**keywords, "weight": "score", "factor": sigma.sqrt(), "sigma": sigma, "D": 128.0}
    work = FunctionWorkload(
        {EAGER: ipfm_loss_of_scores}, ipfm_loss, (raw_t, raw_s, y), weighed, oracle=weighed_reference
    )
    yield make("ipfm_loss", "alpha=1 raw bf16 score", bytes=moved, workload=work)
    eager = {EAGER: preconditioned_denoising_loss}
    work = FunctionWorkload(eager, denoising_loss, (raw_t, y, sigma), given, oracle=reference.denoising_loss)
    reading = half + 2 * size
    moved = {"forward": Bytes(reading + half, reads * reading + half)}
    yield make("denoising_loss", "raw bf16", bytes=moved, workload=work)
    real, eager = {**given, "stretch": 0.94 / 0.92, "share": 0.92}, {EAGER: denoising_loss_of_targets}
    work = FunctionWorkload(eager, denoising_loss, (raw_t, y, sigma), real, oracle=reference.denoising_loss)
    yield make("denoising_loss", "raw bf16 real", bytes=moved, workload=work)


def preconditioned_ipfm_loss(
    t: Tensor, s: Tensor, y: Tensor, *, alpha: float, x: Tensor, c_skip: Tensor, c_out: Tensor
) -> IpfmLoss:
    """The denoised images as tensors of their own, and the gradients taken back to the raw outputs and to x."""
    skip, out = c_skip.view(-1, 1, 1, 1), c_out.view(-1, 1, 1, 1)
    denoised_t, denoised_s = (torch.addcmul(skip * x, out, v.to(x.dtype)) for v in (t, s))
    result = reference.ipfm_loss(denoised_t, denoised_s, y, alpha=alpha)
    dy = result.dy + skip * (result.dt + result.ds)
    return result._replace(dt=(out * result.dt).to(t.dtype), ds=(out * result.ds).to(s.dtype), dy=dy)


def preconditioned_denoising_loss(
    pred: Tensor, y: Tensor, sigma: Tensor, *, x: Tensor, c_skip: Tensor, c_out: Tensor
) -> DenoisingLoss:
    """The same for the denoising loss."""
    skip, out = c_skip.view(-1, 1, 1, 1), c_out.view(-1, 1, 1, 1)
    result = reference.denoising_loss(torch.addcmul(skip * x, out, pred.to(x.dtype)), y, sigma)
    return result._replace(grad=(out * result.grad).to(pred.dtype))


def ipfm_loss_of_targets(
    t: Tensor,
    s: Tensor,
    y: Tensor,
    *,
    alpha: float,
    x: Tensor,
    c_skip: Tensor,
    c_out: Tensor,
    real_weights: tuple[float, float],
) -> IpfmLoss:
    """With real data beside: the targets as a tensor of their own, for which the loss is a times the one without."""
    a, b = real_weights
    skip, out = c_skip.view(-1, 1, 1, 1), c_out.view(-1, 1, 1, 1)
    offset = skip * x
    target = torch.lerp(offset, y, b / a)
    denoised_t, denoised_s = (torch.addcmul(offset, out, v.to(x.dtype)) for v in (t, s))
    weight = 1 / (denoised_t - y).abs().mean((1, 2, 3)).clamp(min=1e-5)
    result = reference.ipfm_loss(denoised_t, denoised_s, target, alpha=alpha)
    factor = a * weight / result.weight
    column = factor.view(-1, 1, 1, 1)
    dt, ds, dy = column * result.dt, column * result.ds, b / a * (1 - skip) * column * result.dy
    return IpfmLoss(
        factor * result.loss, weight, (out * dt).to(t.dtype), (out * ds).to(s.dtype), dy.to(y.dtype), result.valid
    )


def ipfm_loss_of_scores(
    t: Tensor,
    s: Tensor,
    y: Tensor,
    *,
    alpha: float,
    x: Tensor,
    c_skip: Tensor,
    c_out: Tensor,
    weight: str,
    factor: Tensor,
    sigma: Tensor,
    D: float,
) -> IpfmLoss:
    """The loss by its usual weight, and each of its gradients times the other one."""
    skip, out = c_skip.view(-1, 1, 1, 1), c_out.view(-1, 1, 1, 1)
    usual = preconditioned_ipfm_loss(t, s, y, alpha=alpha, x=x, c_skip=c_skip, c_out=c_out)
    away = ((1 - skip) * x - out * t.to(x.dtype)).square().sum((1, 2, 3))
    own = factor * (y[0].numel() / D + 1) / (away / D + sigma.square())
    by = own / usual.weight
    dt, ds, dy = (by.view(-1, 1, 1, 1) * g for g in (usual.dt, usual.ds, usual.dy))
    return IpfmLoss(by * usual.loss, own, dt.to(t.dtype), ds.to(s.dtype), dy.to(y.dtype), usual.valid)


def weighed_reference(t: Tensor, s: Tensor, y: Tensor, *, weight: Any, D: float, **given: Any) -> IpfmLoss:
    """`reference.ipfm_loss`, which is given 1 / D."""
    return reference.ipfm_loss(t, s, y, weight_by=weight, by_D=1 / D, **given)


def denoising_loss_of_targets(
    pred: Tensor,
    y: Tensor,
    sigma: Tensor,
    *,
    x: Tensor,
    c_skip: Tensor,
    c_out: Tensor,
    stretch: float,
    share: float,
) -> DenoisingLoss:
    """The same for the denoising loss."""
    target = torch.lerp(c_skip.view(-1, 1, 1, 1) * x, y, stretch)
    loss, grad, valid = preconditioned_denoising_loss(pred, target, sigma, x=x, c_skip=c_skip, c_out=c_out)
    return DenoisingLoss(share * loss, share * grad, valid)


def plain_group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float,
) -> Tensor:
    """PyTorch's operations one after the other, as autograd records them."""
    n = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(n if scale is None or shift is None else torch.addcmul(shift, n, scale + 1))


def group_norm_case(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, *, last: bool, scaled: bool
) -> Case:
    """Gradients with respect to everything; "recomputed" is the operation's reference, which keeps the input alone."""
    batch, channels, height, width = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    layout = torch.channels_last if last else torch.contiguous_format
    x = draw(*shape).contiguous(memory_format=layout).requires_grad_()
    inputs = (x, GROUPS, draw(channels).requires_grad_(), draw(channels).requires_grad_())
    arguments: dict[str, Any] = {"eps": 1e-5}
    if scaled:
        arguments |= {name: (0.1 * draw(batch, channels, 1, 1)).requires_grad_() for name in ("scale", "shift")}
    plain: dict[str, Callable[..., Any]] = {
        EAGER: plain_group_norm_silu,
        "recomputed": group_norm_reference.group_norm_silu,
    }
    work = FunctionWorkload(plain, group_norm_silu, inputs, arguments, oracle=reference.group_norm_silu)
    once, once_back = (
        kernel_for(channels, GROUPS, height * width, dtype, last, scaled=scaled, backward=backward)[1].get("RESIDENT")
        for backward in (False, True)
    )
    forward = Bytes(2 * x.nbytes, (2 if once else 4) * x.nbytes)
    backward = Bytes(3 * x.nbytes, (3 if once_back else 5) * x.nbytes)
    both = Bytes(forward.needed + backward.needed, forward.kernel + backward.kernel)
    variant = " ".join(part for part, given in (("scaled", scaled), ("channels_last", last)) if given)
    modes = {"forward": forward, "backward": backward, "both": both}
    return Case("group_norm_silu", variant, _name(shape), dtype, x.numel(), modes, work)


def residual_case(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, *, last: bool) -> Case:
    """Both branches and a bias, as a block of ncsn++ adds and scales them, and all gradients."""
    generator = torch.Generator(device).manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    a, b = (draw(*shape).contiguous(memory_format=layout).requires_grad_() for _ in range(2))
    inputs = (a, b, draw(shape[1]).requires_grad_())
    scale = {"scale": 0.5**0.5}
    work = FunctionWorkload(
        {EAGER: partial(unchecked_residual_sum, triton_runs=False)},
        residual_sum,
        inputs,
        scale,
        oracle=reference.residual_sum,
    )
    modes = {mode: Bytes(n * a.nbytes, n * a.nbytes) for mode, n in (("forward", 3), ("backward", 2), ("both", 5))}
    return Case("residual_sum", "channels_last" if last else "", _name(shape), dtype, a.numel(), modes, work)


def edm2_cases(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    """The operations of EDM2's blocks at one level, in channels_last, and all gradients."""
    generator = torch.Generator(device).manual_seed(0)
    batch, channels, height, width = shape
    heads = max(1, channels // 64)

    def draw(*size: int) -> Tensor:
        made = torch.randn(size, generator=generator, device=device).to(dtype)
        made = made.contiguous(memory_format=torch.channels_last) if made.ndim == 4 else made
        return made.requires_grad_()

    def make(
        op: str,
        variant: str,
        kernel: Callable[..., Any],
        plain: Callable[..., Any],
        inputs: tuple[Any, ...],
        arguments: Mapping[str, Any],
        forward: int,
        backward: int,
    ) -> Case:
        eager = {EAGER: partial(plain, triton_runs=False)}
        work = FunctionWorkload(eager, kernel, inputs, arguments, oracle=getattr(reference, op))
        bytes_ = {"forward": forward, "backward": backward, "both": forward + backward}
        modes = {mode: Bytes(moved, moved) for mode, moved in bytes_.items()}
        return Case(op, variant, _name(shape), dtype, math.prod(shape), modes, work)

    x, scale, joined = draw(*shape), draw(batch, channels), 2 * draw(*shape).nbytes
    bits, size = x.numel() // 8, x.nbytes
    both, clip = (x, draw(*shape)), {"clip": 256.0}
    yield make("mp_sum", "clip", mp_sum, unchecked_mp_sum, (*both, 0.3), clip, 3 * size + bits, 3 * size + bits)
    yield make("mp_silu", "scaled", mp_silu, unchecked_mp_silu, (x, scale), {}, 2 * size, 3 * size)
    yield make("mp_cat_silu", "", mp_cat_silu, unchecked_mp_cat_silu, (*both, 0.5), {}, 3 * joined, 4 * joined)
    yield make("pixel_norm_silu", "", pixel_norm_silu, unchecked_pixel_norm_silu, (x,), {}, 3 * size, 4 * size)
    qkv, scaled = draw(batch, height * width, 3 * heads * (channels // heads)), {"k_scale": 0.125}
    yield make("qkv_norm", "", qkv_norm, unchecked_qkv_norm, (qkv, heads), scaled, 2 * qkv.nbytes, 3 * qkv.nbytes)


def row_normalise_case(device: torch.device, shape: tuple[int, ...]) -> Case:
    """A float32 master made a weight in bfloat16, and the gradient of the weight that of the master.

    The seed is not that of the gradients, of which only rounding is left where they have the direction of the master.
    """
    generator = torch.Generator(device).manual_seed(1)
    master = torch.randn(shape, generator=generator, device=device).requires_grad_()
    eager: dict[str, Callable[..., Any]] = {EAGER: partial(unchecked_row_normalise, triton_runs=False)}
    options = {"out_dtype": torch.bfloat16}
    work = FunctionWorkload(eager, row_normalise, (master,), options, oracle=reference.row_normalise)
    size, half, row = master.nbytes, master.nbytes // 2, master[0].numel()
    reads = 1 if row_config(row)[0] >= row else 2
    forward = Bytes(size + half, reads * size + half)
    backward = Bytes(2 * size + half, reads * (size + half) + size)
    both = Bytes(forward.needed + backward.needed, forward.kernel + backward.kernel)
    modes = {"forward": forward, "backward": backward, "both": both}
    return Case("row_normalise", "to bf16", _name(shape), master.dtype, master.numel(), modes, work)


def adam_case(device: torch.device, shapes: Sequence[tuple[int, ...]], name: str, averages: int = 1) -> Case:
    """Weights, second moment and averages read and written, gradients read.

    The kernels read the gradients twice: they first see whether all are finite.
    """
    elements = sum(map(math.prod, shapes))
    needed = 5 + 2 * averages
    moved = {"step": Bytes(needed * 4 * elements, (needed + 1) * 4 * elements)}
    work = AdamWorkload(shapes, device, averages)
    return Case("AdamEMA", name, f"{elements / 1e6:.3g}M", torch.float32, elements, moved, work)


def _name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
