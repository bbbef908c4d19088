"""Fused operations: each one a PyTorch reference and a Triton kernel behind one validated public function."""

from ipfm.kernels import philox, reference
from ipfm.kernels.adam import AdamEMA
from ipfm.kernels.denoising_loss import DenoisingLoss, denoising_loss
from ipfm.kernels.generator_loss import IpfmLoss, ipfm_loss
from ipfm.kernels.group_norm import group_norm_silu
from ipfm.kernels.mp_cat_silu import mp_cat_silu
from ipfm.kernels.mp_silu import mp_silu
from ipfm.kernels.mp_sum import mp_sum
from ipfm.kernels.perturbation import perturb
from ipfm.kernels.pixel_norm_silu import pixel_norm_silu
from ipfm.kernels.qkv_norm import qkv_norm
from ipfm.kernels.residual import residual_sum
from ipfm.kernels.row_normalise import row_normalise

__all__ = [
    "AdamEMA",
    "DenoisingLoss",
    "IpfmLoss",
    "denoising_loss",
    "group_norm_silu",
    "ipfm_loss",
    "mp_cat_silu",
    "mp_silu",
    "mp_sum",
    "perturb",
    "philox",
    "pixel_norm_silu",
    "qkv_norm",
    "reference",
    "residual_sum",
    "row_normalise",
]
