"""Small operations on networks that a run needs before it trains them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from ipfm.models import EDMPrecond


def with_dropout(net: EDMPrecond, dropout: float) -> EDMPrecond:
    """A trainable copy of `net` with another dropout probability."""
    twin = EDMPrecond(replace(net.config, dropout=dropout))
    twin.load_state_dict(net.state_dict())
    return twin.to(next(net.parameters()).device).requires_grad_(True)


def fingerprint(net: EDMPrecond) -> str:
    """SHA-256 of the weights and buffers: tells two teachers apart wherever their files lie."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
