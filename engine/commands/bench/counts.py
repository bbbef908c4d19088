"""What a step costs that can be counted without a GPU.

    python -m ipfm.engine.commands.bench.counts [ROW ...]

Each row is a number of this version; docs/speed.md has those of several versions beside each other. A row has a command
of its own, by its name. All but the host's time are counts, the same at every run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ipfm.engine.commands.bench.meta_step import (
    EmptyGraphs,
    Recording,
    block_passes,
    network_traffic,
    one_micro_batch,
    record,
)
from ipfm.engine.commands.bench.plain_step import PlainDistillation
from ipfm.engine.config import ZeroStage
from ipfm.engine.distributed import pieces
from ipfm.engine.distributed.world import World, import_deepspeed, start_world
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.runtime.launcher import stop_world
from ipfm.engine.training.distiller import Distiller
from ipfm.engine.training.resolve import resolve
from ipfm.kernels.bench.compile_report import access_bits, compile_variant, tool_output
from ipfm.kernels.bench.fake_driver import Variant, fake_cuda
from ipfm.models import build_network, presets

BATCH, EDM2_BATCH = 256, 64
CIFAR = replace(presets.get("cifar10-ncsnpp", D=2048.0), dropout=0.0)
# The same number of operators, each with next to nothing to compute.
TINY = replace(CIFAR, img_resolution=8, model_channels=8, attn_resolutions=(4,))
# Steps before it is timed: pieces are captured by then.
BEFORE, ROUNDS = pieces.WARM_UPS + 2, 12


# ------------------------------------------------------------------------------------------------------------- waiting


def synchronisations() -> Mapping[str, Any]:
    """Calls of DeepSpeed's device-wide synchronisation in an iteration, by ZeRO stage, once the first is over."""
    network = replace(presets.get("digits", D=128.0), model_channels=8)
    world = start_world()
    torch.manual_seed(0)
    teacher = build_network(network)
    found: dict[str, int] = {}
    calls: Counter[int] = Counter()
    accelerator: Any = import_deepspeed().accelerator.get_accelerator()
    before = accelerator.synchronize
    accelerator.synchronize = lambda device_index=None: calls.update([0])
    try:
        for stage in (0, 1, 2, 3):
            config = DistillConfig(
                batch=4, micro_batch=4, max_steps=9, zero=stage, precision="fp32", backward="joint",
                activation_checkpointing="off",
            )  # fmt: skip
            training = Distiller(config, teacher, world=world)
            for step in range(3):
                calls.clear()
                training.iteration(step)
            found[f"ZeRO {stage}"] = calls.total()
    finally:
        accelerator.synchronize = before
        stop_world()
    return {"value": max(found.values()), **found}


# ---------------------------------------------------------------------------------------- what is dispatched and moved


@cache
def _cifar(*, graphs: bool = False, stage: ZeroStage = 0) -> Recording:
    """An iteration of the CIFAR-10 recipe's network, joint, in bf16, with one update of the student."""
    config = DistillConfig(max_steps=1, precision="bf16", zero=stage, memory_format="channels_last", augment=0.0)
    return record(one_micro_batch(config, CIFAR, BATCH, stage=stage), CIFAR, graphs=graphs)


def operators() -> Mapping[str, Any]:
    """Operators dispatched in an iteration of CIFAR-10's ncsn++, bf16, joint; launches outside of one count as one."""
    recording = _cifar()
    most = dict(recording.by_operator.most_common(8))
    return {"value": recording.operator_count, "launches": len(recording.launches), **most}


def replays() -> Mapping[str, Any]:
    """Operators dispatched and CUDA graphs replayed in the same iteration, once its pieces are captured."""
    recording = _cifar(graphs=True)
    return {
        "value": f"{recording.operator_count} and {recording.replays}",
        "launches outside of graphs": len(recording.launches),
    }


def weight_copies() -> Mapping[str, Any]:
    """Copies of weights in the same iteration at ZeRO 1, for convolutions whose activations lie in another order."""
    recording = _cifar(stage=1)
    return {"value": recording.reordered, "bytes": recording.reordered_bytes}


