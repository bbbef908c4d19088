"""Whether an exported graph computes what the network does."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ipfm.engine.commands.export.network import ExportedNetwork
from ipfm.engine.runtime.errors import Failed

LIMIT = 1e-4
BATCHES = (1, 3)


class ExportFailed(Failed):
    """The graph cannot be made, or does not compute what the network does; the message is one line."""


def largest_difference(network: ExportedNetwork, run: Callable[[Mapping[str, Tensor]], Tensor]) -> float:
    """The largest difference between what `run` makes of fresh latents and what the network makes of them.

    Differences are those of pixels in [-1, 1]; where an image goes beyond, relative to its largest value.

    Args:
        network: what was exported.
        run: the exported graph; it is called with batches of the sizes `BATCHES`, none of which it was traced with.

    Raises:
        ExportFailed: the difference is above `LIMIT` or not a number, or the shape is another.
    """
    worst = 0.0
    for seed, batch in enumerate(BATCHES, start=1):
        inputs = network.fresh(batch, seed)
        with torch.no_grad():
            expected, found = network.function(**inputs), run(inputs)
        if found.shape != expected.shape:
            raise ExportFailed(f"the exported graph makes {tuple(found.shape)} instead of {tuple(expected.shape)}")
        size = expected.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1.0)
        difference = float(((found - expected).abs() / size).max())
        if not difference <= LIMIT:
            raise ExportFailed(
                f"the exported graph differs from the network by {difference:.1e} at a batch of {batch}, more than "
                f"{LIMIT:.0e}; nothing was written"
            )
        worst = max(worst, difference)
    return worst
