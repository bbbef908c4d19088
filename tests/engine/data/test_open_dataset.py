"""Data sets on disk: folders and zips, labels, subsets, lazy reading, and everything that is refused."""

import io
import json
import os
import re
import stat
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ipfm.engine.data import decoding, image_files
from ipfm.engine.data import open_dataset as data_files
from ipfm.engine.data.decoding import DecodedImages
from ipfm.engine.data.labels import as_labels
from ipfm.engine.data.open_dataset import open_dataset
from ipfm.engine.data.zip_writer import encode_png, image_name, write_dataset_zip


def random_images(n: int, channels: int = 3, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, channels, size, size), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options: object) -> bytes:
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, format=kind, **options)
    return buffer.getvalue()


def write(place: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """The files in a folder, or in a zip where the place is named so."""
    if place.suffix == ".zip":
        with zipfile.ZipFile(place, "w", method) as target:
            for name, content in files.items():
                target.writestr(name, content)
        return place
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def numbered(images: np.ndarray) -> dict[str, bytes]:
    return {image_name(i): encode_png(pixels) for i, pixels in enumerate(images)}


def label_file(labels: object) -> dict[str, bytes]:
    return {"dataset.json": json.dumps({"labels": labels}).encode()}


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["folder", "stored.zip", "deflated.zip"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_the_order_of_their_names(tmp_path, place, channels):
    images = random_images(12, channels)
    files = dict(reversed(numbered(images).items())) | label_file([[image_name(i), i % 4] for i in range(12)])
    method = zipfile.ZIP_DEFLATED if "deflated" in place else zipfile.ZIP_STORED
    path = write(tmp_path / place, files, method)
    data = open_dataset(path, xflip=True)
    assert torch.equal(data.images, torch.from_numpy(images))
    assert data.labels.tolist() == [i % 4 for i in range(12)] and data.classes == 4
    assert data.name == str(path) and data.xflip
    torch.testing.assert_close(data.take(3, 2), torch.from_numpy(images[3:5]).float() / 127.5 - 1)
    assert open_dataset(path, labels=False).labels is None


def test_names_sort_as_text_with_their_folders_and_other_files_are_left_out(tmp_path):
    images = random_images(5)
    names = ["a/10.png", "a/9.PNG", "a.png", "b/c/x.bmp", "Z.tiff"]
    kinds = ["PNG", "PNG", "PNG", "BMP", "TIFF"]
    files = {name: encoded(pixels, kind) for name, pixels, kind in zip(names, images, kinds, strict=True)}
    junk = {
        "readme.txt": b"x",
        ".hidden.png": b"x",
        "__MACOSX/a/._10.png": b"x",
        "a/.git/x.png": b"x",
        "a/thumbs.db": b"",
        "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg": encoded(images[0], "JPEG"),
        "$RECYCLE.BIN/$RX1.png": b"x",
    }
    order = [names.index(name) for name in ("Z.tiff", "a.png", "a/10.png", "a/9.PNG", "b/c/x.bmp")]
    for place in ("folder", "all.zip"):
        data = open_dataset(write(tmp_path / place, files | junk))
        assert torch.equal(data.images, torch.from_numpy(images[order])) and data.labels is None


def test_formats_and_modes_become_grey_or_rgb(tmp_path):
    colour, grey = random_images(1)[0], random_images(1, 1)[0]
    opaque = np.concatenate([colour, np.full((1, 8, 8), 255, dtype=np.uint8)])
    files = {
        "0.png": encoded(colour),
        "1.webp": encoded(colour, "WEBP", lossless=True),
        "2.gif": encoded(grey, "GIF"),
        "3.png": encoded(grey),
        "4.png": encoded(opaque),
        "5.png": encoded(grey, mode="1"),
        "6.jpg": encoded(np.full((3, 8, 8), 130, dtype=np.uint8), "JPEG", mode="CMYK", quality=100),
        "7.ppm": encoded(colour, "PPM"),
        "8.png": encoded(grey, mode="LA"),
    }
    images = open_dataset(write(tmp_path / "x", files)).images.numpy()
    assert images.shape == (9, 3, 8, 8)
    for i in (0, 1, 4, 7):
        assert np.array_equal(images[i], colour), i
    for i in (2, 3, 8):
        assert np.array_equal(images[i], np.repeat(grey, 3, 0)), i
    assert set(np.unique(images[5])) == {0, 255}
    assert abs(images[6].astype(int) - 130).max() <= 3
    # Grey where the first image is.
    first = {"0.png": encoded(grey), "1.png": encoded(grey, mode="1")}
    assert open_dataset(write(tmp_path / "grey", first)).shape == (1, 8, 8)


def test_lazy_reading_gives_the_same_as_memory(tmp_path):
    images = random_images(40)
    files = numbered(images) | label_file([[image_name(i), [i, -i / 2]] for i in range(40)])
    for path in (write(tmp_path / "x.zip", files, zipfile.ZIP_DEFLATED), write(tmp_path / "x", files)):
        held = open_dataset(path, xflip=True)
        lazy = open_dataset(path, xflip=True, memory_limit=40 * 3 * 64 - 1)
        assert isinstance(held.images, torch.Tensor) and isinstance(lazy.images, DecodedImages)
        assert len(lazy) == 40 and lazy.shape == held.shape == (3, 8, 8) and lazy.classes == 2
        assert torch.equal(lazy.take(5, 30), held.take(5, 30))
        for step in range(5):  # with a step over the end of the epoch
            for one, other in zip(*(data.batch(step, torch.arange(13), batch_size=17, seed=1) for data in (lazy, held)),
                                  strict=True):  # fmt: skip
                assert torch.equal(one, other)
    assert data_files.IN_MEMORY_LIMIT == 4 * 10**9


def test_several_threads_read_one_zip(tmp_path, monkeypatch):
    """Every image is right among 600 that eight threads read at once."""
    images = random_images(30, size=32)
    path = write(tmp_path / "x.zip", numbered(images), zipfile.ZIP_DEFLATED)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        monkeypatch.setattr(decoding, "threads", lambda: pool)
        lazy = open_dataset(path, memory_limit=0)
        index = torch.from_numpy(np.random.default_rng(1).integers(0, 30, 600))
        assert np.array_equal(lazy.images.read(index).numpy(), images[index.numpy()])


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_follow_their_names_and_their_kind(tmp_path):
    files = numbered(random_images(4))
    names = list(files)
    path = write(
        tmp_path / "a", files | label_file([[name.replace("/", "\\"), 7 - i] for i, name in enumerate(names)][::-1])
    )
    data = open_dataset(path)
    assert data.labels.tolist() == [7, 6, 5, 4] and data.classes == 8
    vectors = [[0.5, 1, -2e-3], [0, 0, 0], [1, 2, 3], [1e5, -1, 7]]
    data = open_dataset(
        write(tmp_path / "b.zip", files | label_file([list(p) for p in zip(names, vectors, strict=True)]))
    )
    assert torch.equal(data.labels, torch.tensor(vectors)) and data.classes == 3
    assert open_dataset(write(tmp_path / "c.zip", files | label_file(None))).labels is None


def test_subset(tmp_path):
    images = random_images(50, size=4)
    path = write(tmp_path / "x.zip", numbered(images) | label_file([[image_name(i), i] for i in range(50)]))
    for count, seed in ((1, 0), (20, 0), (20, 7), (49, 2**32 - 1)):
        order = np.arange(50)
        np.random.RandomState(seed).shuffle(order)
        kept = np.sort(order[:count])
        data = open_dataset(path, max_images=count, seed=seed)
        assert data.labels.tolist() == kept.tolist()
        assert np.array_equal(data.images.numpy(), images[kept])
        assert data.classes == 50  # of the whole set
    assert len(open_dataset(path, max_images=50)) == len(open_dataset(path, max_images=51)) == 50


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(path: Path, message: str, **options: object) -> str:
    with pytest.raises(ValueError, match=message) as caught:
        open_dataset(path, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_what_is_no_data_set_is_told_what_would_be(tmp_path):
    possible = r"folder or zip of images, or CIFAR-10's python or binary archive \(.tar.gz or unpacked\)"
    refused(tmp_path / "none", f"none does not exist; .* {possible}")
    refused(write(tmp_path / "a", {"x.txt": b"1"}), f"holds no images .* {possible}")
    refused(write(tmp_path / "a.zip", {"x.txt": b"1"}), f"holds no images .* {possible}")
    refused(
        write(tmp_path, {"x.bin": b"\0" * 600}) / "x.bin", f"no data set that can be read: it must be .* {possible}"
    )
    refused(write(tmp_path, {"x.tar.gz": b"\x1f\x8b" + b"\0" * 600}) / "x.tar.gz", "cannot be read as an archive")
    whole = write(tmp_path / "b.zip", numbered(random_images(2))).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    refused(tmp_path / "cut.zip", "no data set that can be read")
    for options in ({"max_images": 0}, {"seed": -1}, {"seed": 2**32}):
        refused(tmp_path / "b.zip", "must", **options)


COLOUR, GREY = random_images(2), random_images(2, 1)
TALL = np.zeros((3, 9, 8), dtype=np.uint8)
SHEER = np.concatenate([COLOUR[0], np.full((1, 8, 8), 254, dtype=np.uint8)])
DEEP = io.BytesIO()
Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(DEEP, format="PNG")
PNG = encode_png(COLOUR[0])
BAD_IMAGES = {
    "not square": (encoded(TALL), PNG, r"0.png is 8x9, but images must be square: `ipfm dataset --crop center`"),
    "other size": (PNG, encode_png(random_images(1, size=4)[0]), "1.png is 4x4, but the data set's first image is 8x8"),
    "other shape": (PNG, encoded(TALL), "1.png is 8x9, but"),
    "colour among grey": (encode_png(GREY[0]), PNG, "1.png is in colour, but the data set is grey"),
    "transparent": (PNG, encoded(SHEER), "1.png is transparent: ipfm dataset --background white"),
    "16 bit": (PNG, DEEP.getvalue(), "1.png has 16 bits a value, of which 8 .* ipfm dataset --to-8-bits keeps"),
    "cut short": (PNG, PNG[:150], "1.png cannot be decoded: "),
    "no image": (PNG, b"\x00\x01nothing", "1.png is no image; what can be read: BMP, "),
    "empty": (b"", PNG, "0.png is no image"),
    "a program": (PNG, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "1.png is no image"),
}


@pytest.mark.parametrize("place", ["x", "x.zip"])
@pytest.mark.parametrize(("first", "second", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_are_named(tmp_path, place, first, second, message):
    path = write(tmp_path / place, {"0.png": first, "1.png": second})
    line = refused(path, message)
    assert line.startswith(f"{path}: " if place.endswith(".zip") else f"{path}/")
    if "0.png" not in message:  # found when it is read
        lazy = open_dataset(path, memory_limit=0)
        with pytest.raises(ValueError, match=message):
            lazy.take(0, 2)


NAMES = ["00000/img00000000.png", "00000/img00000001.png"]
PAIRS = [[NAMES[0], 1], [NAMES[1], 0]]
BAD_LABELS = {
    "unknown image": ([*PAIRS, ["00000/x.png", 1]], "has a label for 00000/x.png, which is not there"),
    "no label": (PAIRS[:1], f"has no label for {NAMES[1]}"),
    "two labels": ([*PAIRS, PAIRS[0]], f"has two labels for {NAMES[0]}"),
    "negative": (
        [PAIRS[0], [NAMES[1], -1]],
        f"the label of {NAMES[1]} must be a whole number from 0 to 999999, got -1",
    ),
    "huge": ([PAIRS[0], [NAMES[1], 10**30]], f"the label of {NAMES[1]} must be a whole number .* got 10000"),
    "fraction": ([[NAMES[0], 1.5], PAIRS[1]], f"{NAMES[0]} must be a whole number .* got 1.5"),
    "truth": ([[NAMES[0], True], PAIRS[1]], "must be a whole number .* got True"),
    "word": ([[NAMES[0], "cat\n"], PAIRS[1]], r"must be a whole number .* got 'cat\\n'"),
    "none": ([[NAMES[0], None], PAIRS[1]], "must be a whole number .* got None"),
    "mixed": ([[NAMES[0], [1.0]], PAIRS[1]], f"the label of {NAMES[1]} is no list of 1 numbers"),
    "mixed, the other way": ([PAIRS[0], [NAMES[1], [1.0]]], "must be a whole number"),
    "lengths": ([[NAMES[0], [1.0]], [NAMES[1], [1, 2]]], f"{NAMES[1]} is no list of 1 numbers"),
    "empty lists": ([[NAMES[0], []], [NAMES[1], []]], "no list of 1 numbers"),
    "words in lists": ([[NAMES[0], ["a"]], [NAMES[1], ["b"]]], "no list of 1 numbers"),
    "infinite": ([[NAMES[0], [float("inf")]], [NAMES[1], [1]]], "no list of 1 numbers"),
    "beyond float32": ([[NAMES[0], [1e39]], [NAMES[1], [1]]], "no list of 1 numbers"),
    "no pair": ([PAIRS[0], NAMES[1]], r"entry 1 of the labels is no pair \[name, label\]"),
    "no list": ({NAMES[0]: 1}, '"labels" must be a list of pairs'),
}


@pytest.mark.parametrize(("labels", "message"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_bad_labels_are_named(tmp_path, labels, message):
    path = write(tmp_path / "x.zip", numbered(COLOUR) | label_file(labels))
    assert refused(path, message).startswith(f"{path}: dataset.json")
    assert len(open_dataset(path, labels=False)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"{", "is no JSON", id="cut"),
        pytest.param(b"\xff", "is no JSON", id="binary"),
        pytest.param(b"[" * 100_000, "is no JSON", id="deep"),
        pytest.param(b"[1]", 'has no "labels"', id="list"),
        pytest.param(b"{}", 'has no "labels"', id="empty"),
    ],
)
def test_bad_label_files(tmp_path, content, message):
    path = write(tmp_path / "x", numbered(COLOUR) | {"dataset.json": content})
    assert refused(path, message).startswith(f"{path}/dataset.json ")


def test_bad_zips(tmp_path, monkeypatch):
    path = write(tmp_path / "x.zip", numbered(COLOUR))
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    (tmp_path / "flipped.zip").write_bytes(content)
    assert NAMES[0] in refused(tmp_path / "flipped.zip", "CRC")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as target, pytest.warns(UserWarning, match="Duplicate"):
        for name in ("b\n.png", "a.png", "b\n.png"):
            target.writestr(name, PNG)
    refused(tmp_path / "twice.zip", r"holds 'b\\n.png' twice")
    # The first bit of a member's flags says that it is encrypted.
    locked = bytearray(path.read_bytes())
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    refused(tmp_path / "locked.zip", f"{NAMES[0]}: .*encrypted")
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", len(PNG) - 1)
    refused(path, f"{NAMES[0]}: larger than 0 MiB")


def test_large_images_are_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 63)
    refused(write(tmp_path / "x", numbered(COLOUR)), f"{NAMES[0]} is 8x8, more than 0 million pixels")


# -- nothing is dropped without a word ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "set/", "a/b/"])
@pytest.mark.parametrize("style", ["plain", "backslash", "dot", "capital"])
def test_labels_are_found_however_a_zip_writes_its_names(tmp_path, prefix, style):
    def member(name: str) -> str:
        return {"backslash": name.replace("/", "\\"), "dot": f"./{name}"}.get(style, name)

    pairs = [[member(name), 1 - i] for i, name in enumerate(NAMES)]
    label = "Dataset.JSON" if style == "capital" else "dataset.json"
    files = {member(prefix + name): encode_png(pixels) for name, pixels in zip(NAMES, COLOUR, strict=True)}
    files[member(prefix + label)] = json.dumps({"labels": pairs}).encode()
    data = open_dataset(write(tmp_path / "x.zip", files | {"__MACOSX/._x.png": b"x"}))
    assert data.labels.tolist() == [1, 0] and np.array_equal(data.images.numpy(), COLOUR)


def test_labels_of_a_part_of_the_images_are_refused(tmp_path):
    files = {"a/0.png": PNG, "b/0.png": PNG} | {"a/dataset.json": label_file([["0.png", 1]])["dataset.json"]}
    refused(write(tmp_path / "x", files), "a/dataset.json has the labels of its own folder, in which b/0.png is not")
    files = {"0.png": PNG, "1.xyz": b"x"} | label_file([["0.png", 1], ["1.xyz", 0]])
    refused(write(tmp_path / "y", files), "has a label for 1.xyz, which is left out: it is no image")
    files = {"0.png": PNG, "1.psd": b"x"} | label_file([["0.png", 1], ["1.psd", 0]])
    refused(write(tmp_path / "z", files), "1.psd, which is left out with all images .psd, which are not read: convert")


def test_names_of_labels_in_another_form_of_unicode(tmp_path):
    files = {"cafe\u0301.png": PNG} | label_file([["caf\u00e9.png", 2]])
    assert open_dataset(write(tmp_path / "x.zip", files)).labels.tolist() == [2]


def test_labels_are_found_where_names_differ_in_capitals_alone(tmp_path):
    upper = [name.replace(".png", ".PNG") for name in NAMES]
    files = {name: encode_png(pixels) for name, pixels in zip(upper, COLOUR, strict=True)}
    pairs = [[name, 1 - i] for i, name in enumerate(NAMES)]
    assert open_dataset(write(tmp_path / "x.zip", files | label_file(pairs))).labels.tolist() == [1, 0]
    # Two images that differ so: whose label it is, nobody knows.
    both = files | {NAMES[0]: encode_png(COLOUR[0])}
    refused(write(tmp_path / "y.zip", both | label_file([*pairs[1:], [upper[0].title(), 0]])), "is not there")


def test_images_without_a_suffix_and_single_images_are_named(tmp_path, capsys):
    bare = {"n00": encode_png(COLOUR[0]), "n01": encoded(COLOUR[0], "JPEG"), "LICENSE": b"x"}
    for place in ("x", "x.zip"):
        path = write(tmp_path / place, bare)
        said = r"no suffix, such as .png: 2 \(n00, n01\); files without a suffix: 1 \(LICENSE\)"
        refused(path, said)
    write(tmp_path / "x", {"a.png": encode_png(COLOUR[0])})
    assert len(open_dataset(tmp_path / "x")) == 1
    assert "no suffix, such as .png: 2 (n00, n01)" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"strict was given, and .*no suffix"):
        open_dataset(tmp_path / "x", strict=True)
    refused(tmp_path / "x" / "a.png", r"it is a single image \(PNG\); give the folder that it lies in")


@pytest.mark.parametrize(
    "start, said",
    [
        (b"\0\0\0\x18ftypheic", "is an image of the format HEIC; what can be read: BMP, GIF"),
        (b"\0\0\0\x18ftypavif", "is a damaged AVIF"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "is a damaged JPEG 2000"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "is an image of the format JPEG XL; what can be read"),
        (b"8BPS", "is an image of the format PSD, of Photoshop;"),
        (b"\xff\xd8\xff", "is a damaged JPEG"),
        (b"\x1f\x8b", "is no image; what can be read"),
    ],
)
def test_what_no_image_is_is_said(tmp_path, start, said):
    refused(write(tmp_path / "x", {"a.jpg": start + bytes(64)}), f"a.jpg {said}")


def test_what_is_no_data_set_is_named(tmp_path):
    for name, content, said in (
        ("a.7z", b"7z\xbc\xaf\x27\x1c", "it is packed with 7-Zip: unpack it first"),
        ("a.rar", b"Rar!\x1a\x07", "it is packed with RAR: unpack it first"),
        ("a.xz", b"\xfd7zXZ\0", "it is packed with xz: unpack it first"),
    ):
        refused(write(tmp_path, {name: content + bytes(64)}) / name, said)
    write(tmp_path / "net", {"config.json": b"{}", "model.safetensors": b"x"})
    refused(tmp_path / "net", "net holds no images: it is a model folder")
    weights = write(tmp_path / "x.zip", {"archive/data.pkl": b"x", "archive/data/0": b"x"})
    refused(weights, "holds no images: it is a checkpoint, a file of torch.save")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("data.mdb", "it is a database of LMDB, as LSUN's: export its images to files"),
        ("ffhq-r06.tfrecords", "it holds records of TensorFlow: export its images to files"),
        ("n01440764.tar.gz", r"it holds packed tars: unpack them \(gunzip\), for images are read from tars"),
    ],
)
def test_a_folder_of_another_programs_data_is_named_with_the_way_out(tmp_path, name, said):
    write(tmp_path / "x", {f"sub/{name}": b"x"})
    refused(tmp_path / "x", f"x holds no images: {said}")
    # Images beside it are a data set.
    assert len(open_dataset(write(tmp_path / "x", {"0.png": PNG}))) == 1


def test_an_npz_is_no_data_set(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    refused(tmp_path / "x.npz", r"it is an .npz \(arr_0\), which is measured \(ipfm evaluate\): to train on images")


def test_paths_are_read_as_a_shell_reads_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x", numbered(COLOUR))
    assert len(open_dataset(Path("~/x"))) == len(open_dataset("~/x")) == len(COLOUR)
    with pytest.raises(ValueError, match="a path is empty, as of a variable that is not set"):
        open_dataset("")
    refused(Path("~/y"), f"{tmp_path}/y does not exist; a data set is")


def test_links_to_folders_are_followed_and_a_pipe_is_not_waited_for(tmp_path, capsys):
    write(tmp_path / "birds", {"0.jfif": encoded(COLOUR[0], "JPEG"), "x.xyz": b"x", ".hidden.png": b"x"})
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "bird").symlink_to(tmp_path / "birds")
    (tmp_path / "set" / "up").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "set" / "f.png")
    assert len(open_dataset(tmp_path / "set")) == 1
    said = capsys.readouterr().err
    for part in ("files .xyz: 1 (bird/x.xyz)", "hidden files: 1", "pipes, sockets or devices: 1 (f.png)",
                 "folders without an image: 1 (cat)", "links to a folder above them: 1 (up)"):  # fmt: skip
        assert part in said
    assert said.count("\n") == 1
    (tmp_path / "set" / "gone.png").symlink_to(tmp_path / "nothing")
    refused(tmp_path / "set", "gone.png is a link to")


