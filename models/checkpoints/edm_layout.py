"""Networks written as EDM's training program pickles them, for the programs of EDM, EDM2, PFGM++ and SiD.

A file is a pickle in the layout of a network snapshot. Networks and their parts are records of their attributes, by the
names of their classes. What those programs run for a record is the source of its class in their own files; here it is
a text that finds the classes among the files of the program, see `class_source`. How EDM2's parts are written stands in
`edm2_layout`.
"""

import json
import math
import struct
from collections import OrderedDict
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from ipfm.models.blocks import UNetBlock
from ipfm.models.checkpoints import edm2_layout
from ipfm.models.checkpoints.class_source import class_source
from ipfm.models.checkpoints.infer_config import OPTIONS, UNETS
from ipfm.models.checkpoints.pickle_writer import Call, Global, Made, Parts, write_pickle
from ipfm.models.checkpoints.stored_tensors import BLOB_START
from ipfm.models.config import NetworkConfig
from ipfm.models.embeddings import FourierEmbedding, PositionalEmbedding
from ipfm.models.facts import GeneratorFacts, ModelFacts, TeacherFacts, read_facts
from ipfm.models.json_values import from_json, to_json
from ipfm.models.layers import Conv2d, GroupNorm, Linear
from ipfm.models.precond import Precond
from ipfm.models.unet import UNet
from ipfm.models.unet_layout import CHANNELS_PER_HEAD

FACTS_ENTRY = "ipfm"
"""What stands beside the network, for this package alone: what is said of it, as JSON."""
# What PFGM++ stores where a network is not its own, D = inf.
_D_OF_DIFFUSION = 128
# Attributes of the parts, where they are called the same.
_ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    UNet: ("label_dropout",),
    UNetBlock: ("in_channels", "out_channels", "emb_channels", "num_heads", "dropout", "skip_scale", "adaptive_scale"),
    Conv2d: ("in_channels", "out_channels", "up", "down", "fused_resample"),
    Linear: ("in_features", "out_features"),
    GroupNorm: ("num_groups", "eps"),
    PositionalEmbedding: ("num_channels", "max_positions", "endpoint"),
    FourierEmbedding: (),
}
# Parts that are None where a network does without; they are no modules then.
_OPTIONAL = ("map_label", "map_augment", "skip", *edm2_layout.OPTIONAL)


def write_network(net: Precond, file: IO[bytes], facts: ModelFacts) -> None:
    """Write a pickle of protocol 4 that holds the network as `ema`: in eval mode, float32, on the CPU.

    A teacher is written as EDM's network snapshots are, without a loss, an augmentation and a data set; a generator as
    SiD's.

    Args:
        net: the network.
        file: an open binary file.
        facts: what is said of it, for `facts_in`.

    Raises:
        OSError: the disk refuses.
    """
    others: dict[str, object] = {"loss_fn": None, "augment_pipe": None, "dataset_kwargs": {}}
    if net.config.is_edm2:
        others = {"encoder": edm2_layout.encoder(net), "loss_fn": None, "dataset_kwargs": {}}
        others = {"encoder": others["encoder"]} if isinstance(facts, GeneratorFacts) else others
    root = {
        "ema": _records(net),
        **({} if isinstance(facts, GeneratorFacts) and not net.config.is_edm2 else others),
        FACTS_ENTRY: json.dumps(to_json(facts.to_json(), FACTS_ENTRY), allow_nan=False),
    }
    write_pickle(root, file)


def facts_in(entries: Mapping[str, object]) -> TeacherFacts | GeneratorFacts | None:
    """What `write_network` was told of the network `ema`; None of a file of another program.

    Args:
        entries: everything at the top of the file.

    Raises:
        ValueError: it is damaged, so that a generator might be taken for a teacher.
    """
    if FACTS_ENTRY not in entries:
        return None
    text = entries[FACTS_ENTRY]
    try:
        stored = from_json(json.loads(text)) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(f"what it says of its network, under {FACTS_ENTRY!r}, is damaged")
    return read_facts(stored)


