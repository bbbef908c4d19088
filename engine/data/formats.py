"""Which formats of images are read, by content and by the suffix of a name, and what to do about the others."""

from __future__ import annotations

import os
from functools import cache

from ipfm.models.checkpoints.recognise import image_kind, what_pointer

# Formats that Pillow decodes itself, where it was built with them: others are handed to programs on the machine.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "QOI", "DIB")
# A TGA begins with nothing that would tell it from anything else: its name has to say it.
_BY_NAME = dict.fromkeys((".icb", ".tga", ".vda", ".vst"), "TGA")
# How Pillow's `features` calls what a format needs.
_FEATURES = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
_SUFFIXES = {
    **dict.fromkeys((".apng", ".png"), "PNG"),
    **dict.fromkeys((".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"), "JPEG"),
    **dict.fromkeys((".pbm", ".pgm", ".pnm", ".ppm"), "PPM"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"), "JPEG2000"),
    **dict.fromkeys((".heic", ".heics", ".heif", ".hif"), "HEIC"),
    **_BY_NAME,
    ".avif": "AVIF", ".bmp": "BMP", ".dib": "DIB", ".gif": "GIF", ".qoi": "QOI", ".webp": "WEBP",
}  # fmt: skip
EXTENSIONS = frozenset(_SUFFIXES)
"""What the name of an image ends in, in small or capital letters."""
_UNREAD = frozenset(
    (".arw", ".cr2", ".cr3", ".dds", ".dng", ".eps", ".exr", ".hdr", ".ico", ".jxl", ".nef", ".orf", ".pcx", ".psd",
     ".raf", ".rw2", ".sgi", ".svg", ".xcf")
)  # fmt: skip
"""Suffixes of images that are not read whatever is installed."""
CONVERT = "convert them to PNG"
_HEIC = "pip install pillow-heif"
_NEWER = "pip install --upgrade pillow"


def formats_of(name: str) -> tuple[str, ...]:
    """Pillow's names of the formats that the file `name` may have."""
    named = _BY_NAME.get(os.path.splitext(name)[1].lower())
    return (*filter(_has, _FORMATS), *(("HEIF",) if _heic() else ()), *((named,) if named else ()))


def why_not_read(suffix: str) -> str | None:
    """Why images of this suffix cannot be read here, and what to do; None where they can be, or are no images.

    Args:
        suffix: in small letters, with its dot.
    """
    if suffix in _UNREAD:
        return f"images {suffix}, which are not read: {CONVERT}"
    kind = _SUFFIXES.get(suffix)
    if kind == "HEIC":
        return None if _heic() else f"images {suffix}, which need `{_HEIC}`, or {CONVERT}"
    if kind in _FEATURES and not _has(kind):
        return f"images {suffix}, which need a newer Pillow (`{_NEWER}`), or {CONVERT}"
    return None


def what_instead(start: bytes) -> str:
    """What a file is that Pillow does not know, from its first bytes, 512 of them: "is …"."""
    readable = f"what can be read: {', '.join(kind for kind in _FORMATS if _has(kind))}"
    if kind := image_kind(start):
        plain = kind.replace(" ", "")
        if plain in _FORMATS and _has(plain):
            return f"is a damaged {kind}"
        way = {"HEIC": _HEIC, **dict.fromkeys(_FEATURES, _NEWER)}.get(plain)
        if kind == "HEIC" and _heic():
            return "is a damaged HEIC"
        return f"is an image of the format {kind}; {readable}{f'; {kind} with `{way}`' if way else ''}"
    what = what_pointer(start)
    return f"is no image{f': {what}' if what else f'; {readable}'}"


@cache
def _has(kind: str) -> bool:
    if kind not in _FEATURES:
        return True
    from PIL import features

    # An older Pillow does not know the name of a newer format, and warns of it.
    name = _FEATURES[kind]
    return name in (*features.modules, *features.codecs) and bool(features.check(name))


@cache
def _heic() -> bool:
    """Whether HEIC is read: a package of its own gives it to Pillow."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True
