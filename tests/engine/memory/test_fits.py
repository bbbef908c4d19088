"""The table of --dry-run: how the published large batches are laid out on 1, 4 and 8 GPUs of 24, 80 and 141 GB."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from ipfm.engine.experiments.step_time import StepTime
from ipfm.engine.memory.budget import USABLE
from ipfm.engine.memory.fits import GPUS, RANKS, layout_table
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.models import NetworkConfig
from ipfm.recipes import cifar_ipfm

SMALL = NetworkConfig(
    img_resolution=16, img_channels=2, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(),
    dropout=0.0,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the table; memory in GB."""

    ranks: int
    gpu: float
    micro: int
    accumulation: int
    backward: str
    checkpointed: bool
    stage: int
    weights: float
    masters: float
    optimizer: float
    gradients: float
    buckets: float
    step: float
    peak: float
    cost: float


LINE = re.compile(
    r" *(\d+) +([\d.]+) GB +(\d+) x (\d+) +(joint|phased) +(yes|no) +([0-3])" + r" +([\d.]+)" * 8, flags=re.ASCII
)


def rows(text: str) -> list[Row]:
    found = []
    for match in filter(None, map(LINE.fullmatch, text.splitlines())):
        ranks, gpu, micro, parts, backward, again, stage, *numbers = match.groups()
        whole = (int(ranks), float(gpu), int(micro), int(parts), backward, again == "yes", int(stage))
        found.append(Row(*whole, *map(float, numbers)))
    return found


def test_a_large_batch(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.step_time", lambda *_: StepTime(0.001))
    cifar_ipfm.main(["--batch", "4096", "--dry-run"])
    table = rows(capsys.readouterr().out)
    assert [(row.ranks, row.gpu) for row in table] == [(ranks, gpu) for ranks in RANKS for gpu in GPUS]
    for row in table:
        assert row.ranks * row.micro * row.accumulation == 4096
        assert row.peak <= USABLE * row.gpu
        parts = row.weights + row.masters + row.optimizer + row.gradients + row.buckets + row.step
        assert parts == pytest.approx(row.peak, abs=0.05)
        assert (row.cost == 1.0) == (row.backward == "joint" and not row.checkpointed)
        assert row.masters > 0  # bf16 has fp32 masters, in ZeRO's optimiser but on a GPU by itself
        assert (row.stage > 0) == (row.ranks > 1)
    for ranks in RANKS:
        costs = [row.cost for row in table if row.ranks == ranks]
        assert costs == sorted(costs, reverse=True)
    for stage in {row.stage for row in table}:
        per_rank = {row.ranks: row.optimizer for row in table if row.stage == stage}
        assert all(per_rank[a] > per_rank[b] for a in per_rank for b in per_rank if a < b)


def test_what_is_fixed_stands() -> None:
    config = DistillConfig(batch=32, max_steps=1, zero=3, precision="fp32", micro_batch=4, backward="phased",
                           activation_checkpointing="on")  # fmt: skip
    (row,) = rows(layout_table(config, SMALL, ranks=(2,), gpus=(24,), zero=3))
    assert (row.stage, row.micro, row.accumulation, row.backward, row.checkpointed) == (3, 4, 4, "phased", True)
    assert row.masters + row.optimizer < 0.001  # a small network, sharded


def test_what_does_not_fit_says_what_it_needs() -> None:
    config = DistillConfig(batch=2, max_steps=1)
    line = layout_table(config, SMALL, ranks=(1,), gpus=(0.001,)).splitlines()[2]
    assert line.startswith("    1 0.001 GB a process may use 0.8 MiB, but needs at least ")
    assert line.endswith("phased, ZeRO 0, 1 process): more processes or --offload help")


def test_a_batch_that_the_processes_cannot_share() -> None:
    config = DistillConfig(batch=6, max_steps=1)
    table = layout_table(config, SMALL, ranks=(1, 4), gpus=(24,))
    assert [row.ranks for row in rows(table)] == [1]
    assert "4  24 GB batch must be divisible by the number of processes, got 6 and 4" in table


def test_the_columns_have_a_legend() -> None:
    title, head, _, *legend = layout_table(
        DistillConfig(batch=2, max_steps=1), SMALL, ranks=(1,), gpus=(24,)
    ).splitlines()
    assert title.startswith("layouts on GPUs, bf16, ")
    for column in ("ranks", "micro x accum.", "checkpointed", "weights", "masters", "Adam+EMA", "grads", "buckets",
                   "step", "cost"):  # fmt: skip
        assert column in head and any(f"{column}:" in line for line in legend), column
    assert max(map(len, legend)) <= 120
