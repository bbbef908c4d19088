"""Images from a generator in a .pt2 file: needs torch and numpy."""

import json

import numpy as np
import torch


def load(path):
    """(network, facts). Reading a .pt2 file unpickles: load files that you trust."""
    files = {"facts.json": ""}
    return torch.export.load(path, extra_files=files).module(), json.loads(files["facts.json"])


def noise(n, facts, rng):
    """n draws of the noise of PFGM++ at sigma = 1: Student t of D degrees of freedom, Gaussian at D = inf."""
    g, D = rng.standard_normal((n, *facts["image_shape"])), float(facts["D"])
    return torch.from_numpy(g if np.isinf(D) else g / np.sqrt(rng.chisquare(D, (n, 1, 1, 1)) / D)).float()


@torch.no_grad()
def generate(network, facts, n, seed=0, classes=None, draws=None):
    """Images (n, C, H, W) in [-1, 1]; their classes, and a draw of noise for each step, are drawn where not given."""
    rng, k, x = np.random.default_rng(seed), max(1, facts["label_dim"]), 0
    labels = torch.eye(k)[rng.integers(k, size=n) if classes is None else classes]
    for i, sigma in enumerate(facts["sigmas"]):
        x = x + sigma * (noise(n, facts, rng) if draws is None else draws[i])
        inputs = {"x": x, "sigma": torch.full((n,), sigma), "class_labels": labels}
        x = network(*(inputs[name] for name in facts["inputs"]))
    return x
