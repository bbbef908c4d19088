"""Moving averages by half-life and by a power of the time, and those made afterwards."""

import math
from pathlib import Path

import numpy as np
import pytest

from ipfm.engine.averages import WIDEST, Average, Profile, combination, exponent, width

OFFICIAL = np.load(Path(__file__).parents[1] / "fixtures" / "edm2_phema.npz")


def test_powers_and_decays_are_the_official_ones():
    assert [exponent(float(std)) for std in OFFICIAL["std"]] == pytest.approx(OFFICIAL["exp"], rel=1e-13)
    for (std, seen, batch), beta in zip(OFFICIAL["beta_args"], OFFICIAL["beta"], strict=True):
        found = Average(std=float(std)).decay(round(seen / batch) - 1, int(batch), rampup=0.05, seen=0)
        assert found == pytest.approx(beta, rel=1e-13, abs=1e-15)
    assert Average(std=0.05).decay(0, 64, rampup=0.05, seen=0) == 0


def test_powers_and_decays_that_are_published():
    """EDM2's widths by their powers; of SiD and SiDA the decay once the half-life is whole: at a batch of the paper."""
    assert [exponent(std) for std in (0.01, 0.05, 0.1)] == pytest.approx([96.99, 16.97, 6.94], abs=0.005)
    for half_life, batch, decay in (
        (500.0, 256, 0.99965), (500.0, 512, 0.99929), (2000.0, 8192, 0.9972), (2000.0, 2048, 0.9993),
    ):  # fmt: skip
        found = Average(half_life=half_life).decay(10**7, batch, rampup=0.05, seen=10**9)
        assert found == pytest.approx(decay, abs=5e-5)


@pytest.mark.quick
@pytest.mark.parametrize("case", [0, 1])
def test_coefficients_are_the_official_ones(case):
    stored = [Profile(float(t), float(s)) for t, s in zip(OFFICIAL[f"in_nimg_{case}"], OFFICIAL[f"in_std_{case}"],
                                                          strict=True)]  # fmt: skip
    wanted = zip(OFFICIAL[f"out_nimg_{case}"], OFFICIAL[f"out_std_{case}"], strict=True)
    for column, (t, s) in enumerate(wanted):
        found = combination(stored, Profile(float(t), float(s)))
        assert np.abs(found - OFFICIAL[f"coef_{case}"][:, column]).max() <= 1e-11
        assert found.sum() == pytest.approx(1, abs=1e-14)


def test_what_is_combined_is_the_average_of_the_wanted_width():
    """On a training whose weight after n images is known: averages kept along the way, against one kept directly."""
    batch, steps = 4, 2048
    kept = [0.05, 0.1, 0.075]
    values, stored = [0.0] * 3, {}
    for step in range(steps):
        weight = math.sin(step / 300) + (step / steps) ** 2
        for i, std in enumerate(kept):
            decay = Average(std=std).decay(step, batch, rampup=1, seen=0)
            values[i] = decay * values[i] + (1 - decay) * weight
        if (step + 1) % 64 == 0:
            stored |= {Profile((step + 1) * batch, std): values[i] for i, std in enumerate(kept[:2])}
    found = combination(list(stored), Profile(steps * batch, kept[2]))
    assert found @ np.array(list(stored.values())) == pytest.approx(values[2], rel=5e-4)
    assert abs(values[2] - values[0]) > 10 * 5e-4 * abs(values[2])


def test_names_sort_and_read():
    names = {None: "ema500k", 0.05: "ema0.05", 0.1: "ema0.1", 0.135: "ema0.135"}
    for std, name in names.items():
        assert (Average(half_life=500.0) if std is None else Average(std=std)).name == name
    assert Average(half_life=0.05).name == "ema0.05k" and Average(half_life=5e7).name == "ema50000000k"
    assert Average(half_life=50.0).in_words == "half-life 50 kimg" and Average(std=0.1).in_words == "relative width 0.1"


@pytest.mark.parametrize("std", [0, -0.1, WIDEST, 0.3, math.nan, 1e-5])
def test_a_width_that_no_growing_power_has(std):
    with pytest.raises(ValueError, match=r"^std must be relative widths from 0\.0001 to 0\.2887 \(below\), got"):
        exponent(std)
    assert width(exponent(0.288)) == pytest.approx(0.288) and width(0.0) == WIDEST


def test_averages_that_cannot_be_combined():
    stored = [Profile(1000.0, 0.05), Profile(2000.0, 0.05)]
    for at in (1500.0, 1000.0, 3000.0):
        with pytest.raises(ValueError, match="must be of the time of the last of the stored ones"):
            combination(stored, Profile(at, 0.1))
    with pytest.raises(ValueError, match=r"the average of 1 kimg and std 0\.05 is there twice"):
        combination([stored[0], *stored], Profile(2000.0, 0.1))
    with pytest.raises(ValueError, match="no average to combine"):
        combination([], Profile(2000.0, 0.1))