def traffic() -> Mapping[str, Any]:
    """GB that elementwise operations, biases and normalisations read and write at batch 256."""
    recording = _cifar()
    once, again = recording.elementwise_bytes / 1e9, recording.norm_rereads / 1e9
    biases = (recording.added_biases + recording.reduced_biases) / 1e9
    return {
        "value": f"{once:.0f} to {once + again:.0f}",
        "each tensor of an operator once": round(once, 1),
        "of it biases of convolutions": round(biases, 1),
        "read again by normalisations": round(again, 1),
    }


def passes() -> Mapping[str, Any]:
    """Passes over the data in the forward of a residual block of CIFAR-10's ncsn++, outside of convolutions."""
    return {"value": round(block_passes(CIFAR, BATCH), 2)}


def edm2_traffic() -> Mapping[str, Any]:
    """MB an image that EDM2's size S moves outside of convolutions and attention, fp16, with kernels and without."""
    network = replace(presets.get("edm2-img512-s"), dropout=0.0)
    found = {
        f"{name}, by {by}": round(network_traffic(network, EDM2_BATCH, backward=backward, kernels=kernels) / 1e6)
        for name, backward in (("forward", False), ("forward and backward", True))
        for by, kernels in (("the kernels", True), ("PyTorch's operations", False))
    }
    return {"value": found["forward, by the kernels"], **found}


# ------------------------------------------------------------------------------------------------------- machine code


_LINE = re.compile(r"^(?P<label>\.\w+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*)")
_TARGET = re.compile(r"`\((\.\w+)\)")


def loops(listing: str) -> tuple[list[str], list[list[str]]]:
    """(all opcodes, those of each loop) of an nvdisasm listing, without padding."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    bodies: list[list[str]] = []
    for line in listing.splitlines():
        if not (found := _LINE.search(line)):
            continue
        if found["label"]:
            labels[found["label"]] = len(opcodes)
        elif not found["opcode"].startswith("NOP"):
            opcodes.append(found["opcode"])
            target = _TARGET.search(found["rest"])
            if found["opcode"].startswith("BRA") and target and target[1] in labels:
                bodies.append(opcodes[labels[target[1]] :])
    return opcodes, bodies


def per_element(listing: str, bits: int) -> tuple[float, float]:
    """(instructions, those of them that are MUFU) a thread executes for an element; `bits` are read of one in a pass.

    In loops over the elements, each of them once; in code without such a loop all of it.
    """
    opcodes, bodies = loops(listing)
    chosen = [body for body in bodies if _bits_read(body)] or [opcodes]
    shares = [(len(body), sum(o.startswith("MUFU") for o in body), _bits_read(body) / bits) for body in chosen]
    instructions, special = (sum(share[i] / share[2] for share in shares) for i in (0, 1))
    return instructions, special


def _bits_read(opcodes: Sequence[str]) -> int:
    loads = (o for o in opcodes if o.startswith("LDG") and "EL" not in o.split("."))
    return sum(map(access_bits, loads))


def _norm_backward() -> list[Variant]:
    """The backward of normalisations of 256 channels, 32x32, in channels_last: with and without an addend."""
    return [
        variant
        for variant in {launch.variant: None for launch in _cifar().launches if launch.numbers.get("HW") == 1024}
        if variant.name == "group_norm_silu_backward_kernel"
        and variant.constant("CHANNELS") == 8
        and variant.constant("SILU")
    ]


def instructions() -> Mapping[str, Any]:
    """Instructions and MUFU an element: group_norm_silu backward, 256 channels, 32x32, channels_last, bf16, sm_90."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        for variant in _norm_backward():
            path.write_bytes(compile_variant(variant, 90)[0])
            listing = tool_output("nvdisasm", "--print-code", str(path))
            found.append((*per_element(listing, 2 * 16), variant.warps))  # x and dy
    worst = max(found)
    return {"value": f"{worst[0]:.0f} and {worst[1]:.1f}", "warps": worst[2], "kinds of launches": len(found)}


# --------------------------------------------------------------------------------------------------------- host's time


def _iteration(name: str, world: World) -> Callable[[int], object]:
    """An iteration of the tiny network: "plain", or the engine as the name's end says."""
    torch.manual_seed(0)
    teacher = build_network(TINY)
    stage: Any = 1 if name.endswith("ZeRO 1") else 0
    config = DistillConfig(
        batch=1, micro_batch=1, max_steps=10_000, zero=stage, precision="fp32", backward="joint",
        activation_checkpointing="off", memory_format="channels_last", augment=0.0,
    )  # fmt: skip
    if name == "plain":
        return PlainDistillation(resolve(config, TINY, world), teacher, device=world.device).iteration
    with mock.patch.dict(pieces.CAPTURES, {"cpu": EmptyGraphs} if name.endswith("graphs") else {}):
        return Distiller(config, teacher, world=world).iteration


