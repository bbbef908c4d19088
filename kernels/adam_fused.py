"""AdamEMA's step by Triton kernels: a few launches for all parameters, however many tensors they are.

The kernels find the tensors through tables on the device. What a table holds changes rarely; it is sent again, without
waiting, when it did.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import triton.language as tl
from torch import Tensor

from ipfm.kernels._dense import is_dense, same_order
from ipfm.kernels._dispatch import adam_config, float64_bits, on_device
from ipfm.kernels.adam_kernels import measure_kernel, numbers_kernel, reduce_kernel, update_kernel

# Averages that the kernels have arguments for.
MOST_AVERAGES = 4
_COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


@dataclass(frozen=True)
class Group:
    """One parameter group in one step: its settings, and those of its tensors that have a gradient.

    `columns`: the weights, v, m (no tensors at beta1 = 0), then each average; tensors of a column in one order.
    """

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    rectified: bool
    gradients: list[Tensor]
    columns: list[list[Tensor]]

    @property
    def averages(self) -> int:
        return len(self.columns) - 3


def rho_inf(beta2: float) -> float:
    """The longest that the average v gets, in gradients, for Rectified Adam [Liu et al. 2020, algorithm 2]."""
    return 2 / (1 - beta2) - 1


@dataclass(frozen=True)
class _Batch:
    """What one launch takes: a stretch of the programs, all of one group, dtype and alignment."""

    group: int
    dtype: torch.dtype
    aligned: bool
    first_program: int
    programs: int


@dataclass
class _Plan:
    """Tables for tensors at certain addresses."""

    key: list[object]
    batches: list[_Batch]
    sources: list[tuple[int, int]]  # of each row: which gradient, and bytes before the row's first element
    width: int
    table: Tensor
    blocks: Tensor
    gradients: list[int] = field(default_factory=list)
    gradient_table: Tensor | None = None

    @property
    def programs(self) -> int:
        return sum(batch.programs for batch in self.batches)


class FusedAdam:
    """The tables of one optimiser, and its step."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None
        # Columns of the last step, of which no tensor needed a copy, and how weights and gradients lay.
        self._known: tuple[list[list[list[Tensor]]], list[object]] | None = None
        # A captured graph keeps reading what it was captured with.
        self._captured: list[Tensor] = []
        # Pinned memory for the addresses of gradients that a graph allocates: none can be pinned during a capture.
        self._spare: Tensor | None = None

    def step(
        self,
        groups: Sequence[Group],
        steps: Tensor,
        *,
        grad_scale: Tensor | None,
        clip_norm: float | None,
        ema_decay: Tensor | Sequence[float],
        sum_over_shards: Callable[[Tensor], object] | None,
        before_update: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Update weights, state and `steps`, t, of parameters on one device; arguments are valid.

        Args:
            groups: the parameter groups that have gradients.
            steps: 0-d float64 tensor, t, changed in place.
            grad_scale: as in `AdamEMA`.
            clip_norm: as in `AdamEMA`.
            ema_decay: a decay for each average, numbers or a float64 tensor on the parameters' device.
            sum_over_shards: as in `AdamEMA`.
            before_update: called with what is returned, before the weights are read.

        Returns:
            0-d bool tensor: whether the step was applied.
        """
        device = steps.device
        with on_device(device):
            copies: list[tuple[Tensor, Tensor]] = []
            layouts: list[object] = [_layouts(group) for group in groups]
            known = self._known is not None and layouts == self._known[1] and _same_columns(groups, self._known[0])
            if not known:
                given = groups
                groups = [_dense(group, copies) for group in groups]
                unchanged = all(map(_same_tensors, groups, given))
                self._known = ([group.columns for group in groups], layouts) if unchanged else None
            plan = self._planned(groups, device, known)
            assert plan.gradient_table is not None
            segment, block, warps = adam_config()
            scale = steps if grad_scale is None else grad_scale.to(device)
            scaled, limited = grad_scale is not None, clip_norm is not None

            # Measure: whether a square is not finite, and the norm, over all tensors.
            partials = torch.empty(max(2, plan.programs + plan.programs % 2), dtype=torch.float64, device=device)
            for batch in plan.batches:
                measure_kernel[(batch.programs,)](
                    plan.blocks, plan.table, plan.gradient_table, scale, partials, batch.first_program,
                    WIDTH=plan.width, SCALED=scaled, NORM=limited, COMPUTE=_COMPUTE[batch.dtype],
                    MAX=torch.finfo(batch.dtype).max, ALIGNED=batch.aligned, SEGMENT=segment, num_warps=warps,
                )  # fmt: skip
            found = torch.empty(2, dtype=torch.float64, device=device)
            largest = min((torch.finfo(batch.dtype).max for batch in plan.batches), default=0.0)
            reduce_kernel[(1,)](partials, found, plan.programs, MAX=largest, BLOCK=4096, num_warps=16)
            if sum_over_shards is not None:
                sum_over_shards(found)

            # Decide and update, a group at a time.
            applied = torch.empty((), dtype=torch.bool, device=device)
            numbers = torch.empty((len(groups), 4 + MOST_AVERAGES), dtype=torch.float64, device=device)
            for i, group in enumerate(groups):
                _launch_numbers(group, found, steps, applied, numbers[i], clip_norm, ema_decay, counts=i == 0)
            if before_update is not None:
                before_update(applied)
            for batch in plan.batches:
                group = groups[batch.group]
                update_kernel[(batch.programs,)](
                    plan.blocks, plan.table, plan.gradient_table, scale, numbers[batch.group], batch.first_program,
                    WIDTH=plan.width, SCALED=scaled, LIMITED=limited, BETA1=group.betas[0], BETA2=group.betas[1],
                    EPS=group.eps, WEIGHT_DECAY=group.weight_decay, RECTIFIED=group.rectified, AVERAGES=group.averages,
                    COMPUTE=_COMPUTE[batch.dtype], ALIGNED=batch.aligned, SEGMENT=segment, BLOCK=block,
                    num_warps=warps,
                )  # fmt: skip
            for tensor, copy in copies:
                tensor.copy_(copy)
            # Autograd must see that saved values changed: a kernel that wrote into a tensor does not tell it.
            torch.autograd.graph.increment_version([w for group in groups for w in group.columns[0]])
        return applied

    def _planned(self, groups: Sequence[Group], device: torch.device, known: bool) -> _Plan:
        """Tables for these tensors: those of the last step where they still hold; `known`: the columns are its."""
        gradients = [*map(Tensor.data_ptr, itertools.chain.from_iterable(group.gradients for group in groups))]
        columns = [column for group in groups for column in group.columns]
        places = [[*map(Tensor.data_ptr, column)] for column in columns]
        aligned = not functools.reduce(operator.or_, gradients, 0) % 16
        key: list[object] = [adam_config(), device, aligned or [address % 16 for address in gradients], places]
        if known and self._plan is not None and self._plan.key[:4] == key:
            # Of the very same tensors it is known.
            key.append(self._plan.key[4])
        else:
            key.append([[(w.numel(), w.dtype) for w in group.columns[0]] for group in groups])
        plan = self._plan
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if plan is None or plan.key != key:
            if capturing:
                raise RuntimeError("AdamEMA: a step can be captured only after one with the same parameters outside it")
            plan = self._built(groups, gradients, key, device)
        if plan.gradient_table is None or plan.gradients != gradients:
            addresses = [gradients[i] + before for i, before in plan.sources]
            table = self._sent(torch.tensor(addresses, dtype=torch.int64), device)
            plan = replace(plan, gradients=gradients, gradient_table=table)
        if capturing:
            # What is sent during a capture arrives with the first replay only: no step outside the graph may use it.
            assert plan.gradient_table is not None
            self._captured += [plan.table, plan.blocks, plan.gradient_table]
        else:
            self._plan = plan
            if device.type == "cuda" and (self._spare is None or len(self._spare) != len(plan.sources)):
                self._spare = torch.empty(len(plan.sources), dtype=torch.int64, pin_memory=True)
        return plan

    def _built(self, groups: Sequence[Group], gradients: list[int], key: list[object], device: torch.device) -> _Plan:
        """Tables with a row for each tensor, or two: its whole 16-byte vectors, and what is left of it."""
        width = 4 + max(group.averages for group in groups)
        rows: dict[tuple[int, torch.dtype, bool], list[tuple[int, int, list[int]]]] = {}
        number = 0
        for i, group in enumerate(groups):
            for k, w in enumerate(group.columns[0]):
                addresses = [column[k].data_ptr() if column else 0 for column in group.columns]
                aligned = all(address % 16 == 0 for address in (*addresses, gradients[number]))
                elements, size = w.numel(), w.element_size()
                wide = elements - elements % (16 // size) if aligned else 0
                for first, count in ((0, wide), (wide, elements - wide)):
                    if count:
                        row = [count, *(address + first * size for address in addresses)]
                        row += [0] * (width - len(row))
                        rows.setdefault((i, w.dtype, first < wide), []).append((number, first * size, row))
                number += 1
        everything = [row for part in rows.values() for row in part]
        segment = adam_config()[0]
        counts = torch.tensor([-(-row[0] // segment) for _, _, row in everything], dtype=torch.int64)
        of_row = torch.repeat_interleave(torch.arange(len(counts)), counts)
        within = torch.arange(len(of_row)) - (counts.cumsum(0) - counts)[of_row]
        batches = []
        programs = 0
        for (i, dtype, aligned), part in rows.items():
            more = sum(-(-row[0] // segment) for _, _, row in part)
            batches.append(_Batch(i, dtype, aligned, programs, more))
            programs += more
        return _Plan(
            key,
            batches,
            [(number, before) for number, before, _ in everything],
            width,
            self._sent(torch.tensor([row for _, _, row in everything], dtype=torch.int64), device),
            self._sent(torch.stack([of_row, within], dim=1).to(torch.int32), device),
        )

    def _sent(self, host: Tensor, device: torch.device) -> Tensor:
        """A copy on `device`; the host does not wait for it."""
        if device.type != "cuda":
            return host
        if torch.cuda.is_current_stream_capturing() and self._spare is not None and self._spare.shape == host.shape:
            host = self._spare.copy_(host)
            self._captured.append(host)
            self._spare = None
        else:
            host = host.pin_memory()
        return host.to(device, non_blocking=True)


def _launch_numbers(
    group: Group,
    found: Tensor,
    steps: Tensor,
    applied: Tensor,
    numbers: Tensor,
    clip_norm: float | None,
    ema_decay: Tensor | Sequence[float],
    *,
    counts: bool,
) -> None:
    """Numbers of the group's update; `counts`: and `applied` and `steps`, which all groups share."""
    lr, given = group.lr, isinstance(ema_decay, Tensor)
    decays = [0.0] * MOST_AVERAGES
    if not isinstance(ema_decay, Tensor):
        decays[: group.averages] = ema_decay[: group.averages]
    # Not of zero, nor of a denormal, which is zero where those are flushed.
    beta1, beta2 = (math.log(max(beta, sys.float_info.min)) for beta in group.betas)
    numbers_kernel[(1,)](
        found, steps, applied, numbers, lr if isinstance(lr, Tensor) else steps, ema_decay if given else steps,
        0 if isinstance(lr, Tensor) else float64_bits(lr), *map(float64_bits, decays),
        RATE_TENSOR=isinstance(lr, Tensor), DECAY_TENSOR=given, COUNTS=counts, LIMIT=clip_norm or 0.0,
        LOG_BETA1=beta1, LOG_BETA2=beta2, RHO=rho_inf(group.betas[1]) if group.rectified else 0.0,
        MOMENT=group.betas[0] > 0, AVERAGES=group.averages, MAX=torch.finfo(torch.float64).max, num_warps=1,
    )  # fmt: skip


def _layouts(group: Group) -> list[list[object]]:
    """What decides whether gradients lie as their weights do, in fewer questions than it takes to decide it."""
    dtypes: list[object] = [g.dtype for g in group.gradients]
    return [dtypes, [*map(Tensor.stride, group.gradients)], [*map(Tensor.stride, group.columns[0])]]


def _same_columns(groups: Sequence[Group], known: Sequence[list[list[Tensor]]]) -> bool:
    """Whether the groups' columns are these very tensors."""
    mine = [group.columns for group in groups]
    if [[*map(len, columns)] for columns in mine] != [[*map(len, columns)] for columns in known]:
        return False
    pairs = zip(itertools.chain(*mine), itertools.chain(*known), strict=True)
    return all(all(map(operator.is_, one, other)) for one, other in pairs)


def _same_tensors(group: Group, given: Group) -> bool:
    """Whether no tensor of the group is a copy."""
    pairs = zip([group.gradients, *group.columns], [given.gradients, *given.columns], strict=True)
    return all(all(map(operator.is_, mine, theirs)) for mine, theirs in pairs)


def _dense(group: Group, copies: list[tuple[Tensor, Tensor]]) -> Group:
    """The group with every tensor's elements side by side in memory, in the order of its weights'.

    Tensors that are not so are copied; of those that the step writes, (tensor, copy) goes to `copies`.
    """
    columns = [list(column) for column in group.columns]
    gradients = list(group.gradients)
    for k, w in enumerate(columns[0]):
        like = w.detach() if is_dense(w) else torch.empty_like(w)
        if not same_order(gradients[k], like):
            gradients[k] = torch.empty_like(like).copy_(gradients[k])
        for column in columns:
            if column and not same_order(column[k], like):
                copy = torch.empty_like(like).copy_(column[k])
                copies.append((column[k], copy))
                column[k] = copy
    return replace(group, gradients=gradients, columns=columns)
