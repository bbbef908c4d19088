"""Worker: a teacher's training, of which one process alone meets errors, as one of several.

Argument (JSON): {"out": folder}
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ipfm.engine.config import TeacherConfig
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.world import start_world
from ipfm.engine.evaluation.evaluation import Evaluation
from ipfm.engine.evaluation.metrics import PixelFeatures, Statistics
from ipfm.engine.objectives.step_metrics import StepMetrics
from ipfm.engine.runtime.errors import TrainingFailed
from ipfm.engine.runtime.launcher import stop_world
from ipfm.engine.training.teacher import TeacherTraining
from ipfm.models import NetworkConfig

NETWORK = NetworkConfig(
    img_resolution=4, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(), D=64.0
)


class Files:
    """Images in files, of which those of a process cannot be read from some reading on; one tells the set."""

    shape, device = (16, 1, 4, 4), torch.device("cpu")

    def __init__(self, good: int) -> None:
        self.good = good

    def to(self, device: object) -> "Files":
        return self

    def read(self, indices: Tensor) -> Tensor:
        self.good -= 1
        if self.good < 0:
            raise OSError(5, "Input/output error", "/data/7.png")
        return torch.zeros(len(indices), 1, 4, 4, dtype=torch.uint8)


class Features(PixelFeatures):
    """Pixels, which one process cannot take."""

    broken = False

    def __call__(self, images: Tensor) -> Tensor:
        if self.broken:
            raise RuntimeError("no cuDNN")
        return super().__call__(images)


def main() -> None:
    out = Path(json.loads(sys.argv[1])["out"])
    world = start_world()
    config = TeacherConfig(
        D=64.0, batch=4, max_steps=4, zero=0, heun_steps=1, eval_every=2, log_every=1, micro_batch=2, precision="fp32"
    )
    features = Features((1, 4, 4))
    features.broken = world.rank == 1
    evaluation = Evaluation(features, Statistics(torch.zeros(16), torch.eye(16)), images=8, batch=2)
    found = {}
    for name, good in (("stopped", 4), ("finished", 100)):
        data = ImageDataset(Files(good if world.rank == 1 else 100))
        try:
            TeacherTraining(config, NETWORK, data, evaluation=evaluation, world=world).run(out / "run")
            found[name] = ""
        except TrainingFailed as error:
            found[name] = str(error)
    training = TeacherTraining(replace(config, max_steps=6), NETWORK, data, world=world)
    if world.rank == 1:
        training._step = broken
    try:
        training.run(out / "run")
    except TrainingFailed as error:
        found["alone"] = str(error)
    (out / f"rank{world.rank}.json").write_text(json.dumps(found))
    stop_world()


def broken(step: int) -> StepMetrics:
    raise TypeError("a defect of one")


main()
