"""The weights of LPIPS from files as they are published. Nothing is downloaded, and nothing in a file is run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ipfm.models.checkpoints.state_dicts import StateDict, open_state_dict

# Channels of VGG-16's convolutions between its poolings [Simonyan and Zisserman 2015, table 1, column D].
_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# What images in [-1, 1] are shifted and divided by, per channel, so that they are normalised as in VGG's training.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_HUB_FILE = "vgg16-397923af.pth"
_PACKAGE_FILE = Path("weights", "v0.1", "vgg.pth")
POSSIBLE = (
    'the state dict of lpips.LPIPS(net="vgg") of the Python package lpips (.pth, .pt or .safetensors), or a folder '
    f"with torchvision's {_HUB_FILE} and the file {_PACKAGE_FILE} of the package lpips"
)


class Convolution(NamedTuple):
    """A 3×3 convolution of VGG-16."""

    number: int
    """Of the layer, as torchvision counts them: convolutions, ReLUs and poolings."""
    inside: int
    outside: int
    """Channels."""


def levels() -> list[list[Convolution]]:
    """VGG-16 up to its last ReLU: the convolutions before each of the five features, a pooling between two levels."""
    found: list[list[Convolution]] = []
    number, inside = 0, 3
    for widths in _WIDTHS:
        found.append([])
        for outside in widths:
            found[-1].append(Convolution(number, inside, outside))
            number, inside = number + 2, outside
        number += 1
    return found


def shapes() -> dict[str, tuple[int, ...]]:
    """Shape of each tensor by its name in lpips.LPIPS(net="vgg"); the linear layers, which are small, come first."""
    linear = {lin_name(level): (1, parts[-1].outside, 1, 1) for level, parts in enumerate(levels())}
    convolutions: dict[str, tuple[int, ...]] = {}
    for level, parts in enumerate(levels()):
        for part in parts:
            weight, bias = vgg_names(level, part)
            convolutions |= {weight: (part.outside, part.inside, 3, 3), bias: (part.outside,)}
    return linear | convolutions


def lin_name(level: int) -> str:
    """Name of the linear layer after features `level`, 0 to 4."""
    return f"lin{level}.model.1.weight"


def vgg_names(level: int, part: Convolution) -> tuple[str, str]:
    """Names of the convolution's weight and bias."""
    stem = f"net.slice{level + 1}.{part.number}"
    return f"{stem}.weight", f"{stem}.bias"


def check_shapes(where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that these are the names and shapes expected.

    Raises:
        ValueError: they are others; one line that begins with `where`.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing or unknown:
        parts = (
            f"{what} {_some(names)}" for what, names in (("lacks", missing), ("has the unknown", unknown)) if names
        )
        raise ValueError(f"{where} {' and '.join(parts)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{where}: {name} has shape {found[name]}, expected {shape}")


def read_weights(path: Path | None) -> dict[str, Tensor]:
    """The weights of LPIPS with VGG-16, float32 on the CPU, by the names of `shapes`.

    Args:
        path: a file or folder, see `POSSIBLE`. None takes them from the installed package lpips, of which a file is
            read and no code run, and torchvision's file in torch's hub folder ($TORCH_HOME/hub/checkpoints).

    Raises:
        ValueError: one line that names the file and what is possible: there are none, damage, names or shapes of
            something else.
    """
    try:
        if path is None:
            return _installed()
        return _read_folder(path) if path.is_dir() else _read_whole(path)
    except ValueError as error:
        raise ValueError(f"{error}; LPIPS can be read from {POSSIBLE}") from None


def _installed() -> dict[str, Tensor]:
    package = importlib.util.find_spec("lpips")
    folders = (package.submodule_search_locations if package else None) or []
    linear = next((file for folder in folders if (file := Path(folder, _PACKAGE_FILE)).is_file()), None)
    vgg = Path(torch.hub.get_dir(), "checkpoints", _HUB_FILE)
    lacking = [] if linear else [f"the Python package lpips with its file {_PACKAGE_FILE} is not installed"]
    lacking += [] if vgg.is_file() else [f"there is no {vgg}"]
    if linear is None or lacking:
        raise ValueError(f"no weights of LPIPS on this machine ({', and '.join(lacking)}): give --lpips PATH")
    return _read_parts(linear, vgg)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    found = sorted(folder.glob("vgg16-*.pth"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "no vgg16-*.pth"
        raise ValueError(f"{folder} should hold one file {_HUB_FILE}, got {names}")
    linear = folder / _PACKAGE_FILE.name
    if not linear.is_file():
        raise ValueError(f"{folder} has no {linear.name}")
    return _read_parts(linear, found[0])


def _read_parts(linear: Path, vgg: Path) -> dict[str, Tensor]:
    """Weights from a file of the linear layers and one of torchvision's VGG-16, whose classifier is left out."""
    weights = _take(open_state_dict(linear), {lin_name(level): lin_name(level) for level in range(len(_WIDTHS))})
    names: dict[str, str] = {}
    for level, parts in enumerate(levels()):
        for part in parts:
            weight, bias = vgg_names(level, part)
            names |= {weight: f"features.{part.number}.weight", bias: f"features.{part.number}.bias"}
    return weights | _take(open_state_dict(vgg), names, others=("classifier.",))


def _read_whole(path: Path) -> dict[str, Tensor]:
    state = open_state_dict(path)
    for name, values in (("scaling_layer.shift", SHIFT), ("scaling_layer.scale", SCALE)):
        if name not in state.shapes:
            continue
        stored = state.load(name).flatten()
        if len(stored) != 3 or not torch.allclose(stored, torch.tensor(values), rtol=1e-5):
            raise ValueError(f"{state.where}: {name} is not {values}")
    # The package lists the linear layers a second time.
    aliases = [f"lins.{level}.model.1.weight" for level in range(len(_WIDTHS))]
    return _take(
        state, {name: name for name in shapes()}, others=("scaling_layer.shift", "scaling_layer.scale", *aliases)
    )


def _take(state: StateDict, names: Mapping[str, str], *, others: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Tensors by the names of `shapes`, from those of a file; more may stand in it if `others` begin their names."""
    known = shapes()
    found = {name: shape for name, shape in state.shapes.items() if not name.startswith(others)}
    check_shapes(state.where, found, {theirs: known[ours] for ours, theirs in names.items()})
    return {ours: state.load(theirs) for ours, theirs in names.items()}


def _some(names: Iterable[str]) -> str:
    """The first of some names, for a message."""
    first, *rest = names
    return f"{_printable(first)} and {len(rest)} more" if rest else _printable(first)


def _printable(name: str) -> str:
    return name[:60] if name.isprintable() else ascii(name[:60])
