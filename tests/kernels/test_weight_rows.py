"""AdamEMA on masters under forced weight normalisation, against the rule inside the forward pass."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import Tensor

from ipfm.kernels import AdamEMA
from ipfm.kernels._dispatch import Backend
from ipfm.kernels.weight_rows import RowBlock, WeightRows, row_blocks

# NumPy's, in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
SHAPES = [(5, 3, 3, 3), (7, 11), (1, 6)]
UNUSED = 2
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-3}


def normalised(w: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(w.flatten(1), dim=1) / math.sqrt(w[0].numel())
    return w / (1e-4 + norm).view(-1, *[1] * (w.ndim - 1))


def plain(w: Tensor) -> Tensor:
    return normalised(w) / math.sqrt(w[0].numel())


def start(dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[list[Tensor], Tensor]:
    """Masters with rows of sizes from 0.1 to 3, one of them zero, and a gain."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [draw(*shape) * 10 ** (draw(shape[0], *[1] * (len(shape) - 1)) / 2) for shape in SHAPES]
    weights[1][3] = 0
    return [w.to(device, dtype) for w in weights], torch.tensor(0.7, dtype=dtype, device=device)


def loss_of(weights: list[Tensor], gain: Tensor, step: int) -> Tensor:
    """Of some size, whatever the size of a row; the last weight is left out."""
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step)).to(gain)
    y = torch.nn.functional.conv2d(x, weights[0]).tanh().flatten(1)[:, :11]
    return ((y @ weights[1].T + 0.3) * gain).square().sum() + gain.square()


def in_forward(steps: int, *, clip: float | None = None) -> dict[str, list[Tensor]]:
    """The rule inside the forward pass, in float64: the truth."""
    weights, gain = start(torch.float64)
    params = [p.requires_grad_(True) for p in (*weights, gain)]
    adam = torch.optim.Adam(params, **OPTIONS)
    averages = [p.detach().clone() for p in params]
    for step in range(steps):
        with torch.no_grad():
            for w in weights[:UNUSED]:
                w.copy_(normalised(w))
        adam.zero_grad()
        loss_of([plain(w) for w in weights], gain, step).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for p in params if p.grad is not None], clip)
        adam.step()
        for average, p in zip(averages, params, strict=True):
            average.lerp_(p.detach(), 0.3)
    with torch.no_grad():
        used = [plain(normalised(w)) if i < UNUSED else plain(w) for i, w in enumerate(weights)]
    return {"masters": [p.detach() for p in params], "averages": averages, "plain": used}


