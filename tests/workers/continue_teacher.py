"""Worker: trains a teacher for four steps, and again from the state after two of them, as if it came from a file.

Argument (JSON): {"out": folder, "zero": stage, "ema": whether the state holds an average}
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ipfm.engine import TeacherConfig, TeacherTraining
from ipfm.engine.data.dataset import digits
from ipfm.engine.distributed.world import start_world
from ipfm.engine.runtime.launcher import stop_world
from ipfm.models import NetworkConfig
from ipfm.models.checkpoints.training_state import TrainingState


def weights(training: TeacherTraining) -> dict[str, torch.Tensor]:
    return {f"{kind}/{name}": tensor.detach().float().clone() for kind in training.net.state_kinds
            for name, tensor in training.net.full(kind)}  # fmt: skip


def main() -> None:
    job = json.loads(sys.argv[1])
    world = start_world()
    network = NetworkConfig(
        img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(),
        dropout=0.0, embedding_type="fourier", augment_dim=9, label_dim=10, D=64.0,
    )  # fmt: skip
    config = TeacherConfig(
        batch=8,
        max_steps=4,
        lr=1e-3,
        eps=1e-3,
        lr_rampup_kimg=0.1,
        augment=0.3,
        zero=job["zero"],
        precision="fp32",
        ema_rampup=1.0,  # that an average remembers where it started
    )
    whole = TeacherTraining(config, network, digits(), world=world)
    for step in range(2):
        whole.iteration(step)
    kinds = {kind: {name: t.clone() for name, t in whole.net.full(kind)} for kind in whole.net.state_kinds}
    buffers = {name: t.clone() for name, t in whole.net.module.named_buffers()}
    state = TrainingState(
        config=network,
        D_source="file",
        weights={**kinds["weight"], **buffers},
        ema={**kinds["ema"], **buffers} if job["ema"] else None,
        ema_from=None,
        exp_avg=kinds["exp_avg"],
        exp_avg_sq=kinds["exp_avg_sq"],
        adam_steps=2,
        images_seen=16,
        betas=(0.9, 0.999),
        lr=1e-3,
        eps=1e-3,
    )
    part = TeacherTraining(config, network, digits(), start=state, world=world)
    assert part.first_step == 2 and part.net.steps_applied == 2
    start = weights(part)
    for step in range(2, 4):
        whole.iteration(step)
        part.iteration(step)
    tensors = {"start": start, "whole": weights(whole), "part": weights(part)}
    if world.is_main:
        for name, values in tensors.items():
            save_file(values, Path(job["out"]) / f"{name}.safetensors")
    stop_world()


main()
