"""`ipfm dataset`: what it writes is what it read, shaped and labelled as asked; it refuses before it writes."""

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ipfm.engine.commands.dataset import Dataset
from ipfm.engine.data import preparation as dataset_making
from ipfm.engine.data.open_dataset import open_dataset
from ipfm.engine.runtime.commandline import BadInput, parse


def random_image(seed: int, width: int = 8, height: int = 8, channels: int = 3) -> np.ndarray:
    """(H, W, C) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(path)


def folder(place: Path, *names: str, size: int = 8) -> np.ndarray:
    """A folder with an image by each name; returns the images (N, C, H, W) in the order of the names."""
    images = [random_image(i, size, size) for i in range(len(names))]
    for name, pixels in zip(names, images, strict=True):
        save(place / name, pixels)
    return np.stack(images).transpose(0, 3, 1, 2)


def same(data, images: np.ndarray, labels: list | None) -> bool:
    kept = None if data.labels is None else data.labels.tolist()
    return np.array_equal(data.images.numpy(), images) and kept == labels


def cifar(place: Path, rows: int = 4) -> tuple[np.ndarray, list[int]]:
    place.mkdir()
    random = np.random.default_rng(5)
    table = random.integers(0, 256, (5, rows, 3073), dtype=np.uint8)
    table[:, :, 0] %= 10
    table[0, 0, 0] = 9
    for i in range(5):
        (place / f"data_batch_{i + 1}.bin").write_bytes(table[i].tobytes())
    flat = table.reshape(-1, 3073)
    return flat[:, 1:].reshape(-1, 3, 32, 32), flat[:, 0].tolist()


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_folder_with_labels(tmp_path, capsys):
    images = folder(tmp_path / "in", "b.png", "a/z.png", "c.bmp")
    pairs = [["b.png", 3], ["c.bmp", 0], ["a/z.png", 1]]
    (tmp_path / "in" / "dataset.json").write_text(json.dumps({"labels": pairs}))
    Dataset(source=tmp_path / "in", out=tmp_path / "out.zip").run()
    assert same(open_dataset(tmp_path / "out.zip"), images[[1, 0, 2]], [1, 3, 0])
    said = capsys.readouterr().out
    assert "3 images 8x8, RGB" in said and "labels: those of dataset.json" in said and "4 classes" in said
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.namelist() == [f"00000/img0000000{i}.png" for i in range(3)] + ["dataset.json"]

    Dataset(source=tmp_path / "in", out=tmp_path / "none.zip", labels="none").run()
    assert same(open_dataset(tmp_path / "none.zip"), images[[1, 0, 2]], None)
    # A zip as the source: the same again, to the byte.
    Dataset(source=tmp_path / "out.zip", out=tmp_path / "again.zip").run()
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "out.zip").read_bytes()
    capsys.readouterr()
    Dataset(source=tmp_path / "in", out=tmp_path / "out.zip", overwrite=True, json=True).run()
    assert json.loads(capsys.readouterr().out) == {
        "out": str(tmp_path / "out.zip"), "images": 3, "resolution": 8, "channels": 3,
        "labels": "those of dataset.json", "classes": 4, "label_width": 4,
        "left_out": {}, "empty_classes": [2], "remarks": ["1 of 4 classes have no images: 2"],
        "of_images": 3, "subset": None,
    }  # fmt: skip


def test_folders_as_classes(tmp_path, capsys):
    source = tmp_path / "in"
    images = folder(source, "dog/1.png", "cat/sub/2.png", "cat/1.png", "owl/1.png")
    Dataset(source=source, out=tmp_path / "auto.zip").run()
    order = [2, 1, 0, 3]
    assert same(open_dataset(tmp_path / "auto.zip"), images[order], [0, 0, 1, 2])
    assert "labels: the folders cat, dog, owl" in capsys.readouterr().out
    # Automatically where all images lie in folders, and these are classes.
    save(source / "stray.png", random_image(9))
    Dataset(source=source, out=tmp_path / "stray.zip").run()
    assert open_dataset(tmp_path / "stray.zip").labels is None
    with pytest.raises(BadInput, match=r"stray.png lies in no folder, so it has no class"):
        Dataset(source=source, out=tmp_path / "not.zip", labels="folders").run()
    (source / "stray.png").unlink()
    # dataset.json goes first, unless the folders are asked for.
    (source / "dataset.json").write_text('{"labels": null}')
    Dataset(source=source, out=tmp_path / "null.zip").run()
    assert open_dataset(tmp_path / "null.zip").labels is None
    Dataset(source=source, out=tmp_path / "folders.zip", labels="folders").run()
    assert (tmp_path / "folders.zip").read_bytes() == (tmp_path / "auto.zip").read_bytes()


def test_numbered_folders_and_a_single_folder_are_no_classes(tmp_path):
    folder(tmp_path / "a", "00000/img00000999.png", "00001/img00001000.png")
    folder(tmp_path / "b", "images/1.png", "images/2.png")
    for name in ("a", "b"):
        Dataset(source=tmp_path / name, out=tmp_path / f"{name}.zip").run()
        assert open_dataset(tmp_path / f"{name}.zip").labels is None
    Dataset(source=tmp_path / "a", out=tmp_path / "c.zip", labels="folders").run()
    assert open_dataset(tmp_path / "c.zip").labels.tolist() == [0, 1]


def test_many_folders_are_named_in_short(tmp_path, capsys):
    folder(tmp_path / "in", *(f"class{i:02}/1.png" for i in range(15)))
    Dataset(source=tmp_path / "in", out=tmp_path / "out.zip").run()
    said = capsys.readouterr().out
    assert "class00, class01, class02, class03, class04, class05, …, class12, class13, class14\n15 classes" in said


def test_cifar(tmp_path, capsys):
    images, labels = cifar(tmp_path / "bin")
    Dataset(source=tmp_path / "bin", out=tmp_path / "all.zip").run()
    assert same(open_dataset(tmp_path / "all.zip"), images, labels)
    assert "20 images 32x32, RGB" in capsys.readouterr().out
    Dataset(source=tmp_path / "bin", out=tmp_path / "none.zip", labels="none", resolution=16, max_images=6).run()
    kept = open_dataset(tmp_path / "bin", max_images=6)
    small = [np.asarray(Image.fromarray(i.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.LANCZOS))
             for i in kept.images]  # fmt: skip
    assert same(open_dataset(tmp_path / "none.zip"), np.stack(small).transpose(0, 3, 1, 2), None)
    with pytest.raises(BadInput, match="is CIFAR-10, which has labels of its own"):
        Dataset(source=tmp_path / "bin", out=tmp_path / "not.zip", labels="folders").run()


def test_a_subset_is_the_one_that_reading_would_take(tmp_path, capsys):
    names = [f"{i // 20}/{i:02}.png" for i in range(40)]
    images = folder(tmp_path / "in", *names)
    Dataset(source=tmp_path / "in", out=tmp_path / "all.zip").run()
    Dataset(source=tmp_path / "in", out=tmp_path / "some.zip", max_images=7).run()
    some, expected = open_dataset(tmp_path / "some.zip"), open_dataset(tmp_path / "all.zip", max_images=7)
    assert torch.equal(some.images, expected.images) and torch.equal(some.labels, expected.labels)
    assert len(images) == len(open_dataset(tmp_path / "all.zip"))
    capsys.readouterr()
    # The last class has one image, which is not among those kept: the file cannot tell of the class.
    folder(tmp_path / "two", *(f"{i // 39}/{i:02}.png" for i in range(40)))
    Dataset(source=tmp_path / "two", out=tmp_path / "first.zip", max_images=7).run()
    assert open_dataset(tmp_path / "first.zip").labels.tolist() == [0] * 7
    assert "1 class (the source has 2; the last are not among these)" in capsys.readouterr().out


def test_what_is_left_out_is_counted_and_strict_refuses(tmp_path, capsys):
    source = tmp_path / "in"
    folder(source, "set/cat/0.png", "set/dog/0.png")
    (source / "set" / "dog" / "2.xyz").write_bytes(b"x")
    (source / ".DS_Store").write_bytes(b"x")
    (source / "set" / "bird").mkdir()
    out = tmp_path / "out.zip"
    refused("strict was given, and .*files .xyz: 1", source=source, out=out, strict=True)
    (source / "set" / "dog" / "1.png").write_bytes(b"")
    refused("dog/1.png is no image: it is empty", source=source, out=out)
    both = "strict forbids to leave anything out, and skip-unreadable asks for it: give one of them"
    refused(both, source=tmp_path / "not looked for", out=out, skip_unreadable=True, strict=True)
    capsys.readouterr()
    Dataset(source=source, out=out, json=True, skip_unreadable=True).run()
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts["left_out"] == {
        "files of the system": 1, "files .xyz": 1, "folders without an image": 1, "images that cannot be read": 1,
    }  # fmt: skip
    assert facts["images"] == 2 and facts["labels"] == "the folders cat, dog" and facts["remarks"][0] in said.err
    assert open_dataset(out).labels.tolist() == [0, 1]
    # What a system puts there is no data.
    folder(tmp_path / "mac", "0.png")
    (tmp_path / "mac" / ".DS_Store").write_bytes(b"x")
    Dataset(source=tmp_path / "mac", out=tmp_path / "mac.ZIP", strict=True).run()
    (tmp_path / "mac" / "dataset.json").write_text('{"labels": [["0.png", 1]]}')
    refused("1 of 2 classes have no images: 0", source=tmp_path / "mac", out=out, overwrite=True, strict=True)


def test_the_parts_of_a_split_are_no_classes(tmp_path, capsys):
    folder(tmp_path / "in", "train/cat/0.png", "val/cat/1.png")
    refused("holds train and val, the parts of a split, which are no classes", source=tmp_path / "in",
            out=tmp_path / "out.zip")  # fmt: skip
    folder(tmp_path / "stray", "cat/0.png", "dog/0.png", "preview.png")
    Dataset(source=tmp_path / "stray", out=tmp_path / "out.zip").run()
    assert "no labels, for preview.png lies beside the folders" in capsys.readouterr().err


def test_numbered_parts_are_no_classes_unless_it_is_said(tmp_path, capsys):
    """FFHQ's folders, those of `ipfm sample --subdirs`, others like them; and classes that have numbers for names."""
    layouts = {
        ("00000/00000.png", "01000/01000.png"): None,
        ("000000/000000.png", "001000/001000.png"): None,
        ("00000/a.png", "00001/b.png"): None,
        ("0/a.png", "9/b.png"): [0, 1],
        ("0000/img00000000.png", "0001/img00000001.png"): [0, 1],
    }
    for place, (names, auto) in enumerate(layouts.items()):
        source = tmp_path / str(place)
        folder(source, *names)
        capsys.readouterr()
        Dataset(source=source, out=tmp_path / "auto.zip", overwrite=True).run()
        said = capsys.readouterr().err
        labels = open_dataset(tmp_path / "auto.zip").labels
        assert (labels if labels is None else labels.tolist()) == auto
        parts = ", ".join(name.split("/")[0] for name in names)
        note = f"the folders {parts} are taken for parts of a data set, not for classes: --labels folders makes them"
        assert (note in said) == (auto is None)
        if auto is None:
            refused("strict was given, and .* are taken for parts", source=source, out=tmp_path / "x.zip", strict=True)
        Dataset(source=source, out=tmp_path / "asked.zip", overwrite=True, labels="folders", strict=True).run()
        assert open_dataset(tmp_path / "asked.zip").labels.tolist() == [0, 1]


