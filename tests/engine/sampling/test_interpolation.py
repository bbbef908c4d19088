"""The path between seeds: latents stay draws of the prior, ends are the seeds' images, and what cannot be is said."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import official_files as of
import pytest
import torch
from PIL import Image
from scipy import stats

from ipfm.engine import generate, load_generator, load_sampler
from ipfm.engine.commands.main import _main
from ipfm.engine.random_streams import Stream
from ipfm.engine.runtime.commandline import run_command
from ipfm.engine.sampling.image_sampler import ImageSampler
from ipfm.engine.sampling.interpolation import Between, _radii, _scores, between, path, shares
from ipfm.engine.sampling.samplers import Churn, heun_sample
from ipfm.engine.sampling.seeds import SampleNoise
from ipfm.kernels import perturb
from ipfm.models import EDMPrecond, NetworkConfig, load_teacher, save_model

SMALL = NetworkConfig(
    model_type="SongUNet", img_resolution=4, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1,
    attn_resolutions=(), D=16.0,
)  # fmt: skip
MODELS: dict[str, dict[str, object]] = {
    "one": {"task": "generator", "sigmas": [2.5]},
    "four": {"task": "generator", "sigmas": [2.5, 1.875, 1.25, 0.625]},
    "trajectory": {"task": "generator", "parametrisation": "trajectory", "sigma_max": 60.0, "sigma_min": 0.01},
    "classed": {"task": "generator", "sigmas": [2.5, 1.25]},
    "teacher": {"task": "teacher"},
}
DIMENSIONS = (0.5, 1.0, 16.0, 2048.0, math.inf)
# Two samples of the law, as [Massart 1990]: P(sup |F_n - F| > e) <= 2 exp(-2 n e^2), which is 1e-6 here.
PAIRS = 4000
FALSE_ALARM = 1e-6
LARGEST = math.sqrt(math.log(2 / FALSE_ALARM) / (2 * PAIRS))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, facts in MODELS.items():
        save_model(
            of.randomize(EDMPrecond(replace(SMALL, label_dim=3 * (name == "classed")))), root / name, extra=facts
        )
    return root


def sample(*arguments: object) -> int:
    try:
        run_command("ipfm", _main, ["sample", *map(str, arguments)])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def draws(D: float, sigma: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """PAIRS of independent draws of the prior of 1x4x4 images."""
    index = torch.arange(PAIRS)
    zeros, levels = torch.zeros(PAIRS, 1, 4, 4), torch.full((PAIRS,), sigma)
    first, last = (perturb(zeros, levels, D, seed=seed, stream=1, step=0, sample_index=index) for seed in (1, 2))
    return first, last


def distance(radii: torch.Tensor, D: float, sigma: float = 3.0) -> float:
    """Kolmogorov's distance of radii of 16 elements from their law."""
    ratio = (radii.double().flatten() / sigma).square().numpy()
    law = stats.chi2(16) if math.isinf(D) else stats.betaprime(8, D / 2, scale=D)
    return float(stats.kstest(ratio, law.cdf).statistic)


@pytest.mark.quick
@pytest.mark.parametrize("D", DIMENSIONS)
def test_the_prior_is_kept_all_along_the_path(D):
    """The norm's law, a uniform direction, and their independence; a straight line and a mean of logarithms fail."""
    first, last = draws(D)
    levels = torch.full((PAIRS,), 3.0)
    for share in (0.1, 0.5, 0.8):
        x = between(first, last, share, levels, D).flatten(1)
        radii = x.norm(dim=1)
        assert distance(radii, D) < LARGEST
        # Of a uniform direction u in R^16, (u_1 + 1) / 2 ~ Beta(15/2, 15/2).
        directions = (x / radii[:, None] + 1) / 2
        for element in (0, 7, 15):
            assert stats.kstest(directions[:, element].numpy(), stats.beta(7.5, 7.5).cdf).statistic < LARGEST
        large = radii > radii.median()
        for half in (large, ~large):
            found = stats.kstest(directions[half, 3].numpy(), stats.beta(7.5, 7.5).cdf).statistic
            assert found < LARGEST * math.sqrt(2)
    # The mean of two Cauchy variables is one.
    straight = distance(((first + last) / 2).flatten(1).norm(dim=1), D)
    assert straight < LARGEST if D == 1 else straight > LARGEST
    norms = [x.flatten(1).norm(dim=1).double() for x in (first, last)]
    assert distance((norms[0] * norms[1]).sqrt(), D) > 1.5 * LARGEST


