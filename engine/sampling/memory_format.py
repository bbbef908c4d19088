"""The order of a network's activations and weights in memory."""

from __future__ import annotations

import torch

from ipfm.engine.config import MemoryFormat
from ipfm.models import Precond
from ipfm.models.layers import lay_out_weights


def set_memory_format(net: Precond, memory_format: MemoryFormat, device: torch.device) -> None:
    """Set the order of the activations of `net` from now on, and if it is frozen of its weights; its results stay.

    Args:
        net: the network.
        memory_format: channels_last, contiguous, or auto, which is channels_last on GPUs.
        device: where it computes.
    """
    net.channels_last = is_channels_last(memory_format, device)
    if net.channels_last and not any(p.requires_grad for p in net.parameters()):
        lay_out_weights(net)


def is_channels_last(memory_format: MemoryFormat, device: torch.device) -> bool:
    """Whether activations on `device` have the channels of a pixel side by side."""
    return memory_format == "channels_last" or (memory_format == "auto" and device.type == "cuda")