def test_parts_of_edms_format_as_classes_are_said_and_its_labels_are_taken(tmp_path, capsys):
    source = tmp_path / "in"
    folder(source, "00000/img00000000.png", "00001/img00001000.png")
    Dataset(source=source, out=tmp_path / "a.zip").run()
    assert open_dataset(tmp_path / "a.zip").labels is None and capsys.readouterr().err == ""
    Dataset(source=source, out=tmp_path / "a.zip", labels="folders", overwrite=True).run()
    assert "whose classes are those of its dataset.json; as asked for, they are classes here" in capsys.readouterr().err
    pairs = [["00000/img00000000.png", 3], ["00001/img00001000.png", 1]]
    (source / "dataset.json").write_text(json.dumps({"labels": pairs}))
    Dataset(source=source, out=tmp_path / "a.zip", overwrite=True).run()
    assert open_dataset(tmp_path / "a.zip").labels.tolist() == [3, 1]


def test_which_images_of_more_are_kept_is_said(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "a.zip"
    folder(source, *(f"{i // 5}/{i:02}.png" for i in range(20)))
    Dataset(source=source, out=tmp_path / "all.zip").run()

    def kept(**options) -> tuple[list[int], dict]:
        capsys.readouterr()
        Dataset(source=source, out=out, overwrite=True, json=True, **options).run()
        return open_dataset(out).labels.tolist(), json.loads(capsys.readouterr().out)

    for seed in (0, 1):
        labels, facts = kept(max_images=6, seed=seed)
        assert facts["remarks"][0] == f"{source}: 6 of 20 images are kept, drawn at random (seed {seed})"
        assert (facts["images"], facts["of_images"], facts["subset"]) == (6, 20, {"chosen": "random", "seed": seed})
        assert labels == open_dataset(tmp_path / "all.zip", max_images=6, seed=seed).labels.tolist()
    labels, facts = kept(max_images=6, subset="first")
    assert labels == [0] * 5 + [1] and facts["subset"] == {"chosen": "first", "seed": None}
    assert facts["remarks"] == [
        f"{source}: the first 6 of 20 images are kept, in their order",
        "2 of 4 classes have no images: 2, 3",
    ]
    assert kept(max_images=20)[1]["subset"] is None and kept()[1]["remarks"] == []
    # A source of its own.
    cifar(tmp_path / "bin")
    Dataset(source=tmp_path / "bin", out=tmp_path / "c.zip", max_images=3, subset="first").run()
    assert "the first 3 of 20 images are kept" in capsys.readouterr().err
    assert torch.equal(open_dataset(tmp_path / "c.zip").images, open_dataset(tmp_path / "bin").images[:3])


def test_each_refusal_of_an_image_names_an_option_that_gets_on(tmp_path):
    """Transparent, deep, several pictures, not square, damaged: refused, and taken when that is asked for."""
    source = tmp_path / "in"
    folder(source, "a.png")
    clear = random_image(1, channels=4)
    clear[0, 0, 3] = 7
    save(source / "b.png", clear)
    Image.fromarray(np.full((8, 8), 999, dtype=np.uint16)).save(source / "c.png")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(source / "d.gif", save_all=True, append_images=frames[1:])
    save(source / "e.png", random_image(2, 9, 8))
    (source / "f.png").write_bytes((source / "a.png").read_bytes()[:80])
    given = {"source": source, "out": tmp_path / "out.zip", "resolution": 8}
    for option, value, said in [
        ("to_8_bits", True, "c.png has 16 bits a value, .* --to-8-bits"),
        ("first_frame", True, "d.gif holds 2 pictures, .* --first-frame"),
        ("fit", "stretch", "e.png is 9x8, .* --fit stretch"),
        ("background", "grey", "b.png is transparent: .* --background"),
        ("skip_unreadable", True, "f.png cannot be decoded: .*; --skip-unreadable goes on without it"),
    ]:
        refused(said, **given)
        given[option] = value
    Dataset(**given).run()
    images = open_dataset(tmp_path / "out.zip").images
    assert len(images) == 5 and (images[2] == 3).all() and images[3].float().mean((1, 2)).tolist() == [255, 0, 0]


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_the_middle_is_cut_out_before_resizing(tmp_path):
    wide, tall, square = random_image(0, 31, 20), random_image(1, 16, 41), random_image(2, 8, 8)
    for name, pixels in (("0.png", wide), ("1.png", tall), ("2.png", square)):
        save(tmp_path / "in" / name, pixels)
    Dataset(source=tmp_path / "in", out=tmp_path / "out.zip", resolution=8, crop="center").run()
    middles = [wide[:, 5:25], tall[12:28], square]
    expected = [np.asarray(Image.fromarray(m).resize((8, 8), Image.Resampling.LANCZOS)) for m in middles]
    got = open_dataset(tmp_path / "out.zip").images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(got, np.stack(expected))
    assert np.array_equal(got[2], square)


def shaped(tmp_path: Path, **options) -> np.ndarray:
    """What `ipfm dataset` makes of `tmp_path`/in: (N, H, W, C)."""
    Dataset(source=tmp_path / "in", out=tmp_path / "out.zip", overwrite=True, **options).run()
    return open_dataset(tmp_path / "out.zip").images.permute(0, 2, 3, 1).numpy()


def lanczos(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def test_the_wide_crop_is_a_rectangle_in_a_black_square(tmp_path):
    wide, tall, exact = random_image(0, 40, 20), random_image(1, 16, 41), random_image(2, 16, 12)
    for name, pixels in (("0.png", wide), ("1.png", tall), ("2.png", exact)):
        save(tmp_path / "in" / name, pixels)
    got = shaped(tmp_path, resolution="16x12", crop="wide")
    assert got.shape == (3, 16, 16, 3)
    assert not got[:, :2].any() and not got[:, 14:].any()
    # The largest rectangles of 4:3: 27x20 of 40x20, 16x12 of 16x41.
    middles = [wide[:, 6:33], tall[14:26], exact]
    assert np.array_equal(got[:, 2:14], np.stack([lanczos(one, 16, 12) for one in middles]))
    assert np.array_equal(got[2, 2:14], exact)


def test_images_that_are_not_square_can_be_kept_whole(tmp_path, capsys):
    wide, square = random_image(0, 24, 12), random_image(1, 12, 12)
    for name, pixels in (("0.png", wide), ("1.png", square)):
        save(tmp_path / "in" / name, pixels)
    capsys.readouterr()
    got = shaped(tmp_path, resolution=8, fit="stretch", json=True)
    assert np.array_equal(got, np.stack([lanczos(wide, 8, 8), lanczos(square, 8, 8)]))
    said = capsys.readouterr()
    note = f"{tmp_path}/in: 1 of 2 images are not square and were squeezed into squares"
    assert json.loads(said.out)["remarks"] == [note] and f"ipfm: note: {note}\n" in said.err
    # It was asked for: strict does not mind.
    shaped(tmp_path, resolution=8, fit="stretch", strict=True)
    got = shaped(tmp_path, resolution=8, fit="pad")
    assert np.array_equal(got[0, 2:6], lanczos(wide, 8, 4)) and not got[0, :2].any() and not got[0, 6:].any()
    assert np.array_equal(got[1], lanczos(square, 8, 8))
    assert "1 of 2 images are not square and were filled up to squares with black" in capsys.readouterr().err
    # Without a resolution: the shorter side, or the longer one.
    (tmp_path / "in" / "1.png").unlink()
    assert shaped(tmp_path, fit="stretch").shape == (1, 12, 12, 3)
    got = shaped(tmp_path, fit="pad")
    assert got.shape == (1, 24, 24, 3) and np.array_equal(got[0, 6:18], wide)


def test_shrinking_as_for_adm_halves_by_boxes_and_takes_the_middle(tmp_path):
    y, x = np.mgrid[:40, :72]
    pixels = np.stack([x * 3, y * 4, x + y], 2).astype(np.uint8)
    save(tmp_path / "in" / "a.png", pixels)
    got = shaped(tmp_path, resolution=10, crop="adm")
    # Twice by 2: 18x10, of which the middle is columns 4 to 13: values are means of 4x4 pixels.
    expected = pixels.reshape(10, 4, 18, 4, 3).mean((1, 3))[:, 4:14]
    assert np.abs(got[0] - expected).max() <= 1
    assert shaped(tmp_path, resolution=30, crop="adm").shape == (1, 30, 30, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"crop": "adm"}, "crop adm needs --resolution"),
        ({"crop": "wide"}, "crop wide needs a width and a height: --resolution 512x384, say"),
        ({"crop": "wide", "resolution": "64x64"}, "crop wide needs a width and a height"),
        ({"crop": "wide", "resolution": "48x64"}, "crop wide needs a width not below the height, got 48x64"),
        ({"resolution": "64x48"}, "resolution must be one side, for images are square, got 64x48: --crop wide"),
        ({"resolution": "64x"}, "resolution must be a side, as in 64, or with --crop wide WxH, .* got '64x'"),
        ({"resolution": "4097x4", "crop": "wide"}, "resolution must lie in 1…4096, got 4097"),
        ({"crop": "center", "fit": "pad"}, "crop and fit exclude each other"),
        ({"subset": "first"}, "subset needs max-images"),
        ({"seed": 3}, "seed needs max-images"),
        ({"seed": 3, "subset": "first", "max_images": 1}, "seed was given, but subset first draws nothing"),
        ({"seed": -1, "max_images": 1}, "seed must lie in 0"),
    ],
)
def test_shapes_and_subsets_that_cannot_be(tmp_path, options, said):
    folder(tmp_path / "in", "0.png")
    refused(said, source=tmp_path / "in", out=tmp_path / "out.zip", **options)


