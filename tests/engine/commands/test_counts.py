"""What a step costs that can be counted without a GPU: asserted are counts, never times."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ipfm.engine.commands.bench import counts
from ipfm.engine.commands.bench.meta_step import network_traffic
from ipfm.kernels.bench import variants
from ipfm.models import presets

# Of the CIFAR-10 recipe's network, in bf16 and channels_last: each may fall, and none may grow.
OPERATORS, ONCE_GB, AGAIN_GB, PASSES = 2960, 197, 4.2, 7.0

LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.EL.U16 R2, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P0 LDG.E.128 R8, desc[UR4][R6.64] ;
        /*0040*/                   MUFU.EX2 R9, R8 ;
        /*0050*/              @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0070*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0080*/                   FADD R4, R4, R5 ;
        /*0090*/                   STG.E.64 desc[UR4][R6.64], R4 ;
        /*00a0*/              @P1 BRA `(.L_x_2) ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   NOP ;
"""


def test_a_step_of_cifar_dispatches_and_moves_no_more_than_it_did() -> None:
    operators, traffic = counts.operators(), counts.traffic()
    assert 1000 < operators["value"] <= OPERATORS
    assert operators["launches"] > 100
    assert traffic["each tensor of an operator once"] <= ONCE_GB
    assert traffic["read again by normalisations"] <= AGAIN_GB


def test_edm2_moves_no_more_between_its_convolutions_than_it_did() -> None:
    """Size S, an image forward in fp16."""
    network = replace(presets.get("edm2-img512-s"), dropout=0.0)
    assert 200e6 < network_traffic(network, counts.EDM2_BATCH) <= 270e6


def test_a_residual_block_passes_over_its_data_no_more_often_than_it_did() -> None:
    assert 4 < counts.passes()["value"] <= PASSES


def test_instructions_of_loops_are_counted_for_an_element() -> None:
    opcodes, bodies = counts.loops(LISTING)
    assert len(opcodes) == 12
    assert [len(body) for body in bodies] == [4, 5]
    # Two arrays of 16 bits: 256 bits are 8 elements, and 128 bits are 4.
    assert counts.per_element(LISTING, 32) == (4 / 8 + 5 / 4, 1 / 8)
    straight = LISTING.replace("BRA `(", "BRA.U `(.L_y_")
    assert counts.per_element(straight, 32) == (12 / 12, 1 / 12)


def test_the_launches_whose_instructions_are_counted_are_some_of_the_recipe() -> None:
    variants = counts._norm_backward()
    assert variants
    assert all(variant.constant("s_c") == 1 for variant in variants)  # channels_last
    assert all(dict(variant.types)["p_dy"] == "*bf16" for variant in variants)


def test_the_compile_report_has_what_the_recipe_launches() -> None:
    """To the last constant: the cases of `ipfm bench --offline` are recorded as a step is."""
    launched = {launch.variant for launch in counts._cifar().launches}
    chosen = [variants.perturb_situations, variants.loss_situations, variants.group_norm_situations]
    shared = {case.kernel for case in variants.cases(of=chosen) if case.code in launched}
    assert shared == {"perturb", "ipfm_loss", "denoising_loss", "group_norm_silu", "group_norm_silu backward"}


def test_what_a_gpu_has_to_show_first_is_no_more_than_it_was() -> None:
    """Depthwise convolutions in channels_last, and noise: each program draws its sample's gamma variable anew."""
    recording = counts._cifar()
    depthwise = [(kind, count) for kind, count in recording.convolutions.items() if kind.groups > 1]
    found = {
        transposed: sum(count for kind, count in depthwise if kind.transposed == transposed)
        for transposed in (False, True)
    }
    assert 0 < found[False] <= 46 and 0 < found[True] <= 44
    # Their filters are constants: no gradient of a weight.
    assert not any(kind.backward for kind, _ in depthwise)
    noise = [launch for launch in recording.launches if launch.variant.name == "perturb_kernel"]
    assert noise and all(launch.grid[0] <= 12 * counts.BATCH for launch in noise)


def test_a_row_by_its_name(tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "counted", lambda row: {"value": 7, "of it reads": 4})
    said = f"{counts.ROWS['passes'][0]}: 7 (at most 7)\n    of it reads: 4\n"
    counts.main(["passes", "--json", str(tmp_path / "row.json")])
    assert capsys.readouterr().out == said
    assert json.loads((tmp_path / "row.json").read_text()) == {"passes": {"value": 7, "of it reads": 4}}
    counts.main([])
    assert capsys.readouterr().out.count("(at most ") == len(counts.ROWS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["passses"], "there is no row passses; possible: synchronisations, operators, replays,"),
        (["passes", "--json", "missing/row.json"], "--json: there is no folder missing"),
    ],
)
def test_what_cannot_be_counted_is_said_in_a_line(words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        counts.main(words)
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_row_that_fails_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts.sys, "executable", "false")
    with pytest.raises(SystemExit, match=r"passes could not be counted \(exit code 1\)"):
        counts.main(["passes"])
