"""Recorded launches compiled for GPUs that are not there: what the machine code needs, beside what the GPUs have.

`compiled` gives Triton what its just-in-time compiler gives it at a launch (see `fake_driver`), and reads registers,
spills and shared memory from the machine code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import triton

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
    variants: Iterable[Variant],
    some: Iterable[Variant] = (),
    *,
    known: Collection[tuple[Variant, int]] = (),
    processes: int = 1,
) -> Iterator[list[Compiled]]:
    """Variants for the architectures of `ALL`, and those of `some` for `SOME`, some at a time as they are ready.

    Args:
        variants: every variant.
        some: those that are compiled for further architectures.
        known: variants and architectures that are left out.
        processes: that work side by side.

    Raises:
        RuntimeError: the compiler's, or as `compile_variant`.
    """
    parts = [
        ([variant for variant in chosen[i : i + TOGETHER] if (variant, capability) not in known], capability)
        for chosen, capabilities in ((list(variants), ALL), (list(some), SOME))
        for i in range(0, len(chosen), TOGETHER)
        for capability in capabilities
    ]
    tasks = [(part, capability) for part, capability in parts if part]
    if not tasks:
        return
    with ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.map(compile_some, *zip(*tasks, strict=True))


class Kept:
    """What was compiled, in a file of JSON lines, for a rehearsal that is interrupted to go on where it was.

    Of other kernels, another Triton or another PyTorch than today's it takes nothing, and begins the file anew.

    Args:
        path: of the file; None keeps nothing.

    Raises:
        OSError: the file cannot be read, or cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[tuple[str, int], dict[str, int]] = {}
        if path is None:
            return
        first = json.dumps({"sources": sources()})
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        if not lines or lines[0] != first:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{first}\n", encoding="utf-8")
            return
        for line in lines[1:]:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off where a process was ended
                found = json.loads(line)
                self._found[found.pop("variant"), found["capability"]] = found

    def of(self, pairs: Iterable[tuple[Variant, int]]) -> list[Compiled]:
        """Of these variants and architectures what is kept."""
        asked = {pair: (_name(pair[0]), pair[1]) for pair in pairs}
        return [Compiled(pair[0], **self._found[key]) for pair, key in asked.items() if key in self._found]

    def add(self, done: Iterable[Compiled]) -> None:
        """Keep what was compiled."""
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for one in done:
                fields_ = {f.name: getattr(one, f.name) for f in fields(one) if f.name != "variant"}
                # The line before may have been cut off.
                file.write(f"\n{json.dumps({'variant': _name(one.variant), **fields_})}")


def sources() -> str:
    """A digest of all that decides what a variant is compiled to: the kernels, Triton's and PyTorch's versions."""
    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _name(variant: Variant) -> str:
    return hashlib.sha256(repr(variant).encode()).hexdigest()


def asked(variants: Iterable[Variant], some: Iterable[Variant]) -> list[tuple[Variant, int]]:
    """Variants and architectures that `compile_all` compiles."""
    return [(v, capability) for chosen, all_ in ((variants, ALL), (some, SOME)) for v in chosen for capability in all_]


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