def test_resizing_keeps_what_a_low_pass_keeps(tmp_path):
    """A plane stays a plane: Lanczos' filter does not shift, and does not darken."""
    y, x = np.mgrid[:64, :64]
    save(tmp_path / "in" / "a.png", (40 + 2 * x + y)[..., None].astype(np.uint8))
    Dataset(source=tmp_path / "in", out=tmp_path / "out.zip", resolution=16).run()
    got = open_dataset(tmp_path / "out.zip").images[0, 0, 2:-2, 2:-2].float()
    v, u = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    expected = 40 + 2 * (4 * u + 1.5) + 4 * v + 1.5
    assert (got - expected[2:-2, 2:-2]).abs().max() <= 1


def test_without_a_resolution_the_middles_must_be_alike(tmp_path):
    save(tmp_path / "in" / "0.png", random_image(0, 12, 8))
    save(tmp_path / "in" / "1.png", random_image(1, 8, 9))
    Dataset(source=tmp_path / "in", out=tmp_path / "out.zip", crop="center").run()
    assert open_dataset(tmp_path / "out.zip").shape == (3, 8, 8)


def test_grey_and_colour_together_become_rgb(tmp_path):
    save(tmp_path / "in" / "0.png", random_image(0, channels=1))
    save(tmp_path / "in" / "1.png", random_image(1))
    Dataset(source=tmp_path / "in", out=tmp_path / "both.zip").run()
    images = open_dataset(tmp_path / "both.zip").images.numpy()
    assert np.array_equal(images[0], np.repeat(random_image(0, channels=1), 3, 2).transpose(2, 0, 1))
    (tmp_path / "in" / "1.png").unlink()
    Dataset(source=tmp_path / "in", out=tmp_path / "grey.zip").run()
    assert open_dataset(tmp_path / "grey.zip").shape == (1, 8, 8)


