"""The architecture of a network in a checkpoint: its constructor's arguments, checked against the tensors there are.

The tensors' names and shapes determine nearly everything; the arguments that a file states must say the same, before
anything is built from them. The constructor arguments of the EDM family and their defaults are those of Karras et al.
(2022) and Xu et al. (2023).
"""

import math
import re
from collections.abc import Mapping

from ipfm.models.checkpoints.pickle_values import shown
from ipfm.models.checkpoints.pickled_objects import Record
from ipfm.models.config import NetworkConfig

Shapes = Mapping[str, tuple[int, ...]]
_COMMON = {"label_dim": 0, "use_fp16": False}
# The preconditioners' own arguments and their defaults.
OPTIONS: dict[str, dict[str, object]] = {
    "EDMPrecond": {"sigma_min": 0.0, "sigma_max": math.inf, "sigma_data": 0.5},
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100.0},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000},
}
_MODEL_TYPES = {
    "EDMPrecond": "DhariwalUNet",
    "VPPrecond": "SongUNet",
    "VEPrecond": "SongUNet",
    "iDDPMPrecond": "DhariwalUNet",
}
PRECONDITIONERS = tuple(OPTIONS)
UNETS: dict[str, dict[str, object]] = {
    "SongUNet": {
        "augment_dim": 0,
        "model_channels": 128,
        "channel_mult": (1, 2, 2, 2),
        "channel_mult_emb": 4,
        "num_blocks": 4,
        "attn_resolutions": (16,),
        "dropout": 0.10,
        "label_dropout": 0.0,
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": (1, 1),
    },
    "DhariwalUNet": {
        "augment_dim": 0,
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "channel_mult_emb": 4,
        "num_blocks": 3,
        "attn_resolutions": (32, 16, 8),
        "dropout": 0.10,
        "label_dropout": 0.0,
    },
}
# Classes that are met in files of the same form.
_FOREIGN = {
    "Generator": "a GAN's generator",
    "Discriminator": "a GAN's discriminator",
    "DistributedDataParallel": "a wrapper around a network, which must be saved without it",
}
# (part, side) -> entry -> the rest of a tensor's name -> its shape.
Entries = dict[tuple[str, int], dict[str, dict[str, tuple[int, ...]]]]
_ENTRY = re.compile(r"model\.(enc|dec)\.(\d{1,5})x(\d{1,5})_([a-z0-9_]{1,20})\.(.+)")
_TAPS = {2: (1, 1), 4: (1, 3, 3, 1)}
_MAX_VALUES = 64


def network_config(record: Record, shapes: Shapes, *, D: float) -> NetworkConfig:
    """The configuration of a network in a file.

    Args:
        record: the network.
        shapes: of its tensors, by name.
        D: auxiliary dimensions it was trained for, which are no part of the architecture.

    Raises:
        ValueError: the file's arguments and tensors make no network of the EDM family.
    """
    name = record.class_name
    if name not in OPTIONS:
        foreign = f", {_FOREIGN[name]}," if name in _FOREIGN else ""
        raise ValueError(
            f"the class {shown(name)}{foreign} cannot be read; possible: {', '.join(PRECONDITIONERS)} and EDM2's "
            "Precond"
        )
    seen = from_shapes(shapes)
    given = _arguments(record)
    inner = record.mapping("_modules").get("model")
    if not isinstance(inner, Record):
        raise ValueError("there is no U-Net in it")
    unet = str(seen["model_type"])
    stated = record.state if given is None else given
    chosen: dict[str, object] = dict(seen)
    for option, default in {**_COMMON, **OPTIONS[name]}.items():
        chosen[option] = _plain(option, stated.get(option, default))
    if given is None:
        chosen["dropout"] = _dropout(inner)
        chosen["label_dropout"] = _plain("label_dropout", inner.state.get("label_dropout", 0.0))
    else:
        given.setdefault("model_type", _MODEL_TYPES[name])
        _take_arguments(chosen, given, seen, UNETS[unet], extra={**_COMMON, **OPTIONS[name]})
        _check_inner_arguments(inner, chosen)
    if isinstance(fp16 := record.state.get("use_fp16"), bool):
        chosen["use_fp16"] = fp16
    doubled = chosen.pop("out_channels") != chosen["img_channels"]
    if doubled != (name == "iDDPMPrecond"):
        raise ValueError(f"the channels that its U-Net returns are not those of the class {name}")
    if chosen["label_dim"] != seen["label_dim"]:
        raise ValueError(_contradiction("label_dim", chosen["label_dim"], seen["label_dim"]))
    if name != "EDMPrecond":
        chosen["precond"] = name
    return NetworkConfig(**chosen, D=D)  # type: ignore[arg-type]