def test_photos_are_turned_as_their_exif_orientation_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (16, 16), "white")
    picture.paste("red", (0, 0, 16, 8))  # above, as stored; at the right when it is turned
    (tmp_path / "x").mkdir()
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        picture.save(tmp_path / "x" / f"a.{'tif' if kind == 'TIFF' else kind.lower()}", kind, exif=exif, quality=100)
    images = open_dataset(tmp_path / "x").images
    assert (images[:, 1, :, 10:] < 40).all() and (images[:, 1, :, :6] > 215).all()
    picture.crop((0, 0, 16, 8)).save(tmp_path / "x" / "a.jpeg", exif=exif)
    refused(tmp_path / "x", "a.jpeg is 8x16, but images must be square")


def test_damaged_exif_data_are_no_damaged_picture(tmp_path, capsys):
    exif = b"Exif\0\0MM\0*" + bytes([255] * 40)
    picture = Image.new("RGB", (16, 16), "red")
    (tmp_path / "x").mkdir()
    for kind in ("jpeg", "png", "webp"):
        picture.save(tmp_path / "x" / f"a.{kind}", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of Pillow's own lines reaches stderr
        data = open_dataset(tmp_path / "x")
    assert len(data) == 3
    (said,) = data.remarks
    assert re.search(r"x: Pillow warned \d+ times? and read the images all the same: Corrupt EXIF data", said)
    assert capsys.readouterr().err == f"ipfm: note: {said}\n"


def test_classes_without_an_image_are_said(tmp_path, capsys):
    files = numbered(COLOUR) | label_file([[NAMES[0], 1], [NAMES[1], 3]])
    assert open_dataset(write(tmp_path / "x.zip", files)).classes == 4
    assert "x.zip: 2 of 4 classes have no images: 0, 2\n" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["png", "ppm", "tif"])
