"""Forced weight normalisation in an optimiser: which rows of weights lie where in its tensors, and the rule on them.

A layer computes with plain weights w = n(M') / √K; the optimiser holds the masters M, M' = n(M) in a step, with

    n(M) = M / (eps + ‖M‖ / √K)    a row at a time, of K elements.

Between the steps masters stay as the optimiser left them: averages, checkpoints and evaluations see those. A step first
replaces them by M', takes the gradient of w for that of M', moves M', and writes the plain weights of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ipfm.kernels._dense import is_dense

# Of the norm, as EDM2 has it.
EPS = 1e-4


@dataclass(frozen=True)
class RowBlock:
    """Rows that follow each other in an optimiser's tensor, or the part of a row that a shard has.

    Attributes:
        start: of the first one, in elements as they lie in memory.
        rows: how many.
        length: elements of each that are here.
        columns: elements of a row, K.
        cut: number of the row among all that shards cut; None where it is whole.
        used: the forward pass uses it. What it does not use keeps its master: w = n(M) / √K.
    """

    start: int
    rows: int
    length: int
    columns: int
    cut: int | None = None
    used: bool = True

    @property
    def end(self) -> int:
        """Where it ends, in elements as they lie in memory."""
        return self.start + self.rows * self.length


@dataclass(frozen=True)
class WeightRows:
    """The weights under the rule in one of an optimiser's tensors.

    Attributes:
        blocks: where they lie, in ascending order.
        plain: the plain weights, which a step writes, in any dtype: of the tensor's shape, or flat where that is. What
            lies in no block is copied there as it is.
    """

    blocks: tuple[RowBlock, ...]
    plain: Tensor

    @classmethod
    def whole(cls, master: Tensor, plain: Tensor, *, used: bool = True) -> WeightRows:
        """Those of a tensor that is a weight.

        Args:
            master: (rows, ...), each row without gaps in memory.
            plain: of the same shape.
            used: as in `RowBlock`.

        Raises:
            ValueError: the rows lie otherwise, or plain has another shape.
        """
        if master.ndim < 2 or plain.shape != master.shape:
            raise ValueError(
                f"weight rows: master and plain must have one shape of 2 dimensions or more; got {tuple(master.shape)} "
                f"and {tuple(plain.shape)}"
            )
        rows, columns = master.shape[0], master[0].numel()
        if not is_dense(master) or (rows > 1 and master.stride(0) != columns):
            raise ValueError(f"weight rows: rows must lie in memory without gaps; got strides {master.stride()}")
        return cls((RowBlock(0, rows, columns, columns, used=used),), plain)


def row_blocks(
    start: int, first: int, count: int, columns: int, cut: Callable[[int], int], *, used: bool = True
) -> list[RowBlock]:
    """The blocks of a stretch of a weight: whole rows, and the cut ones before and after them.

    Args:
        start: where the stretch lies in the optimiser's tensor.
        first: its first element within the weight.
        count: its elements.
        columns: of a row.
        cut: the number of a row that is cut, by its index in the weight.
        used: as in `RowBlock`.
    """
    blocks = []
    while count:
        row, skipped = divmod(first, columns)
        rows = count // columns if skipped == 0 else 0
        length = columns if rows else min(columns - skipped, count)
        block = RowBlock(start, max(1, rows), length, columns, None if rows else cut(row), used)
        blocks.append(block)
        taken = block.end - start
        start, first, count = start + taken, first + taken, count - taken
    return blocks


def gradients_of_masters(
    masters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rows: Sequence[WeightRows],
    cuts: int,
    sum_over_shards: Callable[[Tensor], object] | None,
) -> list[tuple[Tensor, Tensor]]:
    """Turn gradients of plain weights into those of M' = n(M), in place: what the rule in the forward pass gives.

    With s' = eps + ‖M'‖ / √K, for each row: G <- (G − M' (M'·G) / (‖M'‖ √K s')) / (√K s').

    Args:
        masters: M, float32 or float64; nothing is written.
        gradients: of their plain weights, in their dtype and order.
        rows: of each.
        cuts: rows that are cut, over all shards.
        sum_over_shards: sums a tensor over the shards, in place.

    Returns:
        For each block that is used (M, s), M as (rows, length) and s as (rows, 1): M' is M / s.
    """
    views = [
        (block, _view(m, block), _view(g, block))
        for m, g, own in zip(masters, gradients, rows, strict=True)
        for block in own.blocks
        if block.used
    ]
    sums = [torch.stack([_square(m), (m * g).sum(1)], dim=1) for _, m, g in views]
    _complete([block for block, _, _ in views], sums, cuts, sum_over_shards, width=2, like=masters[0])
    found = []
    for (block, m, g), both in zip(views, sums, strict=True):
        size = (both[:, :1] / block.columns).sqrt()
        s = EPS + size
        again = EPS + size / s
        # M' (M'·G) / (‖M'‖ √K s'), with M' = M / s and ‖M'‖ = √K size / s.
        share = both[:, 1:] / (size * s * again * block.columns)
        g.addcmul_(m, torch.where(size > 0, share, torch.zeros_like(share)), value=-1)
        g.div_(again * block.columns**0.5)
        found.append((m, s))
    return found


def write_plain(
    rows: Mapping[Tensor, WeightRows], cuts: int, sum_over_shards: Callable[[Tensor], object] | None
) -> None:
    """Write the plain weights of what the masters are now, n(M') / √K with M' = n(M), once rounded.

    Args:
        rows: of each of an optimiser's tensors.
        cuts: rows that are cut, over all shards.
        sum_over_shards: sums a tensor over the shards, in place.
    """
    views = [(block, _view(m, block)) for m, own in rows.items() for block in own.blocks]
    sums = [_square(m)[:, None] for _, m in views]
    _complete([block for block, _ in views], sums, cuts, sum_over_shards, width=1, like=next(iter(rows)))
    scales = iter([_plain_scale(square, block) for (block, _), square in zip(views, sums, strict=True)])
    for m, own in rows.items():
        if own.plain.ndim != 1:
            (block,) = own.blocks
            own.plain.copy_((_view(m, block) * next(scales)).as_strided(m.shape, m.stride()))
            continue
        end = 0
        for block in own.blocks:
            own.plain[end : block.start].copy_(m[end : block.start])
            end = block.end
            _view(own.plain, block).copy_(_view(m, block) * next(scales))
        own.plain[end:].copy_(m[end:])


def _plain_scale(square: Tensor, block: RowBlock) -> Tensor:
    """What brings rows of M to their plain weights, from the sums of their squares."""
    size = (square / block.columns).sqrt()
    s = EPS + size
    if block.used:
        s = s * (EPS + size / s)
    return 1 / (s * block.columns**0.5)


def _complete(
    blocks: Sequence[RowBlock],
    sums: list[Tensor],
    cuts: int,
    sum_over_shards: Callable[[Tensor], object] | None,
    *,
    width: int,
    like: Tensor,
) -> None:
    """Make sums over parts of rows, (rows, n), those over the rows; no others travel."""
    if not cuts or sum_over_shards is None:
        return
    everywhere = like.new_zeros(cuts, width)
    for block, own in zip(blocks, sums, strict=True):
        if block.cut is not None:
            everywhere[block.cut] += own[0]
    sum_over_shards(everywhere)
    for i, block in enumerate(blocks):
        if block.cut is not None:
            sums[i] = everywhere[block.cut][None]


def _view(t: Tensor, block: RowBlock) -> Tensor:
    """The block of a tensor without gaps, as (rows, length)."""
    return t.as_strided((block.rows, block.length), (block.length, 1), t.storage_offset() + block.start)


def _square(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).square()
