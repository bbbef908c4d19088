"""What an exported graph computes: functions of tensors alone, with preconditioning and noise levels inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.sampling.trajectory import trajectory
from ipfm.models import EDMPrecond, Precond


class OneStep(nn.Module):
    """x (N, C, H, W) at noise level sigma, and one-hot class labels (N, label_dim) -> images, float32."""

    def __init__(self, net: Precond, sigma: float) -> None:
        super().__init__()
        self.net, self.sigma = net, sigma

    def forward(self, x: Tensor, class_labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.net(x, self.sigma, class_labels)
        return out.float()


class TrajectoryEnd(nn.Module):
    """x (N, C, H, W) at the start of the trajectories, and class labels -> their ends, float32; see `trajectory`."""

    def __init__(self, net: EDMPrecond, ends: NoiseLevels) -> None:
        super().__init__()
        self.net, self.ends = net, ends

    def forward(self, x: Tensor, class_labels: Tensor | None = None) -> Tensor:
        t = torch.full((x.shape[0],), self.ends.sigma_min, dtype=self.net.wide_dtype, device=x.device)
        return trajectory(
            self.net,
            x,
            t,
            sigma_max=self.ends.sigma_max,
            sigma_data=self.net.sigma_data,
            input_dtype=self.net.input_dtype,
            class_labels=class_labels,
        ).float()


class Denoising(nn.Module):
    """x (N, C, H, W), its noise levels sigma (N,), and class labels -> the denoised x, float32."""

    def __init__(self, net: Precond) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.net(x, sigma, class_labels)
        return out.float()
