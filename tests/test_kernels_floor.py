"""The instruction count of perturb: loops found in listings, classes, and the floor beside a kernel compiled for sm_90.

Compiles in a process of its own: the interpreter flag that this one may carry turns every kernel into Python.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipfm.kernels.bench import floor

LISTING = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IMAD.WIDE.U32 R2, R3, R4, RZ ;
        /*0020*/              @!P1 BRA `(.L_x_3) ;
        /*0030*/               @P0 BRA P2, `(.L_x_0) ;
.L_x_1:
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0050*/                   FFMA R8, R8, R9, R10 ;
        /*0060*/              @!P0 STG.E.128 desc[UR4][R6.64], R8 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/               @P3 BRA `(.L_x_0) ;
.L_x_3:
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
        /*00b0*/                   NOP;
"""


def test_the_innermost_loop_that_stores_is_found() -> None:
    assert floor.element_loop(LISTING) == ["LDG.E.128", "FFMA", "STG.E.128", "BRA"]
    assert floor.element_loop(LISTING.replace("@P0 BRA `(.L_x_1)", "@P0 BRA `(.L_x_3)"))[0] == "IMAD.WIDE.U32"
    assert floor.element_loop(LISTING.replace("STG", "STS")) == []
    assert floor.straight_line(LISTING)[-2:] == ["EXIT", "BRA"]


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("IMAD.WIDE.U32", "full product"), ("IMAD.HI.U32", "full product"), ("IMAD", "integer"),
        ("IMAD.SHL.U32", "integer"), ("IMAD.MOV.U32", "other"), ("LOP3.LUT", "logic"), ("FFMA", "float"),
        ("MUFU.SQRT", "square root"), ("I2FP.F32.U32", "conversion"), ("STG.E.128", "memory"), ("BRA", "other"),
    ],
)  # fmt: skip
def test_classes_of_instructions(opcode: str, kind: str) -> None:
    assert floor.kind(opcode) == kind


def test_the_floor_is_the_sum_of_its_steps() -> None:
    normals = floor.floor_per_element(floor.NORMALS)
    assert sum(normals.values()) * 4 == sum(step.count for step in floor.NORMALS)
    assert normals[floor.WIDE] * 4 == 10 * 2 - 2
    assert normals[floor.LOGIC] * 4 == (10 * 2 - 1) + 2 * 1 + 2 * 3
    assert normals[floor.SPECIAL] * 4 == 2


def test_compiled_kernels_stand_a_little_above_the_floor(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = f"from ipfm.kernels.bench import run_floor; print(run_floor({str(tmp_path)!r}, ['sm_90']))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "floor.csv"
    with (tmp_path / "floor.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["kernel"], r["variant"], r["counted"]) for r in rows] == [
        ("perturb", "fp32 D=inf", "loop"), ("perturb", "fp32 D=128", "loop"), ("philox normal", "fp32", "difference"),
    ]  # fmt: skip
    for r in rows:
        # A wrong loop or number of elements would be off by a factor of two or more.
        assert 0.99 < float(r["over_floor"]) < 1.6, r
        assert sum(float(r[c]) for c in floor.CLASSES) == pytest.approx(float(r["instructions"]), abs=0.05)
        # Both are what the algorithm says, whatever the assembler does with the rest.
        assert float(r["square root"]) == 0.5
        assert float(r["conversion"]) == 1.5
    assert [float(r["memory"]) for r in rows] == [0.5, 0.5, 0.25]
    text = (tmp_path / "floor.md").read_text()
    assert "| perturb | fp32 D=inf | sm_90 | loop |" in text
    assert "30.5 each" in text


def test_refuses_to_count_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must not be set"):
        floor.run_floor(tmp_path)
