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
# And what the host takes for each operator that it dispatches, launch included, one after the other.
HOST_US = 15.0
# The operations at their largest measured sizes: elements, and bytes that must move for each.
OPERATIONS = (
    ("`perturb`, fp32", 2**25, 8),
    ("`perturb`, bf16", 2**25, 4),
    ("`group_norm_silu`, forward, bf16", 256 * 256 * 32 * 32, 4),
    ("`group_norm_silu`, backward, bf16", 256 * 256 * 32 * 32, 6),
    ("`ipfm_loss`, fp32", 2**25, 24),
    ("`denoising_loss`, fp32", 2**25, 12),
    ("`AdamEMA`, a network of ncsn++", 55_700_000, 32),
)


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
    """Bytes at the peak, by the memory plan, at ZeRO 0, the default on one GPU."""

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
    def host_ms(self) -> float:
        """Of the host, at `HOST_US` an operator; next to nothing where CUDA graphs replay the step."""
        return 1e-3 * HOST_US * self.operators

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
    recording = record(one_micro_batch(config, network, batch, stage=0), network)
    moved = sum(count for name, count in recording.bytes.items() if name.removeprefix("aten.") not in MATRIX)
    moved += recording.added_biases + recording.reduced_biases
    plan = plan_memory(network, micro_batch=batch, stage=0, precision="bf16", backward="joint", config=config)
    flops = recording.flops.total()
    return Expectation(flops / 1e12, moved / 1e9, recording.operator_count, plan.peak)
