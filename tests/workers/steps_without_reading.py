"""Worker: iterations of a distillation and of a teacher's training in which no tensor's value may reach Python.

Argument (JSON): {"out": file}. Leaves {"read": {setting: {place: readings}}, "waits": {setting: {place: calls of
DeepSpeed's device-wide synchronisation}}}. On a GPU every wait of the host is an error.
"""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench.no_reading import NoReading, synchronizations
from ipfm.engine.config import TeacherConfig
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.world import start_world
from ipfm.engine.runtime.launcher import stop_world
from ipfm.engine.training.teacher import TeacherTraining
from ipfm.models import NetworkConfig, build_network

NETWORK = NetworkConfig(
    img_resolution=16, img_channels=2, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,),
    dropout=0.1, label_dim=3, augment_dim=9, D=16.0,
)  # fmt: skip
BASE = {"batch": 4, "micro_batch": 1, "max_steps": 9, "augment": 0.5, "clip_grad": 1.0}
SETTINGS = (
    ("fp32", 0, "joint", 1), ("fp32", 2, "phased", 2), ("bf16", 1, "joint", 1),
)  # fmt: skip
# What DeepSpeed's stage 3 gathers it looks up in host memory, which counts as reading; it may not wait either.
WAITING = (("fp32", 3, "joint", 1, 2), ("bf16", 1, "phased", 1, 2))
# Iterations in which what is made once is made; a GPU's graphs are recorded in more than one.
BEFORE = 3 if torch.cuda.is_available() else 1


@contextmanager
def no_waiting() -> Iterator[None]:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


def main() -> None:
    job = json.loads(sys.argv[1])
    world = start_world()
    gc.freeze()
    found: dict[str, dict[str, dict[str, int]]] = {"read": {}, "waits": {}}

    def run(name: str, task: Distiller | TeacherTraining, *, read: bool = True) -> None:
        for step in range(BEFORE):
            task.iteration(step)
        with synchronizations() as waits:
            if read:
                with NoReading(count=True) as mode, no_waiting():
                    task.iteration(BEFORE)
                found["read"][name] = dict(mode.found)
            else:
                task.iteration(BEFORE)
        found["waits"][name] = dict(waits)

    for precision, zero, backward, steps in SETTINGS:
        config = DistillConfig(
            **BASE, dropout=0.1, zero=zero, precision=precision, backward=backward, steps=steps,
            activation_checkpointing="on" if backward == "phased" else "off",
        )  # fmt: skip
        name = f"distillation, {precision}, ZeRO {zero}, {backward}, {steps} steps"
        run(name, Distiller(config, build_network(NETWORK), world=world))
    for precision, zero, backward, steps, updates in WAITING:
        config = DistillConfig(
            **BASE, zero=zero, precision=precision, backward=backward, steps=steps, student_updates=updates
        )
        name = f"distillation, {precision}, ZeRO {zero}, {backward}, {updates} student updates"
        run(name, Distiller(config, build_network(NETWORK), world=world), read=False)
    images = torch.randint(256, (8, 2, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageDataset(images, torch.arange(8) % 3, classes=3)
    teaching = TeacherConfig(**BASE, zero=2, precision="bf16")
    run("teacher, bf16, ZeRO 2", TeacherTraining(teaching, NETWORK, data, world=world))
    if world.is_main:
        Path(job["out"]).write_text(json.dumps(found))
    stop_world()


main()
