"""Prediction of the memory that a distillation needs on one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ipfm.engine.zero import BUCKET_ELEMENTS, Precision
from ipfm.models import NetworkConfig, Precond, build_network

# Share of a GPU's memory that a plan may fill: the rest is for workspaces and fragmentation.
USABLE = 0.85


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one process, by part, and the backward mode that fits."""

    parameters: int
    """Number of parameters of one network."""
    weights: int
    """Teacher, student, generator and averaged generator, and ZeRO's fp32 master weights."""
    gradients: int
    """Of the one network that is being trained."""
    optimizer: int
    """Adam's moments of student and generator, and the generator's EMA."""
    buckets: int
    """Communication buffer of the network that is being trained."""
    activations_phased: int
    """What the largest backward pass keeps alive: one network's activations."""
    activations_joint: int
    """What a joint generator step keeps alive: the activations of all three networks."""
    budget: int | None
    """Bytes that the process may use; None: not known."""
    backward: str
    """"joint" or "phased"."""

    @property
    def state(self) -> int:
        """Bytes of everything but activations."""
        return self.weights + self.gradients + self.optimizer + self.buckets

    def total(self, backward: str) -> int:
        """Bytes at the peak with this backward mode."""
        return self.state + (self.activations_phased if backward == "phased" else self.activations_joint)

    def __str__(self) -> str:
        parts = [
            ("weights of four networks", self.weights),
            ("gradients of one network", self.gradients),
            ("optimiser state and EMA", self.optimizer),
            ("communication bucket", self.buckets),
            ("activations, joint", self.activations_joint),
            ("activations, phased", self.activations_phased),
            ("total, joint", self.total("joint")),
            ("total, phased", self.total("phased")),
        ]
        lines = [f"{name:<28}{_size(value):>12}" for name, value in parts]
        limit = "none given" if self.budget is None else _size(self.budget)
        return "\n".join([*lines, f"{'budget':<28}{limit:>12}", f"{'backward':<28}{self.backward:>12}"])


