"""Which implementation runs, and the block sizes and warps of the Triton kernels."""

from __future__ import annotations

import contextlib
import struct
from typing import Literal

import torch
import triton

from ipfm.kernels._cache import usable_cache

Backend = Literal["auto", "triton", "reference"]
BACKENDS = ("auto", "triton", "reference")

# Triton reads TRITON_INTERPRET when it decorates a kernel, so the state at import is what counts.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# Kinds of devices on which "auto" is Triton. A rehearsal without a GPU adds others (bench/fake_driver.py).
TRITON_DEVICES = {"cuda"}


def use_triton(op: str, backend: str, device: torch.device) -> bool:
    """Resolve `backend` for tensors on `device`.

    Args:
        op: the operation's name, for the message.
        backend: "auto" (Triton on CUDA, the reference elsewhere), "triton" or "reference".
        device: where the tensors are.

    Returns:
        True for the Triton kernel, False for the reference.

    Raises:
        ValueError: an unknown name, or Triton on a device that it cannot run on.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "auto":
        return device.type in TRITON_DEVICES
    if backend == "triton" and device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"{op}: backend 'triton' needs CUDA tensors, got {device.type}; on a CPU it runs only in Triton's "
            "interpreter (set TRITON_INTERPRET=1 before ipfm.kernels is imported)"
        )
    return backend == "triton"


_NOTHING = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Make `device` current for a launch: Triton launches on the current device, not on its arguments'."""
    if device.type != "cuda":
        return _NOTHING
    usable_cache()
    return _NOTHING if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def signed32(value: int) -> int:
    """The int32 with the bits of `value` mod 2³²: an argument of one type for every value, so no recompilation."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def signed64(value: int) -> int:
    """The int64 with the bits of `value` in [0, 2⁶⁴): what an operator's argument can hold."""
    return value - (1 << 64) if value >= 1 << 63 else value


