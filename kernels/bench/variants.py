"""The variants of every kernel that the offline compile report compiles: types, constants and alignment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from ipfm.kernels import fused_rows, reference
from ipfm.kernels._dispatch import adam_config, flat_config, noise_config, row_config
from ipfm.kernels.adam_kernels import measure_kernel, numbers_kernel, reduce_kernel, update_kernel
from ipfm.kernels.denoising_loss import denoising_loss_kernel
from ipfm.kernels.generator_loss import ipfm_loss_kernel
from ipfm.kernels.group_norm import kernel_for
from ipfm.kernels.mp_cat_silu import block_sizes as cat_sizes
from ipfm.kernels.mp_cat_silu import mp_cat_silu_backward_kernel, mp_cat_silu_kernel
from ipfm.kernels.mp_silu import block_sizes as silu_sizes
from ipfm.kernels.mp_silu import dropping, mp_silu_backward_kernel, mp_silu_kernel
from ipfm.kernels.mp_sum import mp_sum_backward_kernel, mp_sum_kernel
from ipfm.kernels.perturbation import perturb_kernel
from ipfm.kernels.philox import NORMAL, UNIFORM, gamma_kernel, philox_kernel
from ipfm.kernels.pixel_norm_silu import block_sizes as pixel_sizes
from ipfm.kernels.pixel_norm_silu import pixel_norm_silu_backward_kernel, pixel_norm_silu_kernel
from ipfm.kernels.qkv_norm import block_sizes as head_sizes
from ipfm.kernels.qkv_norm import qkv_norm_backward_kernel, qkv_norm_kernel
from ipfm.kernels.residual import block_sizes as residual_sizes
from ipfm.kernels.residual import residual_sum_backward_kernel, residual_sum_kernel
from ipfm.kernels.row_normalise import block_sizes as row_sizes
from ipfm.kernels.row_normalise import row_normalise_backward_kernel, row_normalise_kernel

FLOAT_MAX = {"fp32": 3.4028234663852886e38, "fp16": 65504.0, "bf16": 3.3895313892515355e38}


@dataclass(frozen=True)
class Case:
    """A kernel variant: argument types by name (those not listed are constexprs), and what alignment is known.

    `scalar_loads` and `scalar_stores` count the accesses to per-sample numbers. They are narrow by nature, so that many
    of the narrowest accesses are left out of the reported width; so are loads that ask to stay in the cache
    (evict_last), which fetch parameters and statistics.
    """

    kernel: str
    variant: str
    fn: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    warps: int = 4
    scalar_loads: int = 0
    scalar_stores: int = 0
    quick: bool = True  # part of the quick report


def perturb_variants() -> Iterator[Case]:
    """Every dtype, tail, layout and second output of perturb that compiles to other code."""
    position = ("seed_lo", "seed_hi", "step", "stream")
    cifar, odd = 3072, 35

    def case(
        variant: str,
        *,
        dtype: str = "fp32",
        out: str | None = None,
        dof: float | None = 128,
        channels: int = 1,
        inner: int = cifar,
        samples: int = 256,
        sliced: bool = False,
        clock: bool = False,
        quick: bool = True,
    ) -> Case:
        block, tiles, warps = noise_config(samples, inner, channels == 3)
        types = {
            "p_y": f"*{dtype}",
            "p_sigma": "*fp32",
            "p_c_in": "*fp32",
            "p_index": "*i64",
            "p_x": f"*{dtype}",
            "p_scaled": f"*{out or dtype}",
            "half_dof_bits": "i64",
            **dict.fromkeys(position, "i32"),
            **dict.fromkeys(("inner", "n_1", "n_2", "sy_b", "sx_b"), "i32"),
        }
        constants: dict[str, Any] = {
            "CHANNELS": channels,
            "NDIM": 1,
            "HEAVY": dof is not None,
            "BOOST": dof is not None and dof < 2,
            "SCALED": out is not None,
            "RGB": channels == 3,
            "COMPUTE": tl.float32,
            "MAX": FLOAT_MAX["fp32"],
            "LOG_RATIO_MAX": reference.LOG_RATIO_MAX,
            "BLOCK": block,
            "TILES": tiles,
            "sy_0": 0,
            "sy_1": 0,
            "sx_0": 0,
            "sx_1": 0,
        }
        # Triton makes a constant of an argument that is 1.
        strides = ("sy_c", "sy_2", "sx_c", "sx_2")
        if sliced:
            constants |= {"sx_c": 1, "sx_2": 1}
            types |= {"sy_c": "i32", "sy_2": "i32"}
        elif channels == 1:
            constants |= dict.fromkeys(strides, 1)
        else:
            constants |= {"sy_c": 1, "sx_c": 1}
            types |= {"sy_2": "i32", "sx_2": "i32"}
        aligned: tuple[str, ...] = ("p_y", "p_x", "p_scaled", "p_sigma", "p_c_in", "p_index")
        if inner % 16 == 0:
            aligned += ("inner", "sy_b", "sx_b")
        if clock:
            types["step"] = "*i64"
        loads = 2 + (out is not None) + clock
        return Case(
            "perturb", variant, perturb_kernel, types, constants, aligned, warps, scalar_loads=loads, quick=quick
        )

    yield case("fp32 D=128")
    yield case("fp32 D=128 many samples", samples=1 << 14, quick=False)
    yield case("fp32 D=0.5", dof=0.5)
    yield case("fp32 D=inf", dof=None)
    yield case("bf16 D=128", dtype="bf16", quick=False)
    yield case("fp16 D=128", dtype="fp16", quick=False)
    yield case("fp32 D=128 c_in fp32", out="fp32", quick=False)
    yield case("fp32 D=128 c_in bf16", out="bf16")
    yield case("fp32 D=inf c_in bf16", dof=None, out="bf16", quick=False)
    yield case("fp32 D=128 channels_last", channels=3, inner=1024, quick=False)
    yield case("fp32 D=128 c_in bf16 channels_last", channels=3, inner=1024, out="bf16")
    yield case("bf16 D=128 channels_last", channels=3, inner=1024, dtype="bf16", quick=False)
    yield case("fp32 D=128 sliced", sliced=True, quick=False)
    yield case("fp32 D=128 step in memory", clock=True)
    yield case("fp32 D=128 unaligned", inner=odd)


def loss_variants() -> Iterator[Case]:
    """The losses; raw: with the preconditioning, x and y in float32; real: with real data beside."""
    for label, elements in (("32x32x3", 3072), ("64x64x3", 12288), ("5x7 unaligned", 35)):
        for dtype in ("fp32", "bf16") if elements == 35 else ("fp32", "bf16", "fp16"):
            quick = dtype == "fp32" or (elements, dtype) == (3072, "bf16")
            yield from _both_losses(f"{dtype} {label}", elements, dtype, raw=False, quick=quick)
            if dtype != "fp16" and elements != 35:
                yield from _both_losses(f"{dtype} {label} raw", elements, dtype, raw=True, quick=elements == 3072)
                name, quick = f"{dtype} {label} raw real", (elements, dtype) == (3072, "bf16")
                yield from _both_losses(name, elements, dtype, raw=True, quick=quick, real=True)


def _both_losses(
    variant: str, elements: int, dtype: str, *, raw: bool, quick: bool, real: bool = False
) -> Iterator[Case]:
    """Both kernels; `dtype` is that of the predictions, or of the raw outputs. `real`: with real data beside."""
    a, b = (0.92, 0.94) if real else (1.0, 1.0)
    block, warps = row_config(elements)
    clean = "fp32" if raw else dtype
    row = ("elements",) if elements % 16 == 0 else ()
    common = {
        "RAW": raw,
        "COMPUTE": tl.float32,
        "MAX_LOSS": FLOAT_MAX["fp32"],
        "MAX_GRAD": FLOAT_MAX[dtype],
        "BLOCK": block,
        "RESIDENT": block >= elements,
    }
    per_sample = {"p_c_skip": "*fp32", "p_c_out": "*fp32", "p_loss": "*fp32", "p_valid": "*i1"}
    for kernel, fn, outputs, targets, numbers, constants, loads, stores in (
        (
            "ipfm_loss",
            ipfm_loss_kernel,
            ("t", "s", "dt", "ds"),
            ("y", "x", "dy"),
            {"p_weight": "*fp32"},
            {"ALPHA": 1.0, "BETA": 2.0, "A": a, "B": b, "FLOOR": reference.WEIGHT_FLOOR, "MAX_DY": FLOAT_MAX[clean]},
            0,
            3,
        ),
        (
            "denoising_loss",
            denoising_loss_kernel,
            ("pred", "grad"),
            ("y", "x"),
            {"p_sigma": "*fp32"},
            {"DATA_TERM": 4.0, "STRETCH": b / a, "SHARE": a},
            1,
            2,
        ),
    ):
        types = {f"p_{v}": f"*{dtype}" for v in outputs} | {f"p_{v}": f"*{clean}" for v in targets}
        pointers = types | per_sample | numbers
        strides = tuple(f"s{v[0] if kernel == 'denoising_loss' else v}_b" for v in (*outputs, *targets))
        yield Case(
            kernel,
            variant,
            fn,
            pointers | dict.fromkeys(("elements", *strides), "i32"),
            constants | common,
            (*pointers, *row, *(strides if row else ())),
            warps,
            scalar_loads=loads + 2 * raw,
            scalar_stores=stores,
            quick=quick,
        )


def group_norm_variants() -> Iterator[Case]:
    """Forward and backward at the levels of the CIFAR-10 networks and, with six channels a group, of ADM."""
    shapes = [
        ("256ch 16x16", 256, 256, False),
        ("256ch 32x32", 256, 1024, False),
        ("192ch 64x64", 192, 4096, False),
        ("256ch 16x16 channels_last", 256, 256, True),
        ("256ch 32x32 channels_last", 256, 1024, True),
        ("128ch 7x5 unaligned", 128, 35, False),
        # ADM: 6, 12, 18, 30, 36, 42 and 24 channels a group.
        *(
            (f"{channels}ch {side}x{side} channels_last", channels, side * side, True)
            for channels, side in ((192, 64), (384, 32), (576, 64), (960, 32), (1152, 16), (1344, 16), (768, 8))
        ),
    ]
    for label, channels, pixels, last in shapes:
        is_adm = last and channels % 192 == 0
        for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))[: 1 if is_adm else 2]:
            for scaled in (True, False):
                quick = scaled and ("32x32" in label or "unaligned" in label) and (dtype == "bf16" or not last)
                quick = quick and channels != 960
                # In a U-Net what an embedding does not scale has it added, with a bias.
                constants: dict[str, Any] = {"SCALED": scaled, "ADDED": not scaled, "SILU": True}
                constants |= {"s_c" if last else "s_hw": 1, "s_pc": 1}
                data: tuple[str, ...] = ("p_x", "p_weight", "p_bias", "p_scale", "p_shift", "p_addend")
                numbers = ("HW", "s_b", "s_hw" if last else "s_c", "s_pb", "s_ab")
                aligned = numbers if pixels % 16 == 0 else ("s_pb", "s_ab")
                variant = f"{dtype} {label}{' scaled' if scaled else ' addend'}"
                for kernel, more, statistics in (
                    ("group_norm_silu", ("p_y",), ("p_statistics",)),
                    ("group_norm_silu backward", ("p_dy", "p_dx", "p_more"), ("p_statistics", "p_sums")),
                ):
                    types = dict.fromkeys((*data, *more), f"*{dtype}") | dict.fromkeys(statistics, "*fp32")
                    types |= dict.fromkeys(numbers, "i32")
                    back = kernel.endswith("backward")
                    fn, sizes, warps = kernel_for(channels, 32, pixels, torch_dtype, last, scaled=scaled, backward=back)
                    back_only = {"MORE": not scaled, "FACTOR": 1.0 if scaled else 0.5**0.5}
                    here = constants | sizes | (back_only if back else {"EPS": 1e-5})
                    # Two numbers a group, or a channel.
                    yield Case(
                        kernel,
                        variant,
                        fn,
                        {name: types[name] for name in fn.arg_names if name in types},
                        {name: here[name] for name in fn.arg_names if name in here},
                        tuple(n for n in (*data, *more, *statistics, *aligned) if n in fn.arg_names),
                        warps,
                        scalar_stores=2 + (not scaled and back),
                        quick=quick,
                    )


def residual_variants() -> Iterator[Case]:
    """Forward and backward, with a bias and without."""
    shapes = [
        ("256ch 32x32", 256, 1024, False),
        ("192ch 64x64 channels_last", 192, 4096, True),
        ("256ch 32x32 channels_last", 256, 1024, True),
        ("128ch 7x5 unaligned", 128, 35, False),
    ]
    for label, channels, pixels, last in shapes:
        for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            sizes, _, steps, warps = residual_sizes(channels, pixels, torch_dtype, last)
            numbers = ("HW", "s_b", "s_hw" if last else "s_c")
            aligned = ("s_b", numbers[2]) if last else numbers if pixels % 16 == 0 else ()
            for biased in (True, False):
                quick = biased and dtype == "bf16" and "64x64" not in label
                constants = {**sizes, "SCALE": 0.5**0.5, "BIASED": biased, "s_c" if last else "s_hw": 1}
                # Triton makes a constant of an argument that is 1.
                types = dict.fromkeys(numbers if steps == 1 else (*numbers, "STEPS"), "i32")
                constants |= {"STEPS": 1} if steps == 1 else {}
                for kernel, fn, data, sums in (
                    ("residual_sum", residual_sum_kernel, ("p_a", "p_b", "p_bias", "p_y"), ()),
                    ("residual_sum backward", residual_sum_backward_kernel, ("p_dy", "p_d"), ("p_sums",)),
                ):
                    # A gradient's own strides.
                    own = {"s_gb": "i32", **({"s_ghw": "i32"} if last else {})} if sums else {}
                    yield Case(
                        kernel,
                        f"{dtype} {label}{' bias' if biased else ''}",
                        fn,
                        dict.fromkeys(data, f"*{dtype}") | dict.fromkeys(sums, "*fp32") | types | own,
                        constants | ({} if last or not sums else {"s_ghw": 1}),
                        (*data, *sums, *aligned, *(own if aligned else ())),
                        warps,
                        scalar_stores=int(biased and bool(sums)),
                        quick=quick,
                    )


# Two dtypes of activations.
_DTYPES = (("fp16", torch.float16), ("fp32", torch.float32))


def mp_sum_variants() -> Iterator[Case]:
    """Forward and backward of all elements, cut to a range or not, and of one branch alone."""
    block, warps = flat_config()
    for dtype, _ in _DTYPES:
        for label, aligned, clipped, to_b in (
            ("clip", True, True, True),
            ("", True, False, True),
            ("clip one branch", True, True, False),
            ("clip unaligned", False, True, True),
        ):
            common = {"WA": 0.7, "WB": 0.3, "CLIPPED": clipped, "BLOCK": block, "COMPUTE": tl.float32}
            for kernel, fn, data, more in (
                ("mp_sum", mp_sum_kernel, ("p_a", "p_b", "p_y"), {"CLIP": 256.0, "KEPT": clipped}),
                ("mp_sum backward", mp_sum_backward_kernel, ("p_dy", "p_da", "p_db"), {"TO_A": True, "TO_B": to_b}),
            ):
                if not to_b and kernel == "mp_sum":
                    continue
                types = {**dict.fromkeys(data, f"*{dtype}"), "p_inside": "*u8", "N": "i32"}
                # The stores of eight elements' bits.
                bits = 2 * (clipped and kernel == "mp_sum")
                yield Case(
                    kernel, f"{dtype} {label}".strip(), fn, types, common | more, (*types,) if aligned else (), warps,
                    scalar_stores=bits, quick=dtype == "fp16" and clipped and to_b,
                )  # fmt: skip


def _levels(*labels: str) -> Iterator[tuple[str, int, int, bool]]:
    """(label, channels, pixels, channels_last) of levels of EDM2's size S and of others."""
    levels = {
        "192ch 64x64 channels_last": (192, 4096, True),
        "384ch 32x32 channels_last": (384, 1024, True),
        "768ch 8x8 channels_last": (768, 64, True),
        "1792ch 16x16 channels_last": (1792, 256, True),
        "192ch 64x64": (192, 4096, False),
        "576ch 16x16": (576, 256, False),
        "128ch 7x5 unaligned": (128, 35, False),
    }
    for label in labels:
        yield label, *levels[label]


