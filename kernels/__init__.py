"""Fused operations: each one a PyTorch reference and a Triton kernel behind one validated public function."""

from ipfm.kernels import philox, reference
from ipfm.kernels.adam import AdamEMA
from ipfm.kernels.denoising_loss import DenoisingLoss, denoising_loss
from ipfm.kernels.generator_loss import IpfmLoss, ipfm_loss
from ipfm.kernels.group_norm import group_norm_silu
from ipfm.kernels.perturbation import perturb
from ipfm.kernels.residual import residual_sum

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
    "residual_sum",
]