class Kept:
    """An optimiser of masters, each a tensor of its own, and the network's plain weights."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", **options: object) -> None:
        self.weights, self.gain = start(dtype, device)
        self.plain = [torch.empty_like(w).requires_grad_(True) for w in self.weights]
        self.optimizer = AdamEMA([*self.weights, self.gain.requires_grad_(True)], ema=True, **OPTIONS, **options)
        self.optimizer.ema_decay = 0.7
        rows = {
            w: WeightRows.whole(w, p, used=i < UNUSED)
            for i, (w, p) in enumerate(zip(self.weights, self.plain, strict=True))
        }
        self.optimizer.normalise_rows(rows)
        self.optimizer.create_state()
        self.optimizer.write_plain()

    def step(self, step: int, factor: float = 1.0) -> None:
        self.gain.grad = None
        for p in self.plain:
            p.grad = None
        (loss_of(self.plain, self.gain, step) * factor).backward()
        for w, p in zip(self.weights, self.plain, strict=True):
            w.grad = p.grad
        self.optimizer.step()

    def found(self) -> dict[str, list[Tensor]]:
        masters = [*self.weights, self.gain.detach()]
        averages = [self.optimizer.state[p]["ema"] for p in (*self.weights, self.gain)]
        return {"masters": masters, "averages": averages, "plain": [p.detach() for p in self.plain]}


def largest(found: dict[str, list[Tensor]], truth: dict[str, list[Tensor]]) -> float:
    return max(
        float((f.double().cpu() - t).norm() / t.norm()) for k in truth for f, t in zip(found[k], truth[k], strict=True)
    )


@pytest.mark.quick
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize(("backend", "steps"), [("reference", 20), ("triton", 2)])
def test_steps_equal_the_rule_inside_the_forward_pass(
    backend: str, steps: int, dtype: torch.dtype, limit: float, device: torch.device
) -> None:
    """Masters, averages of them and plain weights; a weight that is left out keeps its master."""
    kept = Kept(dtype, device, backend=backend)
    # Else a GPU's convolutions have ten bits.
    with torch.backends.cudnn.flags(allow_tf32=False):
        for step in range(steps):
            kept.step(step)
    assert largest(kept.found(), in_forward(steps)) <= (limit if device.type == "cpu" else 10 * limit)
    assert torch.equal(kept.weights[UNUSED].cpu(), start(dtype)[0][UNUSED])


def test_the_norm_that_is_clipped_is_that_of_the_masters_gradients() -> None:
    """It is what a loop with the rule in its forward pass clips; that of the plain weights is another."""
    kept, unclipped = Kept(torch.float64, clip_norm=0.05), in_forward(5)
    for step in range(5):
        kept.step(step)
    # torch adds 1e-6 to the norm.
    assert largest(kept.found(), in_forward(5, clip=0.05)) <= 1e-6
    assert largest(kept.found(), unclipped) > 1e-3


@pytest.mark.parametrize(
    ("backend", "factor"),
    [("reference", math.nan), ("reference", math.inf), ("reference", 1e200), ("triton", math.inf)],
)
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(backend: str, factor: float) -> None:
    kept = Kept(torch.float64, backend=backend)
    kept.step(0)
    before = {key: [t.clone() for t in tensors] for key, tensors in kept.found().items()}
    kept.step(1, factor)
    assert not kept.optimizer.applied
    assert all(torch.equal(a, b) for key in before for a, b in zip(before[key], kept.found()[key], strict=True))
    kept.step(1)
    assert largest(kept.found(), in_forward(2)) <= 1e-12


def test_plain_weights_in_16_bits_are_rounded_once_and_in_any_memory_format() -> None:
    w = start(torch.float32)[0][0]
    for dtype in (torch.bfloat16, torch.float16):
        target = torch.empty_like(w, dtype=dtype).contiguous(memory_format=torch.channels_last)
        optimizer = AdamEMA([w], lr=0.0)
        optimizer.normalise_rows({w: WeightRows.whole(w, target)})
        optimizer.write_plain()
        torch.testing.assert_close(target, plain(normalised(w.double())).to(dtype), rtol=0, atol=0)
    last = w.contiguous(memory_format=torch.channels_last)
    contiguous, target = torch.empty_like(w), torch.empty_like(w)
    for master, out in ((w, contiguous), (last, target)):
        optimizer = AdamEMA([master], lr=0.0)
        optimizer.normalise_rows({master: WeightRows.whole(master, out)})
        optimizer.write_plain()
    torch.testing.assert_close(target, contiguous)


@pytest.mark.parametrize("ranks", [2, 5, 40])
def test_rows_that_shards_cut_are_normalised_as_whole_ones(ranks: int) -> None:
    """Flat shards of equal size: several cut the same row where there are many."""
    weights, gain = start(torch.float64)
    flat = torch.cat([*[w.flatten() for w in weights], gain.view(1)])
    size = -(-len(flat) // ranks)
    flat = torch.nn.functional.pad(flat, (0, size * ranks - len(flat)))
    starts = [0, *torch.tensor([w.numel() for w in weights]).cumsum(0).tolist()]
    cut: dict[tuple[int, int], int] = {}
    blocks: list[list[RowBlock]] = [[] for _ in range(ranks)]
    for i, w in enumerate(weights):
        columns, end = w[0].numel(), starts[i] + w.numel()
        for at in range(size, len(flat), size):
            if starts[i] < at < end and (at - starts[i]) % columns:
                cut.setdefault((i, (at - starts[i]) // columns), len(cut))
        for rank in range(ranks):
            first, last = max(starts[i], rank * size), min(end, (rank + 1) * size)
            if first < last:
                blocks[rank] += row_blocks(
                    first - rank * size, first - starts[i], last - first, columns,
                    lambda row, i=i: cut[i, row], used=i < UNUSED,
                )  # fmt: skip
    assert len(cut) >= min(ranks - 1, 3) > 0
    out, averages, masters = (torch.full_like(flat, math.nan) for _ in range(3))
    barrier, given = threading.Barrier(ranks, timeout=60), {}

    def run(rank: int) -> None:
        here = slice(rank * size, (rank + 1) * size)
        master = flat[here].clone().requires_grad_(True)
        optimizer = AdamEMA([master], ema=True, clip_norm=0.05, **OPTIONS)
        optimizer.ema_decay = 0.7

        def sum_over_shards(tensor: Tensor) -> None:
            given[rank] = tensor.clone()
            barrier.wait()
            total = torch.stack([given[i] for i in range(ranks)]).sum(0)
            barrier.wait()
            tensor.copy_(total)

        optimizer.sum_over_shards = sum_over_shards
        optimizer.normalise_rows({master: WeightRows(tuple(blocks[rank]), out[here])}, cut_rows=len(cut))
        optimizer.write_plain()
        for step in range(4):
            barrier.wait()
            whole = out.clone().requires_grad_(True)
            parts = [whole[a : a + w.numel()].view(w.shape) for a, w in zip(starts, weights, strict=False)]
            (g,) = torch.autograd.grad(loss_of(parts, whole[starts[-1]], step), whole)
            barrier.wait()
            master.grad = g[here].clone()
            optimizer.step()
        averages[here], masters[here] = optimizer.state[master]["ema"], master.detach()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = Kept(torch.float64, clip_norm=0.05)
    for step in range(4):
        whole.step(step)
    expected = whole.found()
    for tensor, key in ((masters, "masters"), (averages, "averages")):
        own = torch.cat([t.flatten() for t in expected[key]])
        torch.testing.assert_close(tensor[: len(own)], own, rtol=1e-12, atol=1e-13)
    own = torch.cat([*[t.flatten() for t in expected["plain"]], expected["masters"][-1].view(1)])
    torch.testing.assert_close(out[: len(own)], own, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_parts_of_a_row_are_added_up_before_it_is_normalised(backend: Backend) -> None:
    """A flat tensor with a gain before a weight, one of whose rows lies in two blocks, as two shards would have it."""
    w = start(torch.float32)[0][0]
    k = w[0].numel()
    flat = torch.cat([torch.tensor([0.5, -2.0, 3.0]), w.flatten()])
    blocks = (*row_blocks(3, 0, k + 5, k, lambda row: 0), *row_blocks(8 + k, k + 5, 4 * k - 5, k, lambda row: 0))
    found = []
    for own, cut_rows in ((blocks, 1), (tuple(row_blocks(3, 0, 5 * k, k, lambda row: 0)), 0)):
        master, out = flat.clone(), torch.empty(len(flat), dtype=torch.bfloat16)
        optimizer = AdamEMA([master], ema=True, backend=backend, **OPTIONS)
        optimizer.sum_over_shards = lambda tensor: None
        optimizer.normalise_rows({master: WeightRows(own, out)}, cut_rows=cut_rows)
        master.grad = torch.linspace(-1, 1, len(flat))
        optimizer.step()
        found.append((master, out.float()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)
    whole = found[0][0][3:].view(w.shape)
    torch.testing.assert_close(found[0][1][3:].view(w.shape), plain(normalised(whole)), rtol=1e-2, atol=0)
    assert torch.equal(found[0][1][:3], found[0][0][:3].bfloat16().float())


def test_blocks_are_whole_rows_and_what_is_cut_before_and_after_them() -> None:
    for columns in (1, 4, 7):
        for first in range(9):
            for count in range(20):
                found = row_blocks(100, first, count, columns, lambda row: row)
                assert sum(b.rows * b.length for b in found) == count
                at = 100
                for block in found:
                    row, skipped = divmod(first + block.start - 100, columns)
                    assert block.start == at and (block.rows == 1 or block.length == columns)
                    whole = block.length == columns and not skipped
                    assert block.cut == (None if whole else row)
                    at = block.end


def test_rows_that_do_not_lie_in_memory_as_rows_are_refused() -> None:
    w = torch.randn(4, 3, 3, 3)
    for master, plain_weights in ((w.transpose(0, 1), w.transpose(0, 1)), (w[:, 1:], w[:, 1:]), (w, w[1:])):
        with pytest.raises(ValueError, match=r"weight rows: (rows must lie|master and plain must have)"):
            WeightRows.whole(master, plain_weights)