def mp_silu_variants() -> Iterator[Case]:
    """Forward and backward with a scale, without one, and with dropout."""
    for label, channels, pixels, last in _levels(
        "192ch 64x64 channels_last", "768ch 8x8 channels_last", "192ch 64x64", "128ch 7x5 unaligned"
    ):
        for dtype, torch_dtype in _DTYPES:
            for scaled, dropout in ((True, 0.0), (False, 0.0), (True, 0.1)):
                sizes, _, steps, warps = silu_sizes(channels, pixels, torch_dtype, last, drops=dropout > 0)
                constants = {**sizes, **dropping(dropout), "SCALED": scaled}
                numbers = {"HW": "i32", "s_scale": "i32"} | ({} if steps == 1 else {"STEPS": "i32"})
                constants |= {"STEPS": 1} if steps == 1 else {}
                words = [part for part, given in (("scaled", scaled), ("dropout", dropout)) if given]
                for kernel, fn, data, sums in (
                    ("mp_silu", mp_silu_kernel, ("p_x", "p_y"), ()),
                    ("mp_silu backward", mp_silu_backward_kernel, ("p_dy", "p_x", "p_dx"), ("p_sums",)),
                ):
                    pointers = dict.fromkeys(data, f"*{dtype}") | dict.fromkeys((*sums, "p_scale"), "*fp32")
                    pointers["p_seed"] = "*i64" if dropout else f"*{dtype}"
                    yield Case(
                        kernel, " ".join([dtype, label, *words]), fn, pointers | numbers, constants,
                        (*pointers, "s_scale", *(() if "unaligned" in label else ("HW",))), warps,
                        scalar_loads=int(dropout > 0), scalar_stores=int(scaled and bool(sums)),
                        quick=dtype == "fp16" and scaled and (
                            "unaligned" in label if not dropout else "64x64 channels" in label
                        ),
                    )  # fmt: skip


