"""Linear combinations of stored networks, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from ipfm.engine.commands.ema.stored import StoredAverage
from ipfm.engine.runtime.progress import ProgressBar
from ipfm.models import build_network


def combined(stored: Sequence[StoredAverage], coefficients: np.ndarray) -> list[dict[str, Tensor]]:
    """The sums Σ coefficient · parameter, and the buffers of the last one, by the names of the network's state dict.

    A tensor of one stored network is in memory at a time, beside the results. Sums are made in float64.

    Args:
        stored: networks of one architecture.
        coefficients: (results, stored).

    Returns:
        float32 state dicts, one a row.

    Raises:
        ValueError: a file is damaged, lacks a tensor, or a sum is not finite.
    """
    with torch.device("meta"):
        parameters = {name: p.shape for name, p in build_network(stored[0].network).named_parameters()}
    results: list[dict[str, Tensor]] = [{} for _ in coefficients]
    with ExitStack() as stack:
        files = [stack.enter_context(one.tensors()) for one in stored]
        names = files[-1][0]
        with ProgressBar("tensors", len(names), unit="") as bar:
            for name in names:
                if name in parameters:
                    shape = parameters[name]
                    sums = [torch.zeros(shape, dtype=torch.float64) for _ in coefficients]
                    for at, tensor in enumerate(_read(stored, files, name, shape)):
                        for total, row in zip(sums, coefficients, strict=True):
                            total.add_(tensor, alpha=float(row[at]))
                    for result, total in zip(results, sums, strict=True):
                        result[name] = total.float()
                        if not result[name].isfinite().all():
                            raise ValueError(f"{name} of the combination is not finite")
                else:
                    value = files[-1][1](name).float()
                    for result in results:
                        result[name] = value
                bar.advance()
    return results


def _read(
    stored: Sequence[StoredAverage],
    files: Sequence[tuple[tuple[str, ...], Callable[[str], Tensor]]],
    name: str,
    shape: torch.Size,
) -> Iterator[Tensor]:
    """The tensor of each stored network, in float64."""
    for one, (_, load) in zip(stored, files, strict=True):
        try:
            tensor = load(name)
        except KeyError:
            raise ValueError(f"{one.where} lacks tensor {name}") from None
        if tensor.shape != shape:
            raise ValueError(f"{one.where}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        yield tensor.double()
