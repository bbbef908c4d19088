"""`ipfm bench`: the kernels, measured or compiled offline; the metrics; memory, time and passes of a step."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ipfm.engine.runtime.commandline import user_input
from ipfm.engine.runtime.errors import TrainingFailed
from ipfm.engine.runtime.files import check_writable
from ipfm.engine.runtime.host_memory import check_memory, enough_memory
from ipfm.engine.runtime.json_output import output

if TYPE_CHECKING:
    from ipfm.engine.runtime.remarks import Remarks
    from ipfm.models import NetworkConfig


SMALLER = "give a smaller --batch"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure the kernels, the metrics, or the memory or the time of a training step.

    Example: ipfm bench --offline --out build/bench

    Example: ipfm bench --memory --model ncsnpp --channels 32 --batch 64 --out build/bench

    Example: ipfm bench --step --model digits --precision fp32 bf16
    """

    out: Path = Path("bench")
    """Folder for the tables."""
    offline: bool = False
    """Compile every kernel and what each preset's step launches for sm_80, sm_90 and sm_100; report registers, spills,
    access widths and the instructions of perturb beside their floor; needs no GPU."""
    metrics: bool = False
    """Measure FID, KID, Inception score, precision and recall on 50 000 random features of 2048 dimensions."""
    memory: bool = False
    """Measure the memory of a teacher's training step and of a distillation, joint and phased, beside its plan."""
    step: bool = False
    """Time a distillation's step, joint and phased, beside the same step in plain PyTorch, in alternation."""
    passes: bool = False
    """Time a step of every objective beside the passes of its networks that it is counted by."""
    model: str = "ncsnpp"
    """With --memory, --step and --passes: the network, ncsnpp, ddpmpp (CIFAR-10's), adm (ImageNet's) or the name of a
    preset."""
    channels: int | None = None
    """With --memory, --step and --passes: channels of the network's first level. Default: as published."""
    batch: int = 64
    """With --memory, --step and --passes: images in a step."""
    precision: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32",)
    """With --step: arithmetic of the networks, one or several."""
    compile: bool = False
    """With --step: measure with torch.compile too, the plain networks as well."""
    rivals: tuple[Literal["channels_last", "fused", "tuned"], ...] = ()
    """With --step: further forms of plain PyTorch; tuned is with both. Default: on GPUs tuned."""
    D: float = 128.0
    """With --step and --passes: auxiliary dimensions, in (0, inf]."""
    activation_checkpointing: bool = False
    """With --memory: measure the distillation with activation checkpointing too."""
    quick: bool = False
    """Small shapes and few repetitions; with --memory one step instead of two, with --step 3 rounds instead of 20, with
    --passes 2 instead of 8."""

    json: bool = False
    """Print JSON: the rows of the tables."""

    def run(self) -> None:
        """Write the tables to `out` and print them."""
        with user_input():
            given = [name for name in ("offline", "metrics", "memory", "step", "passes") if getattr(self, name)]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} exclude each other: give one of them")
            check_writable(self.out, self.out)
        remarks = self._remarks()
        with output(as_json=self.json) as write:
            tables = [self._run_memory()] if self.memory else [self._run_step()] if self.step else self._run_rest()
            facts = {
                "tables": [{"file": table, "rows": read_rows(table)} for table in tables],
                "remarks": list(remarks),
            }
            texts = [table.with_suffix(".md").read_text(encoding="utf-8") for table in tables]
            write(facts, "\n".join([*texts, *map(str, tables)]))

    def _remarks(self) -> Remarks:
        """What is said of where it is measured."""
        from ipfm.engine.runtime.remarks import Remarks

        remarks = Remarks()
        if not self.offline:
            from ipfm.engine.distributed.launch_environment import environment_remarks

            for remark in environment_remarks():
                remarks.add(remark)
        return remarks

    def _run_rest(self) -> list[Path]:
        return [self._run_passes()] if self.passes else self._run_speed()

    def _run_passes(self) -> Path:
        from ipfm.engine.checks import check_D
        from ipfm.engine.commands.bench.passes import cases, run_passes

        with user_input():
            check_D(self.D)
            network = replace(self._network(), D=self.D)
            list(cases(network, self.batch, self.D))
            self.out.mkdir(parents=True, exist_ok=True)
        with enough_memory(SMALLER):
            return run_passes(self.out, network, batch=self.batch, quick=self.quick, title=self.model)

    def _run_speed(self) -> list[Path]:
        from ipfm.engine.commands.bench.metrics import run_metrics
        from ipfm.kernels import bench

        with user_input():
            self.out.mkdir(parents=True, exist_ok=True)
        if self.offline:
            from ipfm.engine.commands.bench.meta_step import preset_launches

            return bench.run_compiled(self.out, quick=self.quick, launches=preset_launches(quick=self.quick))
        return [(run_metrics if self.metrics else bench.run_microbenchmarks)(self.out, quick=self.quick)]

    def _run_step(self) -> Path:
        from ipfm.engine.checks import check_D
        from ipfm.engine.commands.bench.step import run_step
        from ipfm.engine.distributed.device import run_device
        from ipfm.engine.objectives.ipfm import DistillConfig
        from ipfm.engine.training.resolve import resolve_precision

        with user_input():
            check_D(self.D)
            network = replace(self._network(), D=self.D)
            for precision in self.precision:
                resolve_precision(DistillConfig(precision=precision, compile=self.compile), run_device())
            self.out.mkdir(parents=True, exist_ok=True)
        with enough_memory(SMALLER):
            return run_step(
                self.out,
                network,
                batch=self.batch,
                precisions=self.precision,
                compiled=self.compile,
                rivals=self.rivals,
                quick=self.quick,
                title=self.model,
            )

    def _network(self) -> NetworkConfig:
        """What --memory and --step measure; ValueError where it, the batch or the environment is impossible."""
        from ipfm.engine.commands.bench.memory import bench_network
        from ipfm.engine.distributed.launch_environment import check_environment

        check_environment()
        if self.batch < 1:
            raise ValueError(f"batch must be an integer >= 1, got {self.batch}")
        network = bench_network(self.model, self.channels)
        self._check_memory(network)
        return network

    def _check_memory(self, network: NetworkConfig) -> None:
        """ValueError: not even the first level's activations of a batch fit into the host's memory."""
        from ipfm.engine.distributed.device import run_device

        if run_device().type == "cpu":
            channels, height, width = network.image_shape
            needed = 4 * self.batch * height * width * (channels + 2 * network.model_channels)
            check_memory(needed, f"a batch of {self.batch:,} images", SMALLER)

    def _run_memory(self) -> Path:
        from ipfm.engine.commands.bench.memory import run_memory

        with user_input():
            network = self._network()
            self.out.mkdir(parents=True, exist_ok=True)
        try:
            with enough_memory(SMALLER):
                return run_memory(
                    self.out,
                    network,
                    batch=self.batch,
                    checkpointed=self.activation_checkpointing,
                    quick=self.quick,
                    title=self.model,
                )
        except RuntimeError as error:
            raise TrainingFailed(str(error)) from error


def read_rows(table: Path) -> list[dict[str, object]]:
    """The rows of a CSV file by the names of its columns: numbers as such, nothing as None."""

    def value(text: str) -> object:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return {"": None, "True": True, "False": False}.get(text, text)

    with table.open(newline="", encoding="utf-8") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]
