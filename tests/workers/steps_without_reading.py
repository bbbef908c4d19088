"""Worker: iterations of a distillation and of a teacher's training in which no tensor's value may reach Python.

Argument (JSON): {"out": file}. Leaves {setting: {place: readings}}. On a GPU every wait of the host is an error.
"""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
from no_reading import NoReading

from ipfm.engine import DistillConfig, Distiller
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
    found = {}

    def run(name: str, task: Distiller | TeacherTraining) -> None:
        task.iteration(0)
        task.iteration(1)
        with NoReading(count=True) as mode, no_waiting():
            task.iteration(2)
        found[name] = dict(mode.found)

    for precision, zero, backward, steps in SETTINGS:
        config = DistillConfig(
            **BASE, dropout=0.1, zero=zero, precision=precision, backward=backward, steps=steps,
            activation_checkpointing="on" if backward == "phased" else "off",
        )  # fmt: skip
        name = f"distillation, {precision}, ZeRO {zero}, {backward}, {steps} steps"
        run(name, Distiller(config, build_network(NETWORK), world=world))
    images = torch.randint(256, (8, 2, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageDataset(images, torch.arange(8) % 3, classes=3)
    teaching = TeacherConfig(**BASE, zero=2, precision="bf16")
    run("teacher, bf16, ZeRO 2", TeacherTraining(teaching, NETWORK, data, world=world))
    if world.is_main:
        Path(job["out"]).write_text(json.dumps(found))
    stop_world()


main()
