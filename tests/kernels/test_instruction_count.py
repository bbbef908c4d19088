"""The instruction count of perturb: loops found in listings, classes, the floor; test_compile_report compiles."""

from pathlib import Path

import pytest

from ipfm.kernels.bench import instruction_count as floor

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


def test_refuses_to_count_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must not be set"):
        floor.run_floor(tmp_path)