_RECONSTRUCT = Global("torch_utils.persistence", "_reconstruct_persistent_obj")
_MODULE_DICT = Global("torch.nn.modules.container", "ModuleDict")
_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_STORAGE = Global("torch.storage", "_load_from_bytes")


def _start_of_storage(count: int) -> bytes:
    """What stands before `count` float32 elements in torch's older format: everything but the elements."""
    kind = b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    number = b"J" + struct.pack("<i", count) if count < 1 << 31 else b"\x8a\x08" + struct.pack("<q", count)
    keys = b"\x80\x02]X\x01\x00\x00\x000a."
    return BLOB_START + kind + number + b"NtQ." + keys + struct.pack("<q", count)


def _records(net: Precond) -> Call:
    """The network as a record of records."""
    edm2 = net.config.is_edm2
    source = class_source({name for module in net.modules() if (name := _class_name(module)) != "ModuleDict"})
    # Layers compute with weights that are made of what files hold.
    stored = net.state_dict()

    def record(module: nn.Module, prefix: str = "") -> object:
        state = vars(nn.Module()) | {"training": False}
        kept = {name: stored[prefix + name] for name, p in module._parameters.items() if p is not None}
        state["_parameters"] = {name: _parameter(values) for name, values in kept.items()}
        state["_buffers"] = {name: None if b is None else _tensor(b) for name, b in module._buffers.items()}
        parts = {name: part for name, part in module._modules.items() if part is not None}
        state["_modules"] = {name: record(part, f"{prefix}{name}.") for name, part in parts.items()}
        if isinstance(module, nn.ModuleDict):
            return Made(_MODULE_DICT, state)
        absent = {name: None for name, p in module._parameters.items() if p is None}
        absent |= {name: None for name in _OPTIONAL if getattr(module, name, ...) is None}
        given: tuple[object, object] = (), {} if edm2 else _keywords(module, net.config)
        if edm2:
            given = edm2_layout.arguments(module, net.config)
        attributes = edm2_layout.attributes(module) if edm2 else _attributes(module)
        attributes |= _pfgmpp(net.config) if edm2 and module is net and math.isfinite(net.D) else {}
        state |= {**absent, **attributes, "_init_args": given[0], "_init_kwargs": given[1]}
        # In the order of their own.
        meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": _class_name(module),
            "state": state,
        }
        return Call(_RECONSTRUCT, (meta,))

    made = record(net)
    assert isinstance(made, Call)
    return made


def _tensor(values: Tensor) -> Call:
    kept = values.detach().to("cpu", torch.float32).contiguous()
    blob = Parts((_start_of_storage(kept.numel()), kept.numpy().reshape(-1).view(np.uint8).data))
    shape, stride, no_hooks = tuple(kept.shape), tuple(kept.stride()), OrderedDict[str, object]()
    return Call(_TENSOR, (Call(_STORAGE, (blob,)), 0, shape, stride, False, no_hooks))


def _parameter(values: Tensor) -> Call:
    return Call(_PARAMETER, (_tensor(values), False, OrderedDict[str, object]()))


def _class_name(module: nn.Module) -> str:
    """The name of the class there; some parts here are of a class that descends from it."""
    if (named := edm2_layout.class_name(module)) is not None:
        return named
    if isinstance(module, Precond):
        return module.PRECOND
    kinds = (kind for kind in _ATTRIBUTES if isinstance(module, kind))
    kind: type[nn.Module] = next(kinds, nn.ModuleDict)
    return type(module).__name__ if kind is UNet else kind.__name__


