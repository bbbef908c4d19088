"""What a network of a configuration consists of, without its weights, and whether a file's network is the same."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from ipfm.models.checkpoints.pickle_values import shown
from ipfm.models.checkpoints.pickled_objects import Record
from ipfm.models.config import NetworkConfig
from ipfm.models.edm2_unet import EDM2Block
from ipfm.models.precond import build_network
from ipfm.models.schedules import iddpm_levels

# Attributes of the EDM family's classes that change what a network computes: of the preconditioners, where they are
# fields of the configuration, and of their parts, whose classes here have them too.
_OPTIONS = (
    *("img_resolution", "img_channels", "label_dim", "sigma_min", "sigma_max", "sigma_data"),
    *("beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2"),
)
_FACTS = (
    *("label_dropout", "in_channels", "out_channels", "emb_channels", "num_heads", "skip_scale", "adaptive_scale"),
    *("up", "down", "fused_resample", "in_features", "out_features", "num_groups", "eps"),
    *("num_channels", "max_positions", "endpoint"),
    *("label_balance", "concat_balance", "res_balance", "attn_balance", "clip_act"),
)
# What EDM2 and SiD call the classes that are here under other names.
_CALLED = {
    "Precond": "EDM2Precond",
    "EDM_2_Precond_EncoderDecoder": "EDM2Precond",
    "EDM_2_Precond_Generator": "EDM2Precond",
    "UNet": "EDM2UNet",
    "UNet_EncoderDecoder": "EDM2UNet",
    "Block": "EDM2Block",
}


Fact: TypeAlias = int | float | bool | str | tuple[float, ...]


@dataclass(frozen=True)
class Part:
    """One module: the names of its class and of those it descends from, and its attributes."""

    classes: frozenset[str]
    facts: Mapping[str, Fact]


@dataclass(frozen=True)
class Blueprint:
    """What a network of a configuration consists of.

    Attributes:
        shapes: of the state dict, by name and in its order.
        parts: every module by its path.
        parameters: names of those tensors that are parameters, in order.
    """

    shapes: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, Part]
    parameters: tuple[str, ...]


@lru_cache(maxsize=4)
def blueprint(config: NetworkConfig) -> Blueprint:
    """The blueprint of a configuration; nothing of the size of its weights is allocated."""
    with torch.device("meta"):
        net = build_network(config)
    parts = {path: _part(module, config if path == "" else module) for path, module in net.named_modules()}
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    return Blueprint(shapes, parts, tuple(name for name, _ in net.named_parameters()))


def check_shapes(plan: Blueprint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that there are exactly the tensors of `plan`, in its order.

    Raises:
        ValueError: there are others.
    """
    missing = next((name for name in plan.shapes if name not in shapes), None)
    unknown = next((name for name in shapes if name not in plan.shapes), None)
    if missing or unknown:
        raise ValueError(f"it lacks the tensor {missing}" if missing else f"it has an unknown tensor {shown(unknown)}")
    for name, shape in plan.shapes.items():
        if shapes[name] != shape:
            raise ValueError(f"{name} has shape {shapes[name]}, expected {shape}")
    if list(shapes) != list(plan.shapes):
        raise ValueError("its tensors are not in the order of its layers")


def check_parts(plan: Blueprint, parts: Mapping[str, Record]) -> None:
    """Check that every part of a file's network is what it is in `plan`: its class, and the numbers that count.

    Raises:
        ValueError: one is not.
    """
    for path, record in parts.items():
        name = shown(path) if path else "the network"
        own = plan.parts.get(path)
        if own is None or not own.classes & {record.class_name, _CALLED.get(record.class_name, record.class_name)}:
            raise ValueError(f"{name} is a {shown(record.class_name)}, which its architecture has not there")
        for fact, expected in own.facts.items():
            stated = record.state.get(fact, expected)
            if fact == "clip_act" and stated is None:
                stated = math.inf
            if not _same(stated, expected):
                raise ValueError(f"{fact} of {name} is {shown(stated)}, but its architecture has {expected}")


def _same(stated: object, expected: Fact) -> bool:
    if isinstance(expected, tuple):
        items = tuple(stated) if isinstance(stated, (list, tuple)) else ()
        return len(items) == len(expected) and all(map(_same, items, expected))
    if isinstance(expected, str):
        return stated == expected
    return isinstance(stated, (int, float)) and math.isclose(stated, expected, rel_tol=1e-5)


def check_constants(config: NetworkConfig, weights: Mapping[str, Tensor]) -> None:
    """Check the buffers that follow from the configuration.

    Resampling filters are outer(f, f) / (Σf)² of the taps f; `u` holds iDDPM's noise levels.

    Raises:
        ValueError: one holds something else.
    """
    taps = torch.tensor(config.resample_filter, dtype=torch.float64)
    expected = (torch.outer(taps, taps) / taps.sum() ** 2).float()
    for name, tensor in weights.items():
        if name.endswith(".resample_filter") and not torch.allclose(tensor[0, 0], expected, rtol=1e-5, atol=1e-7):
            raise ValueError(f"{name} is not the filter of the taps {taps.tolist()}")
        if name == "u":
            levels = torch.tensor(iddpm_levels(config.M, config.C_1, config.C_2).tolist())
            if not torch.allclose(tensor, levels, rtol=1e-3):
                raise ValueError("u holds other noise levels than those of M, C_1 and C_2")


def _part(module: torch.nn.Module, described: object) -> Part:
    names = _OPTIONS if isinstance(described, NetworkConfig) else _FACTS
    facts: dict[str, Fact] = {
        name: value for name in names if isinstance(value := getattr(described, name, None), (int, float))
    }
    if isinstance(module, EDM2Block):
        mode = "up" if module.up else "down" if module.down else "keep"
        own = {"flavor": "enc" if module.encoder else "dec", "resample_mode": mode}
        facts |= {**own, "resample_filter": tuple(module.resample_filter)}
    return Part(frozenset(kind.__name__ for kind in type(module).__mro__), facts)
