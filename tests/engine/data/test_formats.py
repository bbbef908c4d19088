"""Every format that Pillow decodes is read, by its content; what cannot be read is named, with what to do."""

import io
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ipfm.engine.data import decoding, formats
from ipfm.engine.data.decoding import Leniency, read_header, read_picture
from ipfm.engine.data.formats import EXTENSIONS, why_not_read
from ipfm.engine.data.image_files import FolderFiles
from ipfm.engine.data.open_dataset import open_dataset

# Smooth, as a JPEG and an AVIF halve the colours.
PICTURE = Image.fromarray(np.stack([np.add.outer(16 * np.arange(8), 12 * np.arange(8))] * 3, 2).astype(np.uint8))


def encoded(kind: str, image: Image.Image = PICTURE, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


LOSSLESS = {"AVIF": {"quality": 100}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100}}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("JPEG", "a.jfif a.jpe a.JPG a.mpo"), ("JPEG2000", "a.jp2 a.j2k a.jpf"), ("TGA", "a.tga a.VDA a.icb"),
        ("AVIF", "a.avif"), ("WEBP", "a.webp"), ("PPM", "a.ppm a.pnm"), ("PNG", "a.apng"), ("QOI", "a.qoi"),
        ("BMP", "a.bmp"), ("DIB", "a.dib"), ("TIFF", "a.tiff"), ("GIF", "a.gif"),
    ],
)  # fmt: skip
def test_each_format_is_read_under_each_of_its_suffixes(tmp_path, kind, names):
    for place, name in enumerate(names.split()):
        options = {"no_jp2": True} if name.endswith("j2k") else {}
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / name).write_bytes(encoded(kind, **LOSSLESS.get(kind, {}), **options))
        images = open_dataset(folder).images[0].permute(1, 2, 0).int()
        assert (images - torch.from_numpy(np.array(PICTURE)).int()).abs().max() <= (
            3 if kind in ("JPEG", "AVIF") else 0
        )


def test_the_content_decides_over_the_suffix(tmp_path):
    for name, kind in (("a.jpg", "PNG"), ("b.png", "WEBP"), ("c.avif", "BMP"), ("d.tga", "PNG"), ("e.heic", "PNG")):
        (tmp_path / name).write_bytes(encoded(kind, **LOSSLESS.get(kind, {})))
    formats._heic.cache_clear()
    data = open_dataset(tmp_path)
    assert len(data) == 4 and all(torch.equal(image, data.images[0]) for image in data.images)
    # Nothing begins as a TGA does not: the name has to say it.
    (tmp_path / "f.png").write_bytes(encoded("TGA"))
    with pytest.raises(ValueError, match=r"f.png is no image; what can be read: .*; --skip-unreadable goes on without"):
        open_dataset(tmp_path)


def test_images_that_cannot_be_read_are_named_with_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(formats, "_has", lambda kind: kind != "AVIF")
    formats._heic.cache_clear()
    for name in ("0.png", "1.HEIC", "2.heif", "3.avif", "4.psd", "5.jxl", "6.JPG_large", "7.JPG_large", "8.csv"):
        (tmp_path / name).write_bytes(encoded("PNG"))
    (tmp_path / "7.JPG_large").write_bytes(b"x")
    (tmp_path / "8.csv").write_bytes(b"x")
    assert len(open_dataset(tmp_path)) == 1
    said = capsys.readouterr().err
    for part in (
        "images .heic, which need `pip install pillow-heif`, or convert them to PNG: 1 (1.HEIC)",
        "images .heif, which need `pip install pillow-heif`, or convert them to PNG: 1 (2.heif)",
        "images .avif, which need a newer Pillow (`pip install --upgrade pillow`), or convert them to PNG: 1 (3.avif)",
        "images .psd, which are not read: convert them to PNG: 1 (4.psd)",
        "images whose names end in .jpg_large: rename them: 1 (6.JPG_large)",
        "files .jpg_large: 1 (7.JPG_large)",
        "files .csv: 1 (8.csv)",
    ):
        assert part in said
    assert said.count("\n") == 1
    with pytest.raises(ValueError, match=r"strict was given, and .*images .heic, which need"):
        open_dataset(tmp_path, strict=True)
    formats._heic.cache_clear()


def test_an_older_pillow_does_not_know_avif(tmp_path, monkeypatch, recwarn):
    from PIL import features

    monkeypatch.setattr(features, "modules", {name: one for name, one in features.modules.items() if name != "avif"})
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    formats._has.cache_clear()
    try:
        assert "AVIF" not in formats.formats_of("a.png") and why_not_read(".avif") is not None
        (tmp_path / "a.qoi").write_bytes(encoded("QOI"))
        assert len(open_dataset(tmp_path)) == 1
        (tmp_path / "b.jpg").write_bytes(b"\0\0\0\x18ftypavif" + bytes(64))
        with pytest.raises(ValueError, match=r"of the format AVIF; .*; AVIF with `pip install --upgrade pillow`"):
            open_dataset(tmp_path)
    finally:
        formats._has.cache_clear()
    assert not recwarn.list


