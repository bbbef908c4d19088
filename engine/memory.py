"""Prediction of the memory that a distillation needs on one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ipfm.engine.zero import BUCKET_ELEMENTS, Precision
from ipfm.models import EDMPrecond, NetworkConfig

# Share of a GPU's memory that a plan may fill: the rest is for workspaces and fragmentation.
USABLE = 0.85


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one process, by part, and the backward mode that fits.

    `activations_*` are what one backward pass keeps alive at the peak of a generator step.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations_phased: int
    activations_joint: int
    budget: int | None
    backward: str

    @property
    def state(self) -> int:
        """Bytes of everything but activations."""
        return self.weights + self.gradients + self.optimizer + self.buckets

    def total(self, backward: str) -> int:
        """Bytes at the peak with this backward mode."""
        return self.state + (self.activations_phased if backward == "phased" else self.activations_joint)

    def __str__(self) -> str:
        parts = [
            ("weights of three networks", self.weights),
            ("gradients of two", self.gradients),
            ("optimiser state and EMA", self.optimizer),
            ("communication buckets", self.buckets),
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

    Parameters are counted, activations are measured by running one sample on the meta device and adding up what
    autograd keeps; workspaces of convolutions are not included.

    Args:
        network: architecture of all three networks.
        micro_batch: images a process handles at a time.
        ranks: number of processes.
        stage: ZeRO stage 0, 1 or 2.
        precision: "fp32" or "bf16".
        student_beta1, generator_beta1: Adam's first decays; 0 needs no first moment.
        budget: bytes that a process may use; decides joint or phased. None chooses joint.

    Raises:
        ValueError: a number out of its range.
    """
    for name, value in (("micro-batch", micro_batch), ("ranks", ranks)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if stage not in (0, 1, 2):
        raise ValueError(f"the ZeRO stage must be 0, 1 or 2, got {stage}")
    net = _meta_network(network, precision)
    n = sum(p.numel() for p in net.parameters())
    element = 2 if precision == "bf16" else 4
    shard = ranks if stage > 0 else 1
    # The teacher stays in fp32; at stages 1 and 2 each process keeps fp32 masters of its shard besides the weights.
    weights = 4 * n + 2 * element * n + (2 * 4 * n // shard if stage > 0 else 0)
    moments = 2 + (student_beta1 > 0) + (generator_beta1 > 0)
    optimizer = 4 * n * (moments + 1) // shard
    gradients = element * n + element * n // (ranks if stage == 2 else 1)
    buckets = 0 if ranks == 1 and stage == 0 else 2 * element * min(n, BUCKET_ELEMENTS)
    per_sample_all = _saved_bytes(net, precision, frozen=False)
    per_sample_frozen = _saved_bytes(net, precision, frozen=True)
    phased = micro_batch * max(per_sample_all, per_sample_frozen)
    joint = micro_batch * (per_sample_all + 2 * per_sample_frozen)
    plan = MemoryPlan(n, weights, gradients, optimizer, buckets, phased, joint, budget, "joint")
    if budget is not None and plan.total("joint") > budget:
        plan = MemoryPlan(n, weights, gradients, optimizer, buckets, phased, joint, budget, "phased")
    return plan


def device_budget(device: torch.device) -> int | None:
    """Bytes that a run may plan with on `device`: a share of a GPU's memory, or of the machine's available memory."""
    if device.type == "cuda":
        return int(USABLE * torch.cuda.get_device_properties(device).total_memory)
    try:
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
        return int(USABLE * int(available.split()[1]) * 1024)
    except (OSError, StopIteration, ValueError):
        return None


def _meta_network(network: NetworkConfig, precision: Precision) -> EDMPrecond:
    with torch.device("meta"):
        net = EDMPrecond(network)
    net.compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return net


def _saved_bytes(net: EDMPrecond, precision: Precision, *, frozen: bool) -> int:
    """Bytes that autograd keeps for one sample's backward pass, parameters not counted."""
    net.requires_grad_(not frozen)
    if precision == "bf16":
        net = net.to(torch.bfloat16)
    own = {id(p) for p in net.parameters()} | {id(b) for b in net.buffers()}
    shape = (1, net.img_channels, net.img_resolution, net.img_resolution)
    x = torch.empty(shape, device="meta", requires_grad=frozen)
    with _counting(own) as count:
        net.train()(x, torch.ones(1, device="meta"))
    return count[0]


@contextmanager
def _counting(own: set[int]) -> Iterator[list[int]]:
    count = [0]
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if id(base) not in own and id(base) not in seen:
            # Kept alive, so that no later tensor gets the same id.
            seen[id(base)] = base
            count[0] += base.numel() * base.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