def test_pictures_are_made_grey_or_rgb_when_asked(tmp_path, capsys):
    images = folder(tmp_path / "in", "a.png", "b.png")
    Dataset(source=tmp_path / "in", out=tmp_path / "grey.zip", channels=1).run()
    grey = open_dataset(tmp_path / "grey.zip").images.numpy()
    # The luma of ITU-R BT.601.
    luma = np.tensordot(np.array([0.299, 0.587, 0.114]), images, axes=(0, 1))
    assert grey.shape == (2, 1, 8, 8) and np.abs(grey[:, 0] - luma).max() <= 1
    assert "made grey, of which some were in colour" in capsys.readouterr().err
    Dataset(source=tmp_path / "grey.zip", out=tmp_path / "rgb.zip", channels=3).run()
    assert np.array_equal(open_dataset(tmp_path / "rgb.zip").images.numpy(), grey.repeat(3, axis=1))
    Dataset(source=tmp_path / "rgb.zip", out=tmp_path / "as-it-is.zip", channels=3).run()
    assert "made" not in capsys.readouterr().err


def test_more_images_than_are_in_work_at_a_time(tmp_path, monkeypatch):
    images = folder(tmp_path / "in", *(f"{i:02}.png" for i in range(11)))
    monkeypatch.setattr(dataset_making, "_AT_ONCE", 4)
    Dataset(source=tmp_path / "in", out=tmp_path / "out.zip").run()
    assert same(open_dataset(tmp_path / "out.zip"), images, None)


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(message: str, **options) -> None:
    out = options["out"]
    before = {path: path.read_bytes() for path in out.parent.iterdir() if path.is_file()}
    with pytest.raises(BadInput, match=message) as caught:
        Dataset(**options).run()
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in out.parent.iterdir() if path.is_file()} == before