def mp_cat_silu_variants() -> Iterator[Case]:
    """Forward and backward of two activations of unequal widths."""
    for label, channels, pixels, last in _levels(
        "192ch 64x64 channels_last", "384ch 32x32 channels_last", "192ch 64x64", "128ch 7x5 unaligned"
    ):
        for dtype, torch_dtype in _DTYPES:
            sizes, _, steps, warps = cat_sizes((2 * channels, channels), pixels, torch_dtype, last)
            numbers = {"HW": "i32"} | ({} if steps == 1 else {"STEPS": "i32"})
            for kernel, fn, data, given in (
                ("mp_cat_silu", mp_cat_silu_kernel, ("p_a", "p_b", "p_joined", "p_activated"), {}),
                (
                    "mp_cat_silu backward",
                    mp_cat_silu_backward_kernel,
                    ("p_djoined", "p_dactivated", "p_joined", "p_da", "p_db"),
                    {"JOINED": True, "ACTIVATED": True},
                ),
            ):
                pointers = dict.fromkeys(data, f"*{dtype}")
                yield Case(
                    kernel, f"{dtype} {label}", fn, pointers | numbers,
                    sizes | given | {"WA": 0.9, "WB": 1.2} | ({"STEPS": 1} if steps == 1 else {}),
                    (*pointers, *(() if "unaligned" in label else ("HW",))), warps,
                    quick=dtype == "fp16" and ("64x64 channels" in label or "unaligned" in label),
                )  # fmt: skip


