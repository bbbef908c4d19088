"""The architecture of a network of EDM2, DDO, SiD or SiDA in a checkpoint: its arguments, checked against its tensors.

The constructors' arguments and their defaults are those of Karras et al. (2024). State dicts come without arguments, so
that names and shapes say all that they can, and the rest takes its default.
"""

import contextlib
import math
import re
from collections.abc import Mapping
from functools import reduce

from ipfm.models.checkpoints.infer_config import entries_of, sides_of
from ipfm.models.checkpoints.named_networks import NamedNetwork, Weights
from ipfm.models.checkpoints.pickle_values import shown
from ipfm.models.checkpoints.pickled_objects import Record
from ipfm.models.config import NetworkConfig

Shapes = Mapping[str, tuple[int, ...]]
GENERATOR = "EDM_2_Precond_Generator"
"""The class of SiD's and SiDA's generators; SiDA's networks without a log-variance are of it too, in states."""
CLASSES = ("Precond", "EDM_2_Precond_EncoderDecoder", GENERATOR)
# The constructor's arguments that the U-Net is made by, and their defaults.
_UNET: dict[str, object] = {
    "model_channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "channel_mult_noise": None,
    "channel_mult_emb": None,
    "num_blocks": 3,
    "attn_resolutions": (16, 8),
    "channels_per_head": 64,
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "resample_filter": (1, 1),
    "dropout": 0.0,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256,
}
_PRECOND: dict[str, object] = {"use_fp16": True, "sigma_data": 0.5, "logvar_channels": 128}
_SIZES = ("img_resolution", "img_channels", "label_dim")
# Of SiDA's networks: how they are trained, and whether a part of them returns logits too.
_IGNORED = ("force_normalization", "use_gan")
_ENTRY = re.compile(r"unet\.(enc|dec)\.(\d{1,5})x(\d{1,5})_([a-z]{1,10}\d{0,4})\.(.+)")
_MAX_VALUES = 64


def is_edm2(network: NamedNetwork) -> bool:
    """Whether a network is of this family, by its class or by the names in its state dict."""
    return isinstance(network, Weights) or network.class_name in CLASSES


def edm2_config(network: NamedNetwork, shapes: Shapes, *, D: float, like: Record | None = None) -> NetworkConfig:
    """The configuration of a network.

    Args:
        network: the network.
        shapes: of its tensors, by name.
        D: auxiliary dimensions it was trained for, which are no part of the architecture.
        like: a network of the same training, by whose arguments a state dict is taken where its tensors allow it.

    Raises:
        ValueError: the file's arguments and tensors make no network of the family.
    """
    chosen = _arguments(network, shapes, like)
    widest = max(chosen["channel_mult"])  # type: ignore[call-overload]
    chosen["channel_mult_noise"] = chosen["channel_mult_noise"] or chosen["channel_mult"][0]  # type: ignore[index]
    chosen["channel_mult_emb"] = chosen["channel_mult_emb"] or widest
    return NetworkConfig(model_type="EDM2UNet", D=D, **chosen)  # type: ignore[arg-type]


def narrow_heads(config: NetworkConfig) -> bool:
    """Whether a width of the attention heads was assumed that is none of the published networks'."""
    return config.channels_per_head != _UNET["channels_per_head"]


def _arguments(network: NamedNetwork, shapes: Shapes, like: Record | None = None) -> dict[str, object]:
    """The constructor's arguments of a network, complete. ValueError: they contradict its tensors."""
    seen = from_shapes(shapes)
    if isinstance(network, Weights):
        if like is not None:
            with contextlib.suppress(ValueError):
                return _arguments(like, shapes)
        return {**_UNET, **_PRECOND, "channels_per_head": _assumed_heads(shapes), **seen}
    unet = network.mapping("_modules").get("unet")
    if not isinstance(unet, Record):
        raise ValueError("there is no U-Net in it")
    given = _given(network)
    stated: Mapping[str, object] = _of_attributes(network, unet) if given is None else given
    known = (*_SIZES, *_UNET, *_PRECOND, *_IGNORED)
    chosen: dict[str, object] = {**_UNET, **_PRECOND, **seen}
    for name, value in stated.items():
        if name not in known:
            raise ValueError(f"the argument {shown(name)} of a network is unknown")
        if name == "clip_act" and value is None:
            chosen[name] = math.inf
        elif name not in _IGNORED and value is not None:
            chosen[name] = _plain(name, value)
    for name in _SIZES:
        if given is not None and name not in given:
            raise ValueError(f"the argument {name} of a network is missing")
    if given is not None:
        _fill_in(chosen, given)
    chosen["logvar_channels"] = seen["logvar_channels"]
    _check(chosen, seen)
    if isinstance(fp16 := network.state.get("use_fp16"), bool):
        chosen["use_fp16"] = fp16
    return chosen


