"""Microbenchmarks of the kernels: time, bandwidth against a copy of the same bytes, traffic and peak memory.

`run_microbenchmarks` writes micro.csv and micro.md. A provider whose results fail the comparison with the float64
reference is listed with its times and without a speed-up.
"""

from __future__ import annotations

import csv
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import denoising_loss, group_norm_silu, ipfm_loss, perturb, recomputed, reference

QUANTILES = (0.2, 0.5, 0.8)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    """An operation and its inputs; the bytes it must move, and those that its Triton kernel does."""

    op: str
    variant: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: tuple[Tensor | float, ...]
    arguments: dict[str, Any]
    needed: int
    moved: int


@dataclass(frozen=True)
class Row:
    """One line of micro.csv; times in microseconds, bandwidths in GB/s of needed bytes; None where not measured."""

    op: str
    variant: str
    shape: str
    dtype: str
    provider: str = ""
    us_20: float | None = None
    us_50: float | None = None
    us_80: float | None = None
    needed_bytes: int = 0
    moved_over_needed: float | None = None
    gb_per_s: float | None = None
    copy_gb_per_s: float = 0.0
    share_of_copy: float | None = None
    peak_mb: float | None = None
    correct: bool = False
    speedup: float | None = None
    note: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""


class Traffic(TorchDispatchMode):
    """Counts the bytes that eager operations read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace == "aten" and "empty" not in func.name():
            tensors = [v for v in tree_leaves((args, kwargs, result)) if isinstance(v, Tensor)]
            self.bytes += sum(v.numel() * v.element_size() for v in tensors)
        return result


# ------------------------------------------------------------------------------------------------------------ cases

OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "perturb": (perturb, reference.perturb),
    "ipfm_loss": (ipfm_loss, reference.ipfm_loss),
    "denoising_loss": (denoising_loss, reference.denoising_loss),
    "group_norm_silu": (group_norm_silu, recomputed.group_norm_silu),
}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """CIFAR-10's and FFHQ-64's shapes, one that divides by nothing, and on CUDA one of 2^25 elements."""
    shapes: list[tuple[int, ...]] = [(64, 3, 32, 32), (16, 3, 64, 64), (13, 3, 31, 29)]
    dtypes = [torch.float32]
    if device.type == "cuda":
        shapes = [(256, 3, 32, 32), (64, 3, 64, 64), (13, 3, 31, 29), (10923, 3, 32, 32), (2731, 3, 64, 64)]
        dtypes = [torch.float32, torch.bfloat16]
    for shape in shapes[:: 2 if quick else 1]:
        for dtype in dtypes[: 1 if quick else None]:
            yield from _cases(device, shape, dtype, quick)
    large = [(256, 256, 16, 16), (256, 256, 32, 32), (64, 192, 64, 64)] if device.type == "cuda" else [(8, 64, 16, 16)]
    for shape in large[: 1 if quick else None]:
        for dtype in dtypes[: 1 if quick else None]:
            yield from _group_norm_cases(device, shape, dtype, quick)


def _group_norm_cases(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """The forward pass; the channels of the networks, in 32 groups."""
    batch, channels = shape[:2]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    weight, bias = (torch.randn(channels, generator=generator).to(device, dtype) for _ in range(2))
    scale, shift = (0.1 * torch.randn(2 * batch, channels, 1, 1, generator=generator)).to(device, dtype).chunk(2)
    moved = 2 * x.numel() * x.element_size()
    reread = 1 if x[0].numel() // 32 <= 4096 else 3
    for name, options in (("", {}), ("scaled", {"scale": scale, "shift": shift})):
        for layout in (torch.contiguous_format, torch.channels_last)[: 1 if quick else None]:
            last = " channels_last" if layout == torch.channels_last else ""
            yield Case(
                "group_norm_silu", f"{name}{last}".strip(), shape, dtype,
                (x.contiguous(memory_format=layout), 32, weight, bias), {**options, "eps": 1e-5},
                moved, moved // 2 * (1 + reread),
            )  # fmt: skip


def _cases(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    batch = shape[0]
    generator = torch.Generator().manual_seed(0)
    t, s, y = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    sigma = (torch.rand(batch, generator=generator) + 0.1).to(device)
    index = torch.arange(batch, device=device)
    position = {"seed": 1, "stream": 0, "step": 7, "sample_index": index}
    size = y.numel() * y.element_size()
    reread = 2 if y[0].numel() > 4096 else 1
    make = partial(Case, shape=shape, dtype=dtype)
    yield make("perturb", "D=128", inputs=(y, sigma, 128.0), arguments=position, needed=2 * size, moved=2 * size)
    if not quick:
        yield make(
            "perturb", "D=inf", inputs=(y, sigma, torch.inf), arguments=position, needed=2 * size, moved=2 * size
        )
        last = y.to(memory_format=torch.channels_last)
        yield make(
            "perturb",
            "D=128 channels_last",
            inputs=(last, sigma, 128.0),
            arguments=position,
            needed=2 * size,
            moved=2 * size,
        )
        bytes_ = 2 * size + 2 * y.numel()
        scaled = {**position, "c_in": sigma, "out_dtype": torch.bfloat16}
        yield make(
            "perturb", "D=128 c_in bf16", inputs=(y, sigma, 128.0), arguments=scaled, needed=bytes_, moved=bytes_
        )
    yield make(
        "ipfm_loss",
        "alpha=1",
        inputs=(t, s, y),
        arguments={"alpha": 1.0},
        needed=6 * size,
        moved=(3 + 3 * reread) * size,
    )
    yield make("denoising_loss", "", inputs=(t, y, sigma), arguments={}, needed=3 * size, moved=(1 + 2 * reread) * size)


# ------------------------------------------------------------------------------------------------------ measurement


def quantiles(run: Callable[[], Any], device: torch.device, quick: bool) -> tuple[float, float, float]:
    """20, 50 and 80 % quantiles of the time of a call in microseconds; caches are flushed before each call on CUDA."""
    if device.type == "cuda":
        times = triton.testing.do_bench(run, warmup=10, rep=50 if quick else 200, quantiles=list(QUANTILES))
        return tuple(1e3 * t for t in times)
    samples: list[float] = []
    run()
    stop = time.perf_counter() + (0.1 if quick else 0.5)
    while len(samples) < 5 or time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        samples.append(1e6 * (time.perf_counter() - start))
    return tuple(torch.tensor(samples).quantile(torch.tensor(QUANTILES)).tolist())


def copy_bandwidth(needed: int, device: torch.device, quick: bool) -> float:
    """GB/s of a copy that reads and writes `needed` bytes altogether."""
    source = torch.zeros(max(1, needed // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 8e-3 * source.numel() / quantiles(lambda: target.copy_(source), device, quick)[1]


def outputs(result: Any) -> list[Tensor]:
    return [v for v in tree_leaves(result) if isinstance(v, Tensor)]


def correct(case: Case, result: Any) -> bool:
    """Whether a result agrees with the float64 reference within a tolerance for the dtype, element by element."""

    def double(v: Any) -> Any:
        return v.double() if isinstance(v, Tensor) and v.is_floating_point() else v

    doubled = tuple(map(double, case.inputs))
    arguments = {k: torch.float64 if k == "out_dtype" else double(v) for k, v in case.arguments.items()}
    truth = OPS[case.op][1](*doubled, **arguments)
    for got, want in zip(outputs(result), outputs(truth), strict=True):
        got, want = got.double(), want.double()
        coarsest = torch.bfloat16 if torch.bfloat16 in case.arguments.values() else case.dtype
        scale = want.abs().mean() + want.abs()
        if got.numel() and not bool(((got - want).abs() <= TOLERANCE[coarsest] * scale).all()):
            return False
    return True


def peak_megabytes(run: Callable[[], Any], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def providers(case: Case, device: torch.device) -> dict[str, Callable[[], Any]]:
    public, plain = OPS[case.op]
    found: dict[str, Callable[[], Any]] = {"eager": partial(plain, *case.inputs, **case.arguments)}
    if device.type == "cuda":
        found["compile"] = partial(torch.compile(plain, dynamic=False), *case.inputs, **case.arguments)
        found["triton"] = partial(public, *case.inputs, **case.arguments, backend="triton")
    return found


def moved_bytes(case: Case, provider: str, run: Callable[[], Any]) -> int | None:
    if provider == "triton":
        return case.moved
    if provider == "compile":
        return None
    with Traffic() as traffic:
        run()
    return traffic.bytes


def measure(case: Case, device: torch.device, quick: bool) -> Iterator[Row]:
    """The lines of a case, the eager reference first."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    blank = Row(
        op=case.op,
        variant=case.variant,
        shape="x".join(map(str, case.shape)),
        dtype=str(case.dtype).removeprefix("torch."),
        needed_bytes=case.needed,
        copy_gb_per_s=copy_bandwidth(case.needed, device, quick),
        device=name,
        torch=torch.__version__,
        triton=triton.__version__,
    )
    baseline: float | None = None
    for provider, run in providers(case, device).items():
        row = replace(blank, provider=provider)
        try:
            good = correct(case, run())
            moved = moved_bytes(case, provider, run)
            low, middle, high = quantiles(run, device, quick)
            peak = peak_megabytes(run, device)
        except Exception as error:  # a provider that cannot run is a line in the table, not the end of it
            yield replace(row, note=f"{type(error).__name__}: {error}".splitlines()[0][:120])
            continue
        if provider == "eager" and good:
            baseline = middle
        speed = 1e-3 * case.needed / middle
        yield replace(
            row,
            us_20=low,
            us_50=middle,
            us_80=high,
            moved_over_needed=None if moved is None else moved / case.needed,
            gb_per_s=speed,
            share_of_copy=speed / blank.copy_gb_per_s,
            peak_mb=peak,
            correct=good,
            speedup=baseline / middle if baseline is not None and good else None,
            note="" if good else "differs from the float64 reference",
        )


def _show(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def run_microbenchmarks(out: str | Path, quick: bool = False) -> Path:
    """Measures on the CUDA device if there is one, else on the CPU (the reference alone: Triton needs the device).

    Writes micro.csv and micro.md into `out` and returns the path of the CSV file.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for case in cases(device, quick) for row in measure(case, device, quick)]
    path = folder / "micro.csv"
    names = [f.name for f in fields(Row)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(map(astuple, rows))
    shown = names[: names.index("device")]
    lines = [f"{rows[0].device}, torch {rows[0].torch}, triton {rows[0].triton}", ""]
    lines += [f"| {' | '.join(shown)} |", "|" + "---|" * len(shown)]
    lines += [f"| {' | '.join(_show(getattr(row, n)) for n in shown)} |" for row in rows]
    (folder / "micro.md").write_text("\n".join(lines) + "\n")
    return path
