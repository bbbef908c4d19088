"""Augmentation: the filter, the labels' distribution, geometry against float64, independence of the batch."""

import math
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from ipfm.engine.data import augmentation
from ipfm.engine.data.augmentation import (
    AUGMENT_DIM,
    SYM6,
    Augmented,
    _Drawn,
    _labels,
    _Transform,
    _transform,
    _warp,
    augment,
)
from ipfm.engine.random_streams import Stream

SIZE = 32
X_FLIP, Y_FLIP, SCALE, COS, SIN, ALONG, ACROSS, RIGHT, DOWN = range(9)


def run(images: torch.Tensor, probability: float, *, seed: int = 3, step: int = 0, first: int = 0) -> Augmented:
    index = torch.arange(first, first + len(images))
    return augment(images, probability, seed=seed, stream=Stream.TEACHER_AUGMENT, step=step, sample_index=index)


def noise(n: int, size: int = SIZE, channels: int = 3) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    """12 000 labels at p = 0.3."""
    return run(torch.zeros(12_000, 1, 8, 8), 0.3).labels


# -- the filter --------------------------------------------------------------------------------------------------------


def test_the_filter_is_an_orthonormal_low_pass_with_six_vanishing_moments():
    """What defines a filter of twelve taps but for its phase, of which the last line tells one [Daubechies 1992]."""
    h, k = np.array(SYM6), np.arange(12)
    assert len(h) == 12 and abs(h.sum() - math.sqrt(2)) < 1e-11
    for shift in range(6):
        assert abs(np.dot(h[: 12 - 2 * shift], h[2 * shift :]) - (shift == 0)) < 1e-11
    for moment in range(6):
        assert abs((h * (-1.0) ** k * k**moment).sum()) < 1e-8
    assert abs((h * (-1.0) ** k * k**6).sum()) > 1
    # Of the filters that share these properties the symlet is the nearest to symmetry: mirroring any of the zeros, but
    # those at -1, in the unit circle gives another one.
    rest = h
    for _ in range(6):
        rest = np.polydiv(rest, [1.0, 1.0])[0]
    zeros = np.roots(rest)
    found = []
    for turned in product((False, True), repeat=5):
        other = np.poly(np.concatenate([np.where(turned, 1 / zeros, zeros), -np.ones(6)]))
        if abs(other.imag).max() < 1e-6:
            found.append(asymmetry(other.real))
    assert len(found) == 8 and asymmetry(h) < min(found) + 1e-6 < 0.5 * sorted(found)[4]


def asymmetry(h: np.ndarray) -> float:
    """Least mean distance of the phase of the filter from that of a symmetric one."""
    frequency = np.linspace(0.01, math.pi * 0.6, 60)
    phase = np.unwrap(np.angle(np.exp(-1j * np.outer(frequency, np.arange(len(h)))) @ h * np.sign(h.sum())))
    slope = (phase @ frequency) / (frequency @ frequency)
    return float(np.abs(phase - slope * frequency).mean())


# -- labels ------------------------------------------------------------------------------------------------------------


def test_probability_zero_leaves_everything(device):
    images = noise(4).to(device)
    result = augment(images, 0.0, seed=0, stream=17, step=0, sample_index=torch.arange(4, device=device))
    assert result.images is images
    assert torch.equal(result.labels, torch.zeros(4, AUGMENT_DIM, device=device))
    assert result.labels.dtype == torch.float32 and AUGMENT_DIM == 9


