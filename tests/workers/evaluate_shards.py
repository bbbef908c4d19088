"""Worker: measures images that are a function of their index against a reference of images, as one of several.

Argument (JSON): {"files": folder with net.pt and real.npz, "out": folder, "cases": [{"images", "batch"}]}
"""

import contextlib
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from ipfm.engine.commands.evaluate import Evaluate
from ipfm.engine.distributed.world import start_world
from ipfm.engine.evaluation.evaluation import open_comparison
from ipfm.engine.runtime.launcher import stop_world


def main() -> None:
    job = json.loads(sys.argv[1])
    files, out = Path(job["files"]), Path(job["out"])
    world = start_world()
    asked: list[tuple[int, int]] = []

    def sample(first: int, count: int) -> torch.Tensor:
        asked.append((first, count))
        index = torch.arange(first, first + count, dtype=torch.float64)[:, None]
        return torch.sin(index * torch.arange(1, 109) * 0.7 + index**2).float().reshape(count, 3, 6, 6)

    comparison = open_comparison(
        files / "real.npz", (3, 6, 6), world.device, inception=files / "net.pt", metrics=("fid", "kid", "is", "pr")
    )
    results = [
        asdict(comparison.evaluation(world, images=case["images"], batch=case["batch"]).measure(sample, world))
        for case in job["cases"]
    ]

    def damaged(first: int, count: int) -> torch.Tensor:
        if first <= 13 < first + count:
            raise ValueError("image 13 is damaged")
        return torch.zeros(count, 3, 6, 6)

    try:
        comparison.evaluation(world, images=40, batch=8).measure(damaged, world)
        error = ""
    except ValueError as refusal:
        error = str(refusal)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        Evaluate(
            model=files / "real.npz", reference=files / "real.npz", inception=files / "net.pt", images=11, json=True
        ).run()
    found = {"results": results, "asked": asked, "printed": printed.getvalue(), "error": error}
    (out / f"rank{world.rank}.json").write_text(json.dumps(found))
    stop_world()


main()
