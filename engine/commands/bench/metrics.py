"""How long the metrics take once features are extracted: `ipfm bench --metrics`."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ipfm.engine.distributed.device import run_device
from ipfm.engine.evaluation.metrics.frechet import frechet_distance
from ipfm.engine.evaluation.metrics.inception_score import inception_score
from ipfm.engine.evaluation.metrics.kernel_distance import kernel_distance
from ipfm.engine.evaluation.metrics.moments import FeatureMoments
from ipfm.engine.evaluation.metrics.precision_recall import precision_recall
from ipfm.engine.runtime.progress import ProgressBar

# Images and features of a published FID; classes of the Inception network; images for precision and recall.
IMAGES, DIM, CLASSES, PR_IMAGES = 50_000, 2048, 1008, 10_000
BATCH = 500


@dataclass(frozen=True)
class Row:
    """One measurement: `result` is what came out, for the eye."""

    metric: str
    images: int
    dim: int
    seconds: float
    result: str


def run_metrics(out: str | Path, quick: bool = False) -> Path:
    """Measure on random features, on this machine's GPU where it has one, and write metrics.csv and metrics.md.

    Args:
        out: folder to write into.
        quick: a fiftieth of the images and an eighth of the features.

    Returns:
        The path of the table.
    """
    device = run_device()
    images, dim = (IMAGES // 50, DIM // 8) if quick else (IMAGES, DIM)
    pr_images = min(images, PR_IMAGES)
    generator = torch.Generator(device).manual_seed(0)
    mix = torch.randn(dim, dim, generator=generator, device=device) / dim**0.5
    real, generated = (_features(images, mix, shift, generator) for shift in (0.0, 0.05))
    probabilities = torch.randn(images, CLASSES, generator=generator, device=device).softmax(dim=1)
    reference = _moments(real)

    cases: list[tuple[str, int, int, Callable[[], object]]] = [
        ("FID", images, dim, lambda: f"{frechet_distance(_moments(generated), reference):.6g}"),
        ("FID of a set with itself", images, dim, lambda: f"{frechet_distance(_moments(real), reference):.3g}"),
        ("KID", images, dim, lambda: f"{kernel_distance(real, generated).mean:.4g}"),
        ("Inception score", images, CLASSES, lambda: f"{inception_score(probabilities).mean:.4g}"),
        ("precision and recall", pr_images, dim, lambda: _shares(real[:pr_images], generated[:pr_images])),
    ]
    rows = []
    with ProgressBar("metrics", len(cases), unit=" metric") as bar:
        for name, count, width, run in cases:
            started = time.perf_counter()
            result = str(run())  # the text needs the value: nothing is still running on the device
            rows.append(Row(name, count, width, round(time.perf_counter() - started, 2), result))
            bar.advance()
    return _write(Path(out), rows, device)


def _features(images: int, mix: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(images, len(mix), generator=generator, device=mix.device)
    return (noise @ mix + shift).relu()


def _moments(features: Tensor) -> FeatureMoments:
    moments = FeatureMoments(features.shape[1], features.device)
    for batch in features.split(BATCH):
        moments.add(batch)
    return moments


def _shares(real: Tensor, generated: Tensor) -> str:
    shares = precision_recall(real, generated)
    return f"{shares.precision:.4f}, {shares.recall:.4f}"


def _write(folder: Path, rows: list[Row], device: torch.device) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in fields(Row)]
    path = folder / "metrics.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(map(astuple, rows))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [f"Metrics of random features, {where}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(map(str, astuple(row)))} |" for row in rows]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
