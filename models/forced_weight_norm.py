"""Forced weight normalisation of EDM2 (Karras et al. 2024, section 2.3), in the form of plain weights.

The rule: a layer's stored weight, the master M, is used as W = n(M)/√K, where n divides each row of K elements by its
root mean square; and in training M is itself replaced by n(M) before each forward pass, so that a step of the optimiser
moves every row by a share of its size that the learning rate alone decides.

Here the forward pass knows nothing of it: `PlainWeight.weight` is W, an ordinary parameter. W is made once per step of
the optimiser, which keeps M, and the gradient with respect to W becomes that with respect to M once per step: it is
linear in it. State dicts, files and averages of the weights have M.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ipfm.kernels.weight_rows import EPS


def row_scale(master: Tensor) -> Tensor:
    """1e-4 + the root mean square of each row, (rows,); float64 for float64, else float32.

    Args:
        master: (rows, ...).
    """
    wide = _wide(master).flatten(1)
    return EPS + torch.linalg.vector_norm(wide, dim=1) / math.sqrt(wide.shape[1])


def normalised_rows(master: Tensor) -> Tensor:
    """n(M): each row divided by `row_scale`; float64 for float64, else float32.

    Args:
        master: (rows, ...).
    """
    return _wide(master) / _column(row_scale(master), master)


def plain_weight(master: Tensor) -> Tensor:
    """n(M)/√K, what a layer computes with; float64 for float64, else float32.

    Args:
        master: (rows, ...), K elements in each row.
    """
    return normalised_rows(master) / math.sqrt(master[0].numel())


class PlainWeight(nn.Module):
    """A layer under the rule, whose parameter `weight` is the plain weight W: the forward pass uses it as it is.

    A state dict holds the master M that W was made of, and loading one makes W. So files, checkpoints and copies by
    state dict have masters, and whoever computes with the parameter or differentiates has plain weights, and neither
    needs to know of the other. `row_scale` (rows,) keeps the scales of the rows of M, float32 or float64; it is no
    buffer, and in no state dict.

    While the layer is trained its masters are the optimiser's, which writes the parameter alone: a state dict of the
    module then has rows of their directions, of which the same W is made, and not of their sizes. The masters are what
    `TrainedNetwork.full` and the files of a run have.

    Args:
        shape: of the weight, (rows, ...); M starts as standard normal numbers.
    """

    by_pixel: bool = False
    """Whether the weight is stored so, see `weight_order`; its rows are the same."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        master = torch.empty(shape)
        # The meta device has no values.
        if not master.is_meta:
            master.normal_()
        self.weight = nn.Parameter(master)
        self.row_scale = torch.ones(shape[0])
        if not master.is_meta:
            self.set_master(master)

    @torch.no_grad()
    def set_master(self, master: Tensor) -> None:
        """Make the plain weight of this master, in place.

        Args:
            master: of the weight's shape, of any floating dtype.
        """
        self.row_scale = row_scale(master).to(self.weight.device)
        self.weight.copy_(plain_weight(master))

    @torch.no_grad()
    def take_master(self, master: Tensor) -> None:
        """Make the plain weight of this master in its memory, which becomes the parameter's: nothing else is allocated.

        Args:
            master: of the weight's shape, float32 or float64, of nobody else.
        """
        self.row_scale = row_scale(master)
        columns = _column(self.row_scale, master)
        self.weight = nn.Parameter(master.div_(columns).div_(math.sqrt(master[0].numel())))

    def master(self) -> Tensor:
        """The master that the plain weight was made of, of its shape and dtype, but for rounding."""
        scale = self.row_scale * math.sqrt(self.weight[0].numel())
        return (self.weight * _column(scale, self.weight)).to(self.weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PlainWeight":
        super()._apply(fn, recurse)
        moved = fn(self.row_scale)
        # A cast to 16 bits is for what is computed with.
        self.row_scale = moved if moved.dtype.itemsize >= 4 else self.row_scale.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Of a weight that is sharded over processes there is nothing here.
        if len(self.weight) == len(self.row_scale):
            master = self.master()
            destination[prefix + "weight"] = master if keep_vars else master.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(prefix + "weight")
        if isinstance(given, Tensor) and given.shape == self.weight.shape and given.is_floating_point():
            with torch.no_grad():
                state_dict = {**state_dict, prefix + "weight": plain_weight(given)}
                scale = row_scale(given)
            self.row_scale = scale if self.weight.is_meta else scale.to(self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def under_the_rule(module: nn.Module, *, logvar: bool = False) -> tuple[str, ...]:
    """Names of the parameters that the rule concerns, in order: those of all layers that the forward pass calls.

    Args:
        module: a network; one of another architecture has none.
        logvar: the forward pass is asked for the log-variance too.
    """
    return tuple(f"{name}.weight" for name, _ in _layers(module) if logvar or not _is_logvar(name))


def masters(module: nn.Module) -> dict[str, Tensor]:
    """The masters of all layers by the names of their parameters, the log-variance's too; new tensors.

    Args:
        module: a network with plain weights, none of them sharded.
    """
    return {f"{name}.weight": layer.master().detach() for name, layer in _layers(module)}


def _layers(module: nn.Module) -> Iterator[tuple[str, PlainWeight]]:
    # A layer with factors on another one's weight has no master.
    return (
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, PlainWeight) and "weight" in layer._parameters
    )


def _is_logvar(name: str) -> bool:
    return name.rpartition(".")[2] == "logvar_linear"


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