def plan_memory(
    network: NetworkConfig,
    *,
    micro_batch: int,
    ranks: int = 1,
    stage: int = 0,
    precision: Precision = "fp32",
    student_beta1: float = 0.0,
    generator_beta1: float = 0.0,
    budget: int | None = None,
) -> MemoryPlan:
    """Predict the memory of a distillation on each process.

    Parameters are counted; activations are measured: the networks run on the meta device, which computes nothing, and
    what autograd keeps is added up. Not included: workspaces of convolutions, the allocator's fragmentation, and the
    copy of the weights that DeepSpeed keeps in the host's memory at stages 1 and 2.

    Args:
        network: architecture of all three networks.
        micro_batch: images a process handles at a time.
        ranks: number of processes.
        stage: ZeRO stage 0, 1 or 2.
        precision: "fp32" or "bf16" (stage 1 or 2).
        student_beta1, generator_beta1: Adam's first decays; 0 needs no first moment.
        budget: bytes that a process may use; decides joint or phased. None chooses joint.

    Returns:
        The plan; "phased" when the joint form exceeds the budget, whether or not the phased one fits.

    Raises:
        ValueError: a number out of its range, or bf16 at stage 0.
    """
    for name, value in (("micro-batch", micro_batch), ("ranks", ranks)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value}")
    if stage not in (0, 1, 2):
        raise ValueError(f"the ZeRO stage must be 0, 1 or 2, got {stage}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")
    if precision == "bf16" and stage == 0:
        raise ValueError("precision bf16 needs ZeRO stage 1 or 2, got stage 0")
    for name, beta in (("student-beta1", student_beta1), ("generator-beta1", generator_beta1)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {beta}")
    if budget is not None and budget < 0:
        raise ValueError(f"the budget must be >= 0 bytes, got {budget}")

    n = sum(p.numel() for p in _meta_network(network, precision).parameters())
    element = 2 if precision == "bf16" else 4
    shard = ranks if stage > 0 else 1
    # Teacher and averaged generator stay in fp32. At stages 1 and 2 each process keeps fp32 masters of its shards.
    weights = 2 * 4 * n + 2 * element * n + (2 * 4 * n // shard if stage > 0 else 0)
    moments = 2 + (student_beta1 > 0) + (generator_beta1 > 0)
    optimizer = 4 * n * (moments + 1) // shard
    # A network's gradients, and the bucket in which they are reduced, are freed when its optimiser has stepped.
    gradients = element * n // (ranks if stage == 2 else 1)
    # DeepSpeed allocates the whole bucket at stages 1 and 2, on a single process too.
    buckets = element * (BUCKET_ELEMENTS if stage > 0 else min(n, BUCKET_ELEMENTS) if ranks > 1 else 0)

    trained = _saved_bytes(network, precision, micro_batch, frozen=False)
    student = _saved_bytes(network, precision, micro_batch, frozen=True)
    teacher = student
    if precision == "bf16":
        # The teacher's weights are fp32: it keeps a bf16 cast of each one that its backward pass needs.
        teacher = _saved_bytes(network, precision, micro_batch, frozen=True, fp32_weights=True)
    phased = max(trained, student, teacher)
    joint = trained + student + teacher
    state = weights + gradients + optimizer + buckets
    backward = "phased" if budget is not None and state + joint > budget else "joint"
    return MemoryPlan(n, weights, gradients, optimizer, buckets, phased, joint, budget, backward)


def device_budget(device: torch.device) -> int | None:
    """Bytes that this process may plan with on `device`; None where that is not known.

    A share of the GPU's memory; or, on a CPU, of the machine's available memory, divided among its processes.
    """
    if device.type == "cuda":
        return int(USABLE * torch.cuda.get_device_properties(device).total_memory)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    try:
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
        return int(USABLE * int(available.split()[1]) * 1024) // max(1, processes)
    except (OSError, StopIteration, ValueError):
        return None


def _meta_network(network: NetworkConfig, precision: Precision) -> Precond:
    with torch.device("meta"):
        net = build_network(network)
    net.compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return net


def _saved_bytes(
    network: NetworkConfig, precision: Precision, batch: int, *, frozen: bool, fp32_weights: bool = False
) -> int:
    """Bytes that autograd keeps for one backward pass over `batch` samples; parameters and buffers are not counted.

    frozen: the gradient goes to x alone, in eval mode (teacher and student in a generator step); else to the weights.
    fp32_weights: the weights are fp32 at either precision.
    """
    net = _meta_network(network, precision).requires_grad_(not frozen).train(not frozen)
    if precision == "bf16" and not fp32_weights:
        net = net.to(torch.bfloat16)
    x = torch.empty(batch, net.img_channels, net.img_resolution, net.img_resolution, device="meta")
    with _EfficientAttention(), counting_saved_bytes([*net.parameters(), *net.buffers()]) as count:
        net(x.requires_grad_(frozen), torch.ones(batch, device="meta"))
    return count[0]


@contextmanager
def counting_saved_bytes(own: Sequence[Tensor]) -> Iterator[list[int]]:
    """Adds up, in the list's only entry, the bytes of the tensors that autograd saves meanwhile, on any device.

    What shares a storage (views, the same tensor saved by two operations) counts once; what shares it with a tensor in
    `own` does not count.
    """
    # By storage: autograd hands a new tensor object over for each saved one. Kept alive, so that none is reused.
    seen = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in own}
    count = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage
            count[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


class _EfficientAttention(TorchFunctionMode):
    """Attention on the meta device saves what the fused kernels of real devices save: no L x L logits."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _SavedByAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _SavedByAttention(torch.autograd.Function):
    """q, k, v (B, heads, L, d) -> a tensor like q; saves them, the result and a float32 number a query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError("only what is saved is measured")


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
