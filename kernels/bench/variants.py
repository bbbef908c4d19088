"""The cases of the offline compile report: launches as the operations themselves make them, recorded without a GPU.

Each situation calls an operation on tensors of the meta device under the fake driver, forward and backward, as the
recording of a training step does. So types, constants and what 16 divides are those of a true launch, whatever becomes
of a launcher. They are here for what no recipe launches too: other dtypes, images of odd sizes, options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ipfm.kernels import group_norm, philox
from ipfm.kernels.adam import AdamEMA
from ipfm.kernels.bench.fake_driver import ThroughLaunchers, Variant, fake_cuda
from ipfm.kernels.denoising_loss import denoising_loss
from ipfm.kernels.fused_rows import FusedRows
from ipfm.kernels.generator_loss import ipfm_loss
from ipfm.kernels.mp_cat_silu import mp_cat_silu
from ipfm.kernels.mp_silu import mp_silu
from ipfm.kernels.mp_sum import mp_sum
from ipfm.kernels.perturbation import perturb
from ipfm.kernels.pixel_norm_silu import pixel_norm_silu
from ipfm.kernels.qkv_norm import qkv_norm
from ipfm.kernels.reference import LossWeight
from ipfm.kernels.residual import residual_sum
from ipfm.kernels.row_normalise import row_normalise
from ipfm.kernels.weight_rows import WeightRows, row_blocks

_empty = partial(torch.empty, device="meta")
# (a, b) without real data beside, and with: any but 1 are other code.
REAL_WEIGHTS = ((1.0, 1.0), (0.92, 0.94))
WEIGHTS: tuple[LossWeight, ...] = ("score", "unsquared", "given")  # beside the default
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
# What the reports call a kernel, where its own name does not say whose it is.
_NAMES = {
    "group_norm_silu_lanes": "group_norm_silu",
    "group_norm_silu_lanes_backward": "group_norm_silu backward",
    **{name: f"adam {name}" for name in ("measure", "reduce", "numbers", "update")},
    **{f"row_{name}": f"rows {name}" for name in ("gradients", "masters", "plain")},
}


@dataclass(frozen=True)
class Situation:
    """A use of an operation."""

    variant: str
    """What it is, in words; the first is the dtype."""
    call: Callable[[], object]
    """Launches its kernels."""
    quick: bool = True
    """Part of the quick report."""


@dataclass(frozen=True)
class Case:
    """A kernel as a situation launches it."""

    kernel: str
    variant: str
    code: Variant

    @property
    def scalars(self) -> tuple[int, int]:
        """Loads and stores of a number or two for each sample, group or channel, as `scalar_accesses`."""
        return scalar_accesses(self.kernel, self.code)


def cases(*, quick: bool = False, of: Sequence[Callable[[], Iterator[Situation]]] = ()) -> list[Case]:
    """Every kernel in every situation that makes another machine code of it.

    Args:
        quick: leave out situations that differ little from one that stays.
        of: some of `SITUATIONS`; all by default.
    """
    found: dict[Variant, Case] = {}
    names: dict[tuple[str, str], Variant] = {}
    for situations in of or SITUATIONS:
        for situation in situations():
            if quick and not situation.quick:
                continue
            with fake_cuda() as launches, ThroughLaunchers():
                situation.call()
            for launch in launches.calls:
                code = launch.variant
                if code not in found:
                    name = kernel_name(code), situation.variant
                    first = names.setdefault(name, code)
                    found[code] = Case(name[0], " ".join([name[1], *_differences(code, first)]), code)
    return list(found.values())


def _differences(code: Variant, first: Variant) -> list[str]:
    """Constants of a kernel's code that tell it from the one that the same situation launched first."""
    return [f"{name}={value}" for name, value in code.constants if value != first.constant(name)]


def kernel_name(code: Variant) -> str:
    """What the reports call a kernel."""
    name = code.name.removesuffix("_kernel")
    return _NAMES.get(name) or name.replace("_backward", " backward")