def pixel_norm_variants() -> Iterator[Case]:
    """Forward and backward, of 192 to 1792 channels."""
    for label, channels, pixels, last in _levels(
        "192ch 64x64 channels_last", "768ch 8x8 channels_last", "1792ch 16x16 channels_last", "576ch 16x16",
        "128ch 7x5 unaligned",
    ):  # fmt: skip
        for dtype, torch_dtype in _DTYPES:
            sizes, _, warps = pixel_sizes(channels, pixels, torch_dtype, last)
            for kernel, fn, data, given in (
                ("pixel_norm_silu", pixel_norm_silu_kernel, ("p_x", "p_normed", "p_activated"), {}),
                (
                    "pixel_norm_silu backward",
                    pixel_norm_silu_backward_kernel,
                    ("p_x", "p_dnormed", "p_dactivated", "p_dx"),
                    {"NORMED": True, "ACTIVATED": True},
                ),
            ):
                pointers = dict.fromkeys(data, f"*{dtype}")
                yield Case(
                    kernel, f"{dtype} {label}", fn, pointers | {"HW": "i32"}, sizes | given | {"EPS": 1e-4},
                    (*pointers, *(() if "unaligned" in label else ("HW",))), warps,
                    quick=dtype == "fp16" and ("1792" in label or "unaligned" in label),
                )  # fmt: skip


