"""Noise levels: the grid, the laws that training draws from, the generator's levels, refusals."""

import math

import pytest
import scipy.stats
import torch

from ipfm.engine.noise_levels import NoiseLevels, check_sigmas, few_step_sigmas

# The seeds are fixed: the laws pass or fail alike each time. On fresh seeds this level would let all the tests of laws
# in this file together (fewer than 10) fail once in a million runs.
FALSE_ALARM = 1e-7
POSITION = {"seed": 3, "stream": 1, "step": 17}
MANY = torch.arange(200_000)
OTHER = NoiseLevels(sigma_min=0.01, sigma_max=50.0, rho=3.0, p_mean=-0.5, p_std=0.7, t_max=1000.0)


def sigma_at(t: float, levels: NoiseLevels) -> float:
    """Equation 5 of Karras et al. (2022) with t = 1 at sigma_max, in Python's own floats."""
    low, high = levels.sigma_min ** (1 / levels.rho), levels.sigma_max ** (1 / levels.rho)
    return (high + (1 - t) * (low - high)) ** levels.rho


@pytest.mark.parametrize("levels", [NoiseLevels(), OTHER], ids=["default", "other"])
@pytest.mark.parametrize("steps", [2, 3, 18, 40])
def test_karras_grid(levels, steps):
    grid = levels.karras(steps)
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
    expected = [sigma_at(1 - i / (steps - 1), levels) for i in range(steps)]
    torch.testing.assert_close(grid[:-1], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert grid[0].item() == pytest.approx(levels.sigma_max, rel=1e-12)
    assert grid[-2].item() == pytest.approx(levels.sigma_min, rel=1e-12)
    assert grid[-1].item() == 0
    assert (grid.diff() < 0).all()


def test_karras_grid_of_one_step():
    assert NoiseLevels().karras(1).tolist() == pytest.approx([80.0, 0.0], rel=1e-12)


def test_levels_of_the_generator_step():
    """t <= t_max/1000 = 0.8 keeps sigma at or below 24.4 [Zhou et al. 2024]."""
    levels = NoiseLevels()
    t = torch.tensor([0.0, 0.8, 1.0], dtype=torch.float64)
    assert levels.at(t).tolist() == pytest.approx([0.002, 24.40834178658, 80.0], rel=1e-12)
    sigma = levels.generator(MANY, **POSITION)
    assert sigma.dtype == torch.float32 and sigma.shape == (200_000,)
    assert sigma.min() >= 0.002 and sigma.max() <= 24.4084
    assert sigma.max() > 24.3  # the range is used to its end


def test_levels_of_the_generator_step_by_their_share():
    """Of SiD's law at every tenth, and of DMD2's ends, 2 % and 98 % of the grid."""
    t = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.02, 0.98], dtype=torch.float64)
    printed = [0.017, 0.085, 0.32, 0.97, 2.5, 5.8, 12.4, 24.4, 0.0032, 72]
    assert NoiseLevels().at(t).tolist() == pytest.approx(printed, rel=0.03)


@pytest.mark.parametrize("levels", [NoiseLevels(), OTHER], ids=["default", "other"])
def test_denoising_law(levels):
    sigma = levels.denoising(MANY, **POSITION)
    assert sigma.dtype == torch.float32 and sigma.shape == (200_000,)
    standard = (sigma.double().log() - levels.p_mean) / levels.p_std
    assert scipy.stats.kstest(standard.numpy(), "norm").pvalue > FALSE_ALARM


@pytest.mark.parametrize("levels", [NoiseLevels(), OTHER], ids=["default", "other"])
def test_generator_law(levels):
    sigma = levels.generator(MANY, **POSITION).double()
    low, high = levels.sigma_min ** (1 / levels.rho), levels.sigma_max ** (1 / levels.rho)
    t = (sigma ** (1 / levels.rho) - low) / (high - low)
    assert scipy.stats.kstest((t / (levels.t_max / 1000)).numpy(), "uniform").pvalue > FALSE_ALARM