def _attributes(module: nn.Module) -> dict[str, object]:
    """What an object of the class has besides its tensors and parts."""
    if not isinstance(module, Precond):
        names = next((names for kind, names in _ATTRIBUTES.items() if isinstance(module, kind)), ())
        return {name: getattr(module, name) for name in names}
    config = module.config
    fields = ("img_resolution", "img_channels", "label_dim", "use_fp16", *OPTIONS[config.precond])
    found = {name: getattr(config, name) for name in (*fields, "sigma_min", "sigma_max")}
    return {**found, **_pfgmpp(config), "N": config.img_channels * config.img_resolution**2}


def _pfgmpp(config: NetworkConfig) -> dict[str, object]:
    finite = math.isfinite(config.D)
    return {"pfgmpp": finite, "D": _whole(config.D) if finite else _D_OF_DIFFUSION}


def _keywords(module: nn.Module, config: NetworkConfig) -> dict[str, object]:
    """Arguments by which the class makes such an object; of a part without those of its first weights."""
    if isinstance(module, Precond):
        names = ("use_fp16", *OPTIONS[config.precond], "img_resolution", "img_channels", "label_dim")
        own = {name: getattr(config, name) for name in names}
        given = {"model_type": config.model_type, **_architecture(config), **own}
        # The class of EDM and SiD knows neither word, nor do PFGM++'s for VP and iDDPM.
        if math.isfinite(config.D) and config.precond == "EDMPrecond":
            given |= _pfgmpp(config)
        return given
    if isinstance(module, UNet):
        size = {"img_resolution": config.img_resolution, "in_channels": config.img_channels}
        more = {"out_channels": config.out_channels, "label_dim": config.label_dim}
        return {**size, **more, **_architecture(config)}
    if isinstance(module, UNetBlock):
        return _block_keywords(module, config)
    if isinstance(module, Conv2d):
        sizes = {"in_channels": module.in_channels, "out_channels": module.out_channels, "kernel": module.kernel}
        ways = {name: True for name in ("up", "down", "fused_resample") if getattr(module, name)}
        taps = {"resample_filter": _plain(config.resample_filter)} if module.up or module.down else {}
        return {**sizes, **ways, **taps, **_without_bias(module)}
    if isinstance(module, Linear):
        return {"in_features": module.in_features, "out_features": module.out_features, **_without_bias(module)}
    if isinstance(module, GroupNorm):
        return {"num_channels": module.weight.numel(), "eps": module.eps}
    if isinstance(module, PositionalEmbedding):
        return {"num_channels": module.num_channels, "endpoint": module.endpoint}
    assert isinstance(module, FourierEmbedding)
    return {"num_channels": 2 * module.freqs.numel()}


def _architecture(config: NetworkConfig) -> dict[str, object]:
    """Keywords of the U-Net; the width of augment labels only where it takes any."""
    names = [name for name in UNETS[config.model_type] if name != "augment_dim" or config.augment_dim]
    return {name: _plain(getattr(config, name)) for name in names}


def _block_keywords(block: UNetBlock, config: NetworkConfig) -> dict[str, object]:
    song = config.model_type == "SongUNet"
    ways = {name: True for name in ("up", "down") if getattr(block.conv0, name)}
    return {
        "in_channels": block.in_channels,
        "out_channels": block.out_channels,
        "emb_channels": block.emb_channels,
        **ways,
        "attention": block.num_heads > 0,
        **({"num_heads": 1} if song else {"channels_per_head": CHANNELS_PER_HEAD}),
        "dropout": block.dropout,
        "skip_scale": block.skip_scale,
        "eps": block.norm0.eps,
        "resample_filter": _plain(config.resample_filter),
        "resample_proj": song,
        "adaptive_scale": block.adaptive_scale,
    }


def _without_bias(module: Conv2d | Linear) -> dict[str, object]:
    return {"bias": False} if module.bias is None and module.weight is not None else {}


def _plain(value: Any) -> object:
    """Lists, and whole numbers as such, as a training script has them."""
    return [_whole(item) for item in value] if isinstance(value, tuple) else value


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number