def qkv_norm_variants() -> Iterator[Case]:
    """Forward and backward, of heads of 64 channels and of an odd number."""
    for label, heads, width in (("12 heads of 64", 12, 64), ("3 heads of 35 unaligned", 3, 35)):
        for dtype, torch_dtype in _DTYPES:
            sizes, warps = head_sizes(heads, width, torch_dtype)
            for kernel, fn, data, given in (
                ("qkv_norm", qkv_norm_kernel, ("p_qkv", "p_q", "p_k", "p_v"), {"KEPT": True}),
                (
                    "qkv_norm backward",
                    qkv_norm_backward_kernel,
                    ("p_q", "p_k", "p_v", "p_dq", "p_dk", "p_dv", "p_dqkv"),
                    {},
                ),
            ):
                pointers = dict.fromkeys(data, f"*{dtype}") | {"p_sizes": "*fp32"}
                yield Case(
                    kernel, f"{dtype} {label}", fn, pointers | {"N": "i32"},
                    sizes | given | {"EPS": 1e-4, "K_SCALE": 0.125}, (*pointers, "N"), warps,
                    scalar_stores=int(bool(given)), quick=dtype == "fp16",
                )  # fmt: skip


def philox_variants() -> Iterator[Case]:
    """The kernels that draw uniform, normal and gamma numbers."""
    position = dict.fromkeys(("seed_lo", "seed_hi", "step", "stream"), "i32")
    clock = position | {"step": "*i64"}
    for variant, kind, at in (
        ("uniform", UNIFORM, position),
        ("normal", NORMAL, position),
        ("normal step in memory", NORMAL, clock),
    ):
        yield Case(
            "philox",
            variant,
            philox_kernel,
            {"p_index": "*i64", "p_out": "*fp32", **at, "first_block": "i32", "count": "i32"},
            {"KIND": kind, "BLOCK": 256},
            ("p_index", "p_out", "count"),
            scalar_loads=1 + (at is clock),
            quick=variant == "normal",
        )
    for variant, boost, at in (
        ("shape >= 1", False, position),
        ("shape < 1", True, position),
        ("shape < 1 step in memory", True, clock),
    ):
        yield Case(
            "gamma",
            variant,
            gamma_kernel,
            {"p_index": "*i64", "p_out": "*fp64", **at, "shape_bits": "i64"},
            {"BOOST": boost},
            ("p_index", "p_out"),
            1,
            scalar_loads=1 + (at is clock),
            scalar_stores=1,
            quick=variant == "shape < 1",
        )