def host_time() -> Mapping[str, Any]:
    """Times of the host for an iteration of as many operators as CIFAR-10's ncsn++ has, over the plain loop's.

    Processor time, on one thread: a network of 8 channels at batch 1, Triton's own way up to a launch that does
    nothing, and for the rest PyTorch's operators on the CPU. Medians of rounds in alternation.
    """
    torch.set_num_threads(1)
    world = start_world()
    try:
        with fake_cuda(("cpu",), recorded=False):
            names = ("plain", "engine, ZeRO 0", "engine, ZeRO 1", "engine, CUDA graphs")
            tasks = {name: _iteration(name, world) for name in names}
            times: dict[str, list[float]] = {name: [] for name in tasks}
            for step in range(BEFORE + ROUNDS):
                for name, task in tasks.items():
                    begun = time.process_time()
                    task(step)
                    times[name].append(time.process_time() - begun)
    finally:
        stop_world()
    plain = times["plain"][BEFORE:]
    shares = {
        name: statistics.median(mine / theirs for mine, theirs in zip(taken[BEFORE:], plain, strict=True))
        for name, taken in times.items()
    }
    milliseconds = {f"{name}, ms": round(1e3 * statistics.median(taken[BEFORE:]), 1) for name, taken in times.items()}
    of = {name.removeprefix("engine, "): f"{share:.2f}" for name, share in shares.items()}
    return {"value": f"{of['ZeRO 0']}; with CUDA graphs {of['CUDA graphs']}; at ZeRO 1 {of['ZeRO 1']}", **milliseconds}


# ----------------------------------------------------------------------------------------------------------- the table

# Name of a row -> (what it is, what the issue that asked for it allows, how it is counted).
ROWS: dict[str, tuple[str, str, Callable[[], Mapping[str, Any]]]] = {
    "synchronisations": ("device-wide synchronisations an iteration", "0", synchronisations),
    "operators": ("operators dispatched, CIFAR-10 ncsn++, bf16, joint, one student update", "3000", operators),
    "replays": ("operators and replays of CUDA graphs in such an iteration", "a handful of replays", replays),
    "host-time": ("host's time of an iteration over the plain loop's", "0.8; 0.2 with CUDA graphs", host_time),
    "weight-copies": ("copies of weights into the activations' order, an iteration at ZeRO 1", "0", weight_copies),
    "traffic": ("GB of elementwise and normalisation traffic, batch 256", "200", traffic),
    "passes": ("passes over the data in a residual block's forward, outside of convolutions", "7", passes),
    "edm2-traffic": ("MB an image of elementwise traffic, forward, EDM2 size S, fp16, batch 64", "270", edm2_traffic),
    "instructions": ("instructions and MUFU an element, backward of group_norm_silu, sm_90", "62 and 4", instructions),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rows that are asked for, all without a name, each counted in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m ipfm.engine.commands.bench.counts", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"one or several of {', '.join(ROWS)}; all by default")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    options = parser.parse_args(argv)
    unknown = [row for row in options.rows if row not in ROWS]
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}; possible: {', '.join(ROWS)}")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    found: dict[str, Mapping[str, Any]] = {}
    for row in options.rows or ROWS:
        found[row] = counted(row)
        what, most, _ = ROWS[row]
        more = (f"    {name}: {value}" for name, value in found[row].items() if name != "value")
        print(f"{what}: {found[row]['value']} (at most {most})", *more, sep="\n", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def counted(row: str) -> Mapping[str, Any]:
    """A row, counted in a process of its own: with compiled kernels, without a GPU, on one thread.

    Raises:
        SystemExit: it failed; it has said why.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    code = f"import json, sys; from {__spec__.name} import ROWS; json.dump(ROWS[{row!r}][2](), open(sys.argv[1], 'w'))"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        done = subprocess.run([sys.executable, "-c", code, str(out)], env=env, stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(f"{row} could not be counted (exit code {done.returncode})")
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