def scalar_accesses(kernel: str, code: Variant) -> tuple[int, int]:
    """(loads, stores) of single numbers in a kernel's code, of samples, groups, channels or bits.

    They are narrow by nature, so that as many of the narrowest accesses are left out of the reported width; so are
    loads that ask to stay in the cache (evict_last), which fetch parameters and statistics.
    """
    given = code.constant
    clock = int(dict(code.types).get("step", "").startswith("*"))
    raw = 2 * bool(given("RAW"))
    match kernel:
        case "perturb":
            return 2 + bool(given("SCALED")) + clock, 0
        case "ipfm_loss":
            # A number a sample each.
            return raw + bool(given("FACTOR")) + (given("WEIGHT") == 2), 3
        case "denoising_loss":
            return 1 + raw, 2
        case "group_norm_silu" | "group_norm_silu backward":
            return 0, 2 + (kernel.endswith("backward") and bool(given("ADDED")))
        case "residual_sum backward":
            return 0, int(bool(given("BIASED")))
        case "mp_sum":
            return 0, 2 * bool(given("KEPT"))
        case "mp_silu" | "mp_silu backward":
            dropped = int(dict(code.types)["p_seed"] == "*i64")
            return dropped, int(kernel.endswith("backward") and bool(given("SCALED")))
        case "qkv_norm":
            return 0, int(bool(given("KEPT")))
        case "philox":
            return 1 + clock, 0
        case "gamma":
            return 1 + clock, 1
        case "adam measure" | "rows gradients":
            return 0, 1
        case "adam reduce":
            return 0, 2
        case "adam numbers":
            return 6, 8
    return 0, 0