def adam_variants() -> Iterator[Case]:
    """The four kernels of AdamEMA: update, measure, reduce and numbers."""
    segment, block, warps = adam_config()
    tables = {"p_blocks": "*i32", "p_table": "*i64", "p_grads": "*i64", "p_scale": "*fp32"}
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
    for dtype, aligned, option in (
        *(("fp32", True, option) for option in options),
        ("fp32", False, options[0]),
        ("fp64", True, options[0]),
    ):
        beta1, averages, decay, rectified = option
        common = {
            "WIDTH": 4 + averages,
            "SCALED": True,
            "COMPUTE": tl.float64 if dtype == "fp64" else tl.float32,
            "ALIGNED": aligned,
            "SEGMENT": segment,
        }
        quick = dtype == "fp32" and aligned and option in options[:3]
        more = (" weight decay", decay), (" rectified", rectified), (" unaligned", not aligned)
        yield Case(
            "adam update",
            f"{dtype} beta1={beta1} ema={averages}{''.join(part for part, given in more if given)}",
            update_kernel,
            {**tables, "p_numbers": "*fp64", "first_program": "i32"},
            {
                "LIMITED": True,
                "BETA1": beta1,
                "BETA2": 0.999,
                "EPS": 1e-8,
                "WEIGHT_DECAY": decay,
                "RECTIFIED": rectified,
                "AVERAGES": averages,
                "BLOCK": block,
                **common,
            },
            (*tables, "p_numbers"),
            warps,
            quick=quick,
        )
        if averages == 1 and beta1 == 0:
            yield Case(
                "adam measure",
                f"{dtype}{'' if aligned else ' unaligned'}",
                measure_kernel,
                {**tables, "p_partials": "*fp64", "first_program": "i32"},
                {"NORM": True, "MAX": FLOAT_MAX["fp32"], **common},
                (*tables, "p_partials"),
                warps,
                scalar_stores=1,
                quick=quick,
            )
    results = {"p_found": "*fp64", "p_steps": "*fp64", "p_applied": "*i1", "p_numbers": "*fp64"}
    yield Case(
        "adam reduce",
        "fp64",
        reduce_kernel,
        {"p_partials": "*fp64", "p_found": "*fp64", "programs": "i32"},
        {"MAX": FLOAT_MAX["fp32"], "BLOCK": 4096},
        ("p_partials", "p_found"),
        16,
        scalar_stores=2,
    )
    for variant, given, rho in (("", False, 0.0), (" on the device", True, 0.0), (" rectified", False, 1999.0)):
        yield Case(
            "adam numbers",
            f"beta1=0.9 ema=2{variant}",
            numbers_kernel,
            {
                **results,
                "p_rate": "*fp64",
                "p_decays": "*fp64",
                **dict.fromkeys(("rate_bits", *(f"decay_bits_{i}" for i in range(4))), "i64"),
            },
            {
                "RATE_TENSOR": given,
                "DECAY_TENSOR": given,
                "COUNTS": True,
                "LIMIT": 1.0,
                "LOG_BETA1": -0.1,
                "LOG_BETA2": -0.001,
                "RHO": rho,
                "MOMENT": True,
                "AVERAGES": 2,
                "MAX": 1.7976931348623157e308,
            },
            (*results, "p_rate", "p_decays"),
            1,
            scalar_loads=6,
            scalar_stores=8,
            quick=not given,
        )


