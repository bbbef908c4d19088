"""The model card of an exported model: a README.md with what its run says of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipfm.engine.commands import describe
from ipfm.engine.commands.export.network import ExportedNetwork
from ipfm.engine.evaluation.metrics.measures import measures_of
from ipfm.engine.evaluation.results import EvaluationRow, read_results, results_table
from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.runtime.wording import counted, symbol
from ipfm.models.autoencoder import is_latent

_COUNTS = {1: "One", 2: "Two", 3: "Three", 4: "Four"}
_MARK = "<!-- ipfm export; SHA-256 of the text above: "


@dataclass(frozen=True)
class Origin:
    """What the run folder around a generator says.

    Attributes:
        teacher: name of the teacher's file or folder, None where it is not known.
        fingerprint: SHA-256 of its weights, likewise.
        results: the table at the end of the run.
    """

    teacher: str | None = None
    fingerprint: str | None = None
    results: tuple[EvaluationRow, ...] = ()


def origin_of(model: Path) -> Origin:
    """What the run folder around the model folder `model` says; nothing where that is none."""
    place = model.absolute()
    # Snapshots and checkpoints lie a folder further down.
    deep = place.parent.name in ("snapshots", "checkpoints")
    run = place.parent.parent if deep else place.parent
    try:
        record = json.loads((run / "config.json").read_text(encoding="utf-8"))
        if not (deep or place.name in ("generator", "generator-best")) or record["kind"] != "distill":
            return Origin()
        fingerprint, teacher = record.get("teacher"), record["config"].get("teacher")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return Origin()
    # A distance that was not finite is null in the file.
    results = read_results(run) if place.name == "generator" else []
    rows = tuple(row for row in results if _is_measured(row) and isinstance(row.nfe, int))
    if isinstance(teacher, str):
        teacher = Path(teacher).name
    else:
        teacher = "trained by the same run" if (run / "teacher" / "model").is_dir() else None
    return Origin(
        teacher,
        fingerprint if isinstance(fingerprint, str) else None,
        rows,
    )


def _is_measured(row: EvaluationRow) -> bool:
    """Every number that was asked for is one."""
    return all(isinstance(getattr(row, measure.key), float) for measure in measures_of(row.metrics))


def model_card(network: ExportedNetwork, origin: Origin, *, program: str, loader: str | None, grid: str | None) -> str:
    """The text of README.md.

    Args:
        network: what is exported.
        origin: the run that it comes from.
        program: name of the plain PyTorch program beside the card.
        loader: name of the file that draws from it; None for a teacher.
        grid: name of the picture with samples; None where there is none.
    """
    sections = [_front_matter(network), f"# {_title(network)}", _summary(network)]
    if grid is not None:
        sections.append(f"![images of seed 0]({grid})")
    sections.append(_table(_facts(network, origin)))
    if origin.results:
        sections += ["## Results", "At the end of the run, measured as the teacher beside it:"]
        sections.append(f"```text\n{results_table(origin.results)}```")
    sections += ["## Use", _use(network, program, loader)]
    sections += ["## Settings of its training", f"```json\n{json.dumps(network.facts['training'], indent=1)}\n```"]
    sections += ["## Licence", _LICENCE]
    text = "\n\n".join(sections) + "\n"
    return f"{text}\n{_MARK}{_digest(text)} -->\n"


def is_untouched(card: str) -> bool:
    """Whether `card` is as `model_card` made it."""
    text, mark, rest = card.partition(f"\n{_MARK}")
    return bool(mark) and rest == f"{_digest(text)} -->\n"


_LICENCE = """The weights inherit the licence of the teacher that they come from. No file says which one that is:
fill in `license` at the top of this page, and this section, before you publish the weights."""


_DECODED = """
Latents become pictures by the autoencoder of EDM2's latents, `stabilityai/sd-vae-ft-mse`, in a local folder:

