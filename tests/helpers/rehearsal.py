"""Every recipe's step on GPUs that are not there: what it launches, compiled for each of them (`make rehearsal`).

    python tests/helpers/rehearsal.py [--recipe NAME ...] [--processes 2] [--out FILE]

An iteration of each recipe and preset is recorded on the meta device in bf16 and channels_last, with the whole batch on
one GPU and with its share of eight. Every launch has passed the checks of a launcher by then (the grid, the arguments'
ranges). Each kind of launch is then compiled for sm_80, sm_90 and sm_100, the heaviest of each kernel for sm_75, sm_86,
sm_89 and sm_120 too. With --out what is compiled is written down as it comes, in FILE with .compiled.jsonl in place of
its suffix: a rehearsal that was interrupted, given again, compiles the rest. Ends with exit code 1 where something does
not compile, spills, or asks for more registers, threads or shared memory than there are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ipfm.engine.commands.bench.meta_step import GPUS, fused_dropout, one_micro_batch, record
from ipfm.engine.commands.recipes import project_recipes
from ipfm.engine.config import RunConfig
from ipfm.engine.experiments.distil import DistilRecipe
from ipfm.engine.experiments.local import TrainAndDistil
from ipfm.engine.experiments.teacher import TeacherRecipe
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.kernels.bench.fake_driver import Launch
from ipfm.kernels.bench.rehearsal import Compiled, Kept, asked, compile_all, compile_some, heaviest, in_words
from ipfm.models import NetworkConfig, presets


class Step(NamedTuple):
    """A training to record."""

    name: str
    config: RunConfig
    network: NetworkConfig


def steps() -> Iterator[Step]:
    """The steps of every recipe, and of every preset that no recipe has. Ablations run the digits' recipes."""
    seen: list[NetworkConfig] = []
    for recipe in project_recipes():
        name = recipe.file.removesuffix(".py")
        for step in _of_recipe(name, recipe):
            seen.append(replace(step.network, D=1.0, dropout=0.0))
            yield step
    for preset in presets.names():
        if replace(presets.get(preset), D=1.0, dropout=0.0) not in seen:
            network = presets.get(preset, D=128.0)
            yield Step(preset, DistillConfig(batch=256, max_steps=1, dropout=fused_dropout(network)), network)


def _of_recipe(name: str, recipe: Any) -> Iterator[Step]:
    if isinstance(recipe, DistilRecipe):
        network = presets.get(recipe.preset, D=recipe.D)
        yield Step(name, recipe.base.distillation(), network)
    elif isinstance(recipe, TrainAndDistil):
        network = recipe.network(recipe.base, recipe.D)
        yield Step(name, recipe.base.distillation(), network)
        yield Step(f"{name}, teacher", recipe.teaching(recipe.base), network)
    elif isinstance(recipe, TeacherRecipe):
        for arch, preset in recipe.presets.items():
            network = replace(presets.get(preset, D=recipe.D), img_resolution=recipe.shape[1])
            yield Step(f"{name} --arch {arch}", recipe.base.training(), network)
    else:
        raise TypeError(f"{name} is a recipe of a kind that the rehearsal does not know: {type(recipe).__name__}")


def tried(step: Step, gpus: int) -> tuple[str, list[Launch], int]:
    """As `recorded`; where that fails, a name that says why, and nothing: the others are rehearsed too."""
    try:
        return recorded(step, gpus)
    except Exception as error:
        return f"{step.name} on {gpus} GPUs is not recorded: {type(error).__name__}: {error}", [], 0


