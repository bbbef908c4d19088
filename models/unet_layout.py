"""Which entries a U-Net has, in order, before any of them is built: names, channels, attention, skip connections.

Pure bookkeeping, so that a configuration can be checked without allocating a network.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ipfm.models.attention import head_count
from ipfm.models.layers import check_resample_filter, group_count

EncoderType = Literal["standard", "skip", "residual"]
DecoderType = Literal["standard", "skip"]
EmbeddingType = Literal["positional", "fourier"]
Kind = Literal["conv", "block", "aux_down", "aux_skip", "aux_residual", "aux_up", "aux_norm", "aux_conv"]

CHANNELS_PER_HEAD = 64
"""Width of an attention head of a DhariwalUNet."""


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
    """The entries of a SongUNet, whose keywords these are.

    Raises:
        ValueError: the numbers cannot make one.
    """
    check_choice("encoder_type", encoder_type, get_args(EncoderType))
    check_choice("decoder_type", decoder_type, get_args(DecoderType))
    check_resample_filter(resample_filter)
    _check_levels(img_resolution, channel_mult)
    sides = [img_resolution >> level for level in range(len(channel_mult))]
    widths = [model_channels * mult for mult in channel_mult]
    encoder = _encoder(sides, widths, in_channels, model_channels, num_blocks, attn_resolutions, encoder_type)
    decoder: list[Entry] = []
    for level, blocks in _decoder_levels(sides, widths, encoder, num_blocks, attn_resolutions, every_block=False):
        decoder += blocks
        if decoder_type == "skip" or level == 0:
            at, width = f"{sides[level]}x{sides[level]}", widths[level]
            if decoder_type == "skip" and level != len(sides) - 1:
                decoder.append(Entry(f"{at}_aux_up", "aux_up", out_channels, out_channels, up=True))
            decoder.append(Entry(f"{at}_aux_norm", "aux_norm", width, width))
            decoder.append(Entry(f"{at}_aux_conv", "aux_conv", width, out_channels))
    layout = Layout(tuple(encoder), tuple(decoder))
    _check_widths(layout, channels_per_head=None)
    return layout


def dhariwal_unet_layout(
    *,
    img_resolution: int,
    in_channels: int,
    model_channels: int,
    channel_mult: Sequence[int],
    num_blocks: int,
    attn_resolutions: Sequence[int],
) -> Layout:
    """The entries of a DhariwalUNet, whose keywords these are, up to its last block.

    Raises:
        ValueError: the numbers cannot make one.
    """
    _check_levels(img_resolution, channel_mult)
    sides = [img_resolution >> level for level in range(len(channel_mult))]
    widths = [model_channels * mult for mult in channel_mult]
    encoder = _encoder(sides, widths, in_channels, widths[0], num_blocks, attn_resolutions, "standard")
    levels = _decoder_levels(sides, widths, encoder, num_blocks, attn_resolutions, every_block=True)
    layout = Layout(tuple(encoder), tuple(entry for _, blocks in levels for entry in blocks))
    _check_widths(layout, channels_per_head=CHANNELS_PER_HEAD)
    return layout


def edm2_unet_layout(
    *,
    img_resolution: int,
    in_channels: int,
    model_channels: int,
    channel_mult: Sequence[int],
    num_blocks: int,
    attn_resolutions: Sequence[int],
    channels_per_head: int,
    resample_filter: Sequence[float],
) -> Layout:
    """The entries of an EDM2UNet, whose keywords these are; the first one takes a channel of ones too.

    Raises:
        ValueError: the numbers cannot make one.
    """
    check_resample_filter(resample_filter)
    _check_levels(img_resolution, channel_mult)
    sides = [img_resolution >> level for level in range(len(channel_mult))]
    widths = [model_channels * mult for mult in channel_mult]
    encoder = _encoder(sides, widths, in_channels + 1, widths[0], num_blocks, attn_resolutions, "standard")
    levels = _decoder_levels(sides, widths, encoder, num_blocks, attn_resolutions, every_block=True)
    layout = Layout(tuple(encoder), tuple(entry for _, blocks in levels for entry in blocks))
    for entry in layout.encoder + layout.decoder:
        if entry.attention:
            _check_heads(entry, channels_per_head)
    return layout


def _encoder(
    sides: Sequence[int],
    widths: Sequence[int],
    in_channels: int,
    first_width: int,
    num_blocks: int,
    attn_resolutions: Sequence[int],
    encoder_type: EncoderType,
) -> list[Entry]:
    """From the images (in_channels) to the innermost level; sides and widths of the levels, highest resolution first.

    first_width: output channels of the first convolution, before the first block.
    """
    entries: list[Entry] = []
    width, aux_width = first_width, in_channels
    for side, wide in zip(sides, widths, strict=True):
        at = f"{side}x{side}"
        if side == sides[0]:
            entries.append(Entry(f"{at}_conv", "conv", in_channels, first_width))
        else:
            entries.append(Entry(f"{at}_down", "block", width, width, down=True))
            if encoder_type == "skip":
                entries.append(Entry(f"{at}_aux_down", "aux_down", aux_width, aux_width, down=True))
                entries.append(Entry(f"{at}_aux_skip", "aux_skip", aux_width, width))
            elif encoder_type == "residual":
                entries.append(Entry(f"{at}_aux_residual", "aux_residual", aux_width, width, down=True))
                aux_width = width
        for index in range(num_blocks):
            entries.append(Entry(f"{at}_block{index}", "block", width, wide, attention=side in attn_resolutions))
            width = wide
    return entries


def _decoder_levels(
    sides: Sequence[int],
    widths: Sequence[int],
    encoder: Sequence[Entry],
    num_blocks: int,
    attn_resolutions: Sequence[int],
    *,
    every_block: bool,
) -> Iterator[tuple[int, list[Entry]]]:
    """(level, its blocks) from the innermost level outwards.

    every_block: all blocks of a level in attn_resolutions attend, not only the last.
    """
    skips = [entry.out_channels for entry in encoder if entry.kind in ("conv", "block")]
    # The encoder's own width: without blocks in it, none of its levels widens.
    width, last = skips[-1], len(sides) - 1
    for level in range(last, -1, -1):
        at, attends = f"{sides[level]}x{sides[level]}", sides[level] in attn_resolutions
        if level == last:
            entries = [
                Entry(f"{at}_in0", "block", width, width, attention=True),
                Entry(f"{at}_in1", "block", width, width),
            ]
        else:
            entries = [Entry(f"{at}_up", "block", width, width, up=True)]
        for index in range(num_blocks + 1):
            skip, name = skips.pop(), f"{at}_block{index}"
            attention = attends and (every_block or index == num_blocks)
            entries.append(Entry(name, "block", width + skip, widths[level], attention=attention, skip_channels=skip))
            width = widths[level]
        yield level, entries


def check_choice(name: str, given: object, possible: Sequence[str]) -> None:
    """Check that `given` is one of `possible`.

    Raises:
        ValueError: it is none of them.
    """
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


def _check_widths(layout: Layout, *, channels_per_head: int | None) -> None:
    """ValueError naming the entry whose channels GroupNorm or the attention heads (None: one head) do not divide."""
    for entry in layout.encoder + layout.decoder:
        if entry.kind not in ("block", "aux_norm"):
            continue
        try:
            group_count(entry.in_channels)
            group_count(entry.out_channels)
        except ValueError as error:
            raise ValueError(_at(entry, error)) from None
        if entry.attention and channels_per_head is not None:
            _check_heads(entry, channels_per_head)


def _check_heads(entry: Entry, channels_per_head: int) -> None:
    """ValueError naming the entry whose channels its attention heads do not divide."""
    try:
        head_count(entry.out_channels, channels_per_head=channels_per_head)
    except ValueError as error:
        raise ValueError(_at(entry, error)) from None


def _at(entry: Entry, error: ValueError) -> str:
    return f"{entry.name}: {error} (change model_channels or channel_mult)"
