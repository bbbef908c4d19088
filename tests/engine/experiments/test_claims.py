"""Claims of a paper: what confirms them, what refutes them, and what decides nothing."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from ipfm.engine.experiments.ablation_report import Curve
from ipfm.engine.experiments.claims import (
    Claim,
    Diverge,
    EndsLower,
    FasterEarly,
    Found,
    ReachesTeacher,
    decided_by,
    judged,
    verdicts_table,
    way_left,
    write_verdicts,
)


def curve(*distances: float, seed: int = 0, variant: str = "a") -> Curve:
    return Curve(variant, seed, 10, tuple((100 * i, value) for i, value in enumerate(distances)))


def found(*runs: tuple[float, ...], teacher: float = 1.0) -> Found:
    """Runs of seeds 0, 1, 2 and so on."""
    return Found([curve(*run, seed=seed) for seed, run in enumerate(runs)], teacher)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("lower", "outcome", "said"),
    [
        ([(9, 2.0), (9, 2.1), (9, 1.9)], "confirmed", "mean difference -1.003"),
        ([(9, 4.0), (9, 4.1), (9, 3.9)], "refuted", "mean difference 0.9967"),
        ([(9, 2.0), (9, 4.5), (9, 2.5)], "undecided", "3 pairs"),
        ([(9, 2.0), (9, 2.1)], "undecided", "2 pairs, 3 are needed"),
        ([(9, 2.0), (9, 2.1), (9, math.nan)], "refuted", "1 of 3 runs of a diverged"),
        ([(9, 1.0, 8.0), (9, 2.1), (9, 1.9)], "refuted", "1 of 3 runs of a diverged"),
    ],
)
def test_a_lower_end_is_decided_by_the_pairs_of_equal_seeds(
    lower: list[tuple[float, ...]], outcome: str, said: str
) -> None:
    verdict = EndsLower(lower="a", higher="b").judge({"a": found(*lower), "b": found((9, 3.0), (9, 3.11), (9, 2.9))})
    assert verdict.outcome == outcome and said in verdict.said


def test_the_way_left_is_1_at_the_start_and_0_at_the_teacher() -> None:
    e = math.e
    # ln(d / teacher) = 4, 2, 0: the way left falls from 1 over 1/2 to 0.
    assert way_left(curve(2 * e**4, 2 * e**2, 2.0), 2.0, 200) == pytest.approx(0.5)
    assert way_left(curve(2 * e**4, 2 * e**2, 2.0), 2.0, 100) == pytest.approx(0.75)
    # Between two evaluations the distance, not its logarithm, is taken to be straight.
    between = math.log((e**4 + e**2) / 2) / 4
    assert way_left(curve(e**4, e**2, 1.0), 1.0, 50) == pytest.approx((1 + between) / 2)
    for distances, teacher in (
        ((9.0, 2.0), 1.0), ((9.0, math.nan, 2.0), 1.0), ((1.0, 0.9, 0.8), 1.0), ((9.0, 2.0, 1.0), math.nan), ((), 1.0),
    ):  # fmt: skip
        assert math.isnan(way_left(curve(*distances), teacher, 200))
    late = Curve("a", 0, 10, ((100, 4.0), (200, 2.0)))
    assert math.isnan(way_left(late, 1.0, 200))


def test_a_start_that_is_closer_alone_is_not_faster() -> None:
    """Each side is measured on its own way: from where it begins to where its teacher is."""
    slow = [(8.0, 4.0 + 0.01 * seed, 2.0) for seed in range(3)]
    closer = [tuple(value / 2 for value in run) for run in slow]
    criterion = FasterEarly(faster="a", slower="b", share=1.0)
    verdict = criterion.judge({"a": found(*closer, teacher=0.5), "b": found(*slow)})
    assert verdict.outcome == "undecided" and verdict.estimate == pytest.approx(0)
    fast = [(8.0, 2.0 + 0.02 * seed, 2.0) for seed in range(3)]
    assert criterion.judge({"a": found(*fast), "b": found(*slow)}).outcome == "confirmed"
    swapped = criterion.judge({"a": found(*slow), "b": found(*fast)})
    assert swapped.outcome == "refuted" and "up to 2 thousand images" in swapped.said
    # Only the first half is looked at: there both are alike, but for noise.
    late = [(8.0, 4.0 + 0.01 * (2 - seed), 1.1) for seed in range(3)]
    assert FasterEarly(faster="a", slower="b").judge({"a": found(*late), "b": found(*slow)}).outcome == "undecided"
    stopped = [(8.0, math.nan), *fast[1:]]
    assert "2 pairs" in criterion.judge({"a": found(*stopped), "b": found(*slow)}).said


@pytest.mark.parametrize(
    ("generators", "outcome"),
    [
        ([(1.1, 1.0, 1.2), (1.1, 1.1, 1.1), (1.0, 1.2, 1.0)], "confirmed"),
        ([(0.5, 0.5, 0.5)] * 3, "confirmed"),
        ([(1.9, 1.8, 1.9)] * 3, "refuted"),
        ([(1.9, 1.15, 1.9)] * 3, "undecided"),
        ([(1.0, 1.1, 1.2)] * 2, "undecided"),
        ([(1.0, 1.1, 1.2), (math.nan,) * 3, (1.0, 1.0, 1.0)], "refuted"),
    ],
)
def test_a_generator_reaches_its_teacher_within_what_sets_of_samples_differ_by(
    generators: list[tuple[float, ...]], outcome: str
) -> None:
    its = Found([curve(9.0, 1.0)] * len(generators), 1.0, dict(enumerate(generators)), (1.0, 1.1, 1.2))
    assert ReachesTeacher(label="a").judge({"a": its}).outcome == outcome


def test_which_variants_diverge() -> None:
    gone, rising, stays = found((9, 1.0, math.nan)), found((9, 1.0, 5.5)), found((9, 1.0, 4.5))
    criterion = Diverge(diverging=("inf",), one_of=("a", "b"), stable=("other",))
    assert criterion.judge({"inf": gone, "a": rising, "b": stays, "other": stays}).outcome == "confirmed"
    for a, b, inf, other in ((stays, stays, gone, stays), (gone, rising, gone, stays), (gone, stays, stays, stays)):
        assert criterion.judge({"inf": inf, "a": a, "b": b, "other": other}).outcome == "refuted"
    verdict = criterion.judge({"inf": gone, "a": rising, "b": stays, "other": gone})
    assert verdict.outcome == "refuted" and "a: 1 of 1 diverged, last / lowest 5.500" in verdict.said
    # Half of the runs are not most of them.
    half = found((9, 1.0, math.nan), (9, 1.0, 1.0))
    assert criterion.judge({"inf": half, "a": rising, "b": stays, "other": stays}).outcome == "refuted"


def test_a_claim_is_judged_where_its_variants_are_run(tmp_path: Path) -> None:
    claims = [
        Claim(text="a below b", source="a paper", criterion=EndsLower(lower="a", higher="b")),
        Claim(text="a below c", source="a paper", criterion=EndsLower(lower="a", higher="c")),
    ]
    assert [claim.text for claim in decided_by(claims, ["a", "b", "d"])] == ["a below b"]
    verdicts = judged(claims, {"a": found((9, 2.0), (9, 2.1), (9, 1.9)), "b": found((9, 3.0), (9, 3.2), (9, 2.9))})
    lines = verdicts_table(verdicts).splitlines()
    assert lines[2].startswith("| a below b | confirmed | mean difference -1.033") and len(lines) == 5
    assert lines[4].startswith("* a below b (a paper): distance at the end of a minus that of b, by seed: confirmed ")
    write_verdicts(verdicts, tmp_path / "claims.csv")
    with open(tmp_path / "claims.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["outcome"], row["n"]) == ("confirmed", "3") and float(row["high"]) < 0