def recorded(step: Step, gpus: int) -> tuple[str, list[Launch], int]:
    """(name, one launch of each kind, operators) of an iteration on so many GPUs."""
    torch.set_num_threads(1)
    config = replace(step.config, max_steps=1, kimg=None, precision="bf16", zero=1, memory_format="channels_last")
    if getattr(config, "distance", "") == "lpips":
        config = replace(config, distance="l2")  # whose network, VGG, launches no kernel of this project
    settings = one_micro_batch(config, step.network, max(1, config.batch // gpus), stage=1)
    recording = record(settings, step.network)
    kinds = {launch.variant: launch for launch in recording.launches}
    return f"{step.name}, {settings.micro_batch} images", list(kinds.values()), recording.operator_count


def rehearse(chosen: list[Step], processes: int, kept: Kept) -> dict[str, Any]:
    """Record and compile in processes side by side: the counts, and what is wrong."""
    begun = time.monotonic()
    tasks = [(step, gpus) for step in chosen for gpus in (1, GPUS)]
    launches: list[Launch] = []
    missing: list[str] = []
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name, kinds, operators in pool.map(tried, *zip(*tasks, strict=True)):
            print(f"{name}: {operators} operators, {len(kinds)} kinds of launches", file=sys.stderr, flush=True)
            launches += kinds
            missing += [] if kinds else [name]
    return _compiled(len(tasks), launches, missing, processes, kept) | {"seconds": round(time.monotonic() - begun)}


def _compiled(steps: int, launches: list[Launch], missing: list[str], processes: int, kept: Kept) -> dict[str, Any]:
    """The counts of what was recorded once it is compiled; what was compiled before an interruption is not again."""
    # Each kind once, whichever recipes and numbers of GPUs launch it.
    variants, heavy = dict.fromkeys(kind.variant for kind in launches), heaviest(launches)
    done = kept.of(asked(variants, heavy))
    known = {(one.variant, one.capability) for one in done}
    print(f"{len(variants)} kinds of launches in all, {len(done)} compiled before", file=sys.stderr, flush=True)
    for part in compile_all(variants, heavy, known=known, processes=processes):
        kept.add(part)
        done += part
        # What is wrong is known when it is found, not an hour later.
        print(f"{len(done)} compiled", *faults(launches, part), sep="\n", file=sys.stderr, flush=True)
    counts = counted(steps, launches, done)
    return counts | {"faults": [*missing, *counts["faults"]]}


def rehearse_quickly(chosen: list[Step]) -> dict[str, Any]:
    """In this process, with the whole batch, and of each kernel the variant with the most to do, for sm_90."""
    launches = [launch for step in chosen for launch in recorded(step, 1)[1]]
    return counted(len(chosen), launches, compile_some(heaviest(launches), 90))


def counted(steps: int, launches: list[Launch], done: list[Compiled]) -> dict[str, Any]:
    """The counts of what was recorded and compiled."""
    variants = dict.fromkeys(c.variant for c in done)
    return {
        "steps": steps,
        "variants": len(variants),
        "by_kernel": dict(sorted(Counter(variant.name for variant in variants).items())),
        "by_architecture": dict(sorted(Counter(f"sm_{c.capability}" for c in done).items())),
        "spills": sum(c.spills for c in done),
        "most_registers": max((c.registers for c in done), default=0),
        "most_shared_bytes": max((c.shared for c in done), default=0),
        "faults": faults(launches, done),
    }


def faults(launches: list[Launch], done: list[Compiled]) -> list[str]:
    """What is wrong with what was compiled, a line each."""
    examples = {launch.variant: launch for launch in launches}
    return [
        f"{c.variant.name} for sm_{c.capability}: {', '.join(c.faults)} ({in_words(c.variant, numbers)})"
        for c in done
        for numbers in (examples[c.variant].numbers,)
        if c.faults
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=[], help="only steps whose name begins with one of these")
    parser.add_argument("--processes", type=int, default=2, help="side by side (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="for sm_90, and of each kernel the largest launch alone")
    parser.add_argument("--out", type=Path, help="a JSON file for the counts; beside it what is compiled")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    chosen = [step for step in steps() if step.name.startswith(tuple(options.recipe) or "")]
    if not chosen:
        known = ", ".join(dict.fromkeys(step.name.partition(" ")[0].rstrip(",") for step in steps()))
        parser.error(f"no step begins with {' or '.join(options.recipe)}; possible: {known}")
    if options.out is not None and options.out.is_dir():
        parser.error(f"--out {options.out} is a folder: give a file")
    try:
        kept = Kept(None if options.out is None or options.quick else options.out.with_suffix(".compiled.jsonl"))
    except OSError as error:
        parser.error(f"--out {options.out} cannot be written: {error.strerror}")
    counts = rehearse_quickly(chosen) if options.quick else rehearse(chosen, options.processes, kept)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    for name, value in counts.items():
        print(f"{name}: {value}" if name != "faults" else "\n".join(value) or "no faults")
    sys.exit(1 if counts["faults"] else 0)


if __name__ == "__main__":
    main()
