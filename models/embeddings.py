"""Embeddings of the noise label: t (N) -> (N, channels), cosines first."""

import math

import torch
from torch import Tensor, nn

from ipfm.models.layers import Float32Buffers


def check_embedding_width(num_channels: int, *, endpoint: bool = False) -> None:
    """Check that `num_channels` is even and leaves at least one frequency, two with `endpoint`.

    Raises:
        ValueError: it is not or does not.
    """
    least = 4 if endpoint else 2
    if num_channels % 2 or num_channels < least:
        raise ValueError(f"a noise embedding needs an even number of channels, at least {least}, got {num_channels}")


class PositionalEmbedding(nn.Module):
    """concat(cos(t·f), sin(t·f)) with f_i = max_positions^(-i / (half - endpoint)), half = channels/2, i < half.

    The frequencies are computed in the dtype of t, at least float32; there is no tensor in the state dict.

    Args:
        num_channels: width of the embedding.
        max_positions: the highest frequency, 1, over the lowest.
        endpoint: whether it is that exactly, or nearly so.

    Raises:
        ValueError: an odd channel count, or fewer than 2 channels (4 with `endpoint`).
    """

    def __init__(self, num_channels: int, *, max_positions: int = 10000, endpoint: bool = False) -> None:
        super().__init__()
        check_embedding_width(num_channels, endpoint=endpoint)
        self.num_channels = num_channels
        self.max_positions = max_positions
        self.endpoint = endpoint

    def forward(self, t: Tensor) -> Tensor:
        half = self.num_channels // 2
        # Recomputed rather than kept: a buffer would follow casts of the module and lose its precise values.
        dtype = torch.promote_types(t.dtype, torch.float32)
        exponent = torch.arange(half, dtype=dtype, device=t.device) / (half - (1 if self.endpoint else 0))
        return _cos_sin(t, (1 / self.max_positions) ** exponent)


class FourierEmbedding(Float32Buffers):
    """concat(cos(2π·t·freqs), sin(2π·t·freqs)); the random `freqs` (channels/2), `scale` times a normal, are fixed.

    `freqs` is a buffer and part of a checkpoint. It stays float32 under every cast of the module: in bfloat16 the
    phase would be off by whole radians.

    Args:
        num_channels: width of the embedding.
        scale: standard deviation of the frequencies.

    Raises:
        ValueError: an odd channel count.
    """

    freqs: Tensor

    def __init__(self, num_channels: int, *, scale: float = 16) -> None:
        super().__init__()
        check_embedding_width(num_channels)
        freqs = torch.empty(num_channels // 2)
        # The meta device has no values, and arithmetic takes long there.
        self.register_buffer("freqs", freqs if freqs.is_meta else scale * torch.randn(num_channels // 2))

    def forward(self, t: Tensor) -> Tensor:
        return _cos_sin(t, 2 * math.pi * self.freqs)


def _cos_sin(t: Tensor, frequencies: Tensor) -> Tensor:
    phase = torch.outer(t, frequencies.to(t.dtype))
    return torch.cat([phase.cos(), phase.sin()], dim=1)
