"""What `ipfm doctor` finds, and how fast the GPU copies and multiplies: what the other sections are held against."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ipfm.engine.commands.doctor.command import findings
from ipfm.engine.commands.doctor.place import OK, Place, Row, failed, tried
from ipfm.kernels.bench.measurement import quantiles

# Elements of the copy and side of the matrices, on a GPU and on a CPU.
ELEMENTS, SIDE = {True: 1 << 28, False: 1 << 16}, {True: 8192, False: 128}


def rows(place: Place) -> Iterator[Row]:
    """A row a finding, then the machine's own speed."""
    for finding in [] if place.quick else findings():
        verdict = failed(finding.remedy or finding.value) if finding.state == "missing" else OK
        yield {
            "topic": finding.topic,
            "what": finding.name,
            "found": finding.value,
            "verdict": verdict if finding.state != "remark" else finding.remedy,
        }
    device = torch.device(place.device)
    for dtype in (torch.float32, torch.bfloat16):
        for name, ask in (("copy", _copy), ("matrix product", _product)):
            kind = str(dtype).removeprefix("torch.")
            row = {"topic": "speed", "what": f"{name}, {kind}"}
            yield tried(row, lambda ask=ask, dtype=dtype: {"found": ask(device, dtype, place), "verdict": OK})  # type: ignore[misc]


def _copy(device: torch.device, dtype: torch.dtype, place: Place) -> str:
    source = torch.zeros(ELEMENTS[place.cuda], dtype=dtype, device=device)
    target = torch.empty_like(source)
    _, middle, _ = quantiles(lambda: target.copy_(source), device, quick=True)
    return f"{2e-3 * source.nbytes / middle:.0f} GB/s, read and written"


def _product(device: torch.device, dtype: torch.dtype, place: Place) -> str:
    """As the networks compute: in TF32 where the GPU has it."""
    side = SIDE[place.cuda]
    torch.backends.cuda.matmul.allow_tf32 = True
    a = torch.randn(side, side, device=device).to(dtype)
    _, middle, _ = quantiles(lambda: a @ a, device, quick=True)
    return f"{2e-6 * side**3 / middle:.3g} TFLOP/s"
