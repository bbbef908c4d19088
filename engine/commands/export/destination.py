"""Where an export goes: its format by the name, and nothing replaced that is not an export itself."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Literal, get_args

from ipfm.engine.commands.export import edm_file, hub_folder, onnx_file
from ipfm.engine.commands.export.network import FORMAT
from ipfm.engine.commands.export.program import FACTS_FILE
from ipfm.engine.runtime.files import unwritable_ancestor
from ipfm.models.checkpoints.recognise import missing
from ipfm.models.store import CONFIG_FILE

Format = Literal["onnx", "torch", "huggingface", "edm"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2", "edm": ".pkl"}
# What a name ends in that is meant for a file of a format which is not written.
_OF_FILES = (".bin", ".ckpt", ".gz", ".h5", ".pickle", ".pt", ".pth", ".safetensors", ".tar", ".zip")


def choose_format(out: Path, given: Format | None) -> Format:
    """The format of the file or folder `out`: `given`, or by its name.

    Raises:
        ValueError: the two contradict, or the name is that of a file of another kind.
    """
    by_name = next((name for name, suffix in SUFFIXES.items() if out.suffix.lower() == suffix), None)
    if given is None:
        if out.suffix.lower() in _OF_FILES and not out.is_dir():
            raise ValueError(
                f"OUT must end in {', '.join(SUFFIXES.values())}, or be a folder for Hugging Face, whose name has no "
                f"suffix of a file, got {out}"
            )
        return by_name or "huggingface"
    if given != (by_name or "huggingface"):
        wanted = f"end in {SUFFIXES[given]}" if given in SUFFIXES else "be a folder"
        raise ValueError(f"OUT must {wanted} for the format {given}, got {out}; formats: {', '.join(get_args(Format))}")
    return given


def check_place(out: Path, format: Format, model: Path) -> None:
    """Check that an export can be written to `out`.

    Raises:
        ValueError: it cannot be written, lies in the model folder, or is something else than an earlier export.
    """
    if out.exists() and not model.exists():
        raise ValueError(f"{missing(model)}; the model comes first: ipfm export MODEL OUT")
    # A pickle may be the model too.
    programs = (SUFFIXES["onnx"], SUFFIXES["torch"])
    if model.suffix.lower() in programs and (out / CONFIG_FILE).is_file():
        raise ValueError(f"{model} is an export, and {out} a model, which comes first: ipfm export {out} {model}")
    if model.resolve() in (out.resolve(), out.resolve().parent):
        raise ValueError(f"{out} belongs to the model itself, where other files are refused: name another OUT")
    if (above := unwritable_ancestor(out.absolute().parent)) is not None:
        raise ValueError(f"{out} cannot be written: {above} is no folder that takes files")
    if not out.exists():
        return
    if out.is_dir() != (format == "huggingface"):
        raise ValueError(f"{out} is a {'folder' if out.is_dir() else 'file'}: name another OUT")
    why = _obstacle(out, format)
    if why is not None:
        raise ValueError(f"{out} exists and would be lost, {why}: move it away, or name another OUT")


def _obstacle(out: Path, format: Format) -> str | None:
    if format == "huggingface":
        return hub_folder.obstacle(out)
    exported = {"onnx": onnx_file.is_exported, "torch": _is_program, "edm": edm_file.is_exported}[format]
    return None if exported(out) else f"it is no export in the format {format}"


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(f"/extra/{FACTS_FILE}"))
            return bool(json.loads(archive.read(name))["format"] == FORMAT)
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError, LookupError, TypeError):
        return False
