"""The drawn data set: the factors in the pictures, one picture an index, and the recipe that trains on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import launch
import numpy as np
import prepared
import pytest
import scipy.stats
import torch
from PIL import Image

from ipfm.engine.data.image_grid import image_grid
from ipfm.engine.data.shapes import BRIGHTEST, COLOURS, DARKEST, KINDS, SIZES, SLOTS, draw, draw_factors, shapes
from ipfm.engine.evaluation.metrics import BlockFeatures
from ipfm.engine.experiments.step_time import StepTime
from ipfm.engine.runtime.commandline import BadInput
from ipfm.models import load_model, presets, read_config
from ipfm.recipes import shapes_ipfm
from ipfm.recipes.shapes_ipfm import ShapesOptions

COUNT = 3000
PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
# Area over that of the circle around the shape, whose radius is its size.
AREAS = {
    "disc": 1.0,
    "square": 2 / np.pi,
    "triangle": 3 * np.sqrt(3) / 4 / np.pi,
    "ring": 0.75,
    "cross": 2.0 / np.pi,
    "bar": 1.2 / np.pi,
}


@pytest.fixture(scope="module")
def factors():
    return draw_factors(COUNT)


@pytest.fixture(scope="module")
def images(factors) -> torch.Tensor:
    return draw(factors)


def test_an_image_depends_on_its_seed_and_index_alone(factors, images) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for count in (1, 63, 130):
            data = shapes(count)
            assert torch.equal(data.images, images[:count])
            assert torch.equal(data.labels, factors.kind[:count, 0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(draw(factors.take(77, 5)), images[77:82])
    assert (shapes(20, seed=1).images != images[:20]).flatten(1).any(1).all()
    # A larger picture shows the same scene.
    large = draw_factors(20, side=64)
    torch.testing.assert_close(large.centre, factors.take(0, 20).centre * 2)
    assert torch.equal(large.colour, factors.take(0, 20).colour)


def test_the_pictures_of_a_seed_stay_what_they_are() -> None:
    """docs/shapes.png holds the first images of seed 0: another order of the random numbers would show here."""
    with Image.open(launch.ROOT / "docs" / "shapes.png") as picture:
        kept = np.asarray(picture)
    data = shapes(64)
    assert np.array_equal(kept, image_grid(data.take(0, 64), columns=16, scale=2))
    assert (launch.ROOT / "docs" / "shapes.png").stat().st_size < 60_000


def test_factors_are_uniform_and_independent(factors) -> None:
    """Fixed seed; on fresh ones each of these levels fails once in 10^8 runs."""
    level = 1e-8
    assert set(factors.number.tolist()) == {1, 2, 3}
    low, high = (share * 32 for share in SIZES)
    room = (32 - 2 * factors.size)[..., None]
    continuous = {
        "size": (factors.size - low) / (high - low),
        "centre": (factors.centre - factors.size[..., None]) / room,
        "background": (factors.background - DARKEST) / (BRIGHTEST - DARKEST),
    }
    for name, value in continuous.items():
        assert value.min() >= -1e-6 and value.max() <= 1 + 1e-6, name
        for column in value.reshape(COUNT, -1).T:
            assert scipy.stats.kstest(column.numpy(), "uniform").pvalue > level, name
    whole = {"kind": (factors.kind, len(KINDS)), "colour": (factors.colour, len(COLOURS)),
             "rotation": (factors.rotation // 30, 12), "number": (factors.number[:, None] - 1, SLOTS)}  # fmt: skip
    for name, (value, count) in whole.items():
        for column in value.T:
            assert scipy.stats.chisquare(np.bincount(column.numpy(), minlength=count)).pvalue > level, name
    pairs = torch.cat([value.reshape(COUNT, -1).float() for value in continuous.values()] +
                      [value.float() for value, _ in whole.values()], dim=1)  # fmt: skip
    correlation = np.corrcoef(pairs.numpy().T)
    # Colours exclude each other: a pair of them is correlated by -1/7.
    first = pairs.shape[1] - 1 - 2 * SLOTS
    correlation[first : first + SLOTS, first : first + SLOTS] += 1 / 7 * (1 - np.eye(SLOTS))
    off_diagonal = np.abs(correlation - np.eye(len(correlation)))
    assert off_diagonal.max() < 6.5 / np.sqrt(COUNT)  # 231 pairs, 8e-11 each
    ordered = factors.colour.sort(dim=1).values
    assert (ordered.diff(dim=1) > 0).all(), "two shapes of an image have one colour"


@pytest.mark.parametrize("kind", KINDS)
def test_colour_and_area_are_in_the_picture(factors, images, kind: str) -> None:
    (index,) = torch.where((factors.number == 1) & (factors.kind[:, 0] == KINDS.index(kind)))
    assert len(index) > 100
    pictures, background = images[index].float(), factors.background[index].round()
    x, y = factors.centre[index, 0].long().T
    middle = pictures[torch.arange(len(index)), :, y, x]
    expected = background if kind == "ring" else PALETTE[factors.colour[index, 0]]
    assert torch.equal(middle, expected)
    # The share of each pixel that is covered, from the channel in which shape and ground differ most.
    contrast = PALETTE[factors.colour[index, 0]] - background
    channel = contrast.abs().argmax(1)
    row = torch.arange(len(index))
    covered = (pictures[row, channel] - background[row, channel, None, None]) / contrast[row, channel, None, None]
    area = covered.sum((1, 2))
    ratio = area / (AREAS[kind] * np.pi * factors.size[index, 0].square())
    assert (ratio.mean() - 1).abs() < 0.012
    assert (ratio - 1).abs().max() < 0.04
    # The shape lies where it is said to be.
    pixel = torch.arange(32) + 0.5
    centroid = torch.stack(((covered * pixel).sum((1, 2)), (covered * pixel[:, None]).sum((1, 2))), 1) / area[:, None]
    assert (centroid - factors.centre[index, 0]).abs().max() < 0.08


def test_what_is_in_front_hides_what_is_behind(factors, images) -> None:
    """Slot 0's colour is seen at its centre whatever else there is, and no pixel leaves the range of its colours."""
    (index,) = torch.where(factors.kind[:, 0] != KINDS.index("ring"))
    x, y = factors.centre[index, 0].long().T
    assert torch.equal(images[index, :, y, x].float(), PALETTE[factors.colour[index, 0]])
    several = factors.number > 1
    one = replace(factors, number=torch.ones_like(factors.number))
    differs = (draw(one) != images).flatten(1).any(1)
    assert torch.equal(differs | several, several) and differs[several].float().mean() > 0.99
    shown = torch.where(
        torch.arange(SLOTS)[:, None] < factors.number[:, None, None], PALETTE[factors.colour], torch.nan
    )
    colours = torch.cat((shown, factors.background[:, None].round()), 1)
    low, high = (colours.nan_to_num(nan=empty) for empty in (255.0, 0.0))
    pixels = images.flatten(2).float()
    assert (pixels.amin(2) >= low.amin(1)).all() and (pixels.amax(2) <= high.amax(1)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be an integer in [1, 2147483648), got 0"),
        ({"count": 2.0}, "count must be an integer in [1, 2147483648), got 2.0"),
        ({"side": 15}, "side must be an integer in [16, 32768), got 15"),
        ({"seed": -1}, "seed must be an integer in [0, 18446744073709551616), got -1"),
        ({"seed": True}, "seed must be an integer in [0, 18446744073709551616), got True"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        shapes(**arguments)
    assert str(error.value) == message


# ---------------------------------------------------------------------------------------------------------- features


def test_block_features_are_means_and_deviations(images) -> None:
    features = BlockFeatures((3, 32, 32), 4)
    x = images[:5].double() / 127.5 - 1
    found = features(x)
    assert found.shape == (5, features.dim) == (5, 2 * 3 * 8 * 8) and found.dtype == torch.float64
    blocks = x.reshape(5, 3, 8, 4, 8, 4).transpose(3, 4).flatten(4)
    expected = torch.cat((blocks.mean(4), blocks.std(4, correction=0)), 1).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (features(torch.full((1, 3, 32, 32), 0.7))[:, 192:] < 1e-6).all(), "a plain picture has no deviation"
    assert BlockFeatures((1, 8, 12), 2).dim == 2 * 4 * 6


def test_block_features_refuse() -> None:
    for shape, block, message in [
        ((3, 32, 32), 5, "block must be at least 2 and divide the sides 32 and 32, got 5"),
        ((3, 32, 32), 1, "block must be at least 2 and divide the sides 32 and 32, got 1"),
        ((3, 0, 32), 4, "shape must be (C, H, W), got (3, 0, 32)"),
    ]:
        with pytest.raises(ValueError) as error:
            BlockFeatures(shape, block)
        assert str(error.value) == message
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, 32, 32\), got \(2, 3, 16, 16\)"):
        BlockFeatures((3, 32, 32))(torch.zeros(2, 3, 16, 16))


# ------------------------------------------------------------------------------------------------------------ recipe


@pytest.mark.parametrize(
    ("arch", "published"),
    [("ncsnpp", "cifar10-ncsnpp"), ("ddpmpp", "cifar10-ddpmpp"), ("adm", "imagenet64-adm-uncond")],
)
def test_full_networks_are_the_published_ones(arch: str, published: str) -> None:
    full = shapes_ipfm.network(ShapesOptions(arch=arch, full=True), 2048.0)
    assert full == replace(presets.get(published, D=2048.0), img_resolution=32, augment_dim=0)
    small = shapes_ipfm.network(ShapesOptions(arch=arch, channels=8, conditional=True), 128.0)
    assert (small.model_channels, small.num_blocks, small.label_dim, small.D) == (8, 1, len(KINDS), 128.0)
    assert (small.model_type, small.encoder_type) == (full.model_type, full.encoder_type)


def test_dry_run_says_what_would_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.step_time", lambda *_: StepTime(0.001))
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.layout_table", lambda *_, **__: "layouts")
    for arguments, parts in {
        (): ["runs/shapes-ncsnpp16-D128-alpha1-K1", "SongUNet, 3x32x32, "],
        ("--arch", "adm", "--conditional", "--D", "inf"): [
            "shapes-adm16-cond-Dinf-",
            "DhariwalUNet, 3x32x32, 6 classes",
        ],
        ("--full", "--steps", "2"): ["runs/shapes-ncsnpp-full-D128-alpha1-K2", "56,395,523 parameters"],
    }.items():
        shapes_ipfm.main([*arguments, "--dry-run"])
        printed = capsys.readouterr().out
        for part in [*parts, "memory of one process", "expected duration", "layouts"]:
            assert part in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "vit"], "--arch must be one of adm, ddpmpp, ncsnpp, got"),
        (["--channels", "0"], "--channels must be at least 1, got 0"),
        (["--arch", "ddpmpp", "--channels", "5"], "even number of channels"),
        (["--reference", "x.npz", "--features", "pixels"], "this recipe compares with the shapes themselves"),
        (["--teacher", "x", "--channels", "8"], "--channels was given, but the teacher says what the network is"),
        (["--teacher", "x", "--conditional"], "--conditional was given, but the teacher says what the network is"),
        (["--augment", "0.1"], "augment 0.1 needs a network with 9 augmentation labels"),
    ],
)
def test_bad_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as error:
        shapes_ipfm.main(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.distributed
def test_the_recipe_from_end_to_end(tmp_path: Path) -> None:
    """A narrow class-conditional ADM, two steps of its training and two of its distillation."""
    out = tmp_path / "run"
    done = prepared.run(
        launch.ROOT / "recipes" / "shapes_ipfm.py", "--out", out, "--arch", "adm", "--channels", 8, "--conditional",
        "--teacher-steps", 2, "--max-steps", 2, "--batch", 4, "--eval-images", 8, "--heun-steps", 1, "--eval-every", 0,
        env=launch.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "blocks of pixels against all 20000 shapes" in done.stdout
    assert (out / "results.txt").read_text() in done.stdout
    rows = json.loads((out / "results.json").read_text())
    assert [(row["label"], row["nfe"], row["images"]) for row in rows] == [("teacher", 1, 8), ("generator", 1, 8)]
    assert all(0 < row["frechet"] < 1e4 for row in rows)
    net = load_model(out / "generator")
    assert (net.D, net.label_dim, net.config.model_type) == (128.0, len(KINDS), "DhariwalUNet")
    assert read_config(out / "teacher" / "model").extra["dataset"] == "shapes, seed 0"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(BadInput, match=r"belongs to another configuration \(network\.label_dim is 6 there, 0 here"):
        shapes_ipfm.main(["--out", str(out), "--batch", "4", "--max-steps", "2", "--teacher-steps", "2"])
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.distributed
def test_teacher_and_distil_without_a_command_line(tmp_path: Path) -> None:
    """What a script of ablations does: one teacher, two distillations, a table each; the second time all is read."""
    launch.run_workers("ablation.py", 1, {"out": str(tmp_path)})
    first, second = (json.loads((tmp_path / f"rows{i}.json").read_text()) for i in (1, 2))
    assert first == second
    half, one = first
    assert [row["label"] for row in half] == ["teacher", "generator"]
    assert half[0]["frechet"] == one[0]["frechet"], "the same teacher, measured on the same images"
    assert half[1]["frechet"] != one[1]["frechet"], "another objective, another generator"
    for name, alpha in (("alpha0.5", 0.5), ("alpha1", 1.0)):
        assert read_config(tmp_path / name / "generator").extra["alpha"] == alpha
