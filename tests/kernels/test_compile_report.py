"""The offline compile report: no spills, and 128-bit accesses wherever the data is aligned and contiguous.

Compiles in a process of its own: the interpreter flag that this one may carry turns every kernel into Python.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ipfm.kernels.bench import instruction_count as floor
from ipfm.kernels.bench import run_offline

COLUMNS = [
    "kernel", "variant", "arch", "registers", "spills", "shared_bytes", "global_load_bits", "global_store_bits",
    "instructions",
]  # fmt: skip
FUSED = {
    "perturb", "ipfm_loss", "denoising_loss", "group_norm_silu", "group_norm_silu backward", "residual_sum",
    "residual_sum backward", "adam update", "rows gradients", "rows masters", "rows plain",
    *(f"{name}{way}" for name in ("mp_sum", "mp_silu", "mp_cat_silu", "pixel_norm_silu", "qkv_norm", "row_normalise")
      for way in ("", " backward")),
}  # fmt: skip
# Kernels that write a few numbers alone, and those that read no more than that either.
READERS, SCALAR = {"adam measure", "adam reduce"}, {"gamma", "adam numbers"}
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The folder of a quick report."""
    out = tmp_path_factory.mktemp("offline")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-c",
        "from ipfm.engine.commands.main import main; main()",
        "bench",
        "--offline",
        "--quick",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip().splitlines()[-1]) == out / "offline.csv"
    for name in ("floor", "offline"):
        assert (out / f"{name}.md").read_text() in done.stdout
    return out


@pytest.fixture(scope="module")
def all_rows(report) -> list[dict[str, str]]:
    with (report / "offline.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows(all_rows) -> list[dict[str, str]]:
    """Those of variants that are written down."""
    return [row for row in all_rows if not row["kernel"].startswith("recorded")]


def test_every_kernel_is_compiled_for_every_architecture(rows):
    assert list(rows[0]) == COLUMNS
    found = {(r["kernel"], r["arch"]) for r in rows}
    assert found == {(k, a) for k in (*FUSED, *READERS, *SCALAR, "philox") for a in ARCHITECTURES}
    assert len({(r["kernel"], r["variant"], r["arch"]) for r in rows}) == len(rows)


def test_nothing_spills(all_rows):
    assert {(r["kernel"], r["variant"], r["arch"]): r["spills"] for r in all_rows if r["spills"] != "0"} == {}


def test_what_a_step_really_launches_is_compiled_too(all_rows):
    """Of each kernel the launch with the most to do in a distillation of small networks."""
    recorded = [row for row in all_rows if row["kernel"].startswith("recorded")]
    found = {(row["kernel"].removeprefix("recorded "), row["arch"]) for row in recorded}
    kernels = {"group_norm_silu", "group_norm_silu_backward", "perturb", "ipfm_loss", "denoising_loss", "update"}
    assert {(kernel, arch) for kernel in kernels for arch in ARCHITECTURES} <= found
    assert len({(row["kernel"], row["variant"], row["arch"]) for row in recorded}) == len(recorded)
    wide = [row for row in recorded if "group_norm" in row["kernel"]]
    assert all(row["variant"].startswith("bf16") and int(row["global_load_bits"]) >= 64 for row in wide), wide


def test_aligned_contiguous_data_moves_in_128_bit_accesses(rows):
    wide = [r for r in rows if r["kernel"] not in SCALAR and "unaligned" not in r["variant"]]
    assert len(wide) >= 3 * 10
    for r in wide:
        assert r["global_store_bits"] == ("0" if r["kernel"] in READERS else "128"), r
        assert r["global_load_bits"] == ("0" if r["kernel"] == "philox" else "128"), r


def test_the_report_sees_narrow_accesses(rows):
    """Kernels on 5 x 7 images, where nothing is aligned: proof that the width is read and not assumed."""
    narrow = [r for r in rows if "unaligned" in r["variant"]]
    optimiser = {"adam update", "rows gradients", "rows masters", "rows plain"}
    assert {r["kernel"] for r in narrow} == FUSED - optimiser
    for r in narrow:
        bits = "16" if "16" in r["variant"].split()[0] else "32"
        assert (r["global_load_bits"], r["global_store_bits"]) == (bits, bits), r


# What a program of 512 threads holds so that nothing is read twice: it may have a multiprocessor's registers alone.
HELD_ONCE = {("group_norm_silu backward", "bf16 256ch 32x32 channels_last scaled")}


def test_registers_leave_room_for_the_programs_that_hide_latency(rows):
    most = {True: 128, False: 96}
    assert [r for r in rows if int(r["registers"]) > most[(r["kernel"], r["variant"]) in HELD_ONCE]] == []
    assert {(r["kernel"], r["variant"]) for r in rows} >= HELD_ONCE


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles in this process")
def test_refuses_to_report_on_the_interpreter(tmp_path):
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must not be set"):
        run_offline(tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_spills_are_counted():
    from ipfm.kernels.bench.compile_report import _INSTRUCTION, access_bits

    listing = """
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 STG.E.U16 desc[UR4][R6.64], R5 ;
        /*0030*/                   STL.64 [R1], R8 ;
        /*0040*/               @P1 LDL R9, [R1+0x8] ;
        /*0050*/                   LDG.E R4, desc[UR4][R2.64] ;
    """
    found = _INSTRUCTION.findall(listing)
    assert found == ["LDG.E.128", "STG.E.U16", "STL.64", "LDL", "LDG.E"]
    assert [access_bits(o) for o in found] == [128, 16, 64, 32, 32]


def test_perturb_stands_a_little_above_its_floor(report):
    """The same run has counted its instructions, for sm_90."""
    with (report / "floor.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["kernel"], r["variant"], r["counted"]) for r in rows] == [
        ("perturb", "fp32 D=inf", "loop"),
        ("perturb", "fp32 D=128", "loop"),
        ("philox normal", "fp32", "difference"),
    ]
    for r in rows:
        # A wrong loop or number of elements would be off by a factor of two or more.
        assert 0.99 < float(r["over_floor"]) < 1.6, r
        assert sum(float(r[c]) for c in floor.CLASSES) == pytest.approx(float(r["instructions"]), abs=0.05)
        # Both are what the algorithm says, whatever the assembler does with the rest.
        assert float(r["square root"]) == 0.5
        assert float(r["conversion"]) == 1.5
    assert [float(r["memory"]) for r in rows] == [0.5, 0.5, 0.25]
    text = (report / "floor.md").read_text()
    assert "| perturb | fp32 D=inf | sm_90 | loop |" in text
    assert "30.5 each" in text