def test_colour_of_16_bits_is_refused(tmp_path, kind):
    values = np.arange(8 * 8 * 3, dtype=">u2").reshape(8, 8, 3) * 16
    if kind == "png":

        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        rows = b"".join(b"\0" + row.tobytes() for row in values)
        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
        content += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    elif kind == "ppm":
        content = b"P6 8 8 65535\n" + values.tobytes()
    else:
        tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 128),
                (277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 1, 384)]  # fmt: skip
        entries = b"".join(
            struct.pack("<HHI", *tag[:3]) + struct.pack("<HH" if tag[1] == 3 and tag[2] == 1 else "<I",
                                                         *((tag[3], 0) if tag[1] == 3 and tag[2] == 1 else tag[3:]))
            for tag in tags
        )  # fmt: skip
        head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
        content = head.ljust(122, b"\0") + struct.pack("<HHH", 16, 16, 16) + values.astype("<u2").tobytes()
    refused(write(tmp_path / "x", {f"0.{kind}": content}), "0.* has 16 bits a value")


def test_of_several_pictures_in_a_file_none_is_dropped(tmp_path):
    first, second = (Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in COLOUR)
    for kind in ("GIF", "WEBP", "TIFF"):
        buffer = io.BytesIO()
        first.save(buffer, kind, save_all=True, append_images=[second])
        refused(write(tmp_path / kind, {"0.tif": buffer.getvalue()}), "0.tif holds 2 pictures")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n", "pointer of Git LFS"),
        (b"PK\x03\x04" + bytes(99), "it is a damaged zip"),
    ],
)
def test_what_stands_in_the_place_of_data_is_named(tmp_path, content, message):
    refused(write(tmp_path, {"x.zip": content}) / "x.zip", message)
    if not content.startswith(b"PK"):
        refused(write(tmp_path / "x", {"0.png": content}), f"0.png is no image: .*{message}")


