"""Forced weight normalisation by Triton kernels: the rule on all of an optimiser's rows in a few launches.

The kernels find rows through tables on the device, as those of AdamEMA's step find tensors. Each program has a row,
which it walks twice: once for its sums, and again, mostly from cache, for what they decide. Of a row that shards cut a
program makes its part of the sums, and another one, after they were added up, does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipfm.kernels._dense import is_dense
from ipfm.kernels._dispatch import on_device
from ipfm.kernels.weight_rows import EPS, RowBlock, WeightRows

# Columns of p_table: addresses of masters and plain weights, elements of a row here and in all, whether the forward
# pass uses it, and the index of the block's first row.
MASTER, PLAIN, LENGTH, COLUMNS, USED, FIRST = (tl.constexpr(i) for i in range(6))
WIDTH = tl.constexpr(6)
# Elements at a time, and warps: one access of 128 bits a thread for a float32 row.
BLOCK, WARPS = 512, 4
_TYPES = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16
}  # fmt: skip
# Elements outside of all rows, such as gains, that are copied by their indices, in one go.
_FEW = 2**20

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _row(p_programs, p_table):
    """(block, its entries in the table, row within it) of this program."""
    p = p_programs + 2 * tl.program_id(0).to(tl.int64)
    block = tl.load(p, eviction_policy="evict_last").to(tl.int64)
    row = tl.load(p + 1, eviction_policy="evict_last").to(tl.int64)
    return block, p_table + block * WIDTH, row


@triton.jit
def _begin(p_address, row, length, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the first element of a row; with ALIGNED, 16 bytes or four elements divide where it lies."""
    p = tl.load(p_address, eviction_policy="evict_last").to(tl.pointer_type(TYPE)) + row * length
    if ALIGNED:
        p = tl.multiple_of(p, 16 if TYPE.primitive_bitwidth >= 32 else 8)
    return p


@triton.jit
def _length(p_entries, ALIGNED: tl.constexpr):
    length = tl.load(p_entries + LENGTH, eviction_policy="evict_last").to(tl.int32)
    if ALIGNED:
        length = tl.multiple_of(length, 4)
    return length


@triton.jit
def _scale(square, columns, EPS: tl.constexpr, COMPUTE: tl.constexpr):
    """(‖M‖ / √K, s = eps + that, s' = eps + that of M / s)."""
    mean = square / columns
    size = tl.sqrt(mean) if COMPUTE.primitive_bitwidth == 64 else tl.sqrt_rn(mean)
    s = size + tl.full((), EPS, COMPUTE)
    return size, s, size / s + tl.full((), EPS, COMPUTE)


