"""Keeps a model in release/, with what it is, what made it and its checksum in release/README.md.

    python docs/keep_model.py NAME MODEL EVALUATION.json --command 'python recipes/fashion_ipfm.py --teacher-steps 8000'

MODEL is a model folder or a run; EVALUATION.json is what `ipfm evaluate MODEL --json --repeats 3` printed, or the
distance.json that an ablation left beside a teacher; the command is the one that trained it. A model of the same NAME
is replaced. With --classifier FILE the classifier whose features the distances are of is kept beside the models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from ipfm.engine.experiments.repeats import spread
from ipfm.engine.runtime.wording import counted, significant, symbol
from ipfm.models import load_model
from ipfm.models.checkpoints.run_models import locate

FOLDER = Path(__file__).parent.parent / "release"
LARGEST = 5_000_000
HEAD = """\
# Models

Models that this project trained, to try out what it does without training first. They are no part of the package: a
wheel and a source archive are without them. Each is a folder as `ipfm` writes it: `ipfm info release/NAME` says more,
`ipfm sample release/NAME --n 64 --out clothes.png` draws from it, and a teacher's is the `--teacher` of a recipe.

Their licence is that of the project. They learnt Fashion-MNIST (Zalando SE, MIT licence). Distances are measured by the
features of a small classifier of that set: only those by the very same one compare, and each table names its own. What
was measured, and how, is on the [page of results](../docs/results.md).
"""


class Refused(Exception):
    """What cannot be kept."""


def keep(name: str, model: Path, evaluation: Path, command: str) -> Path:
    """Copy a model and describe it; returns its folder.

    Raises:
        Refused: it is too large, the measurement is of another model or none, or the name is none.
        ValueError: it is no model, or damaged.
    """
    # A folder of its own, which is replaced: not "..".
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise Refused(f"NAME must be letters, digits, dots and dashes, a letter or digit first, got {name!r}")
    place = locate(model).path
    net = load_model(place)
    about = json.loads((place / "config.json").read_text(encoding="utf-8"))
    found = _measured(evaluation, net.config.D)
    task = about["extra"].get("task")
    if found["D"] is None or float(found["D"]) != net.config.D or found["kind"] not in (task, None):
        raise Refused(f"{evaluation} is of a {found['kind']} of D = {found['D']}, {place} is another model")
    if all(run.get("distance") is None for run in found["runs"]):
        raise Refused(f"{evaluation} holds no distance")
    weights = place / "model.safetensors"
    if (size := weights.stat().st_size) >= LARGEST:
        raise Refused(f"{weights} has {size:,} bytes, the largest that is kept has {LARGEST:,}")
    target = FOLDER / name
    # Read before the folder is replaced, as it may be the model itself, measured again.
    files = {path.name: path.read_bytes() for path in (weights, place / "config.json")}
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file, data in files.items():
        (target / file).write_bytes(data)
    parameters = sum(p.numel() for p in net.parameters())
    network = f"{net.config.family}, {net.config.model_channels} channels, {parameters:,} parameters"
    describe(name, rows(about["extra"], found, network, command, target / weights.name))
    return target


def _measured(path: Path, D: float) -> dict[str, Any]:
    """What was measured, in the words of `ipfm evaluate`; `D`: of the model.

    Raises:
        Refused: it is no measurement.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise Refused(f"{path} is no measurement of a model")
    if {"heun_steps", "frechet"} <= found.keys() and "runs" not in found:
        found |= {"kind": "teacher", "D": D, "nfe": 2 * found["heun_steps"] - 1}
        found["runs"] = [{"distance": found["frechet"]}]
    found = {"features_name": found.get("features"), **found}
    if missing := {"kind", "D", "nfe", "images", "runs"} - found.keys():
        raise Refused(f"{path} is no measurement of a model: it has no {', '.join(sorted(missing))}")
    return found


def rows(extra: dict[str, Any], found: dict[str, Any], network: str, command: str, weights: Path) -> dict[str, str]:
    """What stands in the README, by its name there."""
    settings = extra.get("config", {})
    distances = [run["distance"] for run in found["runs"] if run.get("distance") is not None]
    shown = spread(distances) if len(distances) > 1 else significant(distances[0])
    of = "generated images" if extra.get("task") == "generator" else extra.get("dataset") or "images"
    trained = f"{extra.get('optimizer_steps')} steps of {settings.get('batch')} {of}"
    trained += "".join(
        f", {word} {settings[word]}" for word in ("precision", "lr", "seed", "alpha") if word in settings
    )
    return {
        "what": f"{extra.get('task')}, {network}",
        "D": symbol(float(found["D"])),
        "trained": trained,
        "command": f"`{command}`",
        "network evaluations of an image": str(found["nfe"]),
        "Fréchet distance": f"{shown}, {counted(len(distances), 'set')} of {found['images']:,} images, "
        f"{found['features_name']}",
        "file": f"`{weights.relative_to(FOLDER)}`, {weights.stat().st_size / 1e6:.2f} MB",
        "sha256": f"`{digest(weights)}`",
    }


def keep_classifier(file: Path) -> None:
    """Copy and describe a classifier's file.

    Raises:
        Refused: it is too large.
    """
    if file.stat().st_size >= LARGEST:
        raise Refused(f"{file} has {file.stat().st_size:,} bytes, the largest that is kept has {LARGEST:,}")
    FOLDER.mkdir(exist_ok=True)
    target = FOLDER / file.name
    shutil.copyfile(file, target)
    facts = {
        "what": "the classifier whose features are compared: `--classifier` of `ipfm evaluate` and of the recipe",
        "file": f"`{target.name}`, {target.stat().st_size / 1e6:.2f} MB",
        "sha256": f"`{digest(target)}`",
    }
    describe(target.stem, facts)


def describe(name: str, facts: dict[str, str]) -> None:
    """Write the section of a model, in the place of an earlier one of its name or at the end."""
    page = FOLDER / "README.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else HEAD
    lines = [f"## {name}", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]
    sections = re.split(r"(?m)^(?=## )", text.rstrip() + "\n\n")
    rest = [part for part in sections if part.splitlines()[0] != lines[0]]
    page.write_text("".join([*rest, "\n".join(lines), "\n"]), encoding="utf-8")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(folder: Path) -> list[str]:
    """What is wrong with the models of a folder, a line each: not loaded, too large, or not as its README says."""
    text, wrong = (folder / "README.md").read_text(encoding="utf-8"), []
    told = dict(re.findall(r"\| file \| `(.*?)`.*\n\| sha256 \| `(\w+)`", text))
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for name, path in files.items():
        if path.suffix == ".safetensors":
            if told.pop(name, None) != digest(path):
                wrong.append(f"{name} is not in README.md, or with another checksum")
            if path.stat().st_size >= LARGEST:
                wrong.append(f"{name} is too large")
        elif path.name not in ("config.json", "README.md"):
            wrong.append(f"{name} is no part of a model")
    wrong += [f"{name} is missing" for name in told]
    for config in folder.glob("*/config.json"):
        try:
            load_model(config.parent)
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def main() -> None:
    """Keep what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("evaluation", type=Path, metavar="EVALUATION.json")
    parser.add_argument("--command", required=True, help="what trained it")
    parser.add_argument("--classifier", type=Path, help="the file of the classifier, to keep it too")
    given = parser.parse_args()
    try:
        print(keep(given.name, given.model, given.evaluation, given.command))
        if given.classifier is not None:
            keep_classifier(given.classifier)
    except (Refused, ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