def float64_bits(value: float) -> int:
    """The bits of `value` as an int64: Triton would round a float argument to float32."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def noise_config(samples: int, pixels: int, rgb: bool = False) -> tuple[int, int, int]:
    """(block, tiles, warps) of the perturbation kernel, for `pixels` inner elements a sample.

    One warp a program: the sample's gamma variable is computed by every thread, so few threads with many elements each
    make it cheap. `rgb`, three channels together, takes two, between which the exchange goes through shared memory.
    Several tiles a program once there are programs enough to fill any GPU without that.
    """
    block = min(512 if rgb else 256, max(16, triton.next_power_of_2(pixels)))
    tiles = -(-pixels // block)
    wanted = max(1, (1 << 14) // max(1, samples))  # programs a sample that still leave 2^14 in the grid
    return block, min(16, -(-tiles // wanted)), 2 if rgb else 1


def row_config(elements: int, *, crowded: bool = False) -> tuple[int, int]:
    """(block, warps) of the kernels that give each sample one program.

    Rows of up to 4096 elements stay in registers; longer ones are walked twice, the second time mostly from cache.
    Where the registers are `crowded`, with half as many threads: a block of 8 warps would spill on some GPUs.
    """
    block = min(4096, max(16, triton.next_power_of_2(elements)))
    if block < elements:
        block = 1024 if crowded else 2048
    return block, min(8, max(1, block // 256))


def group_config(
    channels: int,
    groups: int,
    pixels: int,
    element_size: int,
    channels_last: bool,
    *,
    scaled: bool = False,
    backward: bool = False,
) -> tuple[int, int, int, int]:
    """(groups a program, padded channels a group, pixels a block, warps) of the group normalisation kernels.

    Groups of up to 4096 elements stay in registers. In channels_last a program takes as many groups side by side as
    fill 64 bytes of a pixel, so that no sector is read for a part of it; as many elements as that makes stay in the
    registers of up to 32 warps: 16 of them a thread, or 8 on the way back, which holds more of each. Forward, without
    scale and shift, twice as many stay in 16 warps, 64 a thread with twice the registers: 32 warps would spill. Where
    8192 are too few on the way back, 32 bytes of a pixel, one sector, of 16 bits each wait in 16 warps, 32 elements a
    thread.
    """
    padded = triton.next_power_of_2(channels)
    together = _side_by_side(channels, groups, element_size, 64) if channels_last else 1
    most = 4096
    if channels_last and element_size <= 4:
        most = 8192 if backward else 16384 if scaled else 32768
        narrow = _side_by_side(channels, groups, element_size, 32)
        whole = triton.next_power_of_2(pixels)
        # (Accesses of 64 bits, as at four channels, take registers that some GPUs' code does not have left.)
        fits = element_size == 2 and padded >= 8 and padded * narrow * whole == 16384
        if backward and fits and padded * together * whole > most:
            return narrow, padded, whole, 16
    block = min(triton.next_power_of_2(pixels), max(1, most // (padded * together)))
    if block < pixels:
        block = max(1, 2048 // (padded * together))
    elements = together * padded * block
    if elements <= 4096:
        return together, padded, block, min(8, max(1, elements // 256))
    if elements > 16384:
        return together, padded, block, 16
    return together, padded, block, min(32, elements // (256 if backward else 512))


def _side_by_side(channels: int, groups: int, element_size: int, width: int) -> int:
    """How many groups fill so many bytes of a pixel in channels_last."""
    together = 1
    while groups % (2 * together) == 0 and together * channels * element_size < width:
        together *= 2
    return together


def lane_config(channels: int, groups: int, pixels: int, element_size: int) -> tuple[int, int, int] | None:
    """(groups a program, lanes, warps) of the normalisation in channels_last where tiles would leave lanes idle.

    As many groups side by side as make whole sectors of a pixel; as many lanes as leave the fewest idle when whole
    pixels fill them, step by step through the image; eight elements a thread. None for powers of two, which fill tiles,
    and where nothing makes accesses of 128 bits possible.
    """
    if channels & (channels - 1) == 0:
        return None
    together = 1
    while groups % (2 * together) == 0 and (
        together * channels * element_size < 64 or together * channels * element_size % 32
    ):
        together *= 2
    width = together * channels
    possible = [lanes for lanes in (4096, 2048, 1024, 512) if lanes >= width]
    if width * element_size % 16 or not possible:
        return None
    lanes = min(possible, key=lambda lanes: lanes * -(-pixels // (lanes // width)))
    return together, lanes, lanes // 256


def residual_config(channels: int, pixels: int, channels_last: bool) -> tuple[int, int, int, int]:
    """(channels a program, pixels a block, blocks a program, warps) of the kernels of a residual sum.

    Channels in the largest power of two that divides them, so that no lane is idle; blocks of 2048 elements, and up to
    eight of them a program, which leave few partial sums. Nothing depends on the batch, for which a compiler would ask.
    """
    most = 64 if channels_last else 16
    together = min(channels & -channels, most)
    if together < 8:
        together = min(triton.next_power_of_2(channels), most)
    block = min(triton.next_power_of_2(pixels), 2048 // together)
    return together, block, min(8, -(-pixels // block)), 4 if together * block >= 512 else 1


def flat_config() -> tuple[int, int]:
    """(elements a program, warps) of kernels that go element by element through the memory: 16 elements a thread."""
    return 2048, 4


def pixel_config(channels: int, pixels: int, channels_last: bool) -> tuple[int, int, int]:
    """(padded channels, pixels a program, warps) of the kernels that normalise each pixel: 16 elements a thread.

    All channels of a pixel wait in registers. Contiguous images take at least 8 pixels, whose channels lie apart.
    """
    padded = max(16, triton.next_power_of_2(channels))
    block = min(triton.next_power_of_2(pixels), max(1 if channels_last else 8, 2048 // padded))
    return padded, block, min(32, max(1, padded * block // 512))


def head_config(width: int) -> tuple[int, int, int]:
    """(padded channels of a head, vectors a program, warps) of the kernels that normalise q, k and v."""
    padded = triton.next_power_of_2(width)
    warps = 4 if padded == width else 8
    return padded, max(1, 2048 // padded), min(32, max(warps, padded // 512))


def adam_config() -> tuple[int, int, int]:
    """(elements a program, elements at a time, warps) of AdamEMA's kernels.

    Four elements a thread and tensor at a time: one 128-bit access each, and registers few enough for every warp that a
    multiprocessor holds. Several times that a program, for what it looks up before it starts.
    """
    return 4096, 512, 4