@pytest.mark.parametrize("memory_limit", [0, 10**6])
def test_an_image_that_cannot_be_read_is_left_out_when_asked(tmp_path, capsys, memory_limit):
    images = random_images(4)
    files = numbered(images) | label_file([[image_name(i), i] for i in range(4)])
    files |= {image_name(0): b"", image_name(3): PNG[:99]}
    path = write(tmp_path / "x.zip", files)
    data = open_dataset(path, skip_unreadable=True, memory_limit=memory_limit)
    got = data.batch(0, torch.arange(4), batch_size=4, seed=0)
    order = got.labels.argmax(1)
    assert sorted(order.tolist()) == [1, 1, 1, 2]  # the labels are those of the images that were read
    assert torch.equal(got.images, torch.from_numpy(images)[order] / 127.5 - 1)
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and f"{image_name(0)} is no image: it is empty; " in said
    data.batch(1, torch.arange(4), batch_size=4, seed=0)
    assert not capsys.readouterr().err


# -- writing -----------------------------------------------------------------------------------------------------------


def test_the_zip_is_edms_and_always_the_same(tmp_path):
    images = random_images(3)
    labels = torch.tensor([4, 0, 2])
    write_dataset_zip(tmp_path / "a.zip", map(encode_png, images), labels)
    write_dataset_zip(tmp_path / "b.zip", map(encode_png, images), labels)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert image_name(49999) == "00049/img00049999.png" and image_name(42) == "00000/img00000042.png"
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        members = archive.infolist()
        assert [m.filename for m in members] == [*map(image_name, range(3)), "dataset.json"]
        assert all(m.compress_type == zipfile.ZIP_STORED for m in members)
        assert all(stat.S_IMODE(m.external_attr >> 16) == 0o644 for m in members)
        assert json.loads(archive.read("dataset.json")) == {
            "labels": [[image_name(i), n] for i, n in enumerate([4, 0, 2])]
        }
        png = archive.read(image_name(1))
    assert len(png) > images[1].size  # not compressed
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode == "RGB" and np.array_equal(np.asarray(image).transpose(2, 0, 1), images[1])
    data = open_dataset(tmp_path / "a.zip")
    assert np.array_equal(data.images.numpy(), images) and data.labels.tolist() == [4, 0, 2]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = write(tmp_path / "a.zip", {"x": b"before"})
    before = path.read_bytes()

    def pngs():
        yield PNG
        raise ValueError("a bad image")

    with pytest.raises(ValueError, match="a bad image"):
        write_dataset_zip(path, pngs(), None)
    with pytest.raises(ValueError, match=r"a.zip: 1 images were given with 2 labels"):
        write_dataset_zip(path, [PNG], torch.tensor([1, 2]))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_float_labels_survive_the_file(tmp_path):
    labels = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    write_dataset_zip(tmp_path / "a.zip", map(encode_png, COLOUR), labels)
    assert torch.equal(open_dataset(tmp_path / "a.zip").labels, labels)
    assert as_labels([[1, 2.5]], ["a"], "x").dtype == torch.float32
