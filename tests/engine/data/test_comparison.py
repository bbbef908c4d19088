"""Pictures of samples: grids of small and large images, and networks and data side by side."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ipfm.engine.data.comparison import (
    IMAGES_OF_CLASSES,
    TITLE_KEY,
    Panel,
    compared,
    comparison_said,
    examples,
    places,
    save_comparison,
)
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.data.image_grid import MOST_PIXELS, PADDING_GREY, image_grid, layout, pixels, read_grid, save_grid


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    ("shape", "scale", "gap"),
    [((1, 8, 8), 8, 8), ((3, 28, 28), 2, 2), ((3, 32, 32), 2, 2), ((3, 64, 64), 1, 2), ((3, 512, 512), 1, 2)],
)
@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (3, 2, 2), (7, 3, 3)])
def test_images_lie_apart_and_are_enlarged_by_whole_numbers(shape, scale, gap, count, rows, columns) -> None:
    images = noise(count, *shape)
    grid = image_grid(images)
    side = shape[1] * scale
    assert grid.shape == (rows * (side + gap) - gap, columns * (side + gap) - gap, 3)
    levels = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    covered = np.zeros(grid.shape[:2], dtype=bool)
    for i in range(count):
        top, left = i // columns * (side + gap), i % columns * (side + gap)
        tile = grid[top : top + side, left : left + side]
        # Every pixel is repeated as it is: nothing in between is made up.
        assert np.array_equal(tile, np.broadcast_to(levels[i].repeat(scale, 0).repeat(scale, 1), tile.shape))
        covered[top : top + side, left : left + side] = True
    assert (grid[~covered] == PADDING_GREY).all()


def test_other_numbers_of_channels_lie_side_by_side_in_grey() -> None:
    images = torch.linspace(-1, 1, 4).reshape(1, 4, 1, 1).expand(2, 4, 8, 8)
    grid = image_grid(images, scale=1)
    assert grid.shape == (8, 2 * (4 * 9 - 1) + 2, 3) and (grid == grid[..., :1]).all()
    p = PADDING_GREY
    assert grid[3, ::9, 0].tolist()[:4] == [0, 85, 170, 255] and grid[3, 8:35:9, 0].tolist() == [p, p, p]


def test_a_grid_of_many_small_images_is_enlarged_less_rather_than_refused() -> None:
    assert layout(64, (1, 8, 8)).scale == 8
    many = layout(1_000_000, (1, 8, 8))
    assert many.scale == 7 and max(many.size) <= MOST_PIXELS
    assert layout(25_000_000, (1, 8, 8)).scale == 1


def test_a_grid_says_how_far_its_images_lie_apart(tmp_path: Path) -> None:
    save_grid(noise(4, 1, 8, 8), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.info["Gap"] == "8"


@pytest.mark.parametrize(
    ("shape", "count", "columns"),
    [((1, 8, 8), 64, None), ((3, 28, 28), 7, 3), ((3, 20, 12), 1, None), ((2, 8, 8), 5, 9)],
)
def test_a_grid_is_read_as_the_images_that_it_was_made_of(tmp_path: Path, shape, count, columns) -> None:
    save_grid(noise(count, *shape), tmp_path / "a.png", columns)
    images = read_grid(tmp_path / "a.png")
    assert len(images) == count and images.shape[2] == shape[1] and images.abs().max() <= 1
    if shape[0] != 2:
        assert images.shape[3] == shape[2]
        assert torch.equal(pixels(images), pixels(noise(count, *shape)).expand(-1, 3, -1, -1))
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(image_grid(images, columns, layout(count, shape).scale), np.asarray(picture))


def test_a_grid_of_an_earlier_version_is_taken_apart_by_its_pixels(tmp_path: Path) -> None:
    """It says its gap, or, of version 0.1.0, nothing: 64 images, one pixel between two."""
    images = noise(64, 1, 8, 8)
    for scale, gap in ((8, 8), (1, 1), (3, 1)):
        cells = pixels(images)[:, 0].numpy().repeat(scale, 1).repeat(scale, 2)
        apart = np.pad(cells, ((0, 0), (0, gap), (0, gap)), constant_values=PADDING_GREY)
        grid = np.concatenate(np.concatenate(apart.reshape(8, 8, *apart.shape[1:]), 1), 1)[:-gap, :-gap]
        about = PngInfo()
        about.add_text("Gap", str(gap))
        Image.fromarray(grid).save(tmp_path / "a.png", pnginfo=about if gap > 1 else None)
        assert torch.equal(pixels(read_grid(tmp_path / "a.png")), pixels(images).expand(-1, 3, -1, -1))


def test_what_is_no_grid_is_not_taken_for_one(tmp_path: Path) -> None:
    save_grid(noise(4, 1, 8, 8), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        for changed in (
            {"Gap": "-1"},
            {"Columns": "0"},
            {"Images": "9" * 5000},
            {"Scale": "x"},
            {"Columns": "5"},
            {"Scale": "9"},
        ):
            about = PngInfo()
            for key, value in {"Gap": "8", "Images": "4", "Columns": "2", "Scale": "8", **changed}.items():
                about.add_text(key, value)
            picture.save(tmp_path / "b.png", pnginfo=about)
            with pytest.raises(ValueError, match="is no grid of images"):
                read_grid(tmp_path / "b.png")
    Image.new("RGB", (70, 70)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="is no grid of images"):
        read_grid(tmp_path / "b.png")


def test_networks_and_data_lie_side_by_side_in_the_same_places(tmp_path: Path) -> None:
    where = places((1, 8, 8), None)
    assert where.drawn == 16 and where.rows[1] == (4, 5, 6, 7) and where.titles == ()
    teacher = noise(16, 1, 8, 8)
    generator = teacher.clone()
    generator[3, 0, 0, 0] = math.nan
    data = ImageDataset(noise(1000, 1, 8, 8), name="x")
    shown = examples(data, where)
    assert torch.equal(shown[[0, 8, 15]], data.images[[0, 500, 937]])
    panels = [Panel("teacher, 35 NFE", teacher), Panel("generator, 1 NFE", generator), Panel("data", shown)]
    picture = save_comparison(panels, where, tmp_path / "a.png")
    grids = [image_grid(panel.images, 4) for panel in panels]
    found = []
    for grid in grids:
        at = [row.tobytes().find(grid[0].tobytes()) for row in picture]
        top = next(y for y, x in enumerate(at) if x >= 0)
        left = at[top] // 3
        assert np.array_equal(picture[top : top + grid.shape[0], left : left + grid.shape[1]], grid)
        found.append((left, top))
    (first, top), (second, _), (third, _) = found
    assert {t for _, t in found} == {top} and second > first + grids[0].shape[1] and third > second
    # A title above each, in dark letters on white.
    for left, _ in found:
        assert (picture[:top, left : left + 60] < 100).any() and (picture[0] == 255).all()
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.info[TITLE_KEY] == "teacher, 35 NFE, generator, 1 NFE, 1 image not finite, data"
        assert np.array_equal(np.asarray(stored), picture)


@pytest.mark.parametrize(
    ("titles", "said"),
    [
        (["teacher, 35 NFE", "generator, 1 NFE", "data"], "teacher, generator and data side by side: "),
        (["teacher, 35 NFE", "generator, 1 NFE"], "teacher and generator side by side, no data at hand: "),
        (["teacher, 35 NFE", "data"], "teacher and data side by side: "),
    ],
)
def test_a_picture_says_what_it_shows_and_whether_there_were_data(tmp_path: Path, titles, said) -> None:
    path = tmp_path / "comparison.png"
    assert comparison_said(path) is None
    bad = torch.full((4, 1, 8, 8), math.nan)
    save_comparison([Panel(title, bad) for title in titles], places((1, 200, 200), None), path)
    assert comparison_said(path) == f"{said}{path}" and len(compared(path)) == len(titles)
    path.write_bytes(path.read_bytes()[:20])
    assert compared(path) == () and comparison_said(path) is None


def test_each_of_few_classes_has_a_row_and_the_data_are_of_it() -> None:
    kinds = torch.tensor([0, 1, 2, 2, 0] + [2] * 59)
    where = places((3, 32, 32), torch.nn.functional.one_hot(kinds, 4).float())
    assert len(kinds) == IMAGES_OF_CLASSES and where.titles == ("class 0", "class 1", "class 2", "class 3")
    assert where.rows[0] == (0, 4, None, None) and where.rows[2] == (2, 3, 5, 6) and where.rows[3] == (None,) * 4
    images = torch.arange(12).reshape(12, 1, 1, 1).expand(12, 3, 32, 32).to(torch.uint8)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3])
    shown = ((examples(ImageDataset(images, labels), where) + 1) * 127.5).round()[:, 0, 0, 0].view(4, 4).tolist()
    assert (shown[0][:2], shown[1][0], shown[2]) == ([0, 1], 3, [5, 6, 8, 9])
    many = places((3, 32, 32), torch.nn.functional.one_hot(kinds, 11).float())
    assert many.titles == () and many.rows[3] == (12, 13, 14, 15)
    # Data without labels, or fewer than there are places.
    few = examples(ImageDataset(images[:3]), places((3, 32, 32), None))
    assert len(few) == 16 and [float(x) for x in (few[:4, 0, 0, 0] + 1) * 127.5] == pytest.approx([0, 1, 2, 96.5 - 0.5])


@pytest.mark.parametrize(("side", "columns"), [(8, 4), (64, 4), (128, 2), (512, 2)])
def test_large_images_are_few(side: int, columns: int) -> None:
    assert places((3, side, side), None).drawn == columns**2


def test_titles_of_a_picture_count_what_is_not_finite_and_data_may_have_another_size(tmp_path: Path) -> None:
    where = places((1, 16, 16), None)
    bad = torch.full((16, 1, 16, 16), math.inf)
    panels = [Panel("teacher, 1 NFE", bad), Panel("data", noise(16, 3, 24, 24))]
    save_comparison(panels, where, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.info[TITLE_KEY] == "teacher, 1 NFE, 16 images not finite, data"
        # Four places of 64 pixels and of 72 pixels, each with three gaps.
        assert picture.width == 3 * 24 + (4 * 64 + 3 * 4) + (4 * 72 + 3 * 3)
