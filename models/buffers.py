"""Buffers whose precision a network depends on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose own buffers stay float32 under every cast of it; they follow it to other devices.

    For constants that low precision would spoil and that are defined by their float32 values.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Buffers":
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            before = kept[name]
            if buffer is not None and before is not None and buffer.dtype != torch.float32:
                self._buffers[name] = before.to(buffer.device)
        return self
