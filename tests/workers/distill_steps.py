"""Worker: distils a stored teacher for some steps in several settings, and leaves the weights of each.

Argument (JSON): {"teacher": folder, "out": folder, "cases": [{"name", "steps", "config", "load"?, "save"?, "export"?,
"persistent"?, "start"?, "continue_from"?}], "as_on_a_gpu"?}. "config" may name its "objective", else ipfm, and
"guide", the folder of the network that guides the teacher, and a "teacher" of its own.
"persistent": elements below which ZeRO 3 keeps a parameter whole; 0: all are sharded. "start": leave what is there
before the first step too, under the name with -start. "continue_from": a training that is gone on from, for "steps"
more. A case with "save" or "export" leaves that alone.
"""

import copy
import functools
import gc
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from on_a_gpu import put_together_as_on_a_gpu

from ipfm.engine import Distiller
from ipfm.engine.commands.bench.equivalence import real_images, trained_tensors
from ipfm.engine.distributed import zero
from ipfm.engine.distributed.world import import_deepspeed, start_world
from ipfm.engine.experiments.options import options_for
from ipfm.engine.experiments.starts import read_start
from ipfm.engine.objectives import OBJECTIVES
from ipfm.engine.runtime.launcher import stop_world
from ipfm.engine.training import resolve
from ipfm.engine.training.checkpoint import find_checkpoint, load_checkpoint
from ipfm.engine.training.checkpoint_writer import save_checkpoint
from ipfm.engine.training.resolve import complete
from ipfm.models import guided, load_teacher
from ipfm.models.facts import GeneratorFacts


def main() -> None:
    job = json.loads(sys.argv[1])
    world = start_world()
    # What is imported stays: DeepSpeed and this program look for garbage often.
    gc.freeze()
    if any(case["config"].get("precision") == "fp16" for case in job["cases"]):
        # Processors without fast fp16 can do it too, slowly.
        resolve.fp16_supported = lambda device: True
        import_deepspeed().accelerator.get_accelerator().is_fp16_supported = lambda: True
    # DeepSpeed's stage 3 writes out every parameter for a message that it does not show.
    torch.nn.Parameter.__repr__ = object.__repr__
    teacher_in = functools.cache(load_teacher)
    for case in job["cases"]:
        zero.PERSISTENT_ELEMENTS = case.get("persistent", 0)
        settings = dict(case["config"])
        kind = OBJECTIVES[settings.pop("objective", "ipfm")]
        distilled = teacher = teacher_in(settings.pop("teacher", job["teacher"]))
        # The small networks of tests too are gathered in several messages.
        zero.GATHERED_ELEMENTS = sum(p.numel() for p in teacher.parameters()) // 3
        if (guide := settings.pop("guide", None)) is not None:
            distilled = guided(teacher, load_teacher(guide), settings["guidance"])
        start = None
        if "continue_from" in case:
            options = options_for(kind)(**settings, continue_from=Path(case["continue_from"]))
            start = read_start(options, complete(options.distillation(), teacher.config, world.device), teacher)
        config = kind(**settings)
        real = real_images() if config.takes_real_images else None
        distiller = Distiller(config, copy.deepcopy(distilled), start=start, real=real, world=world)
        first = distiller.first_step
        if "load" in case:
            checkpoint = find_checkpoint(Path(case["load"]))
            assert checkpoint is not None
            first = load_checkpoint(checkpoint, distiller.networks)
        if case.get("start"):
            tensors = trained_tensors(distiller)
            if world.is_main:
                save_file(tensors, Path(job["out"]) / f"{case['name']}-start-{world.size}.safetensors")
        losses: dict[str, list[torch.Tensor]] = {}
        for step in range(first, case["steps"] + distiller.first_step):
            measured = distiller.iteration(step)
            for name, value in measured.sums.items():
                losses.setdefault(name, []).append(world.all_reduce_sum_(torch.stack([value, measured.counts[name]])))
        if "save" in case:
            save_checkpoint(Path(case["save"]), case["steps"], distiller.networks, world)
        if "export" in case:
            distiller.export(Path(case["export"]), about=GeneratorFacts(), steps=case["steps"])
        if "save" in case or "export" in case:
            continue
        tensors = trained_tensors(distiller)
        tensors |= {f"loss/{name}": torch.stack([s / c for s, c in values]) for name, values in losses.items()}
        if world.is_main:
            save_file(tensors, Path(job["out"]) / f"{case['name']}-{world.size}.safetensors")
    stop_world()


with put_together_as_on_a_gpu() if json.loads(sys.argv[1]).get("as_on_a_gpu") else nullcontext():
    main()
