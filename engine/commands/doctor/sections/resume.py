"""A run that is killed and resumed beside one that is not: the same bits? And images beside those of the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL
from subprocess import Popen
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ipfm.engine.commands.bench.equivalence import NETWORK
from ipfm.engine.commands.bench.short_run import ShortRun, start, wait
from ipfm.engine.commands.doctor.place import LEFT_OUT, Place, Row, failed, judged, tried
from ipfm.engine.evaluation.metrics.features import Features, InceptionFeatures, PixelFeatures
from ipfm.engine.evaluation.metrics.frechet import frechet_distance
from ipfm.engine.evaluation.metrics.moments import FeatureMoments
from ipfm.engine.sampling.samplers import generate
from ipfm.models import build_network, presets

STEPS, KILLED_AT, EVERY = 6, 4, 3
# Of the weights, where a GPU's sums have no fixed order.
CLOSE = 1e-2
# Of the features' variance: the same images from another device.
FAR = 1e-3


def rows(place: Place) -> Iterator[Row]:
    """A row a setting; then the distance of images of a generator, as an evaluation measures it."""
    # All of them side by side: they wait for imports and compilers most of the time.
    begun = [(name, exact, Resumption(place, name, config)) for name, config, exact in _cases(place)]
    for name, exact, resumption in begun:
        row: Row = {"setting": name, "bits must be equal": "yes" if exact else "no"}
        yield tried(row, lambda r=resumption, e=exact: r.compared(e))  # type: ignore[misc]
    yield tried({"setting": "images measured"}, lambda: _evaluated(place))


def _cases(place: Place) -> list[tuple[str, dict[str, Any], bool]]:
    """Name, settings, whether bits must be equal: on one CPU always, on a GPU with deterministic algorithms alone."""
    base: dict[str, Any] = {"checkpoint_every": EVERY, "zero": 0, "precision": "fp32"}
    half: dict[str, Any] = {"checkpoint_every": EVERY, "zero": 1, "precision": "bf16"}
    if place.quick:
        return [("fp32, ZeRO 0", base, not place.cuda)]
    found: list[tuple[str, dict[str, Any], bool]] = [
        ("fp32, ZeRO 0", base, not place.cuda),
        ("bf16, ZeRO 1", half, not place.cuda),
    ]
    if not place.cuda:
        return found
    return found + [(f"{name}, deterministic", {**config, "deterministic": True}, True) for name, config, _ in found]


class Resumption:
    """An undisturbed run and one that is killed, begun side by side."""

    def __init__(self, place: Place, name: str, config: dict[str, Any]) -> None:
        self.place, self.run = place, ShortRun(config, STEPS)
        self.folder = place.folder / name.replace(", ", "-").replace(" ", "")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log.txt"
        self.whole = self._start("whole", self.run)
        self.dying = self._start("resumed", replace(self.run, dies=0, at=KILLED_AT))

    def _start(self, name: str, run: ShortRun) -> list[Popen[bytes]]:
        return start(self.folder / name, run, self.log, device=self.place.device)

    def compared(self, exact: bool) -> Row:
        """The killed run goes on; then the weights of both; `exact`: their bits must be equal."""
        (killed,) = wait(self.dying, self.place.left)
        resumed: int | None = None
        if killed == -SIGKILL:
            (resumed,) = wait(self._start("resumed", self.run), self.place.left)
        (undisturbed,) = wait(self.whole, self.place.left)
        if (killed, resumed, undisturbed) != (-SIGKILL, 0, 0):
            if self.place.over():
                return {"verdict": f"{LEFT_OUT}: {self.place.seconds:.0f} s are over"}
            codes = f"killed {killed}, resumed {resumed}, undisturbed {undisturbed}"
            return {"verdict": failed(f"the runs ended with: {codes}; {last_line(self.log)}")}
        ours, theirs = (weights(self.folder / which / "generator") for which in ("resumed", "whole"))
        same = all(torch.equal(ours[key], theirs[key]) for key in theirs)
        off = max(float((ours[key] - theirs[key]).norm() / (theirs[key].norm() + 1e-12)) for key in theirs)
        return {
            "same bits": "yes" if same else "no",
            "largest difference": f"{off:.1e}",
            "verdict": judged(same or (not exact and off < CLOSE), f"the weights differ by {off:.1e} of their norm"),
        }


def weights(model: Path) -> dict[str, Tensor]:
    """The tensors of a model folder in double precision."""
    (file,) = model.glob("*.safetensors")
    return {name: tensor.double() for name, tensor in load_file(file).items()}


def last_line(log: Path) -> str:
    """What a run said last."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1][:200] if lines else "it said nothing"


def _evaluated(place: Place) -> Row:
    """Fréchet distance of a generator's images drawn here to the same drawn on the CPU: 512 on a GPU.

    By Inception where one was given, else by pixels.
    """
    network = presets.get("ncsnpp", D=128.0) if place.inception else NETWORK
    torch.manual_seed(0)
    net = build_network(replace(network, model_channels=16, label_dim=0, dropout=0.0)).eval()
    count = 512 if place.cuda else 32
    if place.inception is None:
        features: Features = PixelFeatures(network.image_shape)
    else:
        features = InceptionFeatures(place.inception, place.device)
    began = time.perf_counter()
    moments = []
    for device in ("cpu", place.device):
        images = generate(net.to(device), count, seed=0, sigmas=(80.0,))
        found = FeatureMoments(features.dim, device)
        found.add(features(images))
        moments.append(found.statistics)
    distance = frechet_distance(*moments)
    spread = float(moments[0].covariance.trace())
    return {
        "images": count,
        "features": features.name,
        "largest difference": f"{distance:.2e}",
        "seconds": round(time.perf_counter() - began, 1),
        "verdict": judged(distance <= FAR * spread, f"Fréchet distance {distance:.2e} to the same images from the CPU"),
    }
