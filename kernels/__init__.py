"""Fused operations: each one a PyTorch reference and a Triton kernel behind one validated public function."""

from . import philox, reference
from .adam import AdamEMA
from .denoising_loss import DenoisingLoss, denoising_loss
from .generator_loss import IpfmLoss, ipfm_loss
from .group_norm import group_norm_silu
from .radial import perturb

__all__ = [
    "AdamEMA",
    "DenoisingLoss",
    "IpfmLoss",
    "denoising_loss",
    "group_norm_silu",
    "ipfm_loss",
    "perturb",
    "philox",
    "reference",
]