def test_heic_is_read_where_its_package_is_there(tmp_path, monkeypatch):
    """With a stand-in for the package, which reads PNGs under that name."""
    from PIL import PngImagePlugin

    def register() -> None:
        monkeypatch.setitem(Image.OPEN, "HEIF", (PngImagePlugin.PngImageFile, lambda start: start[4:8] == b"ftyp"))
        monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    formats._heic.cache_clear()
    try:
        (tmp_path / "a.heic").write_bytes(encoded("PNG"))
        assert why_not_read(".heic") is None and "HEIF" in formats.formats_of("a.jpg")
        assert len(open_dataset(tmp_path)) == 1
        (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
        with pytest.raises(ValueError, match=r"a.heic .*--skip-unreadable goes on without it"):
            open_dataset(tmp_path)
    finally:
        formats._heic.cache_clear()


def test_every_suffix_is_an_image_or_has_a_reason():
    formats._heic.cache_clear()
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in EXTENSIONS)
    for suffix in Image.registered_extensions():
        kind = Image.registered_extensions()[suffix]
        if kind in ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP", "AVIF"):
            assert suffix in EXTENSIONS or suffix in (".avifs", ".pfm"), suffix


# -- what would be lost ------------------------------------------------------------------------------------------------


def picture(folder: Path, name: str, content: bytes, leniency: Leniency, channels: int = 3) -> np.ndarray:
    (folder / name).write_bytes(content)
    files = FolderFiles(folder)
    read_header(files, name, leniency)
    return np.asarray(read_picture(files, name, channels, leniency))


DEEP = Image.fromarray((np.arange(64, dtype=np.uint16) * 1021).reshape(8, 8))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2"])
def test_the_upper_bits_of_deep_grey_are_taken_when_asked(tmp_path, name):
    if name == "a.pgm":
        content = b"P5 8 8 65535\n" + np.asarray(DEEP).astype(">u2").tobytes()
    else:
        content = encoded({"png": "PNG", "tif": "TIFF", "jp2": "JPEG2000"}[name[2:]], DEEP)
    got = picture(tmp_path, name, content, Leniency(eight_bits=True), channels=1)
    assert np.array_equal(got, np.asarray(DEEP) >> 8)
    with pytest.raises(ValueError, match=r"16 bits a value, of which 8 would be lost; .* ipfm dataset --to-8-bits"):
        open_dataset(tmp_path)


def test_deep_colour_of_newer_formats_is_known(tmp_path, monkeypatch):
    """AVIF of 10 and 12 bits and a JPEG 2000 of 12, which Pillow makes 8 of without a word."""
    avif = encoded("AVIF")
    place = avif.index(b"av1C") + 6
    (tmp_path / "a.avif").write_bytes(avif)
    assert read_header(FolderFiles(tmp_path), "a.avif").channels == 3
    for flags, bits in ((0x40, 10), (0x60, 12)):
        content = avif[:place] + bytes([avif[place] & 0x9F | flags]) + avif[place + 1 :]
        monkeypatch.setattr(decoding, "_start", lambda image, content=content: content)
        with pytest.raises(ValueError, match=rf"{bits} bits a value, of which {bits - 8} would be lost"):
            read_header(FolderFiles(tmp_path), "a.avif")
    assert read_header(FolderFiles(tmp_path), "a.avif", Leniency(eight_bits=True)).channels == 3
    monkeypatch.undo()
    deep = bytearray(encoded("JPEG2000"))
    place = deep.index(b"\xff\x4f\xff\x51") + 42
    assert deep[place] == 7
    deep[place] = 11
    (tmp_path / "a.jp2").write_bytes(deep)
    with pytest.raises(ValueError, match="12 bits a value, of which 4 would be lost"):
        read_header(FolderFiles(tmp_path), "a.jp2")


def test_transparent_pictures_are_put_on_a_colour_when_asked(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 4, 8))
    clear.paste((0, 0, 255, 128), (0, 0, 1, 1))
    got = picture(tmp_path, "a.png", encoded("PNG", clear), Leniency(background="white"))
    assert got[5, 6].tolist() == [255, 255, 255] and got[5, 1].tolist() == [0, 0, 255]
    assert abs(got[0, 0].astype(int) - [127, 127, 255]).max() <= 1
    grey = picture(tmp_path, "b.png", encoded("PNG", clear.convert("LA")), Leniency(background="black"), channels=1)
    assert grey[5, 6] == 0 and grey[5, 1] == 29
    with pytest.raises(ValueError, match=r"a.png is transparent: ipfm dataset --background white \(or black, grey\)"):
        open_dataset(tmp_path)


def test_the_first_of_several_pictures_is_taken_when_asked(tmp_path):
    second = Image.new("RGB", PICTURE.size, "red")
    content = encoded("WEBP", save_all=True, append_images=[second], lossless=True)
    got = picture(tmp_path, "a.webp", content, Leniency(first_frame=True))
    assert np.array_equal(got, np.asarray(PICTURE))
    with pytest.raises(ValueError, match=r"holds 2 pictures, .* or ipfm dataset --first-frame takes the first"):
        open_dataset(tmp_path)