def trained_for(record: Record) -> float | None:
    """The D that a file states: a number, inf for "not PFGM++", None for nothing.

    Raises:
        ValueError: it contradicts itself.
    """
    found: set[float] = set()
    for source in (record.state, _arguments(record) or {}):
        flag, D = source.get("pfgmpp"), source.get("D")
        if flag is None and D is None:
            continue
        if flag is None and source is not record.state:
            flag = record.state.get("pfgmpp")
        if not isinstance(flag, bool):
            raise ValueError(f"pfgmpp is {shown(flag)} beside D = {shown(D)}")
        if not flag:
            found.add(math.inf)
        elif D is not None or source is record.state:
            found.add(_dimensions(D))
    if len(found) > 1:
        raise ValueError(f"it states two values of D: {', '.join(f'{D:g}' for D in sorted(found))}")
    return found.pop() if found else None


def entries_of(shapes: Shapes, pattern: re.Pattern[str]) -> Entries:
    """The entries of a U-Net's encoder and decoder, by (part, side).

    Args:
        shapes: of the tensors, by name.
        pattern: of their names: part, side, side, entry, and what follows.

    Raises:
        ValueError: a side is not the other one.
    """
    entries: Entries = {}
    for name, shape in shapes.items():
        if found := pattern.fullmatch(name):
            part, side, across, entry, rest = found.groups()
            if side != across:
                raise ValueError(f"it has a tensor {shown(name)} of images that are not square")
            entries.setdefault((part, int(side)), {}).setdefault(entry, {})[rest] = shape
    return entries


def sides_of(entries: Entries, whose: str) -> list[int]:
    """The sides of the levels, the largest first, each half the one before.

    Args:
        entries: from `entries_of`.
        whose: such as "a U-Net", for the message.

    Raises:
        ValueError: they are not.
    """
    sides = sorted({side for _, side in entries}, reverse=True)
    if not sides or sides[-1] < 1 or sides != [sides[0] >> level for level in range(len(sides))]:
        raise ValueError(f"its tensors are not those of {whose}: the resolutions are {shown(str(sides))}")
    return sides


def from_shapes(shapes: Shapes) -> dict[str, object]:
    """The arguments of a U-Net that its tensors determine, by name, with `out_channels` and `model_type`.

    Raises:
        ValueError: the tensors are not those of a U-Net of the EDM family.
    """
    entries = entries_of(shapes, _ENTRY)
    sides = sides_of(entries, "a U-Net")
    first = entries.get(("enc", sides[0]), {}).get("conv", {}).get("weight", ())
    song = ("dec", sides[0]) in entries and "aux_conv" in entries["dec", sides[0]]
    dhariwal = "model.out_conv.weight" in shapes
    if song == dhariwal:
        raise ValueError("its tensors are neither those of a SongUNet nor those of a DhariwalUNet")
    out = entries["dec", sides[0]]["aux_conv"].get("weight", ()) if song else shapes["model.out_conv.weight"]
    embedding = shapes.get("model.map_layer0.weight", ())
    if len(first) != 4 or len(out) != 4 or len(embedding) != 2:
        raise ValueError("its tensors are not those of a U-Net: the first or the last layer is missing")
    channels = first[0] if song else embedding[1]
    blocks, widths, attends = zip(*(_level(entries.get(("dec", side), {}), side) for side in sides), strict=True)
    if len(set(blocks)) > 1:
        raise ValueError("its levels have different numbers of blocks")
    facts: dict[str, object] = {
        "model_type": "SongUNet" if song else "DhariwalUNet",
        "img_resolution": sides[0],
        "img_channels": first[1],
        "out_channels": out[0],
        "label_dim": _columns(shapes, "model.map_label.weight"),
        "augment_dim": _columns(shapes, "model.map_augment.weight"),
        "model_channels": channels,
        "channel_mult": tuple(_multiple(width, channels, "a level") for width in widths),
        "channel_mult_emb": _multiple(embedding[0], channels, "the embedding"),
        "num_blocks": blocks[0],
        "attn_resolutions": tuple(side for side, attention in zip(sides, attends, strict=True) if attention),
    }
    if song:
        encoder = {entry for (part, _), found in entries.items() if part == "enc" for entry in found}
        decoder = {entry for (part, _), found in entries.items() if part == "dec" for entry in found}
        facts["channel_mult_noise"] = _multiple(embedding[1], channels, "the noise embedding")
        facts["embedding_type"] = "fourier" if "model.map_noise.freqs" in shapes else "positional"
        facts["encoder_type"] = (
            "residual" if "aux_residual" in encoder else "skip" if "aux_skip" in encoder else "standard"
        )
        facts["decoder_type"] = "skip" if "aux_up" in decoder else "standard"
        facts["resample_filter"] = _taps(shapes)
    return facts