def test_effects_come_with_their_probabilities(labels):
    """Eleven binomials, false alarm 1e-7 each; each pair of effects as well, which are independent."""
    n, p = len(labels), 0.3
    present = {
        "scale": labels[:, SCALE] != 0,
        "rotation": labels[:, SIN] != 0,
        "stretch": labels[:, ALONG] != 0,
        "shift": labels[:, RIGHT] != 0,
    }
    for name, is_there in present.items():
        assert within(is_there, n, p), name
    assert within(labels[:, X_FLIP] == 1, n, 0.5)
    assert within(labels[:, Y_FLIP] == 1, n, p / 2)
    assert set(labels[:, :2].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(labels[:, RIGHT] != 0, labels[:, DOWN] != 0)
    names = list(present)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert within(present[one] & present[other], n, p * p), (one, other)
    # The axis of a stretch is r = 0 half of the times.
    assert within((labels[:, ALONG] != 0) & (labels[:, ACROSS] == 0), n, p / 2)


def within(hits: torch.Tensor, n: int, p: float) -> bool:
    low, high = scipy.stats.binom.ppf([5e-8, 1 - 5e-8], n, p)
    return bool(low <= hits.sum() <= high)


def test_parameters_have_their_distributions(labels):
    """Kolmogorov-Smirnov, six tests with false alarm 1e-7 each."""
    some = {name: labels[:, i][labels[:, i] != 0].double() for name, i in
            (("scale", SCALE), ("right", RIGHT), ("down", DOWN))}  # fmt: skip
    for name, values in some.items():
        assert scipy.stats.kstest(values, "norm").pvalue > 1e-7, name
    turned = labels[labels[:, SIN] != 0].double()
    angle = torch.atan2(turned[:, SIN], turned[:, COS] + 1)
    assert scipy.stats.kstest(angle, "uniform", args=(-math.pi, 2 * math.pi)).pvalue > 1e-7
    torch.testing.assert_close((turned[:, COS] + 1) ** 2 + turned[:, SIN] ** 2, torch.ones(len(turned)).double())
    stretched = labels[labels[:, ALONG] != 0].double()
    length = stretched[:, [ALONG, ACROSS]].norm(dim=1)
    assert scipy.stats.kstest(length, "halfnorm").pvalue > 1e-7
    tilted = stretched[stretched[:, ACROSS] != 0]
    axis = torch.atan2(tilted[:, ACROSS], tilted[:, ALONG]) % math.pi
    assert scipy.stats.kstest(axis, "uniform", args=(0, math.pi)).pvalue > 1e-7


def test_certain_and_tiny_probabilities():
    """With p = 1 all effects come, but for the coins; with p = 1e-9 only x-flips do (false alarm 1e-6 together)."""
    every = run(torch.zeros(2000, 1, 8, 8), 1.0).labels
    assert (every[:, [SCALE, COS, SIN, ALONG, RIGHT, DOWN]] != 0).all()
    assert within(every[:, Y_FLIP] == 1, 2000, 0.5)
    hardly = run(torch.zeros(2000, 1, 8, 8), 1e-9).labels
    assert within(hardly[:, X_FLIP] == 1, 2000, 0.5) and not hardly[:, 1:].any()


# -- geometry ----------------------------------------------------------------------------------------------------------


@cache
def drawn() -> torch.Tensor:
    return run(torch.zeros(6000, 1, 8, 8), 0.3).labels


def alone(effects: tuple[int, ...], n: int, size: int = SIZE, flips: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(sample indices, labels) of samples at p = 0.3 with these effects and no others."""
    found = drawn()
    wanted = torch.zeros(9, dtype=torch.bool)
    wanted[list(effects)] = True
    others = found[:, ~wanted] if not flips else found[:, 2:][:, ~wanted[2:]]
    rows = ((found[:, wanted] != 0).all(1) & (others == 0).all(1)).nonzero()[:n, 0]
    assert len(rows) == n
    return rows, found[rows]


def augmented(images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return augment(images, 0.3, seed=3, stream=Stream.TEACHER_AUGMENT, step=0, sample_index=rows).images


@pytest.mark.parametrize("size", [8, 9, 32, 64])
def test_flips_reorder_the_pixels(size):
    images = noise(6, size)
    for effects, axes in (((), []), ((X_FLIP,), [3]), ((Y_FLIP,), [2]), ((X_FLIP, Y_FLIP), [2, 3])):
        rows, _ = alone(effects, 6)
        torch.testing.assert_close(augmented(images, rows), images.flip(axes), atol=2.5e-5, rtol=0)


def scene(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A smooth picture without symmetry, in pixels from the middle of a 32x32 image; flat towards the edges."""
    hill = np.exp(-((x - 3) ** 2 + 0.5 * (y + 2) ** 2 + 0.4 * (x - 3) * (y + 2)) / 24)
    return hill - 0.7 * np.exp(-((x + 4) ** 2 + (y - 3) ** 2) / 16)


def pixels() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    return x, y


def maps_of(label: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(A, t): the augmented picture shows at A q + t what the image shows at q. From the labels and [EDM, table 6].

    Stretches by w along r and by -w along r + π have equal labels: two maps then.
    """
    flip = np.diag([1 - 2 * label[X_FLIP], 1 - 2 * label[Y_FLIP]])
    turn = np.arctan2(label[SIN], label[COS] + 1)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    scaling = 2 ** (0.2 * label[SCALE]) * np.eye(2)
    w, r = np.hypot(label[ALONG], label[ACROSS]), np.arctan2(label[ACROSS], label[ALONG])
    stretches = [(w, r), (-w, r)] if label[ACROSS] else [(label[ALONG], 0.0)]
    maps = []
    for w, r in stretches:
        # (cos r, -sin r) and what is across it, rows downwards: r is anticlockwise to the eye.
        axes = np.array([[np.cos(r), np.sin(r)], [-np.sin(r), np.cos(r)]])
        stretch = axes @ np.diag([2 ** (0.2 * w), 2 ** (-0.2 * w)]) @ axes.T
        maps.append((stretch @ rotation @ scaling @ flip, SIZE * 0.125 * label[[RIGHT, DOWN]]))
    return maps


@pytest.mark.parametrize(
    ("effects", "tolerance"),
    [
        pytest.param((SCALE,), 0.02, id="scale"),
        pytest.param((COS, SIN), 0.02, id="rotation"),
        pytest.param((ALONG,), 0.02, id="stretch-in-x"),
        pytest.param((ALONG, ACROSS), 0.02, id="stretch"),
        pytest.param((RIGHT, DOWN), 0.02, id="shift"),
        pytest.param((SCALE, COS, SIN, ALONG, ACROSS, RIGHT, DOWN), 0.03, id="all"),
    ],
)
def test_pictures_move_as_their_labels_say(effects, tolerance):
    """A smooth scene against the scene itself, evaluated in float64 where the labels say that its points came from.

    With flips before. The tolerance is for bilinear interpolation between the upsampled pixels, of values of size 1.
    """
    rows, labels = alone(effects, 3 if len(effects) == 7 else 12, flips=True)
    x, y = pixels()
    image = torch.from_numpy(scene(x, y)).float().expand(len(rows), 1, SIZE, SIZE)
    got = augmented(image, rows)[:, 0].double().numpy()
    checked, signs = 0, set()
    for picture, label in zip(got, labels.double().numpy(), strict=True):
        errors, others = [], []
        for matrix, shift in maps_of(label):
            q = np.stack([x - shift[0], y - shift[1]])
            u, v = np.tensordot(np.linalg.inv(matrix), q, 1)
            inside = (abs(u) < SIZE / 2 - 2) & (abs(v) < SIZE / 2 - 2)
            errors.append(abs(picture - scene(u, v))[inside].max())
            others.append(abs(scene(x, y) - scene(u, v))[inside].max())
            checked += inside.sum() / len(maps_of(label))
        assert min(errors) < tolerance
        signs.add(int(np.argmin(errors)))
        unmoved = abs(maps_of(label)[0][0] - np.eye(2)).max() < 0.1 and abs(shift).max() < 1
        assert unmoved or min(others) > 2 * tolerance
    assert checked > 200 * len(rows)
    assert (signs == {0, 1}) == (ACROSS in effects)


def warp(images: torch.Tensor, inverse: tuple[float, ...] = (1, 0, 0, 1), shift: tuple[float, ...] = (0, 0)):
    """`images` under one map: `inverse` (xx, xy, yx, yy), `shift` in pixels to the right and down; no flips."""
    values = [0, 0, *inverse, *(s / images.shape[2] for s in shift)]
    return _warp(images, _Transform(*torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, len(images))))


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_quarter_turns_reorder_a_smooth_picture(quarter):
    picture = torch.from_numpy(scene(*pixels())).float()[None, None]
    c, s = [(0, 1), (-1, 0), (0, -1)][quarter - 1]
    torch.testing.assert_close(warp(picture, (c, -s, s, c)), picture.rot90(quarter, (2, 3)), atol=0.006, rtol=0)


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -5), (-4, 2)])
def test_shifts_by_whole_pixels_copy_them(right, down):
    """From outside comes the reflection, which does not repeat the edge."""
    images = noise(2)
    wide = torch.nn.functional.pad(images, (8, 8, 8, 8), mode="reflect")
    expected = wide[:, :, 8 - down : 40 - down, 8 - right : 40 - right]
    torch.testing.assert_close(warp(images, shift=(right, down)), expected, atol=2.5e-5, rtol=0)


def test_reflection_reaches_one_image_out_and_zeros_lie_beyond():
    moved = warp(torch.ones(1, 1, SIZE, SIZE), shift=(40, 0))[0, 0]
    edge = 40 - (SIZE - 1)  # of the reflection, 31 pixels to the left of the image
    torch.testing.assert_close(moved[:, edge + 6 :], torch.ones(SIZE, SIZE - edge - 6))
    torch.testing.assert_close(moved[:, : edge - 6], torch.zeros(SIZE, edge - 6))
    # So far away that the grid has left everything.
    assert not warp(torch.ones(1, 1, SIZE, SIZE), shift=(300, -300)).any()


@pytest.fixture(scope="module")
def official() -> dict[str, np.ndarray]:
    """What EDM's own pipe made of twenty images: each effect alone, in pairs, all together."""
    with np.load(Path(__file__).parents[2] / "fixtures" / "augment.npz") as file:
        return dict(file)


def apart(official: dict[str, np.ndarray], *, mirrored_stretch: bool = False) -> np.ndarray:
    """Root mean square between the official images and ours with the same numbers drawn, an image each."""
    transform = _transform(_Drawn(*torch.from_numpy(official["parameters"]).T), mirrored_stretch=mirrored_stretch)
    difference = _warp(torch.from_numpy(official["images"]), transform).double().numpy() - official["augmented"]
    return np.sqrt(np.square(difference).mean((1, 2, 3)))


def test_each_effect_and_all_together_agree_with_the_official_pipe(official):
    rms = apart(official)
    assert len(rms) == 20 and {*official["kinds"]} >= {"xflip", "yflip", "scale", "turn", "stretch", "shift", "all"}
    assert (rms <= 0.015).all(), rms
    exact = np.isin(official["kinds"], ("none", "xflip", "yflip", "shift"))
    assert (rms[exact] < 1e-5).all(), rms
    # Stretched along the mirrored axis, as version 0.1 did, whose runs go on so.
    tilted = abs(official["labels"][:, ACROSS]) > 0.1
    assert tilted.sum() == 8 and (apart(official, mirrored_stretch=True)[tilted] > 0.015).all()


def test_labels_are_those_of_the_official_pipe(official):
    labels = _labels(_Drawn(*torch.from_numpy(official["parameters"]).T))
    torch.testing.assert_close(labels, torch.from_numpy(official["labels"]), atol=3e-7, rtol=0)


# -- samples on their own ----------------------------------------------------------------------------------------------


def test_a_sample_depends_on_its_index_alone():
    images = noise(20, 16)
    whole = run(images, 0.6)
    assert torch.equal(run(images, 0.6).images, whole.images)
    for rows in (torch.tensor([7]), torch.arange(19, -1, -3), torch.tensor([2, 2, 11])):
        part = augment(images[rows], 0.6, seed=3, stream=Stream.TEACHER_AUGMENT, step=0, sample_index=rows)
        # Not to the bit: a vector's last elements may be computed by other instructions.
        torch.testing.assert_close(part.images, whole.images[rows], atol=1e-5, rtol=0)
        torch.testing.assert_close(part.labels, whole.labels[rows], atol=1e-6, rtol=0)


def test_large_batches_are_cut_without_a_trace(monkeypatch):
    images = noise(9, 16)
    whole = run(images, 0.6)
    monkeypatch.setattr(augmentation, "_WORKSPACE", 2 * 3 * 102**2)
    torch.testing.assert_close(run(images, 0.6).images, whole.images, atol=1e-5, rtol=0)


def test_each_part_of_the_position_changes_the_numbers():
    images = torch.zeros(64, 1, 8, 8)
    first = run(images, 0.6).labels
    for other in (run(images, 0.6, seed=4), run(images, 0.6, step=1), run(images, 0.6, first=64)):
        assert (other.labels != first).any(1).sum() > 32
    index = torch.arange(64)
    student = augment(images, 0.6, seed=3, stream=Stream.STUDENT_AUGMENT, step=0, sample_index=index)
    assert (student.labels != first).any(1).sum() > 32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_sample_becomes_nan_and_touches_no_other(bad):
    images = noise(6, 16)
    expected = run(images, 0.6)
    spoilt = images.clone()
    spoilt[2, 1, 3, 15] = bad
    got = run(spoilt, 0.6)
    assert got.images[2].isnan().all()
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(got.images[others], expected.images[others])
    assert torch.equal(got.labels, expected.labels)


def test_no_gradient_and_no_change_of_the_images():
    images = noise(3, 8).requires_grad_()
    before = images.detach().clone()
    result = run(images, 0.5)
    assert not result.images.requires_grad and not result.labels.requires_grad
    assert result.images.dtype == torch.float32 and result.images.shape == images.shape
    assert torch.equal(images, before)


@pytest.mark.gpu
def test_a_gpu_agrees_without_a_synchronisation():
    images = noise(16)
    expected = run(images, 0.6)
    index = torch.arange(16, device="cuda")
    on_gpu = images.cuda()

    def call() -> Augmented:
        return augment(on_gpu, 0.6, seed=3, stream=Stream.TEACHER_AUGMENT, step=0, sample_index=index)

    call()  # compiles the random numbers' kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.images.cpu(), expected.images, atol=5e-5, rtol=0)
    torch.testing.assert_close(got.labels.cpu(), expected.labels, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 9)}, r"N >= 8, got \(2, 3, 8, 9\)"),
        ({"images": torch.zeros(2, 3, 7, 7)}, r"N >= 8, got \(2, 3, 7, 7\)"),
        ({"images": torch.zeros(2, 8, 8)}, r"got \(2, 8, 8\)"),
        ({"images": torch.zeros(2, 1, 8, 8, dtype=torch.float64)}, "must be float32, got torch.float64"),
        ({"probability": 1.5}, r"must lie in \[0, 1\], got 1.5"),
        ({"probability": math.nan}, "got nan"),
        ({"sample_index": torch.arange(3)}, r"shape \(2,\) on cpu, got \(3,\) on cpu"),
        ({"sample_index": torch.zeros(2)}, "int64"),
        ({"step": -1}, "step"),
    ],
)
def test_refusals(change, message):
    arguments = {"images": torch.zeros(2, 1, 8, 8), "probability": 0.5, "seed": 0, "stream": 16, "step": 0}
    arguments |= {"sample_index": torch.arange(2)} | change
    with pytest.raises(ValueError, match=message) as caught:
        augment(**arguments)
    assert "\n" not in str(caught.value)
