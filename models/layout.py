"""Which entries a U-Net has, in order, before any of them is built: names, channels, attention, skip connections.

Pure bookkeeping, so that a configuration can be checked without allocating a network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .layers import check_resample_filter, group_count

EncoderType = Literal["standard", "skip", "residual"]
DecoderType = Literal["standard", "skip"]
EmbeddingType = Literal["positional", "fourier"]
Kind = Literal["conv", "block", "aux_down", "aux_skip", "aux_residual", "aux_up", "aux_norm", "aux_conv"]


@dataclass(frozen=True)
class Entry:
    """One entry of an encoder or decoder.

    `skip_channels` is the part of `in_channels` that comes from the newest encoder output not yet used (0: none).
    """

    name: str
    kind: Kind
    in_channels: int
    out_channels: int
    attention: bool = False
    up: bool = False
    down: bool = False
    skip_channels: int = 0


@dataclass(frozen=True)
class Layout:
    """The entries of a U-Net in the order of its state dict, which is also the order of evaluation."""

    encoder: tuple[Entry, ...]
    decoder: tuple[Entry, ...]


def song_unet_layout(
    *,
    img_resolution: int,
    in_channels: int,
    out_channels: int,
    model_channels: int,
    channel_mult: Sequence[int],
    num_blocks: int,
    attn_resolutions: Sequence[int],
    encoder_type: EncoderType,
    decoder_type: DecoderType,
    resample_filter: Sequence[float],
) -> Layout:
    """The entries of a SongUNet; ValueError where the numbers cannot make one."""
    check_choice("encoder_type", encoder_type, get_args(EncoderType))
    check_choice("decoder_type", decoder_type, get_args(DecoderType))
    check_resample_filter(resample_filter)
    _check_levels(img_resolution, channel_mult)
    last = len(channel_mult) - 1

    encoder: list[Entry] = []
    width, aux_width = in_channels, in_channels
    for level, mult in enumerate(channel_mult):
        side = img_resolution >> level
        at = f"{side}x{side}"
        if level == 0:
            encoder.append(Entry(f"{at}_conv", "conv", width, model_channels))
            width = model_channels
        else:
            encoder.append(Entry(f"{at}_down", "block", width, width, down=True))
            if encoder_type == "skip":
                encoder.append(Entry(f"{at}_aux_down", "aux_down", aux_width, aux_width, down=True))
                encoder.append(Entry(f"{at}_aux_skip", "aux_skip", aux_width, width))
            elif encoder_type == "residual":
                encoder.append(Entry(f"{at}_aux_residual", "aux_residual", aux_width, width, down=True))
                aux_width = width
        for index in range(num_blocks):
            wide = model_channels * mult
            encoder.append(Entry(f"{at}_block{index}", "block", width, wide, attention=side in attn_resolutions))
            width = wide

    skips = [entry.out_channels for entry in encoder if entry.kind in ("conv", "block")]
    decoder: list[Entry] = []
    for level in range(last, -1, -1):
        side = img_resolution >> level
        at = f"{side}x{side}"
        if level == last:
            decoder.append(Entry(f"{at}_in0", "block", width, width, attention=True))
            decoder.append(Entry(f"{at}_in1", "block", width, width))
        else:
            decoder.append(Entry(f"{at}_up", "block", width, width, up=True))
        for index in range(num_blocks + 1):
            skip, wide = skips.pop(), model_channels * channel_mult[level]
            attends = index == num_blocks and side in attn_resolutions
            decoder.append(
                Entry(f"{at}_block{index}", "block", width + skip, wide, attention=attends, skip_channels=skip)
            )
            width = wide
        if decoder_type == "skip" or level == 0:
            if decoder_type == "skip" and level != last:
                decoder.append(Entry(f"{at}_aux_up", "aux_up", out_channels, out_channels, up=True))
            decoder.append(Entry(f"{at}_aux_norm", "aux_norm", width, width))
            decoder.append(Entry(f"{at}_aux_conv", "aux_conv", width, out_channels))

    layout = Layout(tuple(encoder), tuple(decoder))
    _check_widths(layout)
    return layout


def check_choice(name: str, given: object, possible: Sequence[str]) -> None:
    """ValueError unless `given` is one of `possible`."""
    if given not in possible:
        raise ValueError(f"{name} {given!r} is unknown; possible: {', '.join(possible)}")


def _check_levels(img_resolution: int, channel_mult: Sequence[int]) -> None:
    if not channel_mult:
        raise ValueError("channel_mult must name at least one level, got none")
    step = 2 ** (len(channel_mult) - 1)
    if img_resolution % step:
        raise ValueError(
            f"img_resolution {img_resolution} cannot be halved {len(channel_mult) - 1} times for the "
            f"{len(channel_mult)} levels of channel_mult {list(channel_mult)}; possible: multiples of {step}"
        )


def _check_widths(layout: Layout) -> None:
    for entry in layout.encoder + layout.decoder:
        widths = (entry.in_channels, entry.out_channels) if entry.kind == "block" else (entry.in_channels,)
        for width in widths if entry.kind in ("block", "aux_norm") else ():
            try:
                group_count(width)
            except ValueError as error:
                raise ValueError(f"{entry.name}: {error} (change model_channels or channel_mult)") from None
