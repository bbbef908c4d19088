"""The engine against a plain PyTorch loop: the settings that are compared, how, and the table (`make equivalence`)."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import launch
from safetensors.torch import load_file

from ipfm.engine import DistillConfig
from ipfm.engine.commands.bench import plain_loop
from ipfm.engine.commands.bench.equivalence import BASE, LIMIT, compared_teacher, difference
from ipfm.engine.commands.bench.plain_rule import compared_edm2_teacher, distill_edm2
from ipfm.models import load_teacher, save_model

STAGES, RANKS, BACKWARD, ACCUMULATION = (0, 1, 2, 3), (1, 2), ("joint", "phased"), (1, 2)


def make_teacher(folder: Path) -> Path:
    """The teacher of the comparison as a model folder."""
    save_model(compared_teacher(), folder / "model")
    return folder / "model"


def make_edm2_teacher(folder: Path) -> Path:
    """That of EDM2 as a model folder."""
    save_model(compared_edm2_teacher(), folder / "edm2")
    return folder / "edm2"


def grid(ranks: int) -> dict[str, dict[str, Any]]:
    """Every stage, backward mode and accumulation, by name: what the table shows for `ranks` processes."""
    return {
        f"k1-z{stage}-{backward}-a{parts}": {
            **BASE, "zero": stage, "backward": backward, "micro_batch": BASE["batch"] // ranks // parts,
        }
        for stage in STAGES
        for backward in BACKWARD
        for parts in ACCUMULATION
    }  # fmt: skip


def run(
    teacher: Path,
    out: Path,
    ranks: int,
    cases: Mapping[str, Mapping[str, Any]],
    steps: int,
    *,
    start: bool = False,
    whole: int = 0,
    as_on_a_gpu: bool = False,
) -> dict[str, dict]:
    """The engine's tensors after `steps` in each case, from one group of `ranks` processes.

    `start`: before the steps too, under the name with -start. `whole`: parameters of up to so many elements are not
    sharded at stage 3. `as_on_a_gpu`: networks are put together as they are there.
    """
    more = {"steps": steps, "start": start, "persistent": whole}
    jobs = [{"name": name, "config": config, **more} for name, config in cases.items()]
    job = {"teacher": str(teacher), "out": str(out), "cases": jobs, "as_on_a_gpu": as_on_a_gpu}
    launch.run_workers("distill_steps.py", ranks, job, 900)
    names = [*cases, *(f"{name}-start" for name in cases if start)]
    return {name: load_file(out / f"{name}-{ranks}.safetensors") for name in names}


def main() -> int:
    """Print the table; 1 when any row is beyond the limit."""
    steps = BASE["max_steps"]
    print(f"Weights after {steps} steps against a plain PyTorch loop: largest relative difference of a parameter")
    print("| network | ZeRO | ranks | backward | accumulation | student | generator | EMA | |")
    print("|---|---|---|---|---|---|---|---|---|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        teacher = make_teacher(Path(folder))
        plain = plain_loop.distill(load_teacher(teacher), DistillConfig(**BASE), steps)
        start = {n: p.detach() for n, p in load_teacher(teacher).named_parameters()}
        edm2 = make_edm2_teacher(Path(folder))
        plain_edm2 = distill_edm2(load_teacher(edm2), DistillConfig(**BASE), steps)
        final = plain.generator.state_dict()
        moved = max(float((final[name] - p).norm() / p.norm()) for name, p in start.items())
        for ranks in RANKS:
            for network, expected in ((teacher, plain), (edm2, plain_edm2)):
                for name, found in run(network, Path(folder), ranks, grid(ranks), steps).items():
                    row = difference(expected, found)
                    worst = max(worst, *row)
                    _, stage, backward, parts = name.split("-")
                    kind = "EDM2" if network == edm2 else "NCSN++"
                    cells = [kind, stage[1:], str(ranks), backward, parts[1:], *(f"{value:.1e}" for value in row)]
                    print(f"| {' | '.join(cells)} | {'ok' if max(row) <= LIMIT else 'WRONG'} |", flush=True)
        print(f"largest of all: {worst:.1e} (limit {LIMIT:g}); the generator's parameters moved by up to {moved:.1e}")
        # It is made of what is above.
        import compared_cases

        worst = max(worst, compared_cases.table(Path(folder)))
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
