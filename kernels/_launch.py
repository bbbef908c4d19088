"""Launches that repeat: a kernel with its grid, numbers and constants, of which Triton has to be asked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from triton.runtime.driver import driver

from ipfm.kernels._dispatch import on_device


class Launch:
    """Starts a kernel on tensors whose dtypes, like everything else about a launch, are always the same.

    Triton's own way asks at every launch what each argument is, which takes longer than the launch. Where all memory
    begins at a multiple of 16 bytes, the kernel that it compiled for such is right again and called at once.

    Args:
        kernel: the kernel; its pointers come first among its arguments.
        grid: its programs.
        warps: of each program.
        values: all arguments but the pointers, by name.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], warps: int, values: Mapping[str, Any]) -> None:
        self._kernel, self._grid, self._warps = kernel, grid, warps
        self._values = tuple(values[name] for name in kernel.arg_names if name in values)
        self._again: Callable[..., Any] | None = None
        self._driver: Any = None

    def __call__(self, device: torch.device, *tensors: Tensor) -> None:
        """Start it on a device; `tensors` in the order of the pointers."""
        with on_device(device):
            begins = 0
            for tensor in tensors:
                begins |= tensor.data_ptr()
            if begins % 16:
                self._kernel[self._grid](*tensors, *self._values, num_warps=self._warps)
            elif self._again is not None and driver._active is self._driver:
                self._again(*tensors, *self._values)
            else:
                compiled = self._kernel[self._grid](*tensors, *self._values, num_warps=self._warps)
                if compiled is not None:  # the interpreter compiles nothing
                    self._again, self._driver = compiled[(*self._grid, 1, 1)[:3]], driver._active


def dense_layout(channels: int, pixels: int, last: bool) -> dict[str, int]:
    """How a kernel finds its way in a dense tensor of images: pixels, and strides of image, channel and pixel.

    Args:
        channels: of an image.
        pixels: of an image.
        last: whether its memory format is channels_last.
    """
    strides = (1, channels) if last else (pixels, 1)
    return {"HW": pixels, "s_b": channels * pixels, "s_c": strides[0], "s_hw": strides[1]}
