"""What autograd keeps for a backward pass, and small networks of each architecture to look at it in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from random_values import randomise
from torch import Tensor

from ipfm.models import EDMPrecond

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ddpmpp": {},
    "ncsnpp": {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": (1, 3, 3, 1)},
    "skips": {"encoder_type": "skip", "decoder_type": "skip", "resample_filter": (1, 3, 3, 1)},
    "adm": {"model_type": "DhariwalUNet", "model_channels": 64},
}


@contextmanager
def keeping(*own: Tensor) -> Iterator[list[Tensor]]:
    """One tensor for each storage that autograd saves meanwhile, but for those of `own`; filled in at the end."""
    kept: dict[int, Tensor] = {}
    known = {tensor.untyped_storage()._cdata for tensor in own}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    found.extend(kept.values())


def kept_bytes(run: Callable[[], object], *own: Tensor) -> int:
    """Bytes of the storages that autograd saves while `run` runs, but for those of `own`."""
    with keeping(*own) as kept:
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def build(**changes: Any) -> EDMPrecond:
    """A network for 8×8 images of 2 channels with attention, 3 classes and random values everywhere."""
    shape = {"img_resolution": 8, "img_channels": 2, "model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
    labels = {"label_dim": 3, "augment_dim": 4}
    net = EDMPrecond(**{**shape, **labels, "attn_resolutions": (4,), "dropout": 0.0, **changes})
    randomise(net)
    return net
