"""Instructions that `perturb` needs for an element, beside the least that its arithmetic needs: no GPU.

`run_floor` writes floor.csv and floor.md. The floor is counted by hand from the algorithm that `ipfm.kernels.philox`
writes down; the measured floor is the kernel that draws normals and does nothing else. The numbers count instructions
of a thread, not cycles: full 32 x 32-bit products, square roots and conversions run at a lower rate than the rest.
"""

from __future__ import annotations

import csv
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from ipfm.kernels._dispatch import INTERPRETED, noise_config
from ipfm.kernels.bench.compile_report import ARCHITECTURES, access_bits, compile_variant, tool_output
from ipfm.kernels.bench.fake_driver import Variant
from ipfm.kernels.bench.variants import cases, perturb_situations, philox_situations

WIDE, LOGIC, INTEGER, FLOAT, SPECIAL, CONVERSION, MEMORY, OTHER = CLASSES = (
    "full product", "logic", "integer", "float", "square root", "conversion", "memory", "other",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A step of the algorithm for four elements, and the instructions that it cannot do without."""

    what: str
    count: int
    kind: str


# A Philox block makes four elements. Its first word alone differs between the blocks of a sample, so that two products
# and one exclusive or of the first two rounds are the same for all of them; so is the key of every round.
NORMALS = (
    Step("number of the block", 1, INTEGER),
    Step("10 rounds of 2 products of 32 x 32 bits, 2 of them shared", 18, WIDE),
    Step("10 rounds of 2 three-way exclusive ors, 1 of them shared", 19, LOGIC),
    Step("4 words to floating point", 4, CONVERSION),
    Step("4 uniforms", 4, FLOAT),
    Step("2 logarithms: split into mantissa and exponent", 2 * 2, INTEGER),
    Step("2 logarithms: mask of the exponent", 2 * 1, LOGIC),
    Step("2 logarithms: exponent to floating point", 2 * 1, CONVERSION),
    Step("2 logarithms: m - 1, 8 steps of the polynomial, 2 to add the exponent's part", 2 * 11, FLOAT),
    Step("2 square roots", 2, SPECIAL),
    Step("2 angles: quarter turn and rest", 2 * 3, FLOAT),
    Step("2 sines and cosines: the square, 4 steps each", 2 * 9, FLOAT),
    Step("2 angles: number of the next quarter", 2 * 1, INTEGER),
    Step("2 angles: tests of swap and 2 signs", 2 * 3, LOGIC),
    Step("2 angles: swap and 2 signs", 2 * 4, FLOAT),
    Step("4 products with the radius", 4, FLOAT),
)
STORE = (Step("store of 128 bits", 1, MEMORY),)
PERTURB = (Step("4 times y + scale * noise", 4, FLOAT), Step("load and store of 128 bits", 2, MEMORY))


def floor_per_element(steps: Iterable[Step]) -> dict[str, float]:
    """Instructions an element, by class."""
    found = dict.fromkeys(CLASSES, 0.0)
    for step in steps:
        found[step.kind] += step.count / 4
    return found


# ---------------------------------------------------------------------------------------------------------- listing


_LINE = re.compile(r"^(?P<label>\.\w+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*)")
_TARGET = re.compile(r"`\((\.\w+)\)")
_KINDS = {
    LOGIC: {"LOP3", "PLOP3", "LOP", "LOP32I"},
    INTEGER: {"IADD3", "IADD", "IADD32I", "IMAD", "LEA", "SHF", "SHL", "SHR", "ISETP", "SEL", "VIADD", "IMNMX", "PRMT",
              "IABS", "VIADDMNMX", "VIMNMX"},
    FLOAT: {"FFMA", "FMUL", "FADD", "FSEL", "FSETP", "FMNMX", "FFMA2", "FMUL2", "FADD2"},
    SPECIAL: {"MUFU"},
    CONVERSION: {"I2F", "I2FP", "F2I", "F2F", "F2FP", "FRND"},
    MEMORY: {"LDG", "STG", "LDS", "STS"},
}  # fmt: skip


def kind(opcode: str) -> str:
    """The class of a machine instruction. A full product is one instruction, or two: one for each half of it."""
    name, *parts = opcode.split(".")
    if name == "IMAD":
        if {"WIDE", "HI"} & set(parts):
            return WIDE
        return OTHER if parts[:1] in (["MOV"], ["U32"]) else INTEGER
    return next((k for k, names in _KINDS.items() if name in names), OTHER)


def element_loop(listing: str) -> list[str]:
    """Opcodes of the innermost loop of an nvdisasm listing that stores to global memory; empty if there is none."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in listing.splitlines():
        if not (found := _LINE.search(line)):
            continue
        if found["label"]:
            labels[found["label"]] = len(opcodes)
            continue
        opcodes.append(found["opcode"])
        target = _TARGET.search(found["rest"])
        if found["opcode"].split(".")[0] == "BRA" and target and target[1] in labels:
            loops.append(opcodes[labels[target[1]] :])
    return min((body for body in loops if _stored(body)), key=len, default=[])


def straight_line(listing: str) -> list[str]:
    """All opcodes of a listing but the padding."""
    found = [match["opcode"] for match in map(_LINE.search, listing.splitlines()) if match and match["opcode"]]
    return [opcode for opcode in found if opcode != "NOP"]


def _stored(opcodes: Sequence[str]) -> int:
    """32-bit elements that a thread stores."""
    return sum(access_bits(opcode) for opcode in opcodes if opcode.split(".")[0] == "STG") // 32


def _listing(code: Variant, arch: str) -> str:
    cubin, _ = compile_variant(code, ARCHITECTURES[arch])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return tool_output("nvdisasm", "--print-code", str(path))


def _with(code: Variant, **constants: int) -> Variant:
    """The code with other constants."""
    return replace(code, constants=tuple((name, constants.get(name, value)) for name, value in code.constants))


# ----------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Row:
    """Instructions a thread and element of a compiled kernel, by class, and the floor of the same work."""

    kernel: str
    variant: str
    arch: str
    counted: str
    instructions: float
    classes: dict[str, float]
    floor: float

    def cells(self) -> list[str]:
        numbers = [self.instructions, self.floor, self.instructions / self.floor]
        shown = [f"{n:.2f}" for n in (*numbers, *(self.classes[c] for c in CLASSES))]
        return [self.kernel, self.variant, self.arch, self.counted, *shown]


COLUMNS = ["kernel", "variant", "arch", "counted", "instructions", "floor", "over_floor", *CLASSES]


def perturb_row(variant: str, arch: str) -> Row:
    """perturb in float32 with several tiles a program: the loop over them, or else all of the kernel."""
    _, tiles, _ = noise_config(1 << 14, 3072)
    code = next(case.code for case in cases(of=[perturb_situations]) if case.variant == f"fp32 {variant}")
    listing = _listing(_with(code, TILES=tiles), arch)
    body, counted = element_loop(listing), "loop"
    if not body:
        body, counted = straight_line(listing), "all"
    elements = _stored(body)
    classes = {c: n / elements for c, n in _by_class(Counter(body)).items()}
    floor = sum(floor_per_element((*NORMALS, *PERTURB)).values())
    return Row("perturb", f"fp32 {variant}", arch, counted, len(body) / elements, classes, floor)


def normal_row(arch: str) -> Row:
    """The kernel of `philox.normal`, which is straight-line code: what a longer block adds an element."""
    code = next(case.code for case in cases(of=[philox_situations]) if case.variant == "normal")
    short, long = (straight_line(_listing(_with(code, BLOCK=block), arch)) for block in (256, 512))
    elements = _stored(long) - _stored(short)
    more = Counter(long)
    more.subtract(Counter(short))
    classes = {c: n / elements for c, n in _by_class(more).items()}
    floor = sum(floor_per_element((*NORMALS, *STORE)).values())
    return Row("philox normal", "fp32", arch, "difference", (len(long) - len(short)) / elements, classes, floor)


def _by_class(opcodes: Counter[str]) -> dict[str, int]:
    found = dict.fromkeys(CLASSES, 0)
    for opcode, count in opcodes.items():
        found[kind(opcode)] += count
    return found


def floor_rows(architectures: Sequence[str]) -> Iterator[Row]:
    """perturb at D = inf and D = 128, and the normals alone, for every architecture."""
    for arch in architectures:
        yield perturb_row("D=inf", arch)
        yield perturb_row("D=128", arch)
        yield normal_row(arch)


def run_floor(out: str | Path, architectures: Sequence[str] = tuple(ARCHITECTURES)) -> Path:
    """Write floor.csv and floor.md.

    Args:
        out: folder to write into; it is made where it is missing.
        architectures: keys of `compile_report.ARCHITECTURES`.

    Returns:
        The path of the CSV file.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where nothing is compiled.
    """
    if INTERPRETED:
        raise RuntimeError("the instruction count compiles: TRITON_INTERPRET must not be set in this process")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row.cells() for row in floor_rows(architectures)]
    path = folder / "floor.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    path.with_suffix(".md").write_text(_markdown(rows), encoding="utf-8")
    return path


def _markdown(rows: list[list[str]]) -> str:
    def table(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
        return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]

    normals = sum(step.count for step in NORMALS)
    total = normals + sum(step.count for step in PERTURB)
    by_hand = [[step.what, str(step.count), step.kind] for step in (*NORMALS, *PERTURB)]
    lines = [
        f"# Instructions an element of perturb, compiled with triton {triton.__version__} (torch {torch.__version__})",
        "",
        "Instructions of a thread for each float32 element, in the loop over the elements (loop), or what a longer "
        "block adds to straight-line code (difference). The gamma variable of a sample is drawn before the loop. "
        "'philox normal' draws and stores normals and does nothing else: the measured floor. A full product that the "
        "assembler splits into two halves counts one under 'full product' and one under 'integer'.",
        "",
        *table(COLUMNS, rows),
        "",
        f"The floor by hand: {normals} instructions for the four normals of a Philox block, {normals / 4:g} each, and "
        f"{total} with the rest of perturb, {total / 4:g} an element.",
        "",
        *table(["step, for four elements", "instructions", "class"], by_hand),
    ]
    return "\n".join(lines) + "\n"