def test_an_existing_file_is_replaced_only_when_told(tmp_path):
    images = folder(tmp_path / "in", "0.png")
    out = tmp_path / "out.zip"
    out.write_bytes(b"mine")
    refused("out.zip exists already: give --overwrite", source=tmp_path / "in", out=out)
    Dataset(source=tmp_path / "in", out=out, overwrite=True).run()
    assert same(open_dataset(out), images, None)
    # Also by itself.
    Dataset(source=out, out=out, overwrite=True, resolution=4).run()
    assert open_dataset(out).shape == (3, 4, 4)


def test_bad_arguments(tmp_path):
    folder(tmp_path / "in", "0.png")
    (tmp_path / "folder.zip").mkdir()
    refused("must be named", source=tmp_path / "in", out=tmp_path / "out.tar")
    refused("folder.zip is a folder", source=tmp_path / "in", out=tmp_path / "folder.zip")
    refused("none does not exist; a data set is", source=tmp_path / "none", out=tmp_path / "out.zip")
    for resolution in (0, -1, 4097):
        refused(
            "resolution must lie in 1…4096", source=tmp_path / "in", out=tmp_path / "out.zip", resolution=resolution
        )
    refused("max_images must be at least 1", source=tmp_path / "in", out=tmp_path / "out.zip", max_images=0)


