"""What a file or a folder is that is no model, and what to give instead: the second half of a message.

Nothing is refused and nothing is raised here; a few bytes are looked at, and the names in a folder.
"""

import contextlib
import json
import os
import re
import struct
import zlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ipfm.models.checkpoints.pickle_values import shown

_MODEL_FILES = ("config.json", "model.safetensors")
# What the folder of a run of each kind is of.
RUN_KINDS = {"distill": "distillation", "teacher": "teacher's training"}
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!": "RAR",
}
_KINDS = {
    b"\x89HDF": "an HDF5 file, as Keras and h5py write them",
    b"\x93NUMPY": "an array of NumPy",
    b"\x89PNG": "an image (PNG)",
    b"\xff\xd8\xff": "an image (JPEG)",
    b"GIF8": "an image (GIF)",
    b"GGUF": "a GGUF file, as llama.cpp reads them",
    b"%PDF": "a PDF",
    b"\x7fELF": "a program",
}
_IMAGE_STARTS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"8BPS": "PSD, of Photoshop",
    b"qoif": "QOI",
    b"DDS ": "DDS",
    b"\x76\x2f\x31\x01": "OpenEXR",
}
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CHECKPOINTS = (".pkl", ".pt", ".pth")
_OF_SID = re.compile(r"network-snapshot-\d+\.\d{6}-\d{6,}|edm2_img512_[a-z]{1,3}_sid")
_OF_A_TEACHER = re.compile(r"network-snapshot-\d{6,}\D|training-state-\d|edm2?-|baseline-")
_AVERAGE = re.compile(r"G_ema\d*")
# Names that are looked at in a folder, which may hold millions.
_LOOKED_AT = 1000


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as a shell reads it: ~ is the home folder.

    Args:
        path: as it was given.

    Raises:
        ValueError: it is empty, as an unset variable is.
    """
    if not os.fspath(path):
        raise ValueError("a path is empty, as of a variable that is not set")
    try:
        return Path(path).expanduser()
    except RuntimeError:  # a user that does not exist
        return Path(path)


def missing(path: Path) -> str:
    """Why there is nothing at `path`: "X does not exist", where it was looked for, or where a link leads."""
    if path.is_symlink():
        return f"{_text(path)} is a link to {_text(Path(os.readlink(path)))}, which does not exist"
    return f"{_text(path)} does not exist" + ("" if path.is_absolute() else f" in {_text(Path.cwd())}")


def what_file(data: memoryview, path: Path | None = None) -> str | None:
    """What a file is that is neither a pickle nor of torch.save: "it is a web page …"; None where that is not known.

    Args:
        data: the whole file.
        path: where it lies, for what lies beside it.
    """
    start = bytes(data[:512])
    part = _part_of_a_model(path)
    if part is not None:
        return part
    if not start.strip(b"\0") and not bytes(data[: 1 << 16]).strip(b"\0"):
        return "it begins with nothing but zeros, as a download does that has not ended"
    for magic, name in _PACKED.items():
        if start.startswith(magic):
            return f"it is packed with {name}: unpack it first{_inside_gzip(data) if name == 'gzip' else ''}"
    if start[257:262] == b"ustar":
        return f"it is a tar archive: unpack it, and give the file in it ({_name(start[:100])} comes first)"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < len(data):
        return (
            "it is a safetensors file, tensors without their network: give the model folder that it is from, with its "
            "config.json"
        )
    known = next((words for magic, words in _KINDS.items() if start.startswith(magic)), None)
    if known is None and b"\x12\x07pytorch" in start[:16]:
        known = "a graph of ONNX"
    return f"it is {known}" if known else _what_text(start)


def image_kind(start: bytes) -> str | None:
    """The format of an image file that begins with these bytes, 16 or more; None where it is none that is known."""
    if start[4:8] == b"ftyp":
        brand = start[8:12]
        return "AVIF" if brand.startswith(b"avi") else "HEIC" if brand[:3] in (b"hei", b"hev", b"mif", b"msf") else None
    if start[:4] == b"RIFF":
        return "WEBP" if start[8:12] == b"WEBP" else None
    return next((name for magic, name in _IMAGE_STARTS.items() if start.startswith(magic)), None)


def what_packed(start: bytes) -> str | None:
    """Says so where a file is packed, other than as a zip or by gzip, from its first bytes."""
    name = next((name for magic, name in _PACKED.items() if start.startswith(magic)), None)
    return None if name is None else f"it is packed with {name}: unpack it first"


def what_pointer(data: bytes | memoryview) -> str | None:
    """What stands in the place of a file of weights: a pointer of Git LFS, a page, an answer; None where that is none.

    Args:
        data: the whole file, or its beginning.
    """
    return "it is empty" if not len(data) else _what_text(bytes(data[:512]))


def what_zip(names: Sequence[str]) -> str:
    """What a zip is that torch.save has not written; `names` are those of its members."""
    if any(name.endswith("/constants.pkl") for name in names):
        return "it is a TorchScript program"
    if any(name.endswith("/archive_format") for name in names):
        return "it is a program of torch.export, a .pt2: give the model folder that it was made of"
    if names and all(name.endswith(".npy") for name in names):
        arrays = ", ".join(shown(name.removesuffix(".npy"), 20).strip("'\"") for name in names[:4])
        return f"it is an .npz with the arrays {arrays}: the statistics of a reference, or images"
    if inside := next((name for name in names if name.lower().endswith(_CHECKPOINTS)), None):
        return f"it is a zip with {shown(inside)} in it: unpack it, and give that file"
    if any(name.lower().endswith(_IMAGES) for name in names):
        return "it is a zip of images, a data set"
    return f"it is a zip with {shown(names[0])} in it" if names else "it is an empty zip"


def what_global(module: str, name: str) -> str:
    """What a pickle is that asks for a global which is not admitted: "; it …", or nothing."""
    top = module.partition(".")[0]
    if top in ("posix", "nt", "os", "subprocess", "sys", "builtins", "__builtin__", "runpy", "importlib", "shutil"):
        return "; nothing of it was run"
    if top == "ipfm" or module.startswith("torch.nn"):
        return "; it holds a whole network that only its code could read: store networks with save_model"
    if top == "__torch__":
        return "; it is a TorchScript program, as the Inception network of an evaluation (--inception) is"
    if top in ("diffusers", "transformers", "omegaconf", "pytorch_lightning", "lightning"):
        return f"; it is a file of {top}"
    return ""


def what_folder(folder: Path) -> str | None:
    """What a folder is that is no model: "it is the folder of a run; its generator is …"; None where nothing is known.

    Args:
        folder: the folder.
    """
    if is_checkpoint(folder):
        return f"it is a checkpoint that a run continues from{_whose_run(folder.resolve().parent.parent)}"
    if (run := run_kind(folder)) is not None:
        return f"it is the folder of a {RUN_KINDS[run]}{_models_of(folder)}"
    if folder.name == "checkpoints" and run_kind(folder.resolve().parent) is not None:
        return f"it holds the checkpoints that a run continues from{_whose_run(folder.resolve().parent)}"
    config = read_object(folder / "config.json")
    if foreign := config.get("_class_name") or next(iter(config.get("architectures") or ()), None):
        return f"it is a model of another library ({shown(foreign)})"
    if (folder / "model_index.json").is_file():
        return "it is a pipeline of diffusers"
    return _what_names(folder)


def what_of_ours(folder: Path) -> str | None:
    """What a folder is that this project wrote for itself: a model, a run, a checkpoint of one; None for any other.

    Args:
        folder: the folder.
    """
    if all((folder / name).is_file() for name in _MODEL_FILES):
        return "it is a model folder"
    if is_checkpoint(folder) or run_kind(folder) is not None:
        return what_folder(folder)
    return None


def what_place(path: Path) -> str | None:
    """What stands at `path` in the place of data: a pointer, a page, a pickle, a folder of ours; None if neither.

    Args:
        path: a file or folder.
    """
    if path.is_dir():
        return what_of_ours(path)
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:
        return None
    if start.startswith(b"\x80"):
        return "it is a pickle; statistics are an .npz with mu and sigma"
    return what_pointer(start)


def generator_by_place(path: Path) -> str | None:
    """By what a file that holds an average alone is a generator's: its name or its folder; None where neither says it.

    SiD has alpha in the name, as in network-snapshot-1.200000-403968.pkl, or its own, as in
    edm2_img512_xs_sid_alpha1-249360.pkl, and IPFM's program keeps its averages in
    folders G_ema, G_ema990, …; EDM's own network-snapshot-002500.pkl has neither.

    Args:
        path: the file. Where it is a link, its own name counts and that of what it leads to.
    """
    places = [path.absolute()]
    with contextlib.suppress(OSError, RuntimeError):
        places.append(path.resolve())
    for place in places:
        if _OF_SID.search(place.name):
            return f"by its name, which has SiD's alpha ({_text(Path(place.name))})"
        if _AVERAGE.fullmatch(place.parent.name):
            return f"by its folder {place.parent.name}"
    return None


def teacher_by_name(path: Path) -> bool:
    """Whether the file has a name that EDM, EDM2 or PFGM++ gives to a teacher: network-snapshot-002500.pkl, edm-….pkl.

    Args:
        path: the file.
    """
    return _OF_A_TEACHER.match(path.name) is not None


def is_checkpoint(folder: Path) -> bool:
    """Whether it is a checkpoint of a run."""
    return (folder / "manifest.json").is_file() and (folder / "progress.json").is_file()


def models_in(folder: Path) -> list[Path]:
    """The model folders of a run: its generator first, then its teacher; none where it has exported nothing."""
    places = ("generator", "model", "teacher/model")
    return [folder / place for place in places if all((folder / place / name).is_file() for name in _MODEL_FILES)]


def _what_text(start: bytes) -> str | None:
    plain = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    low = plain.lower()
    if plain.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, in the place of the file: fetch that with `git lfs pull`"
    if low.startswith((b"<!doctype html", b"<html", b"<head")):
        return "it is a web page: the download led to a page, not to the file"
    if low.startswith((b"<?xml", b"<error")):
        return "it is an XML text, as servers answer with: the download has failed"
    if plain.startswith((b"{", b"[")) and _is_text(plain):
        return f"it is a JSON text, as servers answer with: it begins with {shown(plain[:40])}"
    return f"it is a text: it begins with {shown(plain[:40])}" if len(plain) > 8 and _is_text(plain) else None


def _is_text(start: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r" for byte in start) and b"\x7f" not in start


def _inside_gzip(data: memoryview) -> str:
    try:
        start = zlib.decompressobj(31).decompress(bytes(data[:4096]), 512)
    except zlib.error:
        return ", if its download has ended: it is damaged"
    return f" ({_name(start[:100])} comes first in the archive)" if start[257:262] == b"ustar" else ""


def _name(field: bytes) -> str:
    return shown(field.partition(b"\0")[0].decode("utf-8", "replace"))


def _part_of_a_model(path: Path | None) -> str | None:
    if path is None:
        return None
    if is_checkpoint(path.parent):
        whose = _whose_run(path.resolve().parents[2])
        return f"it is a part of a checkpoint that a run continues from: give the folder for its average{whose}"
    if path.name == "config.json" and run_kind(path.parent) is not None:
        return f"it holds the settings of a run{_models_of(path.parent)}"
    if path.name not in _MODEL_FILES:
        return None
    if not all((path.parent / name).is_file() for name in _MODEL_FILES):
        return None
    return f"it is a part of the model folder {_text(path.parent)}: give the folder"


def run_kind(folder: Path) -> str | None:
    """The kind of a run by its folder, of `RUN_KINDS`; None for any other folder."""
    found = read_object(folder / "config.json").get("kind")
    return found if isinstance(found, str) and found in RUN_KINDS else None


def _models_of(folder: Path) -> str:
    found = models_in(folder)
    if not found:
        return ", which has not exported a model yet"
    said = [f"its {'generator' if place.name == 'generator' else 'teacher'} is {_text(place)}" for place in found]
    return f"; {', '.join(said)}"


def _whose_run(folder: Path) -> str:
    return _models_of(folder) if run_kind(folder) is not None else ""


def _what_names(folder: Path) -> str | None:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in islice(entries, _LOOKED_AT))
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if not names:
        return "it is empty"
    if models := [name for name in names if all((folder / name / part).is_file() for part in _MODEL_FILES)]:
        return f"it holds the model folder{'s' * (len(models) > 1)} {_some(models)}: give {_one(models)}"
    if files := [name for name in names if name.lower().endswith(_CHECKPOINTS) and (folder / name).is_file()]:
        return f"it holds the checkpoint{'s' * (len(files) > 1)} {_some(files)}: give {_one(files)}"
    if runs := [name for name in names if run_kind(folder / name) is not None]:
        return f"it holds the run{'s' * (len(runs) > 1)} {_some(runs)}: give a model in {_one(runs)}"
    # A run has pictures too, and they may lie beside runs.
    if any(name.lower().endswith(_IMAGES) for name in names):
        return "it holds images"
    if below := next((name for name in names if _holds_images(folder / name)), None):
        return f"it holds folders of images, such as {shown(below)}: a data set"
    return None


def _holds_images(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.lower().endswith(_IMAGES) for entry in islice(entries, _LOOKED_AT))
    except OSError:
        return False


def _one(names: Sequence[str]) -> str:
    return "that" if len(names) == 1 else "one of them"


def _some(names: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where it cannot be read.

    Args:
        path: the file.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else ascii(text)


def cut_short(data: bytes | memoryview) -> bool:
    """Whether a safetensors file ends before the tensors do that its header lists."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        if length > len(data) - 8:
            return bytes(data[8:9]) == b"{"
        header = json.loads(bytes(data[8 : 8 + length]))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return bool(max(ends, default=0) > len(data) - 8 - length)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
