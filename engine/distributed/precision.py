"""Arithmetic of the networks: which dtype computes, and which may store."""

from __future__ import annotations

import torch
from torch import nn

from ipfm.engine.config import Precision
from ipfm.models import Precond
from ipfm.models.edm2_layers import MPConv
from ipfm.models.layers import Conv2d, GroupNorm

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def apply_precision(net: Precond, precision: Precision) -> Precond:
    """Set the network's arithmetic: 16-bit convolutions, with scalings and embeddings in fp32; or all fp32."""
    net.compute_dtype = DTYPES[precision]
    return net


def halve_storage(net: Precond, precision: Precision) -> Precond:
    """Store in the arithmetic's own 16 bits what is cast to them at each use, for good; the results stay the same.

    Embeddings are computed in fp32 and keep their weights. For frozen networks: nothing smaller than a 16-bit step
    could be learned any more.
    """
    for p in sixteen_bit_parameters(net):
        p.data = p.data.to(DTYPES[precision])
    return net


def sixteen_bit_parameters(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that a 16-bit network uses in 16 bits: those of convolutions and normalisations."""

    def taken(module: nn.Module) -> bool:
        # An MPConv without a kernel is a linear layer, of the embedding.
        return isinstance(module, Conv2d | GroupNorm) or (isinstance(module, MPConv) and module.kernel > 0)

    return [p for module in net.modules() if taken(module) for p in module.parameters(recurse=False)]


def fp16_supported(device: torch.device) -> bool:
    """Whether DeepSpeed trains in fp16 here: on every GPU, and on processors with fp16 arithmetic."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def bf16_supported(device: torch.device) -> bool:
    """Whether this is a GPU with bf16 arithmetic of its own: compute capability 8.0 and later, and AMD's.

    Others emulate it, which torch counts as support and which makes convolutions crawl.
    """
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def allow_tf32(allowed: bool) -> None:
    """TF32 in fp32 convolutions and matrix products on GPUs that have it."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