def row_normalise_variants() -> Iterator[Case]:
    """Forward and backward, of rows that wait in registers and of longer ones; masters in float32 and in 16 bits."""
    for label, columns in (("768 a row", 768), ("13824 a row", 13824), ("35 a row unaligned", 35)):
        for dtype, out in (("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16"), ("fp64", "fp64")):
            sizes, warps = row_sizes(columns, torch.float64 if dtype == "fp64" else torch.float32)
            numbers = {"columns": "i32", "gain_bits": "i64"}
            for kernel, fn, pointers in (
                ("row_normalise", row_normalise_kernel, {"p_m": dtype, "p_w": out}),
                (
                    "row_normalise backward", row_normalise_backward_kernel,
                    {"p_m": dtype, "p_dw": out, "p_dm": dtype},
                ),
            ):  # fmt: skip
                yield Case(
                    kernel, f"{dtype} {label}{'' if out == dtype else f' to {out}'}", fn,
                    {p: f"*{kind}" for p, kind in pointers.items()} | numbers, sizes | {"EPS": 1e-4},
                    (*pointers, *(() if "unaligned" in label else ("columns",))), warps,
                    quick=dtype == out == "fp16" and columns != 768,
                )  # fmt: skip


def row_variants() -> Iterator[Case]:
    """The kernels of AdamEMA's rows under forced weight normalisation: gradients, masters and plain weights."""
    tables = {"p_programs": "*i32", "p_table": "*i64"}
    for dtype, out, aligned, whole in (
        ("fp32", "bf16", True, True),
        ("fp32", "fp32", True, True),
        ("fp32", "bf16", False, True),
        ("fp32", "bf16", False, False),
        ("fp64", "fp64", True, True),
    ):
        common = {
            "COMPUTE": tl.float64 if dtype == "fp64" else tl.float32,
            "ALIGNED": aligned,
            "BLOCK": fused_rows.BLOCK,
        }
        sums = {"SUMS": whole, "APPLY": True, "EPS": 1e-4, **common}
        sizes = {"p_sums": f"*{dtype}", "p_scales": f"*{dtype}"}
        variant = f"{dtype}{'' if aligned else ' unaligned'}{'' if whole else ' cut'}"
        warps, quick = fused_rows.WARPS, dtype == "fp32" and aligned
        if out != "fp32":
            gradients = {**tables, "p_grads": "*i64", **sizes}
            yield Case(
                "rows gradients", variant, fused_rows.row_gradients_kernel, gradients, sums, tuple(gradients), warps,
                scalar_stores=1, quick=quick,
            )  # fmt: skip
            if whole:
                masters = {**tables, "p_scales": f"*{dtype}", "p_applied": "*i1"}
                yield Case(
                    "rows masters", variant, fused_rows.row_masters_kernel, masters, common, tuple(masters), warps,
                    quick=quick,
                )  # fmt: skip
        written = {"bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}[out]
        plain = {**tables, "p_sums": f"*{dtype}"}
        yield Case(
            "rows plain", f"{variant} to {out}", fused_rows.row_plain_kernel, plain, {**sums, "OUT": written},
            tuple(plain), warps, quick=quick and out == "fp32",
        )  # fmt: skip


CASES: list[Callable[[], Iterator[Case]]] = [
    perturb_variants,
    loss_variants,
    group_norm_variants,
    residual_variants,
    mp_sum_variants,
    mp_silu_variants,
    mp_cat_silu_variants,
    pixel_norm_variants,
    qkv_norm_variants,
    row_normalise_variants,
    philox_variants,
    adam_variants,
    row_variants,
]
