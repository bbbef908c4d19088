"""`ipfm plan`: the memory of a distillation, predicted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ipfm.engine.commandline import user_input


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predict the memory that a distillation needs on each process.

    Example: ipfm plan --model cifar10-ncsnpp --batch 256 --ranks 8 --zero 2 --precision bf16 --gpu-memory 24
    """

    model: str
    """Name of a network preset, a model folder, or a checkpoint of EDM, PFGM++ or SiD."""
    batch: int = 256
    """Global batch."""
    ranks: int = 1
    """Number of processes."""
    micro_batch: int | None = None
    """Images one process handles at a time. Default: its whole share of the batch."""
    zero: Literal[0, 1, 2] = 0
    """ZeRO stage."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks."""
    gpu_memory: float | None = None
    """Memory of one GPU in GB; decides between the joint and the phased backward pass."""

    def run(self) -> None:
        """Print the plan."""
        from ipfm.engine.config import DistillConfig
        from ipfm.engine.memory import USABLE, plan_memory
        from ipfm.models import presets, read_config
        from ipfm.models.checkpoint_import import open_checkpoint

        with user_input():
            if self.ranks < 1:
                raise ValueError(f"ranks must be at least 1, got {self.ranks}")
            if self.gpu_memory is not None and not self.gpu_memory > 0:
                raise ValueError(f"gpu-memory must be > 0, got {self.gpu_memory}")
            path = Path(self.model)
            if path.is_file():
                network = open_checkpoint(path).read().config
            else:
                network = read_config(path).network if path.is_dir() else presets.get(self.model)
            config = DistillConfig(
                batch=self.batch, micro_batch=self.micro_batch, zero=self.zero, precision=self.precision
            )
            plan = plan_memory(
                network,
                micro_batch=config.split(self.ranks)[1],
                ranks=self.ranks,
                stage=self.zero,
                precision=self.precision,
                budget=None if self.gpu_memory is None else int(USABLE * self.gpu_memory * 1e9),
            )
        print(plan)