def _backward(*outputs: Tensor) -> None:
    """The backward pass, with gradients that lie as the outputs do."""
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def _images(channels: int, side: tuple[int, int], dtype: torch.dtype, *, last: bool, batch: int = 2) -> Tensor:
    x = _empty(batch, channels, *side, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()


# ----------------------------------------------------------------------------------------------- noise and objectives


def perturb_situations() -> Iterator[Situation]:
    """Every dtype, tail, layout and second output of perturb that compiles to other code."""

    def one(
        variant: str,
        *,
        D: float = 128.0,
        shape: tuple[int, ...] = (256, 3, 32, 32),
        out: torch.dtype | None = None,
        last: bool = False,
        step: int = 64,
        clock: bool = False,
        quick: bool = True,
    ) -> Situation:
        def call() -> None:
            y = _empty(*shape[:-1], step // 64 * shape[-1], dtype=DTYPES[variant.split()[0]])
            y = y[..., :: step // 64]
            if last:
                y = y.contiguous(memory_format=torch.channels_last)
            each = _empty(shape[0])
            position: dict[str, Any] = {"seed": 1, "stream": 2, "sample_index": _empty(shape[0], dtype=torch.int64)}
            position["step"] = _empty((), dtype=torch.int64) if clock else 3
            if out is None:
                perturb(y, each, D, **position)
            else:
                perturb(y, each, D, **position, c_in=each, out_dtype=out)

        return Situation(variant, call, quick)

    bf16 = torch.bfloat16
    yield one("fp32 D=128")
    yield one("fp32 D=128 many samples", shape=(1 << 14, 3, 32, 32), quick=False)
    yield one("fp32 D=0.5", D=0.5)
    yield one("fp32 D=inf", D=math.inf)
    yield one("bf16 D=128", quick=False)
    yield one("fp16 D=128", quick=False)
    yield one("fp32 D=128 c_in fp32", out=torch.float32, quick=False)
    yield one("fp32 D=128 c_in bf16", out=bf16)
    yield one("fp32 D=inf c_in bf16", D=math.inf, out=bf16, quick=False)
    yield one("fp32 D=128 channels_last", last=True, quick=False)
    yield one("fp32 D=128 c_in bf16 channels_last", last=True, out=bf16)
    yield one("bf16 D=128 channels_last", last=True, quick=False)
    yield one("fp32 D=128 sliced", shape=(256, 3072), step=128, quick=False)
    yield one("fp32 D=128 step in memory", clock=True)
    yield one("fp32 D=128 unaligned", shape=(256, 35))


def loss_situations() -> Iterator[Situation]:
    """Both losses; raw: preconditioned, x and y in float32; real: with real data beside; last, a weight."""
    for size, shape in (("32x32x3", (3, 32, 32)), ("64x64x3", (3, 64, 64)), ("5x7 unaligned", (1, 5, 7))):
        odd, small = size.endswith("unaligned"), size == "32x32x3"
        for dtype in ("fp32", "bf16") if odd else ("fp32", "bf16", "fp16"):
            name, half = f"{dtype} {size}", small and dtype == "bf16"
            yield _losses(name, shape, raw=False, real=False, quick=dtype == "fp32" or half)
            if dtype != "fp16" and not odd:
                yield _losses(f"{name} raw", shape, raw=True, real=False, quick=small)
                yield _losses(f"{name} raw real", shape, raw=True, real=True, quick=half)
                for weight in WEIGHTS:
                    for real in (False, True):
                        label, quick = f"{name} raw {weight}{' real' * real}", half and weight == "score" and not real
                        yield Situation(label, partial(_weighed_loss, dtype, shape, weight, real=real), quick)


def _losses(variant: str, shape: tuple[int, ...], *, raw: bool, real: bool, quick: bool) -> Situation:
    def call() -> None:
        dtype = DTYPES[variant.split()[0]]
        t, s = (_empty(64, *shape, dtype=dtype) for _ in range(2))
        y = _empty(64, *shape, dtype=torch.float32 if raw else dtype)
        each = _empty(64)
        given: dict[str, Any] = {"x": torch.empty_like(y), "c_skip": each, "c_out": each} if raw else {}
        a, b = REAL_WEIGHTS[real]
        ipfm_loss(t, s, y, alpha=1.0, real_weights=(a, b), **given)
        denoising_loss(t, y, each, stretch=b / a, share=a, **given)

    return Situation(variant, call, quick)


def _weighed_loss(dtype: str, shape: tuple[int, ...], weight: LossWeight, *, real: bool) -> None:
    t, s = (_empty(64, *shape, dtype=DTYPES[dtype]) for _ in range(2))
    y, each = _empty(64, *shape), _empty(64)
    given: dict[str, Any] = {"sigma": each, "D": 128.0} if weight == "score" else {}
    ipfm_loss(
        t, s, y, alpha=1.0, x=y, c_skip=each, c_out=each, real_weights=REAL_WEIGHTS[real], weight=weight, factor=each,
        **given,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ residual blocks


def group_norm_situations() -> Iterator[Situation]:
    """Forward and backward at the levels of the CIFAR-10 networks and of ADM: 6, 12, 18, 30, 36, 42, 24 a group."""
    cifar = [(256, (16, 16), False), (256, (32, 32), False), (192, (64, 64), False)]
    cifar += [(256, (16, 16), True), (256, (32, 32), True), (128, (7, 5), False)]
    adm = ((192, 64), (384, 32), (576, 64), (960, 32), (1152, 16), (1344, 16), (768, 8))
    for channels, side, last in [*cifar, *((channels, (side, side), True) for channels, side in adm)]:
        is_adm = last and channels % 192 == 0
        label = f"{channels}ch {side[0]}x{side[1]}{' channels_last' if last else ''}"
        label += " unaligned" if side == (7, 5) else ""
        for dtype in ("bf16",) if is_adm else ("bf16", "fp32"):
            for scaled in (True, False):
                quick = scaled and side in ((32, 32), (7, 5)) and (dtype == "bf16" or not last) and channels != 960
                yield _group_norm(f"{dtype} {label}", channels, side, last=last, scaled=scaled, quick=quick)


def _group_norm(
    label: str, channels: int, side: tuple[int, int], *, last: bool, scaled: bool, quick: bool
) -> Situation:
    """In a U-Net what an embedding does not scale has it added, with a bias.

    Its vectors are rows of float32 then, as `ipfm.models.layers.join` makes them. The first normalisation of such a
    block adds the other branch's gradient on the way back, and where nothing is trained applies the sum's factor.
    """

    def call() -> None:
        x = _images(channels, side, DTYPES[label.split()[0]], last=last).detach()
        scale = x.new_empty(2, channels, 1, 1) if scaled else None
        row = _empty(2, channels)
        vector = x.new_empty(channels) if scaled else row
        given: group_norm.Parameters = (vector, vector, scale, scale, None if scaled else row)
        y, about = group_norm.forward_pass(x, 32, given, eps=1e-6, activation=True)
        group_norm.backward_pass(y, x, given, about, (False,) * 5, True)
        if not scaled:
            first: group_norm.Parameters = (row, row, None, None, None)
            group_norm.backward_pass(y, x, first, about, (False,) * 5, True, torch.empty_like(x), math.sqrt(0.5))

    return Situation(f"{label}{' scaled' if scaled else ' addend'}", call, quick)


def residual_situations() -> Iterator[Situation]:
    """Forward and backward, with a bias and without."""
    for channels, side, last in (
        (256, (32, 32), False), (192, (64, 64), True), (256, (32, 32), True), (128, (7, 5), False)
    ):  # fmt: skip
        label = f"{channels}ch {side[0]}x{side[1]}{' channels_last' if last else ''}"
        label += " unaligned" if side == (7, 5) else ""
        for dtype in ("bf16", "fp32"):
            for biased in (True, False):

                def call(
                    channels: int = channels,
                    side: tuple[int, int] = side,
                    last: bool = last,
                    dtype: torch.dtype = DTYPES[dtype],
                    biased: bool = biased,
                ) -> None:
                    a, b = (_images(channels, side, dtype, last=last) for _ in range(2))
                    bias = _empty(channels, dtype=dtype, requires_grad=True) if biased else None
                    _backward(residual_sum(a, b, bias, scale=math.sqrt(0.5)))

                quick = biased and dtype == "bf16" and side != (64, 64)
                yield Situation(f"{dtype} {label}{' bias' if biased else ''}", call, quick)


# ---------------------------------------------------------------------------------------------------------------- EDM2


# Levels of EDM2's size S and of others: channels, sides of an image, and whether it is channels_last.
_LEVELS = {
    "192ch 64x64 channels_last": (192, (64, 64), True),
    "384ch 32x32 channels_last": (384, (32, 32), True),
    "768ch 8x8 channels_last": (768, (8, 8), True),
    "1792ch 16x16 channels_last": (1792, (16, 16), True),
    "192ch 64x64": (192, (64, 64), False),
    "576ch 16x16": (576, (16, 16), False),
    "128ch 7x5 unaligned": (128, (7, 5), False),
}


def _at_levels(
    labels: Sequence[str], call: Callable[[Tensor], object], words: str = "", quick: Callable[[str], bool] = bool
) -> Iterator[Situation]:
    """An operation on activations of some levels, in two dtypes; `quick` is asked about a level, in fp16."""
    for label in labels:
        channels, side, last = _LEVELS[label]
        for dtype in ("fp16", "fp32"):

            def here(
                channels: int = channels, side: tuple[int, int] = side, last: bool = last, dtype: str = dtype
            ) -> object:
                return call(_images(channels, side, DTYPES[dtype], last=last))

            yield Situation(" ".join(filter(None, (dtype, label, words))), here, dtype == "fp16" and quick(label))


def mp_sum_situations() -> Iterator[Situation]:
    """All elements, cut to a range or not, and the gradient of one branch alone."""
    for dtype in ("fp16", "fp32"):
        for label, elements, clip, to_b in (
            ("clip", 4096, 256.0, True),
            ("", 4096, None, True),
            ("clip one branch", 4096, 256.0, False),
            ("clip unaligned", 35, 256.0, True),
        ):

            def call(
                dtype: str = dtype, elements: int = elements, clip: float | None = clip, to_b: bool = to_b
            ) -> None:
                a, b = (_empty(2, elements, dtype=DTYPES[dtype]) for _ in range(2))
                _backward(mp_sum(a.requires_grad_(), b.requires_grad_(to_b), 0.3, clip=clip))

            yield Situation(f"{dtype} {label}".strip(), call, dtype == "fp16" and clip is not None and to_b)


def mp_silu_situations() -> Iterator[Situation]:
    """With a scale, without one, and with dropout."""
    levels = ("192ch 64x64 channels_last", "768ch 8x8 channels_last", "192ch 64x64", "128ch 7x5 unaligned")
    for scaled, dropout in ((True, 0.0), (False, 0.0), (True, 0.1)):

        def call(x: Tensor, scaled: bool = scaled, dropout: float = dropout) -> None:
            scale = x.new_empty(x.shape[:2]).requires_grad_() if scaled else None
            seed = _empty((), dtype=torch.int64) if dropout else None
            _backward(mp_silu(x, scale, dropout=dropout, seed=seed))

        def quick(label: str, scaled: bool = scaled, dropout: float = dropout) -> bool:
            return scaled and ("64x64 channels" if dropout else "unaligned") in label

        words = " ".join(word for word, given in (("scaled", scaled), ("dropout", dropout)) if given)
        yield from _at_levels(levels, call, words, quick)


def mp_cat_silu_situations() -> Iterator[Situation]:
    """Two activations of unequal widths."""

    def call(a: Tensor) -> None:
        last = a.is_contiguous(memory_format=torch.channels_last)
        wide = _images(2 * a.shape[1], (a.shape[2], a.shape[3]), a.dtype, last=last)
        _backward(*mp_cat_silu(wide, a, 0.57))

    levels = ("192ch 64x64 channels_last", "384ch 32x32 channels_last", "192ch 64x64", "128ch 7x5 unaligned")
    yield from _at_levels(levels, call, quick=lambda label: "64x64 channels" in label or "unaligned" in label)


def pixel_norm_situations() -> Iterator[Situation]:
    """Of 192 to 1792 channels."""
    levels = ("192ch 64x64 channels_last", "768ch 8x8 channels_last", "1792ch 16x16 channels_last", "576ch 16x16")
    yield from _at_levels(
        (*levels, "128ch 7x5 unaligned"),
        lambda x: _backward(*pixel_norm_silu(x)),
        quick=lambda label: "1792" in label or "unaligned" in label,
    )


def qkv_norm_situations() -> Iterator[Situation]:
    """Heads of 64 channels and of an odd number."""
    for label, heads, width, tokens in (("12 heads of 64", 12, 64, 256), ("3 heads of 35 unaligned", 3, 35, 35)):
        for dtype in ("fp16", "fp32"):

            def call(heads: int = heads, width: int = width, tokens: int = tokens, dtype: str = dtype) -> None:
                qkv = _empty(2, tokens, 3 * heads * width, dtype=DTYPES[dtype], requires_grad=True)
                _backward(*qkv_norm(qkv, heads, k_scale=0.125))

            yield Situation(f"{dtype} {label}", call, dtype == "fp16")


def row_normalise_situations() -> Iterator[Situation]:
    """Rows that wait in registers and longer ones; masters in float32 and in 16 bits."""
    for label, columns in (("768 a row", 768), ("13824 a row", 13824), ("35 a row unaligned", 35)):
        for dtype, out in (("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16"), ("fp64", "fp64")):

            def call(columns: int = columns, dtype: str = dtype, out: str = out) -> None:
                master = _empty(64, columns, dtype=DTYPES[dtype], requires_grad=True)
                _backward(row_normalise(master, out_dtype=DTYPES[out]))

            quick = dtype == out == "fp16" and columns != 768
            yield Situation(f"{dtype} {label}{'' if out == dtype else f' to {out}'}", call, quick)


# ---------------------------------------------------------------------------------------- random numbers, and optimiser


def philox_situations() -> Iterator[Situation]:
    """Uniform, normal and gamma numbers."""
    for variant, draw, argument in (
        ("uniform", philox.uniform, 3072),
        ("normal", philox.normal, 3072),
        ("normal step in memory", philox.normal, 3072),
        ("gamma shape >= 1", philox.gamma, 64.0),
        ("gamma shape < 1", philox.gamma, 0.25),
        ("gamma shape < 1 step in memory", philox.gamma, 0.25),
    ):

        def call(draw: Callable[..., Tensor] = draw, argument: float = argument, variant: str = variant) -> Tensor:
            step = _empty((), dtype=torch.int64) if variant.endswith("memory") else 3
            return draw(_empty(64, dtype=torch.int64), argument, seed=1, stream=2, step=step)

        yield Situation(variant.removeprefix("gamma "), call, variant in ("normal", "gamma shape < 1"))


def _step(dtype: torch.dtype = torch.float32, *, aligned: bool = True, on_device: bool = False, **options: Any) -> None:
    """A step of AdamEMA with a limited and scaled gradient; `on_device`: its numbers are tensors."""
    p = _empty(100_001, dtype=dtype)[int(not aligned) :][:100_000].requires_grad_()
    optimizer = AdamEMA([p], lr=_empty((), dtype=torch.float64) if on_device else 1e-3, clip_norm=1.0, **options)
    averages = int(options.get("ema", 0))
    optimizer.ema_decay = _empty(averages, dtype=torch.float64) if on_device else 0.5
    optimizer.grad_scale = _empty(())
    p.grad = torch.empty_like(p)
    optimizer.step()


def adam_situations() -> Iterator[Situation]:
    """AdamEMA's step, which has four kernels."""
    # beta1, averages, weight decay, whether rectified
    options = [
        (0.0, 1, 0.0, False),
        (0.9, 2, 0.01, False),
        (0.9, 1, 0.0, True),
        (0.0, 0, 0.0, False),
        (0.0, 0, 0.01, False),
        (0.0, 2, 0.0, False),
        (0.9, 0, 0.0, False),
        (0.9, 3, 0.0, False),
    ]
    for dtype, aligned, on_device, option in (
        *(("fp32", True, False, option) for option in options),
        ("fp32", False, False, options[0]),
        ("fp64", True, False, options[0]),
        ("fp32", True, True, options[1]),
    ):
        beta1, averages, decay, rectified = option
        more = (
            ("weight decay", decay),
            ("rectified", rectified),
            ("unaligned", not aligned),
            ("on the device", on_device),
        )
        words = [f"{dtype} beta1={beta1} ema={averages}", *(word for word, given in more if given)]
        given = {"betas": (beta1, 0.999), "ema": averages, "weight_decay": decay, "rectified": rectified}

        def call(
            dtype: str = dtype, aligned: bool = aligned, on_device: bool = on_device, given: dict[str, Any] = given
        ) -> None:
            _step(DTYPES[dtype], aligned=aligned, on_device=on_device, **given)

        quick = dtype == "fp32" and aligned and not on_device and option in options[:3]
        yield Situation(" ".join(words), call, quick)


def row_situations() -> Iterator[Situation]:
    """What AdamEMA's step does to rows under forced weight normalisation: gradients, masters and plain weights."""
    for dtype, out, columns, cut, quick in (
        ("fp32", "bf16", 768, False, False),
        ("fp32", "fp32", 768, False, True),
        ("fp32", "bf16", 35, False, False),
        ("fp32", "bf16", 35, True, False),
        ("fp64", "fp64", 768, False, False),
    ):

        def call(dtype: str = dtype, out: str = out, columns: int = columns, cut: bool = cut) -> None:
            elements = 64 * columns + cut * (columns // 2)
            master = _empty(elements, dtype=DTYPES[dtype])
            plain = _empty(elements, dtype=DTYPES[out])
            blocks = row_blocks(0, columns - cut * (columns // 2), elements, columns, lambda row: 0)
            rows = FusedRows({master: WeightRows(tuple(blocks), plain)}, int(cut))
            sums: Callable[[Tensor], object] | None = Tensor.clone if cut else None
            rows.gradients_of_masters({master: torch.empty_like(master)}, sums)
            rows.normalise(_empty((), dtype=torch.bool))
            rows.write_plain(sums)

        words = [dtype, "unaligned" if columns == 35 else "", "cut" if cut else "", f"to {out}"]
        yield Situation(" ".join(filter(None, words)), call, quick)


SITUATIONS: list[Callable[[], Iterator[Situation]]] = [
    perturb_situations,
    loss_situations,
    group_norm_situations,
    residual_situations,
    mp_sum_situations,
    mp_silu_situations,
    mp_cat_silu_situations,
    pixel_norm_situations,
    qkv_norm_situations,
    row_normalise_situations,
    philox_situations,
    adam_situations,
    row_situations,
]