@pytest.mark.parametrize("draw", ["denoising", "generator"])
def test_a_sample_does_not_depend_on_its_batch(draw):
    function = getattr(NoiseLevels(), draw)
    index = torch.arange(32)
    whole = function(index, **POSITION)
    assert torch.equal(torch.cat([function(part, **POSITION) for part in index.split(5)]), whole)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(function(index[order], **POSITION), whole[order])
    for other in ({"seed": 4}, {"stream": 2}, {"step": 18}):
        assert not (function(index, **{**POSITION, **other}) == whole).any()


def test_few_step_levels():
    assert few_step_sigmas(1) == (2.5,)
    assert few_step_sigmas(2) == (2.5, 1.25)
    assert few_step_sigmas(4) == (2.5, 1.875, 1.25, 0.625)
    assert few_step_sigmas(5, 10.0) == pytest.approx((10, 8, 6, 4, 2))


def test_sigmas_are_returned_as_floats():
    assert check_sigmas((3, 2, 1)) == (3.0, 2.0, 1.0)
    assert check_sigmas([2.5]) == (2.5,)
    assert all(type(sigma) is float for sigma in check_sigmas((3, 2)))


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ((), "sigmas must hold at least one noise level, got none"),
        ((1.0, 0.0), "sigmas must be finite and > 0, got 1, 0"),
        ((-1.0,), "sigmas must be finite and > 0, got -1"),
        ((math.inf, 1.0), "sigmas must be finite and > 0, got inf, 1"),
        ((math.nan,), "sigmas must be finite and > 0, got nan"),
        ((1.0, 1.0), "sigmas must fall strictly, got 1, 1"),
        ((2.0, 1.0, 1.5), "sigmas must fall strictly, got 2, 1, 1.5"),
        (("2.5",), "sigmas must be a sequence of numbers, got ('2.5',)"),
        (2.5, "sigmas must be a sequence of numbers, got 2.5"),
    ],
)
def test_impossible_sigmas(sigmas, message):
    with pytest.raises(ValueError) as error:
        check_sigmas(sigmas)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["sigma_min", "sigma_max", "rho", "sigma_data", "p_std"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "1", True])
def test_levels_must_be_finite_and_positive(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a finite number > 0, got {value}$"):
        NoiseLevels(**{name: value})


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "x"])
def test_mean_must_be_finite(value):
    with pytest.raises(ValueError, match=f"^p_mean must be a finite number, got {value}$"):
        NoiseLevels(p_mean=value)


@pytest.mark.parametrize("value", [0.0, -1.0, 1000.5, math.nan, math.inf, "800"])
def test_t_max_out_of_range(value):
    with pytest.raises(ValueError, match=rf"^t_max must lie in \(0, 1000\], got {value}$"):
        NoiseLevels(t_max=value)


@pytest.mark.parametrize("sigma_min", [80.0, 90.0])
def test_empty_range(sigma_min):
    with pytest.raises(ValueError, match=f"^sigma_min must be below sigma_max, got {sigma_min} and 80.0$"):
        NoiseLevels(sigma_min=sigma_min)


@pytest.mark.parametrize("steps", [0, -3, 2.0, True])
def test_numbers_of_steps(steps):
    with pytest.raises(ValueError, match=f"^the number of sampling steps must be an integer >= 1, got {steps}$"):
        NoiseLevels().karras(steps)
    with pytest.raises(ValueError, match=f"^the number of generator steps must be an integer >= 1, got {steps}$"):
        few_step_sigmas(steps)


@pytest.mark.parametrize("sigma_init", [0.0, -2.5, math.nan, math.inf])
def test_impossible_first_level(sigma_init):
    with pytest.raises(ValueError, match=f"^sigma_init must be a finite number > 0, got {sigma_init}$"):
        few_step_sigmas(2, sigma_init)