@pytest.mark.parametrize("D", DIMENSIONS)
def test_directions_go_along_the_great_circle_at_equal_angles(D):
    first, last = (x[:50] for x in draws(D))
    levels = torch.full((50,), 3.0)
    steps = [first, *(between(first, last, share, levels, D) for share in (0.2, 0.4, 0.6, 0.8)), last]
    unit = [torch.nn.functional.normalize(x.double().flatten(1), dim=1) for x in steps]
    whole = (unit[0] * unit[-1]).sum(1).acos()
    for a, b in itertools.pairwise(unit):
        torch.testing.assert_close((a * b).sum(1).acos(), whole / 5, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("D", DIMENSIONS)
def test_the_path_begins_and_ends_in_the_seeds_latents_without_a_jump(D):
    first, last = (x[:50] for x in draws(D))
    levels = torch.full((50,), 3.0)
    for share, end in ((1e-7, first), (1 - 1e-7, last)):
        found = between(first, last, share, levels, D)
        size = end.double().flatten(1).norm(dim=1)
        assert ((found - end).flatten(1).norm(dim=1) / size).max() < 1e-4
    # Steps that are a tenth as long move a tenth as far.
    moved = [
        (between(first, last, 0.5, levels, D) - between(first, last, 0.5 + step, levels, D)).flatten(1).norm(dim=1)
        for step in (1e-3, 1e-4)
    ]
    torch.testing.assert_close(moved[1] * 10, moved[0], rtol=0.05, atol=0)


@pytest.mark.parametrize("size", [4, 64, 3072, 196_608])
@pytest.mark.parametrize("D", [0.1, *DIMENSIONS])
def test_scores_of_radii_lead_back_to_them(D, size):
    """Far into the tails, and where N is much larger than D."""
    scores = torch.linspace(-5, 5, 21, dtype=torch.float64)
    radii = _radii(scores, size, D)
    assert radii.isfinite().all() and (radii.diff() > 0).all()
    torch.testing.assert_close(_scores(radii, size, D), scores, rtol=1e-6, atol=1e-6)


def test_noise_of_the_smallest_D_stays_finite():
    noise = SampleNoise.of(200, [Between(i, i + 1, 0.5) for i in range(200)], 0, torch.device("cpu"))
    x = noise.perturb(torch.zeros(200, 1, 2, 2), torch.full((200,), 80.0), 0.02, stream=Stream.SAMPLER_LATENT, step=0)
    assert x.isfinite().all() and x.dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_ends_are_the_images_of_the_seeds_and_a_batch_changes_nothing(place, name):
    G = load_sampler(place / name)
    labels = 1 if name == "classed" else None
    found = G.interpolate(5, 2**63, n=7, class_labels=labels)
    assert found.shape == (7, 1, 4, 4)
    torch.testing.assert_close(found[[0, -1]], G.sample(seed=[5, 2**63], class_labels=labels), rtol=1e-4, atol=1e-5)
    in_batches = G.interpolate(5, 2**63, n=7, class_labels=labels, batch=2)
    torch.testing.assert_close(in_batches, found, rtol=1e-4, atol=1e-5)
    # The same path backwards, and no two images alike.
    back = G.interpolate(2**63, 5, n=7, class_labels=labels)
    torch.testing.assert_close(back.flip(0), found, rtol=1e-3, atol=1e-3)
    assert found.diff(dim=0).flatten(1).norm(dim=1).min() > 1e-3


def test_the_noise_of_later_steps_moves_too(place):
    """So that images change without a jump, where noise that is held would have to be one seed's or the other's."""
    G = load_generator(place / "four")
    distances = [G.interpolate(0, 1, n=n).diff(dim=0).flatten(1).norm(dim=1).max() for n in (5, 33)]
    assert distances[1] < distances[0] / 4
    near = generate(G.network, 2, seed=[Between(0, 1, 1e-4), Between(0, 1, 1 - 1e-4)])
    assert (near - G.sample(seed=[0, 1])).abs().max() < 0.01


def test_a_path_meets_each_of_its_seeds():
    assert path([4, 7], 2) == (4, 7)
    assert path([4, 7], 5) == (4, Between(4, 7, 0.25), Between(4, 7, 0.5), Between(4, 7, 0.75), 7)
    closed = path([0, 1, 2, 0], 8)
    assert [point for point in closed if isinstance(point, int)] == [0, 1, 2, 0] and len(closed) == 8
    assert all(0 < point.share < 1 for point in closed if isinstance(point, Between))
    assert shares(closed[1]) == {0: 0.5, 1: 0.5} and shares(2) == {2: 1.0}
    for n in range(3, 40):
        assert [p for p in path([5, 6, 5], n) if isinstance(p, int)] == [5, 6, 5] and len(path([5, 6, 5], n)) == n
    for seeds, n, said in (
        ([], 5, "interpolate needs two seeds or more, got none"),
        ([3], 5, "interpolate needs two seeds or more, got only 3"),
        ([3, 3], 5, "interpolate needs seeds that differ from one to the next, got 3, 3"),
        ([0, 1, 2], 2, "n must be at least 3, as the seeds 0, 1, 2 are among the images, got 2"),
        ([0, 1], 10**9, "n must be at most 10,000,000 for a path, got 1,000,000,000"),
    ):
        with pytest.raises(ValueError, match=said):
            path(seeds, n)


def seeds_of_classes(G: ImageSampler) -> tuple[int, int, int]:
    """Two seeds that draw one class, and one that draws another."""
    drawn = [SampleNoise.of(1, seed, 0, torch.device("cpu")).labels(G.classes) for seed in range(20)]
    classes = [int(labels.argmax()) for labels in drawn if labels is not None]
    same = [seed for seed in range(20) if classes[seed] == classes[0]]
    return same[0], same[1], next(seed for seed in range(20) if classes[seed] != classes[0])


def test_seeds_of_two_classes_are_refused_unless_one_is_given(place, tmp_path, capsys):
    G = load_generator(place / "classed")
    one, alike, other = seeds_of_classes(G)
    own = G.interpolate(one, alike, n=3)
    torch.testing.assert_close(own[[0, -1]], G.sample(seed=[one, alike]), rtol=1e-4, atol=1e-5)
    said = rf"the seeds {one} and {other} draw the classes \d and \d, and the network knows nothing between: give one "
    with pytest.raises(ValueError, match=said):
        G.interpolate(one, other, n=3)
    assert G.interpolate(one, other, n=3, class_labels=2).shape == (3, 1, 4, 4)
    out = tmp_path / "a.png"
    given = (place / "classed", "--out", out, "--interpolate", one, other)
    assert sample(*given) == 2 and not out.exists()
    assert "give one class for all images, by --classes or class_labels" in capsys.readouterr().err
    assert sample(*given, "--classes", "1,2") == 2
    assert "interpolate is within one class, as the network knows nothing between" in capsys.readouterr().err
    assert sample(*given, "--classes", "2") == 0
    # Rows between two classes are the caller's to give.
    rows = torch.lerp(torch.eye(3)[[0]], torch.eye(3)[[1]], torch.linspace(0, 1, 3)[:, None])
    assert not torch.equal(G.interpolate(0, 1, n=3, class_labels=rows), G.interpolate(0, 1, n=3, class_labels=0))


@pytest.mark.parametrize("name", ["one", "four", "trajectory", "teacher"])
def test_the_command_writes_the_path(place, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    more = ("--heun-steps", 18) if name == "teacher" else ()
    assert sample(place / name, "--interpolate", 5, 9, "--n", 4, "--out", "a.npz", "--json", *more) == 0
    told = json.loads(capsys.readouterr().out)
    third = pytest.approx(1 / 3)
    assert told["interpolated"] == [
        {"5": 1.0}, {"5": pytest.approx(2 / 3), "9": third}, {"5": third, "9": pytest.approx(2 / 3)}, {"9": 1.0},
    ]  # fmt: skip
    assert (told["seed"], told["seeds"], told["images"]) == (None, None, 4)
    with np.load("a.npz") as file:
        images = file["images"]
    expected = load_sampler(place / name).interpolate(5, 9, n=4)
    assert np.abs(images[:, None, :, :, 0] - (expected * 127.5 + 128).clamp(0, 255).numpy()).max() <= 1.01
    assert sample(place / name, "--seeds", "5,9", "--out", "b.npz", *more) == 0
    with np.load("b.npz") as file:
        assert np.abs(file["images"].astype(int) - images[[0, -1]]).max() <= 1


def test_a_picture_is_one_row_and_a_folder_is_numbered(place, tmp_path, capsys):
    assert sample(place / "one", "--interpolate", 0, 1, 0, "--out", tmp_path / "a.png") == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.height == 64 and picture.width > 15 * 64
    assert capsys.readouterr().out.startswith("15 images, 1 network evaluation each")
    folder = (place / "one", "--out", tmp_path / "f", "--interpolate", 0, 1, "--n")
    assert sample(*folder, 3) == 0 and sample(*folder, 3) == 0
    assert sorted(file.name for file in (tmp_path / "f").glob("*.png")) == [f"{i:06d}.png" for i in range(3)]
    # The same numbers would be other places on the path.
    capsys.readouterr()
    assert sample(*folder, 4) == 2 and "of this model with other seed" in capsys.readouterr().err
    assert sample(place / "one", "--interpolate", 0, 1, "--n", 20_000, "--out", tmp_path / "a.png") == 2
    assert "for 20,000 images 4x4: a row takes 10,917" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("0", "1", "--seed", 3), "interpolate and seed exclude each other: give one of them"),
        (("0", "1", "--seeds", "3"), "interpolate and seeds exclude each other: give one of them"),
        (("0", "1", "--churn", 3), "interpolate and churn exclude each other: give one of them"),
        (("7",), "interpolate needs two seeds or more, got only 7"),
        (("7", "7"), "interpolate needs seeds that differ from one to the next, got 7, 7"),
        (("0", "1", "--n", 1), "n must be at least 2, as the seeds 0, 1 are among the images, got 1"),
        (("0", "-1"), "interpolate must lie in [0, 2^64), got -1"),
        (("0", 1 << 64), "interpolate must lie in [0, 2^64), got 18446744073709551616"),
        (("0,1",), "--interpolate takes whole numbers, separated by spaces, got '0,1'"),
        (("0", "1", "--classes", 0), "classes were given, but the network is unconditional: leave them out"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_interpolated_is_said_in_a_line(place, tmp_path, capsys, given, said):
    assert sample(place / "teacher", "--out", tmp_path / "a.png", "--interpolate", *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not (tmp_path / "a.png").exists()


def test_in_python_the_same_is_said(place):
    G = load_generator(place / "one")
    for seeds, given, said in (
        ((0, 0), {}, "seeds that differ from one to the next, got 0, 0"),
        ((0, -1), {}, "seed must be an integer >= 0, got -1"),
        ((0, 1 << 64), {}, r"seed must lie in \[0, 2\^64\), got 18446744073709551616"),
        ((0, 1, 1), {}, "n must be an integer >= 2, got 1"),
        ((0, 1, 3), {"through": [2, 3]}, "n must be at least 4, as the seeds 0, 2, 3, 1 are among the images, got 3"),
        ((0, 1, 4, 0), {}, "the network is unconditional"),
        (([0, 1], 2), {}, r"seed must be an integer >= 0, got \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=said):
            G.interpolate(*seeds, **given)


def test_a_path_through_several_seeds_is_that_of_its_legs(place):
    """Closed, of 8 images from each seed to the next; numbers of NumPy and torch are seeds too."""
    G = load_generator(place / "one")
    closed = G.interpolate(0, np.int64(0), through=[torch.tensor(1), 2])
    assert closed.shape == (22, 1, 4, 4)
    legs = [G.interpolate(a, b)[:-1] for a, b in ((0, 1), (1, 2), (2, 0))]
    torch.testing.assert_close(closed, torch.cat([*legs, G.sample(1, seed=0)]), rtol=1e-4, atol=1e-5)


def test_the_samplers_take_places_between_seeds_too(place):
    """The public functions; noise of churn, which the command refuses, moves as the rest does."""
    net = load_teacher(place / "teacher")
    points = path([3, 8], 5)
    torch.testing.assert_close(
        heun_sample(net, 5, steps=18, seed=points), load_sampler(place / "teacher").interpolate(3, 8, n=5)
    )
    churned = heun_sample(net, 5, steps=4, seed=points, churn=Churn(amount=2))
    ends = heun_sample(net, 2, steps=4, seed=[3, 8], churn=Churn(amount=2))
    torch.testing.assert_close(churned[[0, -1]], ends, rtol=1e-4, atol=1e-5)
