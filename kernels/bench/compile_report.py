"""The offline compile report: every kernel and variant compiled for sm_80, sm_90 and sm_100, with no GPU.

`run_offline` writes offline.csv and offline.md with, per variant: registers a thread, spill instructions (loads and
stores of local memory in the machine code), shared memory, the narrowest global load and store among those that move
data, and the number of machine instructions. Read from the cubin with the tools that the triton package carries.
"""

from __future__ import annotations

import csv
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path

import triton

from ipfm.kernels._dispatch import INTERPRETED
from ipfm.kernels.bench.fake_driver import Variant
from ipfm.kernels.bench.variants import Case, cases

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
INSTRUCTION_BYTES = 16  # of all of these architectures
SHF_EXECINSTR = 4  # an ELF section's flag: holds machine instructions


@dataclass(frozen=True)
class Row:
    """One line of offline.csv; widths in bits, 0 where a kernel moves no such data."""

    kernel: str
    variant: str
    arch: str
    registers: int
    spills: int
    shared_bytes: int
    global_load_bits: int
    global_store_bits: int
    instructions: int


@dataclass
class MachineCode:
    """What nvdisasm and cuobjdump tell about a cubin."""

    registers: int = 0
    instructions: int = 0
    spills: int = 0
    loads: list[int] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)

    def count(self, opcode: str) -> None:
        """Add an instruction."""
        name, *parts = opcode.split(".")
        self.instructions += 1
        self.spills += name in ("LDL", "STL")
        if name == "LDG" and "EL" not in parts:
            self.loads.append(access_bits(opcode))
        elif name == "STG":
            self.stores.append(access_bits(opcode))


# ------------------------------------------------------------------------------------------------------ compilation


def compile_variant(variant: Variant, capability: int) -> tuple[bytes, int]:
    """(machine code, bytes of shared memory) of a recorded kernel for a compute capability, without a GPU.

    Args:
        variant: as it was launched.
        capability: ten times the compute capability, such as 90 for sm_90.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where nothing is compiled.
    """
    if INTERPRETED:
        raise RuntimeError(
            "nothing is compiled in Triton's interpreter: TRITON_INTERPRET must not be set in this process"
        )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.fn.arg_names
    source = ASTSource(
        variant.fn,
        dict(variant.types),
        {(names.index(name),): value for name, value in variant.constants},
        {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return kernel.asm["cubin"], kernel.metadata.shared


def tool_output(name: str, *arguments: str) -> str:
    """What one of the programs that the triton package carries prints.

    Raises:
        FileNotFoundError: the package carries no program of this name.
    """
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise FileNotFoundError(f"the triton package carries no {name} (looked for {path})")
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def access_bits(opcode: str) -> int:
    """Bits that a load or a store moves for a thread."""
    parts = opcode.split(".")
    for part, bits in (("256", 256), ("128", 128), ("64", 64), ("U16", 16), ("S16", 16), ("U8", 8), ("S8", 8)):
        if part in parts:
            return bits
    return 32


def machine_codes(cubins: Sequence[bytes], arch: str) -> list[MachineCode]:
    """The registers and the instructions of cubins with one kernel each, all of the architecture `arch`.

    A start of nvdisasm takes longer than all its work, and it takes one file: their code is put into one.

    Raises:
        RuntimeError: the tools print nothing that says so.
    """
    sections = [_instructions(cubin) for cubin in cubins]
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        for cubin in cubins:
            path.write_bytes(cubin)
            registers = re.search(r"REG:(\d+)", tool_output("cuobjdump", "--dump-resource-usage", str(path)))
            codes.append(MachineCode(int(registers[1]) if registers else 0))
        path.write_bytes(b"".join(sections))
        listing = tool_output("nvdisasm", "--binary", arch.replace("sm_", "SM"), str(path))
    opcodes = _INSTRUCTION.findall(listing)
    counts = [len(section) // INSTRUCTION_BYTES for section in sections]
    if len(opcodes) != sum(counts) or not all(counts) or not all(code.registers for code in codes):
        raise RuntimeError("could not read the resource usage or the instructions of a cubin")
    following = iter(opcodes)
    for code, count in zip(codes, counts, strict=True):
        for opcode in itertools.islice(following, count):
            code.count(opcode)
    return codes


def _instructions(cubin: bytes) -> bytes:
    """The executable sections of a cubin, which is an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, number = struct.unpack_from("<2H", cubin, 58)
    headers = [struct.unpack_from("<2I4Q", cubin, table + size * i) for i in range(number)]
    return b"".join(cubin[at : at + length] for _, _, flags, _, at, length in headers if flags & SHF_EXECINSTR)


def _narrowest(widths: list[int], scalars: int) -> int:
    return min(sorted(widths)[scalars:], default=0)


def report_rows(chosen: Sequence[Case], arch: str) -> Iterator[Row]:
    """The lines of variants, which are compiled for them; `arch` is a key of `ARCHITECTURES`."""
    compiled = [compile_variant(case.code, ARCHITECTURES[arch]) for case in chosen]
    codes = machine_codes([cubin for cubin, _ in compiled], arch)
    for case, (_, shared), code in zip(chosen, compiled, codes, strict=True):
        loads, stores = case.scalars
        yield Row(
            case.kernel,
            case.variant,
            arch,
            code.registers,
            code.spills,
            shared,
            _narrowest(code.loads, loads),
            _narrowest(code.stores, stores),
            code.instructions,
        )


def run_offline(
    out: str | Path,
    architectures: Sequence[str] = tuple(ARCHITECTURES),
    *,
    quick: bool = False,
    further: Callable[[str], list[Row]] | None = None,
) -> Path:
    """Write offline.csv and offline.md.

    Args:
        out: folder to write into; it is made where it is missing.
        architectures: keys of `ARCHITECTURES`.
        quick: leave out variants that differ little from one that stays.
        further: architecture -> lines of other variants, as many for each; their widths are those of most accesses.

    Returns:
        The path of the CSV file.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where nothing is compiled.
    """
    if INTERPRETED:
        raise RuntimeError("the offline report compiles: TRITON_INTERPRET must not be set in this process")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    every = cases(quick=quick)
    by_architecture = [
        [*report_rows(every, arch), *(further(arch) if further is not None else ())] for arch in architectures
    ]
    rows = [row for variant in zip(*by_architecture, strict=True) for row in variant]
    names = [f.name for f in fields(Row)]
    path = folder / "offline.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(map(astuple, rows))
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(map(str, astuple(row)))} |" for row in rows]
    (folder / "offline.md").write_text("\n".join(lines) + "\n")
    return path