def test_bad_images_are_named_and_nothing_is_written(tmp_path, monkeypatch):
    source, out = tmp_path / "in", tmp_path / "out.zip"
    folder(source, "0.png", "1.png")
    save(source / "2.png", random_image(0, 9, 8))
    refused("in/2.png is 9x8, but images must be square: --crop center", source=source, out=out, resolution=8)
    save(source / "2.png", random_image(0, 9, 9))
    refused("in/2.png gives an image of 9 pixels a side, the first one 8: --resolution", source=source, out=out)
    (source / "2.png").write_bytes(b"no image")
    refused("in/2.png is no image", source=source, out=out)
    # Damage that only decoding finds, after the first images were written.
    monkeypatch.setattr(dataset_making, "_AT_ONCE", 1)
    (source / "2.png").write_bytes((source / "1.png").read_bytes()[:120])
    refused("in/2.png cannot be decoded", source=source, out=out)
    image = io.BytesIO()
    Image.fromarray(random_image(1), "RGB").convert("RGBA").save(image, format="PNG")
    (source / "2.png").write_bytes(image.getvalue())
    Dataset(source=source, out=out).run()
    assert len(open_dataset(out)) == 3


def test_the_command_line():
    def read(line: str) -> Dataset:
        return parse(Dataset, line.split(), prog="ipfm dataset", description="")

    plain = Dataset(source=Path("in"), out=Path("out.zip"))
    assert read("in out.zip") == plain
    assert read(
        "in out.zip --resolution 64 --crop center --labels folders --max-images 5 --overwrite"
    ) == replace(plain, resolution=64, crop="center", labels="folders", max_images=5, overwrite=True)  # fmt: skip
    assert read(
        "in out.zip --resolution 512x384 --crop wide --subset first --background grey --first-frame --to-8-bits"
    ) == replace(plain, resolution="512x384", crop="wide", subset="first", background="grey", first_frame=True,
                 to_8_bits=True)  # fmt: skip
    with pytest.raises(BadInput, match="--crop must be one of adm, center, none, wide, got"):
        read("in out.zip --crop left")
