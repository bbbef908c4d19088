"""Memory that a distillation holds for as long as it runs: counted, part by part.

What DeepSpeed 0.19.8 keeps was measured, in bytes a parameter of e bytes on N processes, for each network in training;
at stage 0 there are 16 bits on one process alone, without DeepSpeed:

    stage      weights   masters   moments, EMA   gradients
    0          e         4 at e=2  4 each         e        while the network is trained
    1          e         4/N       4/N each       e        while the network is trained
    2          e         4/N       4/N each       e/N      while the network is trained
    3          e/N       4/N       4/N each       e/N      all the time

A network with forced weight normalisation (EDM2) has masters of its normalised weights at stage 0 in fp32 too. At the
other stages, and in 16 bits, its plain weights are where the roundings of masters are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from ipfm.engine.config import Offload, Precision, Resolved, RunConfig, TeacherStorage, ZeroStage
from ipfm.engine.distributed.precision import DTYPES, sixteen_bit_parameters
from ipfm.engine.distributed.single_process import WIDENED
from ipfm.engine.distributed.zero import BUCKET_ELEMENTS
from ipfm.models import NetworkConfig, build_network
from ipfm.models.forced_weight_norm import under_the_rule
from ipfm.models.low_rank import Lora, low_rank_network


@dataclass(frozen=True)
class Sharding:
    """How the networks of a run are spread over its processes; checked where the run is configured."""

    ranks: int = 1
    stage: ZeroStage = 0
    precision: Precision = "fp32"
    offload: Offload = "none"
    teacher_storage: TeacherStorage = "fp32"

    @classmethod
    def of(cls, settings: Resolved[RunConfig], ranks: int) -> Sharding:
        """That of a run on so many processes."""
        offload = settings.config.offload
        return cls(ranks, settings.stage, settings.precision, offload, settings.teacher_storage)

    @property
    def element(self) -> int:
        """Bytes of a weight in training."""
        return DTYPES[self.precision].itemsize

    def share(self, numbers: int, since: int) -> int:
        """How many of `numbers` a process holds, if they are sharded from stage `since` on; shards are padded."""
        return -(-numbers // self.ranks) if self.stage >= since else numbers

    @property
    def masters(self) -> bool:
        """Whether fp32 weights are kept beside those in training."""
        return self.stage > 0 or self.element < 4

    def update(self, numbers: int) -> int:
        """Bytes that the update of so many parameters needs beside their gradients.

        Those are the shard's gradient in fp32; on a process by itself the narrow ones are freed on the way, some at a
        time. AdamEMA itself needs nothing.
        """
        if self.offload != "none" or not self.masters:
            return 0
        if self.stage > 0:
            return 4 * self.share(numbers, 1)
        return (4 - self.element) * numbers + self.element * min(numbers, WIDENED)


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one process, outside the host's memory but for `host`."""

    parameters: int
    """Number of parameters of the teacher, or of the network where there is none."""
    trained: int
    """Number of parameters of the largest network in training."""
    teacher: int
    weights: int
    """Of the networks in training, and of those that follow them."""
    masters: int
    """fp32 weights beside those in training."""
    optimizer: int
    """Adam's moments and the EMA."""
    gradients: int
    """Of one network, the largest, while it is trained; at stage 3 of all, all the time."""
    buckets: int
    """Communication buffers; at stages 1 and 2 while a network is trained."""
    host: int
    """In the host's memory, for --offload."""
    stage: ZeroStage

    @property
    def permanent(self) -> int:
        """What is there at all times."""
        kept = self.gradients + self.buckets if self.stage == 3 else 0
        return self.teacher + self.weights + self.masters + self.optimizer + kept

    @property
    def training(self) -> int:
        """What is added while a network's backward pass fills its gradients, beside activations."""
        return 0 if self.stage == 3 else self.gradients + self.buckets

    @property
    def per_parameter(self) -> float:
        """Bytes of all networks together, gradients included and buckets not, per parameter of one network."""
        return (self.permanent + self.training - self.buckets) / self.parameters


