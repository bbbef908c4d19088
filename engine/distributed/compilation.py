"""How the networks are executed: the order of their activations in memory, and compilation."""

from __future__ import annotations

import torch

from ipfm.engine.config import MemoryFormat
from ipfm.models import Precond

# Networks of one class share a code object, whose compiled forms are counted together: trained, frozen, without
# gradients, for each of the networks and shapes of a run. Beyond the limit torch would run them uncompiled.
COMPILED_FORMS = 64


def set_execution(net: Precond, *, memory_format: MemoryFormat, compiled: bool, device: torch.device) -> None:
    """Set how `net` computes from now on; its weights and their names stay.

    Args:
        net: a network on `device`, not one whose weights ZeRO 3 gathers.
        memory_format: order of the activations; auto is channels_last on GPUs.
        compiled: by torch.compile, at its first use with each kind of input.
        device: where it runs.
    """
    net.channels_last = memory_format == "channels_last" or (memory_format == "auto" and device.type == "cuda")
    if compiled:
        from torch._inductor import config as inductor

        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_FORMS)
        # The dropout of PyTorch's operations: a network's second pass must repeat the first one's, whatever was fused.
        inductor.fallback_random = True
        # The U-Net alone: what is around it is little, and looks at its arguments with conditions.
        net.model.compile(dynamic=False)


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile has the C++ compiler that it needs on a CPU.

    Raises:
        ValueError: it has not.
    """
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        message = "compile needs a C++ compiler on a CPU, and there is none: install g++, or leave compile out"
        raise ValueError(message) from error