@triton.jit
def row_gradients_kernel(
    p_programs, p_table, p_grads, p_sums, p_scales,
    SUMS: tl.constexpr, APPLY: tl.constexpr, EPS: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = row: Σ M² and Σ M G, then G <- (G − M' (M'·G) / (‖M'‖ √K s')) / (√K s') and s.

    p_sums (rows, 2): where only one of SUMS and APPLY is done, it has the sums in between.
    """
    block, p_entries, row = _row(p_programs, p_table)
    length = _length(p_entries, ALIGNED)
    p_m = _begin(p_entries + MASTER, row, length, COMPUTE, ALIGNED)
    p_g = _begin(p_grads + block, row, length, COMPUTE, ALIGNED)
    index = tl.load(p_entries + FIRST, eviction_policy="evict_last") + row
    if SUMS:
        b_square = tl.zeros((BLOCK,), COMPUTE)
        b_inner = tl.zeros((BLOCK,), COMPUTE)
        for start in range(0, length, BLOCK):
            o = start + tl.arange(0, BLOCK)
            b_m = tl.load(p_m + o, mask=o < length, other=0.0)
            b_g = tl.load(p_g + o, mask=o < length, other=0.0)
            b_square += b_m * b_m
            b_inner += b_m * b_g
        square, inner = tl.sum(b_square, axis=0), tl.sum(b_inner, axis=0)
        if not APPLY:
            tl.store(p_sums + 2 * index, square)
            tl.store(p_sums + 2 * index + 1, inner)
    else:
        square = tl.load(p_sums + 2 * index, eviction_policy="evict_last")
        inner = tl.load(p_sums + 2 * index + 1, eviction_policy="evict_last")
    if APPLY:
        columns = tl.load(p_entries + COLUMNS, eviction_policy="evict_last").to(COMPUTE)
        size, s, again = _scale(square, columns, EPS, COMPUTE)
        # A row of zeros has no direction; NaN stays, for the step to be void.
        share = tl.where(size == 0.0, 0.0, inner / (size * s * again * columns))
        factor = 1.0 / (again * tl.sqrt(columns))
        for start in range(0, length, BLOCK):
            o = start + tl.arange(0, BLOCK)
            b_m = tl.load(p_m + o, mask=o < length, other=0.0)
            b_g = tl.load(p_g + o, mask=o < length, other=0.0)
            tl.store(p_g + o, (b_g - b_m * share) * factor, mask=o < length)
        tl.store(p_scales + index, s)


@triton.jit
def row_masters_kernel(
    p_programs, p_table, p_scales, p_applied, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Program = row: M <- M / s, unless the step is void."""
    _, p_entries, row = _row(p_programs, p_table)
    length = _length(p_entries, ALIGNED)
    p_m = _begin(p_entries + MASTER, row, length, COMPUTE, ALIGNED)
    s = tl.load(p_scales + tl.load(p_entries + FIRST, eviction_policy="evict_last") + row, eviction_policy="evict_last")
    length = tl.where(tl.load(p_applied, eviction_policy="evict_last") != 0, length, 0)
    if ALIGNED:
        length = tl.multiple_of(length, 4)
    for start in range(0, length, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_m = tl.load(p_m + o, mask=o < length, other=0.0)
        b_m = b_m / s if COMPUTE.primitive_bitwidth == 64 else tl.div_rn(b_m, tl.broadcast_to(s, (BLOCK,)))
        tl.store(p_m + o, b_m, mask=o < length)


@triton.jit
def row_plain_kernel(
    p_programs, p_table, p_sums,
    SUMS: tl.constexpr, APPLY: tl.constexpr, EPS: tl.constexpr, COMPUTE: tl.constexpr, OUT: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = row: Σ M², then w = n(n(M)) / √K, or n(M) / √K where the forward pass does not use it."""
    _, p_entries, row = _row(p_programs, p_table)
    length = _length(p_entries, ALIGNED)
    p_m = _begin(p_entries + MASTER, row, length, COMPUTE, ALIGNED)
    index = tl.load(p_entries + FIRST, eviction_policy="evict_last") + row
    if SUMS:
        b_square = tl.zeros((BLOCK,), COMPUTE)
        for start in range(0, length, BLOCK):
            o = start + tl.arange(0, BLOCK)
            b_m = tl.load(p_m + o, mask=o < length, other=0.0)
            b_square += b_m * b_m
        square = tl.sum(b_square, axis=0)
        if not APPLY:
            tl.store(p_sums + 2 * index, square)
    else:
        square = tl.load(p_sums + 2 * index, eviction_policy="evict_last")
    if APPLY:
        columns = tl.load(p_entries + COLUMNS, eviction_policy="evict_last").to(COMPUTE)
        _, s, again = _scale(square, columns, EPS, COMPUTE)
        used = tl.load(p_entries + USED, eviction_policy="evict_last") != 0
        factor = 1.0 / (tl.where(used, s * again, s) * tl.sqrt(columns))
        p_w = _begin(p_entries + PLAIN, row, length, OUT, ALIGNED)
        for start in range(0, length, BLOCK):
            o = start + tl.arange(0, BLOCK)
            b_m = tl.load(p_m + o, mask=o < length, other=0.0)
            tl.store(p_w + o, (b_m * factor).to(OUT), mask=o < length)


# -------------------------------------------------------------------------------------------------------- launchers


@dataclass
class _Tables:
    """Where the rows of some tensors lie."""

    key: list[object]
    table: Tensor
    # Programs of (block, row) by whether the rows are cut and aligned, and of those that the forward pass uses.
    all_rows: dict[tuple[bool, bool], Tensor]
    used_rows: dict[tuple[bool, bool], Tensor]
    owners: list[tuple[int, int]]  # of each block: which tensor, and bytes before it
    sums: Tensor
    scales: Tensor
    cut_rows: Tensor
    cut_numbers: Tensor
    gaps: list[tuple[Tensor, Tensor, Tensor]]  # (plain, masters, indices)
    gradients: list[int] = field(default_factory=list)
    gradient_table: Tensor | None = None


class FusedRows:
    """The rule on an optimiser's tensors, see `WeightRows`; what `weight_rows` does by PyTorch's operations.

    Args:
        rows: of each tensor.
        cuts: rows that are cut, over all shards.
    """

    def __init__(self, rows: Mapping[Tensor, WeightRows], cuts: int) -> None:
        self._rows, self._cuts = rows, cuts
        self._tables: _Tables | None = None

    def gradients_of_masters(
        self, gradients: Mapping[Tensor, Tensor], sum_over_shards: Callable[[Tensor], object] | None
    ) -> None:
        """Turn gradients of plain weights into those of M' = n(M), in place; then `normalise` the masters.

        Args:
            gradients: of each tensor, dense and in its order.
            sum_over_shards: as in `AdamEMA`.
        """
        tables = self._planned()
        addresses = [gradients[m].data_ptr() if m in gradients else 0 for m in self._rows]
        if tables.gradient_table is None or tables.gradients != addresses:
            of_blocks = [addresses[i] + before if addresses[i] else 0 for i, before in tables.owners]
            tables.gradient_table = _sent(torch.tensor(of_blocks, dtype=torch.int64), tables.table.device)
            tables.gradients = addresses
        grads, compute = tables.gradient_table, _TYPES[tables.sums.dtype]

        def launch(programs: Tensor, aligned: bool, sums: bool, apply: bool) -> None:
            row_gradients_kernel[(len(programs),)](
                programs, tables.table, grads, tables.sums, tables.scales,
                SUMS=sums, APPLY=apply, EPS=EPS, COMPUTE=compute, ALIGNED=aligned, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip

        self._run(tables, tables.used_rows, launch, sum_over_shards)

    def normalise(self, applied: Tensor) -> None:
        """M <- n(M) where `applied`, 0-d bool, is true."""
        tables = self._planned()
        with on_device(tables.table.device):
            for (_, aligned), programs in tables.used_rows.items():
                row_masters_kernel[(len(programs),)](
                    programs, tables.table, tables.scales, applied, COMPUTE=_TYPES[tables.sums.dtype],
                    ALIGNED=aligned, BLOCK=BLOCK, num_warps=WARPS,
                )  # fmt: skip

    def write_plain(self, sum_over_shards: Callable[[Tensor], object] | None) -> None:
        """As `weight_rows.write_plain`."""
        tables = self._planned()
        out = _TYPES[next(iter(self._rows.values())).plain.dtype]

        def launch(programs: Tensor, aligned: bool, sums: bool, apply: bool) -> None:
            row_plain_kernel[(len(programs),)](
                programs, tables.table, tables.sums, SUMS=sums, APPLY=apply, EPS=EPS,
                COMPUTE=_TYPES[tables.sums.dtype], OUT=out, ALIGNED=aligned, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip

        self._run(tables, tables.all_rows, launch, sum_over_shards)
        for plain, masters, indices in tables.gaps:
            plain[indices] = masters[indices].to(plain.dtype)
        # Autograd must see that saved values changed: a kernel that wrote into a tensor does not tell it.
        torch.autograd.graph.increment_version([own.plain for own in self._rows.values()])

    def _run(
        self,
        tables: _Tables,
        rows: Mapping[tuple[bool, bool], Tensor],
        launch: Callable[[Tensor, bool, bool, bool], None],
        sum_over_shards: Callable[[Tensor], object] | None,
    ) -> None:
        """Launch on whole rows, and twice on cut ones, between which their sums are added up."""
        alone = not self._cuts or sum_over_shards is None
        with on_device(tables.table.device):
            for (cut, aligned), programs in rows.items():
                launch(programs, aligned, True, alone or not cut)
        if alone or sum_over_shards is None:
            return
        everywhere = tables.sums.new_zeros(self._cuts, 2)
        everywhere.index_add_(0, tables.cut_numbers, tables.sums[tables.cut_rows])
        sum_over_shards(everywhere)
        tables.sums[tables.cut_rows] = everywhere[tables.cut_numbers]
        with on_device(tables.table.device):
            for (cut, aligned), programs in rows.items():
                if cut:
                    launch(programs, aligned, False, True)

    def _planned(self) -> _Tables:
        """Tables for where the tensors lie now."""
        key: list[object] = []
        for m, own in self._rows.items():
            key += [m.data_ptr(), own.plain.data_ptr()]
        if self._tables is None or self._tables.key != key:
            device = next(iter(self._rows)).device
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("AdamEMA: a step can be captured only after one with the same parameters outside it")
            self._tables = _tables(self._rows, key)
        return self._tables


def fits(rows: Mapping[Tensor, WeightRows]) -> bool:
    """Whether the kernels take these: one dtype each of masters and plain weights, which lie in one order."""
    dtypes = {(m.dtype, own.plain.dtype) for m, own in rows.items()}
    return len(dtypes) == 1 and all(
        own.plain.device == m.device and own.plain.stride() == m.stride() and is_dense(own.plain)
        for m, own in rows.items()
    )


def _tables(rows: Mapping[Tensor, WeightRows], key: list[object]) -> _Tables:
    entries: list[list[int]] = []
    owners: list[tuple[int, int]] = []
    cut_rows: list[int] = []
    cut_numbers: list[int] = []
    programs: dict[tuple[bool, bool, bool], list[Tensor]] = {}
    gaps: list[tuple[Tensor, Tensor, Tensor]] = []
    count = 0
    for i, (m, own) in enumerate(rows.items()):
        size, out = m.element_size(), own.plain.element_size()
        for block in own.blocks:
            master, plain = m.data_ptr() + block.start * size, own.plain.data_ptr() + block.start * out
            aligned = master % 16 == 0 and plain % min(16, 4 * out) == 0 and block.length % 4 == 0
            kind = (block.cut is not None, aligned, block.used)
            of_rows = torch.stack([torch.full((block.rows,), len(entries)), torch.arange(block.rows)], dim=1)
            programs.setdefault(kind, []).append(of_rows)
            if block.cut is not None:
                cut_rows.append(count)
                cut_numbers.append(block.cut)
            entries.append([master, plain, block.length, block.columns, int(block.used), count])
            owners.append((i, block.start * size))
            count += block.rows
        gaps += [(own.plain, m.detach(), part.to(m.device)) for part in _outside(own.blocks, m.numel())]
    device, dtype = next(iter(rows)).device, next(iter(rows)).dtype

    def sent(kinds: list[tuple[bool, bool, bool]]) -> dict[tuple[bool, bool], Tensor]:
        found: dict[tuple[bool, bool], list[Tensor]] = {}
        for kind in kinds:
            found.setdefault(kind[:2], []).extend(programs[kind])
        return {kind: _sent(torch.cat(parts).to(torch.int32), device) for kind, parts in found.items()}

    return _Tables(
        key,
        _sent(torch.tensor(entries, dtype=torch.int64).view(-1, WIDTH.value), device),
        sent(list(programs)),
        sent([kind for kind in programs if kind[2]]),
        owners,
        torch.zeros(count, 2, dtype=dtype, device=device),
        torch.ones(count, dtype=dtype, device=device),
        torch.tensor(cut_rows, dtype=torch.int64, device=device),
        torch.tensor(cut_numbers, dtype=torch.int64, device=device),
        gaps,
    )


def _outside(blocks: tuple[RowBlock, ...], end: int) -> list[Tensor]:
    """Indices of the elements in no block, some at a time."""
    edges = [0, *(edge for block in blocks for edge in (block.start, block.end)), end]
    inside = [torch.arange(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]
    return list(torch.cat(inside).split(_FEW)) if inside else []


def _sent(host: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`; the host does not wait for it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