def _level(entries: Mapping[str, Mapping[str, tuple[int, ...]]], side: int) -> tuple[int, int, bool]:
    """(blocks, width, whether it attends) of a level of the decoder."""
    count = sum(re.fullmatch(r"block\d+", entry) is not None for entry in entries)
    width = entries.get("block0", {}).get("conv1.weight", ())
    if count < 1 or len(width) != 4:
        raise ValueError(f"its tensors are not those of a U-Net: resolution {side} has {count} blocks in the decoder")
    return count - 1, width[0], "qkv.weight" in entries.get(f"block{count - 1}", {})


def _columns(shapes: Shapes, name: str) -> int:
    shape = shapes.get(name, (0, 0))
    if len(shape) != 2:
        raise ValueError(f"{name} has shape {shape}")
    return shape[1]


def _multiple(width: int, channels: int, what: str) -> int:
    if channels < 1 or width < 1 or width % channels:
        raise ValueError(f"the width {width} of {what} is no multiple of its {channels} channels")
    return width // channels


def _taps(shapes: Shapes) -> tuple[int, ...]:
    lengths = {shape[-1] for name, shape in shapes.items() if name.endswith(".resample_filter") and shape}
    if not lengths:
        return _TAPS[2]
    if len(lengths) > 1 or (length := lengths.pop()) not in _TAPS:
        raise ValueError("its resampling filter is none that can be read; possible: 2 or 4 taps")
    return _TAPS[length]


def _arguments(record: Record) -> dict[str, object] | None:
    """A copy of the constructor's arguments that a record holds; None where it holds none."""
    if record.state.get("_init_kwargs") is None:
        return None
    if record.state.get("_init_args", ()) != ():
        raise ValueError(f"an object of class {shown(record.class_name)} was made with arguments without names")
    return dict(record.mapping("_init_kwargs"))


def _take_arguments(
    chosen: dict[str, object],
    given: Mapping[str, object],
    seen: Mapping[str, object],
    defaults: Mapping[str, object],
    *,
    extra: Mapping[str, object],
) -> None:
    """Put the stated arguments into `chosen`; ValueError where they are unknown or the tensors say something else."""
    known = {"img_resolution", "img_channels", "model_type", "pfgmpp", "D", *extra, *defaults}
    for name in given:
        if name not in known:
            raise ValueError(f"the argument {shown(name)} of a network is unknown")
    for name in ("img_resolution", "img_channels"):
        if name not in given:
            raise ValueError(f"the argument {name} of a network is missing")
    for name in ("img_resolution", "img_channels", "model_type", *defaults):
        value = _plain(name, given.get(name, defaults.get(name)))
        # Attention shows only where a level is wide enough for a head, and the scale of a filter does not show.
        if name in seen and name not in ("attn_resolutions", "resample_filter") and value != seen[name]:
            raise ValueError(_contradiction(name, value, seen[name]))
        chosen[name] = value


def _check_inner_arguments(inner: Record, chosen: Mapping[str, object]) -> None:
    expected = {**chosen, "in_channels": chosen["img_channels"]}
    for name, value in (_arguments(inner) or {}).items():
        if name not in expected:
            raise ValueError(f"the argument {shown(name)} of its U-Net is unknown")
        if name != "dropout" and _plain(name, value) != expected[name]:
            raise ValueError(_contradiction(f"{name} of its U-Net", _plain(name, value), expected[name]))


def _contradiction(name: str, stated: object, found: object) -> str:
    return f"{name} is stated as {shown(str(stated))}, but its tensors and other arguments say {shown(str(found))}"


def _plain(name: str, value: object) -> object:
    """`value` as an argument: a number, a short text, or a tuple of numbers."""
    if isinstance(value, (list, tuple)):
        if len(value) > _MAX_VALUES or not all(type(item) in (int, float) for item in value):
            raise ValueError(f"the argument {name} is no short list of numbers")
        return tuple(value)
    if isinstance(value, str) and len(value) > _MAX_VALUES:
        raise ValueError(f"the argument {name} is {shown(value)}")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ValueError(f"the argument {name} is {shown(value)}")


def _dropout(inner: Record) -> object:
    """The dropout of a U-Net's blocks, which a file without constructor arguments states with each of them."""
    for part in ("enc", "dec"):
        group = inner.mapping("_modules").get(part)
        for block in group.mapping("_modules").values() if isinstance(group, Record) else ():
            if isinstance(block, Record) and "dropout" in block.state:
                return _plain("dropout", block.state["dropout"])
    return 0.0


def _dimensions(D: object) -> float:
    if isinstance(D, bool) or not isinstance(D, (int, float)) or not D > 0:
        raise ValueError(f"D is {shown(D)}")
    return float(D)
