"""The networks at the top of a checkpoint, by name: whole objects, or the state dicts of EDM2's and SiDA's states."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ipfm.models.checkpoints.pickle_values import shown
from ipfm.models.checkpoints.pickled_objects import MAX_TENSORS, Record, modules, own_tensors
from ipfm.models.checkpoints.stored_tensors import StoredTensor

# By this tensor a state dict is known as one of EDM2's networks.
_OF_EDM2 = "unet.out_conv.weight"
# What stands before the names where a network was saved within a wrapper: none, DistributedDataParallel, torch.compile.
_WRAPPED = ("", "module.", "_orig_mod.")
_MAX_AVERAGES = 64


@dataclass(frozen=True, eq=False)
class Weights:
    """A network of which a file holds the state dict alone.

    Attributes:
        tensors: by name, in the order of the file.
        std: relative width of the power-function average that they are; None for none.
    """

    tensors: Mapping[str, StoredTensor]
    std: float | None = None

    @property
    def class_name(self) -> str:
        """What it is, in the place of a class."""
        return "state dict"


NamedNetwork: TypeAlias = Record | Weights


@dataclass(frozen=True)
class Contents:
    """What a network consists of in a file.

    Attributes:
        tensors: of its state dict, by name and in order.
        parts: its modules by path; none of a state dict.
        parameters: the tensors that are parameters; None where the file does not say.
    """

    tensors: dict[str, StoredTensor]
    parts: dict[str, Record]
    parameters: tuple[str, ...] | None


def average_name(std: float) -> str:
    """The name that an average of EDM2's training state gets, by its relative width: "ema_0.050".

    Args:
        std: the width.
    """
    return f"ema_{std:.3f}" if round(std, 3) == std else f"ema_{std:g}"


def networks_in(root: Mapping[str, object]) -> dict[str, NamedNetwork]:
    """The networks by name, in the order of the file.

    Raises:
        ValueError: averages without their widths.
    """
    found: dict[str, NamedNetwork] = {}
    if (alone := _state_dict(root)) is not None:
        return {"net": alone}
    for name, entry in root.items():
        # Names that are no identifiers are none of a training program's, and unfit to be printed.
        if not name.isidentifier() or not name.isprintable():
            continue
        if isinstance(entry, Record):
            if entry.is_module:
                found[name] = entry
        elif isinstance(entry, dict):
            if (weights := _state_dict(entry)) is not None:
                found[name] = weights
            elif name == "ema" and "emas" in entry:
                found |= _averages(entry)
    return found


def contents(network: NamedNetwork) -> Contents:
    """The tensors and parts of a network.

    Raises:
        ValueError: two tensors of one name, too many of them, or something in their place.
    """
    if isinstance(network, Weights):
        return Contents(dict(network.tensors), {}, None)
    parts: dict[str, Record] = {}
    tensors: dict[str, StoredTensor] = {}
    parameters: list[str] = []
    for path, part in modules(network):
        parts[path] = part
        prefix = f"{path}." if path else ""
        own, buffers = own_tensors(part)
        parameters += [prefix + name for name in own]
        for name, tensor in (*own.items(), *buffers.items()):
            if prefix + name in tensors or len(tensors) >= MAX_TENSORS:
                raise ValueError(f"{shown(prefix + name)} stands there twice, or there are too many tensors")
            tensors[prefix + name] = tensor
    return Contents(tensors, parts, tuple(parameters))


def stated_dtypes(tensors: Mapping[str, StoredTensor]) -> str:
    """The dtypes that tensors are stored in: "float16", or "float16, float32"."""
    return ", ".join(sorted({str(tensor.check()).removeprefix("torch.") for tensor in tensors.values()}))


def _state_dict(entry: Mapping[Any, object]) -> Weights | None:
    """The network whose state dict an entry is; None for anything else."""
    prefix = next((prefix for prefix in _WRAPPED if prefix + _OF_EDM2 in entry), None)
    if prefix is None or len(entry) > MAX_TENSORS:
        return None
    named = ((n.removeprefix(prefix), t) for n, t in entry.items() if type(n) is str and isinstance(t, StoredTensor))
    tensors = dict(named)
    return Weights(tensors) if len(tensors) == len(entry) else None


def _averages(entry: Mapping[Any, object]) -> Iterator[tuple[str, Weights]]:
    """The averages in EDM2's training state, which has their widths and their state dicts side by side."""
    stds, averages = entry.get("stds"), entry["emas"]
    if type(stds) is not list or type(averages) is not list or not len(stds) == len(averages) <= _MAX_AVERAGES:
        raise ValueError("its averages are damaged: as many widths (stds) as averages (emas) should be there")
    named: dict[str, Weights] = {}
    for std, average in zip(stds, averages, strict=True):
        weights = _state_dict(average) if isinstance(average, dict) else None
        # A power function's relative width is below 1 / sqrt(12).
        if type(std) is not float or not 0 < std < 0.2887 or weights is None or average_name(std) in named:
            raise ValueError(f"its average of width {shown(std)} is damaged, or there are two of it")
        named[average_name(std)] = Weights(weights.tensors, std)
    return iter(named.items())
