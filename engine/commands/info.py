"""`ipfm info`: what a model folder holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ipfm.engine.commandline import user_input


@dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a model folder: architecture, D, parameters, training facts.

    Example: ipfm info runs/digits-D128-alpha1-K1/generator
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Model folder."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Print what is known of the model."""
        from ipfm.models import load_teacher, read_config

        with user_input():
            stored = read_config(self.model)
            net = load_teacher(self.model)
        parameters = sum(p.numel() for p in net.parameters())
        parts = {"network": stored.network.to_json(), "training": dict(stored.extra)}
        if self.json:
            print(json.dumps({"parameters": parameters, **parts}, indent=1))
            return
        print(f"parameters: {parameters:,}")
        for part, facts in parts.items():
            print(f"{part}:")
            for name, value in facts.items():
                print(f"  {name:<18} {value}")