```python
from ipfm.models.autoencoder import load_autoencoder

pictures = load_autoencoder("VAE_FOLDER").decode(images)  # (16, 3, …) in [-1, 1]
```
"""


def _front_matter(network: ExportedNetwork) -> str:
    tags = ["ipfm", "pfgm++" if math.isfinite(network.net.D) else "diffusion"]
    if network.is_generator:
        tags += ["distillation", "one-step" if network.nfe == 1 else "few-step"]
    if network.net.label_dim:
        tags.append("class-conditional")
    lines = [
        "---",
        "# Fill in: the weights inherit the licence of their teacher.",
        "license: other",
        "library_name: ipfm",
        "pipeline_tag: unconditional-image-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    return "\n".join(lines)


def _title(network: ExportedNetwork) -> str:
    if network.nfe is None:
        kind = "Teacher"
    else:
        kind = f"{_COUNTS.get(network.nfe, network.nfe)}-step generator"
    return f"{kind} of {_dataset(network) or 'images'}, {_size(network)}, D = {symbol(network.net.D)}"


def _summary(network: ExportedNetwork) -> str:
    images = f"{'latents' if is_latent(network.net.config.image_shape) else 'images'} of {_size(network)} values"
    finite, D = math.isfinite(network.net.D), symbol(network.net.D)
    if network.nfe is None:
        return f"A denoiser of {images}: {f'PFGM++ at D = {D}' if finite else 'a diffusion model (D = ∞)'}."
    count = "one network evaluation" if network.nfe == 1 else counted(network.nfe, "network evaluation")
    prior = f"the heavy-tailed prior of PFGM++ at D = {D}, a Student t," if finite else "a Gaussian (D = ∞)"
    return f"Makes {images} in {count}, from latents of {prior} at σ = {_sigmas(network)[0]:g}."


def _facts(network: ExportedNetwork, origin: Origin) -> dict[str, object]:
    """Rows of the table; None is left out."""
    net, about = network.net, network.about
    distilled_by, own_rows = network.distilled
    levels = ", ".join(f"{sigma:g}" for sigma in _sigmas(network))
    return {
        "auxiliary dimensions D": symbol(net.D),
        "network evaluations an image": network.nfe,
        "noise levels σ" if network.nfe == len(_sigmas(network)) else "noise levels σ, highest and lowest": levels,
        "images": _size(network),
        "classes": net.label_dim or None,
        "network": f"{net.config.model_type}, {net.config.model_channels} channels × {tuple(net.config.channel_mult)}",
        "parameters": f"{sum(p.numel() for p in net.parameters()):,}",
        "data": _dataset(network) or None,
        "distilled by": distilled_by,
        "teacher": origin.teacher,
        "SHA-256 of the teacher's weights": origin.fingerprint,
        "converted from": about.source.get("file"),
        **own_rows,
        "optimizer steps": about.optimizer_steps,
        "measured of it in its run": describe.measured(about.measured),
        "batch": about.settings.get("batch"),
        "precision of the training": about.settings.get("precision"),
    }


def _use(network: ExportedNetwork, program: str, loader: str | None) -> str:
    latent = is_latent(network.net.config.image_shape)
    vae = " --vae VAE_FOLDER" if latent else ""
    made = f"# (16, {network.net.img_channels}, …) {'latents' if latent else 'in [-1, 1]'}"
    given = ", class_labels" if network.net.label_dim else ""
    if loader is not None:
        code = f"""from {Path(loader).stem} import generate, load

network, facts = load("{program}")
images = generate(network, facts, 16, seed=0)  {made}"""
    else:
        code = f"""import torch

network = torch.export.load("{program}").module()
denoised = network(x, sigma{given})  # x (N, C, H, W), sigma (N,), float32"""
    if network.is_generator:
        own = """from ipfm.engine import load_generator

G = load_generator(".")
images = G.sample(16, seed=0)"""
    else:
        own = """from ipfm.engine import load_sampler

T = load_sampler(".", steps=18)
images = T.sample(16, seed=0)"""
    decoded = _DECODED if latent else ""
    return f"""With ipfm, in this folder:

    ipfm sample . --n 64 --out images.png{vae}

```python
{own}  {made}
```
{decoded}
With PyTorch and numpy alone (reading a `.pt2` file unpickles: load files that you trust):

```python
{code}
```"""


def _sigmas(network: ExportedNetwork) -> tuple[float, ...]:
    levels = network.levels
    return (levels.sigma_max, levels.sigma_min) if isinstance(levels, NoiseLevels) else levels


def _dataset(network: ExportedNetwork) -> str:
    return network.about.dataset or ""


def _size(network: ExportedNetwork) -> str:
    return f"{network.net.img_channels}×{network.net.img_resolution}×{network.net.img_resolution}"


def _table(facts: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *rows])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
