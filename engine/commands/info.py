"""`ipfm info`: what a model folder or a checkpoint holds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ipfm.engine.commandline import user_input


@dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a model folder or a checkpoint: architecture, D, parameters, training facts.

    Example: ipfm info runs/digits-D128-alpha1-K1/generator
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Model folder, or a checkpoint of EDM, PFGM++ or SiD."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Print what is known of the model."""
        with user_input():
            parameters, parts = _checkpoint(self.model) if self.model.is_file() else _folder(self.model)
        if self.json:
            print(json.dumps(_plain({"parameters": parameters, **parts}), indent=1, allow_nan=False))
            return
        print(f"parameters: {parameters:,}")
        for part, facts in parts.items():
            print(f"{part}:")
            for name, value in facts.items():
                print(f"  {name:<18} {value}")


def _folder(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Number of parameters, and facts by part. ValueError: there is no model, or it is damaged."""
    from ipfm.models import load_teacher, read_config

    stored = read_config(path)
    net = load_teacher(path)
    parameters = sum(p.numel() for p in net.parameters())
    return parameters, {"network": stored.network.to_json(), "training": dict(stored.extra)}


def _checkpoint(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """As `_folder`, of the network that would be taken from a checkpoint."""
    from ipfm.models.checkpoint_import import open_checkpoint
    from ipfm.models.training_state import read_training_state

    checkpoint = open_checkpoint(path)
    network = checkpoint.read()
    parts: dict[str, dict[str, Any]] = {
        "file": {
            "format": checkpoint.layout,
            "networks": ", ".join(checkpoint.networks),
            "taken": network.key,
            "D from": network.D_source,
        },
        "network": network.config.to_json(),
    }
    if "net" in checkpoint.networks and "optimizer_state" in checkpoint.entries:
        state = read_training_state(path)
        parts["training"] = {
            "images seen": state.images_seen,
            "optimizer steps": state.adam_steps,
            "lr": state.lr,
            "betas": list(state.betas),
            "eps": state.eps,
            "average from": state.ema_from,
        }
    return sum(network.weights[name].numel() for name in network.parameters), parts


def _plain(value: Any) -> Any:
    """`value` with infinity, which JSON lacks, as text."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
