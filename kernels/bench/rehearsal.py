"""Recorded launches compiled for GPUs that are not there: what the machine code needs, beside what the GPUs have.

`compiled` gives Triton what its just-in-time compiler gives it at a launch (see `fake_driver`), and reads registers,
spills and shared memory from the machine code.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from ipfm.kernels.bench.compile_report import MachineCode, Row, compile_variant, machine_codes
from ipfm.kernels.bench.fake_driver import Launch, Variant

# Shared memory that a block may have, in bytes, by ten times the compute capability (CUDA programming guide, table of
# technical specifications; what Triton sees of it).
SHARED_MEMORY = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
REGISTERS, THREADS = 65536, 1024
# For every variant, and for the heaviest of each kernel.
ALL, SOME = (80, 90, 100), (75, 86, 89, 120)
# Variants that are compiled and read together: a start of the tools costs more than their work.
TOGETHER = 12


@dataclass(frozen=True)
class Compiled:
    """A variant for one architecture."""

    variant: Variant
    capability: int
    """Ten times the compute capability."""
    registers: int
    spills: int
    """Loads and stores of local memory in the machine code."""
    shared: int
    """Bytes of shared memory a block."""
    instructions: int
    load_bits: int
    """Width of most loads from global memory but those that ask to stay in the cache; 0 where there is none."""
    store_bits: int
    """Width of most stores to global memory."""

    @property
    def faults(self) -> list[str]:
        """Why it would not run, or run badly."""
        threads = 32 * self.variant.warps
        found = [f"{self.spills} spills"] if self.spills else []
        if self.shared > SHARED_MEMORY[self.capability]:
            found.append(f"{self.shared} bytes of shared memory of {SHARED_MEMORY[self.capability]}")
        if threads > THREADS:
            found.append(f"{threads} threads of {THREADS}")
        if -(-self.registers // 8) * 8 * threads > REGISTERS:
            found.append(f"{self.registers} registers a thread for {threads} threads, of {REGISTERS} together")
        return found


def compile_some(variants: Sequence[Variant], capability: int) -> list[Compiled]:
    """Variants for one architecture, in this process."""
    made = [compile_variant(variant, capability) for variant in variants]
    codes = machine_codes([cubin for cubin, _ in made], f"sm_{capability}")
    return [_read(*found, capability) for found in zip(variants, codes, (shared for _, shared in made), strict=True)]


def _read(variant: Variant, code: MachineCode, shared: int, capability: int) -> Compiled:
    widths = (statistics.mode(found) if found else 0 for found in (code.loads, code.stores))
    return Compiled(variant, capability, code.registers, code.spills, shared, code.instructions, *widths)


def compile_all(
    variants: Iterable[Variant], some: Iterable[Variant] = (), *, processes: int = 1
) -> Iterator[list[Compiled]]:
    """Variants for the architectures of `ALL`, and those of `some` for `SOME`, some at a time as they are ready.

    Args:
        variants: every variant.
        some: those that are compiled for further architectures.
        processes: that work side by side.

    Raises:
        RuntimeError: the compiler's, or as `compile_variant`.
    """
    tasks = [
        (part, capability)
        for chosen, capabilities in ((list(variants), ALL), (list(some), SOME))
        for part in (chosen[i : i + TOGETHER] for i in range(0, len(chosen), TOGETHER))
        for capability in capabilities
    ]
    with ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.map(compile_some, *zip(*tasks, strict=True))


def heaviest(launches: Iterable[Launch]) -> list[Variant]:
    """Of each kernel the variant that is launched on the most bytes, in the order of the kernels' names."""
    largest: dict[str, Launch] = {}
    for launch in launches:
        known = largest.get(launch.variant.name)
        if known is None or sum(launch.bytes.values()) > sum(known.bytes.values()):
            largest[launch.variant.name] = launch
    return [largest[name].variant for name in sorted(largest)]


def in_words(variant: Variant, numbers: Mapping[str, int] | None = None) -> str:
    """A variant for people: its types, and the constants that tell it apart from others of its kernel."""
    types = dict(variant.types)
    first = next((kind.removeprefix("*") for kind in types.values() if kind.startswith("*")), "")
    shown = [f"{name}={value}" for name, value in variant.constants if _tells(name, value)]
    given = [f"{name}={value}" for name, value in (numbers or {}).items() if name in ("HW", "elements", "inner")]
    return " ".join([first, *given, *shown])


def _tells(name: str, value: object) -> bool:
    return isinstance(value, (int, float)) and not name.startswith(("MAX", "LOG", "n_", "s_", "EPS"))


def report_rows(launches: Iterable[Launch], arch: str) -> list[Row]:
    """Lines of the compile report for launches, one a variant; `arch` as in "sm_90"."""
    examples = {launch.variant: launch.numbers for launch in launches}
    capability = int(arch.removeprefix("sm_"))
    return [
        Row(
            f"recorded {c.variant.name.removesuffix('_kernel')}",
            in_words(c.variant, examples[c.variant]),
            arch,
            c.registers,
            c.spills,
            c.shared,
            c.load_bits,
            c.store_bits,
            c.instructions,
        )
        for c in compile_some(list(examples), capability)
    ]
