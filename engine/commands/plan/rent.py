"""The table of what to rent: hours, memory by part, host memory and disk, a row for so many GPUs of each kind."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ipfm.engine.commands.describe import architecture, images
from ipfm.engine.commands.plan.settings import Planned
from ipfm.engine.config import TeacherConfig
from ipfm.engine.experiments.gpu_costs import OF_A_NODE, GpuCost, Run, gpu_costs
from ipfm.engine.memory.arithmetic import GPUS, TRAINING_FORWARDS, Gpu, flops_in_words, forward_flops, peak_in_words
from ipfm.engine.memory.fits import gpu_precision
from ipfm.engine.memory.state import parameter_count
from ipfm.engine.objectives.base import Distillation, lora_facts, lora_words
from ipfm.engine.objectives.initial_networks import trained_config
from ipfm.engine.runtime.json_output import plain
from ipfm.engine.runtime.progress import ProgressBar
from ipfm.engine.runtime.wording import at_least_thousandths, counted, size, three_digits
from ipfm.models import NetworkConfig

COUNTS = (1, 2, 4, 8)
# Length of what is shown of a run that has none, in thousands of images.
WITHOUT_LENGTH = 1000.0
# Columns of the table, and of the lines around it.
WIDTH = 120
# Seconds before the first line of progress, where stderr is a file.
PAUSE = 3.0


def as_trained(config: Distillation | TeacherConfig, network: NetworkConfig) -> NetworkConfig:
    """The architecture as a run with these settings trains it."""
    if isinstance(config, Distillation):
        return trained_config(network, config.dropout)
    return replace(network, dropout=config.dropout)


class RentTable:
    """What a run takes of rented GPUs.

    Args:
        model: as it was typed.
        planned: what is planned.
        counts: numbers of GPUs.
        share: of the peak that a step reaches.
        prices: of a GPU hour, by the names of GPUs.
    """

    def __init__(
        self, model: str, planned: Planned, counts: Sequence[int], share: float, prices: dict[str, float]
    ) -> None:
        self.model, self.planned, self.counts, self.share, self.prices = model, planned, counts, share, prices
        config = planned.config
        self.has_length = config.kimg is not None or config.max_steps is not None
        if not self.has_length:
            config = replace(config, kimg=WITHOUT_LENGTH)
        config = replace(config, precision=gpu_precision(config))
        self.run = Run(config, as_trained(config, planned.network))
        memories = {gpu.memory for gpu in GPUS}
        with ProgressBar("plan", len(memories) * len(counts), unit=" layout", pause=PAUSE) as progress:
            found = gpu_costs(
                self.run,
                counts=counts,
                gpus=GPUS,
                share=share,
                prices=lambda gpu: prices.get(gpu.name),
                done=progress.advance,
            )
            self.rows = sorted(found, key=lambda row: GPUS.index(row.gpu))

    # -- what is said, for machines and for people ------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """For JSON: bytes, seconds and operations."""
        run, planned = self.run, self.planned
        config = run.config
        return {
            "model": self.model,
            "recipe": None if planned.recipe is None else planned.recipe.file,
            "objective": config.kind if isinstance(config, Distillation) else None,
            **({"low_rank": lora} if (lora := lora_facts(config)) else {}),
            "batch": config.batch,
            "precision": config.decided_precision,
            "peak_of": peak_in_words(config.decided_precision, config.tf32),
            "kimg": config.total_steps * config.batch / 1000,
            "steps": config.total_steps,
            "length": planned.source if self.has_length else None,
            "share_of_peak": self.share,
            "forward_flops": run.forward_flops,
            "forwards": run.forwards,
            "step_flops": run.step_flops(),
            "flops": run.step_flops() * run.steps_from(),
            "peak_flops": {gpu.name: self._peak(gpu) for gpu in GPUS},
            "disk": plain(run.disk) | {"total": run.disk.total},
            "evaluation": self._evaluation(),
            "teacher_training": self._teaching(),
            "cheapest": None if (row := self._cheapest) is None else {"gpu": row.gpu.name, "gpus": row.fit.ranks},
            "rows": [self._row_facts(row) for row in self.rows],
        }

    def text(self) -> str:
        """For people: what is planned, the table, and its legend."""
        table = [self._head(), *map(self._row, self.rows)]
        return "\n".join([*self._title(), "", *table, *self._cheapest_in_words(), "", *self._legend()])

    @property
    def _cheapest(self) -> GpuCost | None:
        """The row of the lowest price, of several that of the fewest GPUs; None where no price is known."""
        priced = [row for row in self.rows if row.price is not None]
        return min(priced, key=lambda row: (float(f"{row.price:.3g}"), row.fit.ranks), default=None)

    def _cheapest_in_words(self) -> list[str]:
        if (row := self._cheapest) is None:
            return []
        hours = at_least_thousandths(row.wall_seconds / 3600)
        return [
            "",
            f"cheapest at these prices: {row.fit.ranks} x {row.gpu.name}, {at_least_thousandths(row.price or 0)} for "
            f"{hours} hours; more GPUs add communication, which is left out",
        ]

    def _peak(self, gpu: Gpu) -> float:
        return gpu.peak(self.run.config.decided_precision, self.run.config.tf32)

    def _hours(self, flops: float) -> dict[str, float]:
        """Seconds of each kind of GPU for so many operations."""
        return {gpu.name: flops / (self.share * self._peak(gpu)) for gpu in GPUS}

    def _evaluation(self) -> dict[str, Any] | None:
        count, run = self.planned.eval_images, self.run
        if count is None or not self.has_length:
            return None
        flops = run.evaluation_flops(count)
        return {
            "images": count,
            "times": run.evaluations,
            "teacher_nfe": run.teacher_nfe,
            "generator_nfe": run.generator_nfe,
            "flops": flops,
            "gpu_seconds": self._hours(flops),
        }

    def _teaching(self) -> dict[str, Any] | None:
        """Of the teacher that the recipe trains before."""
        if self.planned.teaching is None:
            return None
        config, network = self.planned.teaching
        flops = forward_flops(network) * TRAINING_FORWARDS * config.batch * config.total_steps
        return {"steps": config.total_steps, "batch": config.batch, "flops": flops, "gpu_seconds": self._hours(flops)}

    def _row_facts(self, row: GpuCost) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "gpu": row.gpu.name,
            "gpus": row.fit.ranks,
            "gpu_memory": row.gpu.memory * 1e9,
            "fits": row.fit.layout is not None,
            "reason": row.fit.reason or None,
        }
        if (layout := row.fit.layout) is None:
            return facts
        plan = layout.plan
        return facts | {
            "micro_batch": plan.micro_batch,
            "accumulation": layout.accumulation,
            "backward": plan.backward,
            "activation_checkpointing": plan.activation_checkpointing,
            "stage": plan.parts.stage,
            "relative_cost": layout.relative_cost,
            "step_flops": row.step_flops,
            "gpu_seconds": row.gpu_seconds,
            "wall_seconds": row.wall_seconds,
            "price": row.price,
            "parts": plain(row.parts),
            "peak": row.parts.peak,
            "budget": plan.budget,
            "host": plain(row.host) | {"total": row.host.total},
            "sent": row.sent,
        }

    def _title(self) -> list[str]:
        run, planned, config = self.run, self.planned, self.run.config
        if isinstance(config, Distillation):
            what = f"distillation {config.objective(run.network).summary}"
            passes = "a step has the arithmetic of"
        else:
            what, passes = "training of a teacher", "a step, forward and backward, is"
        whose = "" if planned.recipe is None else f", settings of {planned.recipe.file}"
        thousands = config.total_steps * config.batch / 1000
        kimg = f"{thousands:,.0f} kimg" if thousands >= 100 else f"{three_digits(thousands)} kimg"
        length = f"length: {counted(f'{config.total_steps:,}', 'step')}, {kimg}, {planned.source}"
        if not self.has_length:
            length = f"no length is published: hours are those of {kimg}; give --kimg or --max-steps"
        further = f" and {flops_in_words(run.further_flops)} of LPIPS" if run.further_flops else ""
        precision = config.decided_precision
        peak = peak_in_words(precision, config.tf32)
        return [
            f"{self.model}: {what}{whose}",
            f"{architecture(run.network)}, {images(run.network)}, {parameter_count(run.network.unguided):,} parameters",
            *self._guide(),
            *([words.removeprefix(", ")] if (words := lora_words(config.to_json())) else []),
            f"batch {config.batch}, {precision}",
            *textwrap.wrap(length, WIDTH, subsequent_indent="  "),
            *textwrap.wrap(
                f"arithmetic: {flops_in_words(run.forward_flops)} a forward pass of an image; {passes} "
                f"{run.forwards:.3g} of them{further}, for {counted(config.batch, 'image')}:",
                WIDTH,
                subsequent_indent="  ",
            ),
            f"  {flops_in_words(run.step_flops())} a step, {flops_in_words(run.step_flops() * run.steps_from())} "
            f"in all; hours at {self.share:.3g} of the {peak} peak (an assumption: --share):",
            f"  {', '.join(f'{gpu.name} {self._peak(gpu) / 1e12:g}' for gpu in GPUS)} TFLOP/s",
            *([f"  {run.remark}"] if run.remark else []),
            *self._beside(),
            f"disk: {run.disk.in_words()}",
        ]

    def _guide(self) -> Iterator[str]:
        if (guide := self.run.network.guide) is not None:
            yield (
                f"guided by {architecture(guide.network)}, {parameter_count(guide.network):,} parameters, in the bytes "
                "of the teacher"
            )

    def _beside(self) -> Iterator[str]:
        """Lines on what the hours leave out and the arithmetic knows."""
        if (teaching := self._teaching()) is not None:
            yield (
                f"its teacher is trained before, {teaching['steps']:,} steps of {teaching['batch']} images, not in the "
                f"hours below;\n  GPU hours: {_shown(teaching['gpu_seconds'])}"
            )
        if (found := self._evaluation()) is None:
            return
        given = "evaluation" if self.planned.always_evaluated else "evaluation, with --reference"
        yield f"{given}: {self.run.evaluation_words(found['images'])};"
        yield f"  not in the hours below, features left out; GPU hours: {_shown(found['gpu_seconds'])}"

    def _head(self) -> str:
        price = f"{'price':>8} " if self.prices else ""
        return f"{'GPUs':<12} {'micro x acc':>11} {'form':<9} {'ZeRO':>4} {'hours':>8} {'GPU h':>8} {price}" + " ".join(
            f"{name:>5}" for name in ("teach", "train", "grads", "Adam", "EMA", "act.", "peak", "host", "disk")
        )

    def _row(self, row: GpuCost) -> str:
        start = f"{row.fit.ranks} x {row.gpu.name}"
        if (layout := row.fit.layout) is None:
            return f"{start:<12} not possible: {row.fit.reason}"
        plan, parts = layout.plan, row.parts
        form = f"{plan.backward or '-'}{'+ck' * plan.activation_checkpointing}"
        price = f"{'-' if row.price is None else at_least_thousandths(row.price):>8} " if self.prices else ""
        numbers = (parts.teacher, parts.weights, parts.gradients, parts.moments, parts.ema, parts.activations)
        shown = " ".join(f"{_gigabytes(value):>5}" for value in numbers)
        hours, gpu_hours = (at_least_thousandths(seconds / 3600) for seconds in (row.wall_seconds, row.gpu_seconds))
        return (
            f"{start:<12} {f'{plan.micro_batch} x {layout.accumulation}':>11} {form:<9} {plan.parts.stage:>4} "
            f"{hours:>8} {gpu_hours:>8} {price}{shown} "
            f"{_gigabytes(parts.peak):>5} {_gigabytes(row.host.total):>5} {_gigabytes(self.run.disk.total):>5}"
        )

    def _legend(self) -> list[str]:
        sent = max((row.sent for row in self.rows), default=0)
        price = "; price: of the GPU hours" if self.prices else ""
        of = f" (at least {size(sent)} a step from each of {max(self.counts)} GPUs)" if sent else ""
        lines = [
            "micro x acc: images that a GPU handles at a time, and how often in a step; form: of the backward pass,",
            "  +ck with activations computed again, '-' where there is one form only; ZeRO: DeepSpeed's stage",
            f"hours: from start to end; GPU h: hours of all GPUs together{price}",
            f"  left out: communication{of}, checkpoints, compilation, reading of data",
            "GB of each GPU: teach: weights of the frozen teacher; train: weights in training, with their fp32 copies;",
            "  grads: gradients with buffers; Adam: its moments; EMA: the average; act.: activations and temporaries;",
            "  peak: the sum, at most 85 % of the GPU, for workspaces of convolutions are not in it",
            f"GB of a node of up to {OF_A_NODE} GPUs: host: memory beside what Python and its libraries take in each",
            "  process: weights at the start, a checkpoint in the making, what --offload keeps there, pinned; disk:",
            "  checkpoints, snapshots, networks",
            "at least 16 images at a time are preferred (an assumption: fewer leave a GPU idle)",
        ]
        if not isinstance(self.run.config, Distillation):
            lines.append(
                "the images of --data lie on each GPU and in each process too, up to 4 GB of pixels: not counted"
            )
        return lines


def parse_prices(words: Sequence[str]) -> dict[str, float]:
    """Prices of a GPU hour by the names of `GPUS`.

    Args:
        words: a number, of all GPUs, or NAME=NUMBER each.

    Raises:
        ValueError: another word.
    """
    names = {_plain(gpu.name): gpu.name for gpu in GPUS}
    found: dict[str, float] = {}
    for word in words:
        name, _, number = word.rpartition("=")
        if name and _plain(name) not in names:
            raise ValueError(f"price is of {', '.join(names.values())}, got {word}")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise ValueError(f"price must be a number >= 0, or one of a GPU as in A100=1.5, got {word}")
        found |= dict.fromkeys([names[_plain(name)]] if name else names.values(), value)
    return found


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower()).removeprefix("rtx")


def _shown(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {at_least_thousandths(value / 3600)}" for name, value in seconds.items())


def _gigabytes(count: int) -> str:
    value = count / 1e9
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
