"""What a step should take on an H100, by arithmetic: written down before anybody has measured it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ipfm.engine.memory.arithmetic import GPUS
from ipfm.engine.memory.plan import plan_memory
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.models import NetworkConfig

H100 = next(gpu for gpu in GPUS if gpu.name == "H100")
# Assumptions: what convolutions of these shapes reach of the peak, and what elementwise kernels reach of the memory's
# 3.35 TB/s.
MATRIX_TFLOPS, MEMORY_TB = 450.0, 3.0


@dataclass(frozen=True)
class Expectation:
    """Of an iteration with one student update, joint, in bf16, on one GPU."""

    tflop: float
    """Convolutions and matrix products."""
    gigabytes: float
    """Read and written by everything else, each tensor once."""
    operators: int
    """Dispatched by the host."""
    planned: int
    """Bytes at the peak, by the memory plan, at ZeRO 1."""

    @property
    def matrix_ms(self) -> float:
        """At `MATRIX_TFLOPS`."""
        return 1e3 * self.tflop / MATRIX_TFLOPS

    @property
    def memory_ms(self) -> float:
        """At `MEMORY_TB`."""
        return self.gigabytes / MEMORY_TB

    @property
    def ms(self) -> float:
        """Of the GPU, one after the other; a host that is slower is not in it."""
        return self.matrix_ms + self.memory_ms

    @property
    def share_of_peak(self) -> float:
        """Of the data sheet's arithmetic in bf16, over the whole step."""
        return 1e3 * self.tflop / self.ms / H100.half


@functools.lru_cache(maxsize=16)
def step_expectation(network: NetworkConfig, batch: int) -> Expectation:
    """For a network, without dropout, and a batch: one iteration, run on the meta device as on a GPU."""
    from ipfm.engine.commands.bench.meta_step import MATRIX, one_micro_batch, record

    config = DistillConfig(
        precision="bf16", memory_format="channels_last", D=network.D, batch=batch, max_steps=1, teacher_storage="half"
    )
    recording = record(one_micro_batch(config, network, batch, stage=1), network)
    moved = sum(count for name, count in recording.bytes.items() if name.removeprefix("aten.") not in MATRIX)
    moved += recording.added_biases + recording.reduced_biases
    plan = plan_memory(network, micro_batch=batch, stage=1, precision="bf16", backward="joint", config=config)
    flops = recording.flops.total()
    return Expectation(flops / 1e12, moved / 1e9, recording.operator_count, plan.peak)
