"""Launches that repeat: a kernel with its grid, numbers and constants, of which Triton has to be asked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

from ipfm.kernels._dispatch import on_device

_HOOKS = knobs.runtime


class Launch:
    """Starts a kernel on tensors whose dtypes, like everything else about a launch, are always the same.

    Triton's own way asks at every launch what each argument is, which takes longer than the launch. Where all memory
    begins at a multiple of 16 bytes, the kernel that it compiled for such is right again and started at once.

    Args:
        kernel: the kernel; its pointers come first among its arguments.
        grid: its programs.
        warps: of each program.
        values: all arguments but the pointers, by name.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], warps: int, values: Mapping[str, Any]) -> None:
        self._kernel, self._grid, self._warps = kernel, grid, warps
        self._sizes = (*grid, 1, 1)[:3]
        self._values = tuple(values[name] for name in kernel.arg_names if name in values)
        self._driver: Any = None
        # What is handed to a compiled kernel beside its arguments.
        self._start: Callable[..., Any] | None = None
        self._fixed: tuple[Any, ...] = ()

    def __call__(self, device: torch.device, *tensors: Tensor) -> None:
        """Start it on a device, the same at every call; `tensors` in the order of the pointers."""
        begins = 0
        for tensor in tensors:
            begins |= tensor.data_ptr()
        start = self._start
        if start is not None and not begins % 16 and driver._active is self._driver and _is_current(device):
            stream = self._driver.get_current_stream(device.index)
            if not _hooked():
                start(*self._sizes, stream, *self._fixed, *tensors, *self._values)
                return
        with on_device(device):
            compiled = self._kernel[self._grid](*tensors, *self._values, num_warps=self._warps)
            # The interpreter compiles nothing, and what a profiler had compiled is for as long as it looks.
            if compiled is not None and not begins % 16 and not _hooked():
                self._fixed = compiled.function, compiled.packed_metadata, None, None, None
                # Last: autograd's threads launch too.
                self._driver, self._start = driver._active, compiled.run


def _is_current(device: torch.device) -> bool:
    """Whether Triton would launch on it; something has been launched before."""
    return device.type != "cuda" or torch._C._cuda_getDevice() == device.index


def _hooked() -> bool:
    """Whether a profiler asked Triton to be told of launches."""
    enter, leave = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def dense_layout(channels: int, pixels: int, last: bool) -> dict[str, int]:
    """How a kernel finds its way in a dense tensor of images: pixels, and strides of image, channel and pixel.

    Args:
        channels: of an image.
        pixels: of an image.
        last: whether its memory format is channels_last.
    """
    strides = (1, channels) if last else (pixels, 1)
    return {"HW": pixels, "s_b": channels * pixels, "s_c": strides[0], "s_hw": strides[1]}
