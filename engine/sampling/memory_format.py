"""The order of a network's activations in memory."""

from __future__ import annotations

import torch

from ipfm.engine.config import MemoryFormat
from ipfm.models import Precond


def set_memory_format(net: Precond, memory_format: MemoryFormat, device: torch.device) -> None:
    """Set the order of the activations of `net` from now on; its weights and its results stay.

    Args:
        net: the network.
        memory_format: channels_last, contiguous, or auto, which is channels_last on GPUs.
        device: where it computes.
    """
    net.channels_last = memory_format == "channels_last" or (memory_format == "auto" and device.type == "cuda")