def from_shapes(shapes: Shapes) -> dict[str, object]:
    """The arguments that a network's tensors determine, by name.

    Widths are products of `model_channels` and a factor, of which a file's own arguments alone say which is which.

    Raises:
        ValueError: the tensors are not those of a network of EDM2.
    """
    entries = entries_of(shapes, _ENTRY)
    sides = sides_of(entries, "a U-Net of EDM2")
    levels = [_level(entries.get(("dec", side), {}), side) for side in sides]
    blocks, widths, attends = zip(*levels, strict=True)
    if len(set(blocks)) > 1:
        raise ValueError("its levels have different numbers of blocks")
    channels = widths[0] if not any(width % widths[0] for width in widths) else reduce(math.gcd, widths)
    noise, embedding = _rows(shapes, "unet.emb_fourier.freqs", 1), _rows(shapes, "unet.emb_noise.weight", 2)
    facts: dict[str, object] = {
        "img_resolution": sides[0],
        "img_channels": _rows(shapes, "unet.out_conv.weight", 4),
        "label_dim": shapes["unet.emb_label.weight"][-1] if len(shapes.get("unet.emb_label.weight", ())) == 2 else 0,
        "model_channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "num_blocks": blocks[0],
        "attn_resolutions": tuple(side for side, attention in zip(sides, attends, strict=True) if attention),
        # A generator has no log-variance.
        "logvar_channels": _rows(shapes, "logvar_fourier.freqs", 1) if "logvar_linear.weight" in shapes else 0,
    }
    if noise != widths[0]:
        facts["channel_mult_noise"] = _multiple(noise, channels, "the noise embedding")
    if embedding != max(widths):
        facts["channel_mult_emb"] = _multiple(embedding, channels, "the embedding")
    return facts


def _assumed_heads(shapes: Shapes) -> int:
    """The width of an attention head, which does not show: 64, or what divides widths that 64 does not."""
    widths = [shape[0] for name, shape in shapes.items() if name.endswith(".attn_proj.weight") and shape]
    common = reduce(math.gcd, widths, 0)
    return common if common % 64 else 64


def _level(entries: Mapping[str, Mapping[str, tuple[int, ...]]], side: int) -> tuple[int, int, bool]:
    """(blocks, width, whether it attends) of a level of the decoder."""
    count = sum(re.fullmatch(r"block\d+", entry) is not None for entry in entries)
    width = entries.get("block0", {}).get("conv_res1.weight", ())
    if count < 1 or len(width) != 4 or not width[0]:
        raise ValueError(
            f"its tensors are not those of a U-Net of EDM2: resolution {side} has {count} blocks in the decoder"
        )
    return count - 1, width[0], "attn_qkv.weight" in entries["block0"]


def _rows(shapes: Shapes, name: str, axes: int) -> int:
    shape = shapes.get(name, ())
    if len(shape) != axes or not shape[0]:
        raise ValueError(f"it lacks the tensor {name}, or that has not {axes} axes")
    return shape[0]


def _multiple(width: int, channels: int, what: str) -> int:
    if width % channels:
        raise ValueError(f"the width {width} of {what} is no multiple of its {channels} channels")
    return width // channels


def _given(record: Record) -> dict[str, object] | None:
    """A copy of the constructor's arguments that a record holds; None where it holds none."""
    if record.state.get("_init_kwargs") is None:
        return None
    if record.state.get("_init_args", ()) != ():
        raise ValueError(f"an object of class {shown(record.class_name)} was made with arguments without names")
    return dict(record.mapping("_init_kwargs"))


def _of_attributes(network: Record, unet: Record) -> dict[str, object]:
    """Arguments as the parts of a network state them that was stored without its constructor's."""
    blocks = [
        block
        for part in ("enc", "dec")
        if isinstance(group := unet.mapping("_modules").get(part), Record)
        for block in group.mapping("_modules").values()
        if isinstance(block, Record) and block.class_name == "Block"
    ]
    found: dict[str, object] = {}
    for name in ("sigma_data", *_SIZES):
        found[name] = network.state.get(name)
    for name in ("label_balance", "concat_balance"):
        found[name] = unet.state.get(name)
    for name in ("resample_filter", "dropout", "res_balance", "attn_balance", "clip_act"):
        found[name] = blocks[0].state.get(name) if blocks else None
    for block in blocks:
        heads, width = block.state.get("num_heads"), block.state.get("out_channels")
        if type(heads) is int and type(width) is int and 0 < heads <= width:
            found["channels_per_head"] = width // heads
            break
    return {name: value for name, value in found.items() if value is not None or (name == "clip_act" and blocks)}


def _fill_in(chosen: dict[str, object], given: Mapping[str, object]) -> None:
    """Put the defaults of the constructor in the place of what the tensors say, where an argument is not given."""
    for name in ("model_channels", "channel_mult", "num_blocks", "attn_resolutions"):
        if given.get(name) is None:
            chosen[name] = _UNET[name]
    for name in ("channel_mult_noise", "channel_mult_emb"):
        chosen[name] = None if given.get(name) is None else _plain(name, given[name])


def _check(chosen: Mapping[str, object], seen: Mapping[str, object]) -> None:
    """ValueError where the tensors say something else than the arguments."""
    channels, factors = chosen["model_channels"], chosen["channel_mult"]
    for name, stated, found in (
        *((name, chosen[name], seen[name]) for name in (*_SIZES, "num_blocks")),
        ("the widths of its levels", _widths(channels, factors), _widths(seen["model_channels"], seen["channel_mult"])),
    ):
        if stated != found or isinstance(stated, bool):
            raise ValueError(f"{name} is stated as {shown(str(stated))}, but its tensors say {shown(str(found))}")


def _widths(channels: object, factors: object) -> object:
    if type(channels) is not int or not isinstance(factors, tuple) or not all(type(f) is int for f in factors):
        return f"{shown(channels)} x {shown(factors)}"
    return tuple(channels * factor for factor in factors)


def _plain(name: str, value: object) -> object:
    """`value` as an argument: a number, or a tuple of numbers."""
    if isinstance(value, (list, tuple)):
        if len(value) > _MAX_VALUES or not all(type(item) in (int, float) for item in value):
            raise ValueError(f"the argument {name} is no short list of numbers")
        return tuple(value)
    if isinstance(value, (bool, int, float)):
        return value
    raise ValueError(f"the argument {name} is {shown(value)}")