class InTraining(NamedTuple):
    """A network in training."""

    network: NetworkConfig
    moments: int
    """fp32 values that its optimiser keeps of each number that is trained."""
    lora: Lora | None = None
    """Factors on the teacher's weights are trained, and those weights counted once; None: all its own."""

    @property
    def numbers(self) -> int:
        """How many numbers are trained."""
        return _parameters(self.network)[0] if self.lora is None else factor_count(self.network, self.lora)

    @property
    def normalised(self) -> int:
        """How many of them are masters of normalised weights."""
        return _parameters(self.network)[2] if self.lora is None else 0


def state_bytes(
    network: NetworkConfig,
    sharding: Sharding,
    trained: Sequence[tuple[NetworkConfig, int] | InTraining],
    *,
    teacher: bool,
    followed: Sequence[NetworkConfig] = (),
) -> StateBytes:
    """What the networks of a run hold.

    Args:
        network: the teacher's architecture, or that of a network in training where there is no teacher.
        sharding: how they are spread.
        trained: each network in training, with the number of fp32 values that its optimiser keeps a parameter, and
            more as of `InTraining`.
        teacher: there is a frozen teacher too.
        followed: networks that are kept with an average of the weights, whole on every process.
    """
    # A guided teacher is two networks, of which those in training have the size of one.
    n, halved, _ = _parameters(network)
    those = [InTraining(*one) for one in trained]
    numbers = [one.numbers for one in those]
    largest, element = max(numbers), sharding.element
    shards = [sharding.share(count, 1) for count in numbers]
    stored = {"fp32": 4 * n, "half": 4 * n - 2 * halved, "sharded": 4 * -(-n // sharding.ranks)}
    kept = stored[sharding.teacher_storage] if teacher else 0
    weights = element * sum(sharding.share(count, 3) for count in numbers)
    masters = 4 * (sum(shards) if sharding.masters else sum(one.normalised for one in those))
    optimizer = 4 * sum(shard * one.moments for shard, one in zip(shards, those, strict=True))
    shares = [element * sharding.share(count, 2) for count in numbers]
    gradients = sum(shares) if sharding.stage == 3 else max(shares)
    bucket = element * BUCKET_ELEMENTS
    # DeepSpeed allocates whole buckets, on a single process too; at stage 0 it gathers what there is.
    buckets = {0: min(bucket, element * largest) if sharding.ranks > 1 else 0, 3: len(trained) * bucket}.get(
        sharding.stage, bucket
    )
    host = 0
    if sharding.offload != "none":
        # With them go two buffers in which the gradients arrive.
        host = masters + optimizer + 8 * sum(shards)
        masters = optimizer = 0
    if sharding.offload == "all":
        host += weights + (gradients if sharding.stage == 3 else 0)
        weights = gradients = 0
        if sharding.teacher_storage == "sharded":
            host, kept = host + kept, 0
    for copied in followed:
        whole, narrow, _ = _parameters(copied)
        weights += 4 * whole - (4 - element) * narrow
    return StateBytes(
        parameter_count(network.unguided),
        largest,
        kept,
        weights,
        masters,
        optimizer,
        gradients,
        buckets,
        host,
        sharding.stage,
    )


def parameter_count(network: NetworkConfig) -> int:
    """Number of parameters."""
    return _parameters(network)[0]


@lru_cache(maxsize=64)
def factor_count(network: NetworkConfig, lora: Lora) -> int:
    """How many numbers the factors on a network of this architecture have."""
    with torch.device("meta"):
        base = build_network(network)
    return sum(p.numel() for p in low_rank_network(network, base, lora).parameters())


@lru_cache(maxsize=64)
def _parameters(network: NetworkConfig) -> tuple[int, int, int]:
    """Number of parameters, of those that sixteen bits may hold, and of those that are normalised."""
    with torch.device("meta"):
        net = build_network(network)
    named = dict(net.named_parameters())
    return (
        sum(p.numel() for p in named.values()),
        sum(p.numel() for p in sixteen_bit_parameters(net)),
        sum(named[name].numel() for name in under_the_rule(net, logvar=True)),
    )
