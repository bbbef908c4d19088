"""Forced weight normalisation of a network in training (EDM2), at every ZeRO stage.

The network's parameters are plain weights at any time, ordinary tensors in its dtype. Its optimiser has the masters in
float32 and writes the plain weights itself, see `AdamEMA.normalise_rows`. Under ZeRO they go from there to the other
processes as DeepSpeed sends any weights: its copy of the masters, which would follow, is handed the plain weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipfm.engine.distributed.single_process import lend_gradients
from ipfm.engine.distributed.world import World
from ipfm.kernels import AdamEMA
from ipfm.kernels.weight_rows import RowBlock, WeightRows, row_blocks
from ipfm.models.forced_weight_norm import masters, under_the_rule


class NormalisedWeights:
    """The weights of a network that are under the rule; of most networks there are none.

    Its parameters become masters here, for its optimiser and engine to be made of, and plain weights by `begin`.

    Args:
        module: the network, none of whose parameters are sharded.
        logvar: the forward passes that are trained give the log-variance too.
    """

    def __init__(self, module: nn.Module, *, logvar: bool) -> None:
        named, used = dict(module.named_parameters()), under_the_rule(module, logvar=logvar)
        self.used: dict[nn.Parameter, bool] = {}
        """The parameters that have masters, and whether the forward pass uses them."""
        with torch.no_grad():
            for name, master in masters(module).items():
                named[name].copy_(master)
                self.used[named[name]] = name in used
        self._optimizer: AdamEMA | None = None
        self._zero: Any = None
        self._shown: list[Tensor] = []
        self._masters = self._plain = torch.empty(0)
        self._lent_freely = False

    def begin(
        self, stage: int, engine: Any, optimizer: AdamEMA, masters: Mapping[nn.Parameter, Tensor], world: World
    ) -> None:
        """Have the optimiser keep the masters, and the network its plain weights, from now on.

        Args:
            stage: ZeRO's.
            engine: the network's; its parameters and the optimiser's are masters yet.
            optimizer: its state exists.
            masters: at stage 0, of each parameter that is under the rule, the optimiser's tensor.
            world: the run's processes.
        """
        self._optimizer = optimizer
        if stage == 0:
            own = {p: masters[p] for p in self.used}
            if world.size > 1:
                self._lend(optimizer, own)
            optimizer.normalise_rows({own[p]: WeightRows.whole(own[p], p, used=self.used[p]) for p in own})
        else:
            self._zero = engine.optimizer
            self._keep_shard(stage, optimizer, world)
            optimizer.register_step_post_hook(self._show_plain)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the network's plain weights of the masters as they are; every process calls it."""
        assert self._optimizer is not None
        self._optimizer.write_plain()
        if self._zero is None:
            return
        if hasattr(self._zero, "update_lp_params"):
            with self.stepping():
                self._show_plain()
                self._zero.update_lp_params()
        elif whole := self._zero.persistent_parameters:
            whole[0].all_gather(whole)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around a step of DeepSpeed's optimiser: afterwards it has the masters again."""
        try:
            yield
        finally:
            if self._shown:
                self._shown[0] = self._masters
                self._shown = []

    def _show_plain(self, *_: Any) -> None:
        """Let DeepSpeed see the plain weights where it looks for masters to copy, after the optimiser's step."""
        if not self._lent_freely:
            # It would free the gradient of what it finds there.
            self._masters.grad = None
        self._shown = self._flats
        self._shown[0] = self._plain

    @property
    def _flats(self) -> list[Tensor]:
        """DeepSpeed's list of flat masters, of which there is one."""
        z3 = hasattr(self._zero, "fp32_partitioned_groups_flat")
        flats: list[Tensor] = (
            self._zero.fp32_partitioned_groups_flat if z3 else self._zero.single_partition_of_fp32_groups
        )
        assert len(flats) == 1
        return flats

    def _keep_shard(self, stage: int, optimizer: AdamEMA, world: World) -> None:
        """Tell the optimiser what of which weights is in this process's flat masters."""
        zero, (self._masters,) = self._zero, self._flats
        if stage == 3:
            self._plain = zero.fp16_partitioned_groups_flat[0]
            self._lent_freely = bool(zero.offload_optimizer)
            if self._plain.data_ptr() == self._masters.data_ptr():
                # One memory for both, where dtype and device are the same.
                self._masters.data = self._masters.data.clone()
            pieces = _parts(zero.fp16_groups[0], world)
        else:
            self._lent_freely = bool(zero.cpu_offload)
            if self._lent_freely:
                self._plain = zero.param_buffer_of_bit16_for_cpu_offload_groups[0]
            else:
                self._plain = zero.parallel_partitioned_bit16_groups[0][world.rank]
            offsets = zero.round_robin_bit16_offsets[0]
            pieces = _stretches(zero.round_robin_bit16_groups[0], offsets, zero.partition_size[0], world)
        cut: dict[tuple[int, int], int] = {}
        blocks: list[RowBlock] = []
        for i, piece in enumerate(pieces):
            if piece.parameter not in self.used:
                continue
            columns = piece.shape[1:].numel()
            for row in sorted({at // columns for at in piece.boundaries if at % columns}):
                cut[i, row] = len(cut)
            number, used = partial(_number, cut, i), self.used[piece.parameter]
            blocks += row_blocks(piece.start, piece.first, piece.elements, columns, number, used=used)
        rows = WeightRows(tuple(blocks), self._plain)
        optimizer.normalise_rows({self._masters: rows}, cut_rows=len(cut))

    @staticmethod
    def _lend(optimizer: AdamEMA, own: Mapping[nn.Parameter, Tensor]) -> None:
        """Make masters of their parameters, whose gradients they have for as long as a step lasts."""

        def take_back(*_: Any) -> None:
            for master in own.values():
                master.grad = None

        with torch.no_grad():
            for p, master in own.items():
                # As the engine has sent them from the first process.
                master.copy_(p)
        optimizer.register_step_pre_hook(lambda *_: lend_gradients(own))
        optimizer.register_step_post_hook(take_back)


def _number(cut: Mapping[tuple[int, int], int], parameter: int, row: int) -> int:
    return cut[parameter, row]


class _Piece(NamedTuple):
    """What a process has of a parameter."""

    parameter: nn.Parameter
    shape: torch.Size
    """Whole."""
    start: int
    """Where it lies in the process's flat tensor."""
    first: int
    """Its first element within the parameter."""
    elements: int
    boundaries: tuple[int, ...]
    """Where within the parameter another process's elements begin."""


def _stretches(parameters: Sequence[Any], offsets: Sequence[int], size: int, world: World) -> list[_Piece]:
    """Stages 1 and 2: of all parameters in one line each process has a stretch of `size` elements."""
    begin = world.rank * size
    pieces = []
    for p, offset in zip(parameters, offsets, strict=True):
        first = min(max(begin - offset, 0), p.numel())
        count = max(0, min(begin + size - offset, p.numel()) - first)
        inside = [rank * size - offset for rank in range(1, world.size) if 0 < rank * size - offset < p.numel()]
        pieces.append(_Piece(p, p.shape, max(offset - begin, 0), first, count, tuple(inside)))
    return pieces


def _parts(parameters: Sequence[Any], world: World) -> list[_Piece]:
    """Stage 3: each process has a part of every parameter, one after the other."""
    pieces = []
    start = 0
    for p in parameters:
        size, whole = p.partition_numel(), p.ds_numel
        first = min(world.rank * size, whole)
        inside = [rank * size for rank in range(1, world.size) if rank * size < whole]
        pieces.append(_Piece(p, p.ds_shape, start, first, min(size, whole - first), tuple(inside)))
        start += size
    return pieces
