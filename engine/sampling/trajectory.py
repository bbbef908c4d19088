"""A parametrisation of a generator: a network that knows the whole trajectory of each latent [Tee et al.]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ipfm.models import EDMPrecond


def trajectory(
    net: Callable[..., Tensor],
    z: Tensor,
    t: Tensor,
    *,
    sigma_max: float,
    sigma_data: float,
    input_dtype: torch.dtype | None = None,
    class_labels: Tensor | None = None,
) -> Tensor:
    """x_theta(z, t): the point at noise level t of the ODE's trajectory that starts in z at level T = sigma_max.

        x_theta(z, t) = c_skip(t) z + c_out(t) F(c_in(T) z, c_noise(t))                         [Tee et al.]
        c_skip = t / T,   c_out = (T - t) / T,   c_in(T) = 1 / sqrt(sigma_data^2 + T^2),   c_noise = ln(t) / 4

    x_theta(z, T) = z exactly, whatever the network, as long as F is finite. Differentiable in the network's parameters
    and in z.

    Args:
        net: called as net(c_in z, t, class_labels, None, raw=True), it returns F: a network with EDM's preconditioning,
            which makes c_noise of t, or anything around one (see `trajectory_network`).
        z: (B, C, H, W) latents at level T, float32 or float64.
        t: (B,) noise levels in (0, T]; on z's device. Not checked, as that would wait for the device.
        sigma_max: T, in the units of the data.
        sigma_data: standard deviation of the data, the network's own.
        input_dtype: dtype in which the network takes c_in z, its `input_dtype`; z's when None.
        class_labels: (B, label_dim) float32 or None.

    Returns:
        (B, C, H, W) float32; float64 where z or F is.

    Raises:
        ValueError: z or t of another shape; whatever the network refuses.
    """
    if z.ndim != 4 or t.shape != z.shape[:1]:
        raise ValueError(f"z must be (B, C, H, W) and t (B,), got {tuple(z.shape)} and {tuple(t.shape)}")
    wide = torch.promote_types(z.dtype, torch.float32)
    c_in = (sigma_data**2 + sigma_max**2) ** -0.5
    inner = net((c_in * z.to(wide)).to(input_dtype or z.dtype), t, class_labels, None, raw=True)
    wide = torch.promote_types(wide, inner.dtype)
    level = t.to(wide).view(-1, 1, 1, 1)
    # A tensor: GPUs divide by a number through its reciprocal, and T / T would not be 1.
    start = torch.full_like(level, sigma_max)
    return torch.addcmul(level / start * z.to(wide), (start - level) / start, inner.to(wide))


def trajectory_network(net: object) -> EDMPrecond:
    """`net`, whose raw output `trajectory` can use: c_noise = ln(t)/4 is EDM's.

    Raises:
        ValueError: it has another preconditioning.
    """
    if not isinstance(net, EDMPrecond):
        raise ValueError(
            f"a trajectory needs a network with EDM's preconditioning (EDMPrecond), got {type(net).__name__}"
        )
    return net
