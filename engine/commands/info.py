"""`ipfm info`: what a run folder, a model folder or a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ipfm.engine.runtime.commandline import user_input
from ipfm.engine.runtime.json_output import output
from ipfm.engine.runtime.wording import number, rows

if TYPE_CHECKING:
    from ipfm.engine.evaluation.metrics.measures import Measure
    from ipfm.engine.runtime.remarks import Remarks
    from ipfm.engine.training.run_state import RunRecord
    from ipfm.engine.training.snapshots import KeptModel
    from ipfm.models import NetworkConfig
    from ipfm.models.checkpoints.published import Published
    from ipfm.models.facts import GeneratorFacts


@dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a run, a model or a checkpoint: how far, what it is, how it was made.

    Example: ipfm info runs/digits-D128-alpha1-K1

    Example: ipfm info training-state-097000.pt --json
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
    """Run folder, model folder, checkpoint of a run, or a checkpoint of EDM, EDM2, PFGM++ or SiD."""
    which: Annotated[str | None, tyro.conf.arg(metavar="WHICH")] = None
    """Describe a network of a run folder, and not the run: best, last, a step or an average."""
    json: bool = False
    """Print JSON: all that is known."""

    def run(self) -> None:
        """Print what is known."""
        from ipfm.engine.runtime.remarks import Remarks
        from ipfm.engine.training.run_state import holds_runs, is_damaged_run, is_run, read_run
        from ipfm.models.checkpoints.run_models import locate

        remarks = Remarks()
        with output(as_json=self.json) as write:
            with user_input():
                if self.which is not None:
                    facts, text = _folder(locate(self.model, self.which).path)
                elif self.model.is_file():
                    facts, text = _checkpoint(self.model)
                elif is_run(self.model):
                    facts, text = _run(self.model, remarks)
                elif is_damaged_run(self.model):
                    raise ValueError(
                        f"{self.model} is the folder of a run, but its config.json is missing or damaged: "
                        "ipfm report shows what there is"
                    )
                else:
                    if not (self.model / "config.json").exists() and holds_runs(self.model):
                        read_run(self.model)  # which says what it is
                    taken = locate(self.model)
                    if taken.taken:
                        remarks.add(taken.said())
                    facts, text = _folder(taken.path)
            write({"path": self.model, **facts, "remarks": list(remarks)}, text)


def _run(path: Path, remarks: Remarks) -> tuple[dict[str, Any], str]:
    """The facts of a run folder, and as text. ValueError: it cannot be read."""
    from ipfm.engine.data.comparison import compared
    from ipfm.engine.evaluation.results import results_table
    from ipfm.engine.objectives import OBJECTIVES
    from ipfm.engine.training.monitor import COMPARISON_FILE
    from ipfm.engine.training.run_state import read_run

    run = read_run(path, times=False)
    if run.settings is None:
        raise ValueError(f"{path} holds no run: no config.json that says distill or teacher")
    for problem in run.problems:
        remarks.add(f"{path}/{problem}")
    kind = run.identity.get("objective")
    distances = [(point.step, point.frechet) for point in run.evaluations if "fid" in point.metrics]
    objective = OBJECTIVES.of(kind, run.settings) if run.kind == "distill" else None
    step, distance = distances[-1] if distances else (None, None)
    facts = {
        "kind": run.kind,
        "state": run.state,
        "steps_done": run.steps_done,
        "steps_total": run.total_steps,
        "checkpoint": run.checkpoint,
        "checkpoint_step": run.checkpoint_step,
        "metric": run.metric,
        "distance": distance,
        "distance_step": step,
        "distances": distances,
        "metrics": run.measured,
        "evaluations": [point.to_json() for point in run.evaluations],
        "best_evaluation": None if run.best_evaluation is None else run.best_evaluation.to_json(),
        "averages": {name: [point.to_json() for point in points] for name, points in run.averages.items()},
        "results": [row.to_json() for row in run.results],
        "objective": kind or (objective and objective.kind),
        "D": run.settings.get("D"),
        "sigmas": run.settings.get("sigmas"),
        "features": run.identity.get("features"),
        "continues": run.identity.get("start"),
        "network": None if run.exported is None else run.export_path,
        "best": run.best and _kept(run.best),
        "snapshots": [_kept(snapshot) for snapshot in run.snapshots],
        "set_aside": [{"path": one.path, "step": one.step, "from_step": one.from_step} for one in run.set_aside],
        "pictures": [{"step": step, "path": place} for step, place in run.pictures],
        "comparison": path / COMPARISON_FILE if compared(path / COMPARISON_FILE) else None,
        "last": run.metrics[-1] if run.metrics else {},
        "config": run.settings,
    }
    unused = objective.unused if objective else run.about.get("unused", ())
    used = {name: value for name, value in run.settings.items() if name not in unused}
    if run.starts and isinstance(graphs := run.starts[-1].get("cuda_graphs"), bool):
        # What "auto" has come to, in the last part of the run.
        used["cuda_graphs"] = "on" if graphs else "off"
    words = objective.in_words(run.settings) if objective else run.about.get("info", kind)
    text = rows(_run_rows(run, facts, used, words))
    return facts, f"{text}\n\n{results_table(run.results).rstrip()}" if run.results else text


def _kept(model: KeptModel) -> dict[str, Any]:
    """A network that a run kept along the way; its distance is null where none was measured."""
    measured = math.isfinite(model.distance)
    about = {"path": model.path, "step": model.step, "distance": model.distance if measured else None}
    return about | {"chosen_by": model.chosen_by, "measured": dict(model.values)}


def _run_rows(
    run: RunRecord, facts: Mapping[str, Any], used: Mapping[str, Any], objective: str | None
) -> list[tuple[str, object]]:
    """The lines of a run's text, from its facts, the settings that it makes use of and its objective in words."""
    from ipfm.engine.commands import describe
    from ipfm.engine.data.comparison import compared

    state, D, best = facts["state"], facts["D"], run.best
    losses = {k: v for k, v in facts["last"].items() if k.endswith("_loss") and isinstance(v, (int, float))}
    return [
        ("run", "distillation" if facts["kind"] == "distill" else "training of a teacher"),
        ("state", state + _WAYS_ON.get(state, "")),
        ("steps", f"{facts['steps_done']} of {facts['steps_total'] or 'an unknown number'}"),
        ("checkpoint", facts["checkpoint"] and f"{facts['checkpoint']} (step {facts['checkpoint_step']})"),
        *((measure.called(run.metric), _over_training(run, measure)) for measure in run.measures),
        ("averages", run.averages_in_words or None),
        ("losses", ", ".join(f"{name.removesuffix('_loss')} {value:.4g}" for name, value in losses.items())),
        ("generator" if facts["kind"] == "distill" else "teacher", facts["network"] or "not exported yet"),
        ("best", best and f"{best.path}: step {best.step}, {best.number}"),
        ("snapshots", _kept_along_the_way(facts["snapshots"])),
        *((("set aside" if one is run.set_aside[0] else ""), one.in_words()) for one in run.set_aside),
        ("pictures", _kept_along_the_way(facts["pictures"])),
        ("side by side", facts["comparison"] and f"{', '.join(compared(facts['comparison']))}: {facts['comparison']}"),
        ("objective", objective),
        ("began with", _start(facts["continues"])),
        ("branch of", _branch(run, facts["continues"])),
        ("D", None if D is None else number(D)),
        ("sigmas", _levels(facts["sigmas"])),
        ("settings", describe.training(used)),
        ("computed", describe.computed(used)),
        ("compared by", facts["features"]),
    ]


def _branch(run: RunRecord, said: object) -> str | None:
    """The run whose settings were the defaults, in words, and which of them are others; None without one."""
    from ipfm.engine.config import TeacherConfig
    from ipfm.engine.objectives import OBJECTIVES
    from ipfm.engine.objectives.base import Distillation
    from ipfm.engine.training.start import Branch

    branch = Branch.read(said.get("branch")) if isinstance(said, dict) else None
    if branch is None or run.settings is None:
        return None
    kind = OBJECTIVES.of(run.identity.get("objective"), run.settings) if run.kind == "distill" else TeacherConfig
    changed = branch.changes(run.settings, kind or Distillation)
    return f"{branch.run} at step {branch.step}" + (f"; {'; '.join(changed)}" if changed else ", with its settings")


def _start(said: object) -> str | None:
    """What a run went on from, in words; None where it began with its teacher or its data."""
    if not isinstance(said, dict):
        return None
    seen, tensors = said.get("images_seen"), said.get("tensors")
    if tensors is not None:
        return f"{tensors} of {said.get('of')} tensors of {said.get('source')}"
    stage = "a second stage: its generator with " if said.get("stage") is True else ""
    return f"{stage}{said.get('source')}" + (f", {seen:,} images seen" if isinstance(seen, int) and seen else "")


def _kept_along_the_way(kept: Sequence[Mapping[str, Any]]) -> str | None:
    """How many snapshots or pictures there are, of which steps, and where."""
    if not kept:
        return None
    first, last = kept[0], kept[-1]
    steps = f"step {first['step']}" if len(kept) == 1 else f"steps {first['step']} to {last['step']}"
    return f"{len(kept)} of {steps}: {last['path'].parent}"


def _over_training(run: RunRecord, measure: Measure) -> str | None:
    """The last value of a number, and the best one if that is another; None where it was never measured."""
    from ipfm.engine.runtime.wording import significant

    points = [(point, point.values[measure.key]) for point in run.evaluations if measure.key in point.values]
    if not points:
        return None
    last, _ = points[-1]
    text = f"{last.shown(measure)} at step {last.step}"
    finite = [(value, point.step) for point, value in points if math.isfinite(value)]
    if not finite:
        return text
    best, step = max(finite, key=lambda found: found[0]) if measure.higher else min(finite, key=lambda found: found[0])
    return text if best == last.values[measure.key] else f"{text}; {measure.best} {significant(best)} at step {step}"


# What follows for whoever started the run.
_WAYS_ON = {
    "stopped": "; the same command continues",
    "diverged": ": too many samples or gradients were not finite, and the same command would probably meet them again; "
    "other settings need another --out",
}


def _folder(path: Path) -> tuple[dict[str, Any], str]:
    """The same of a model folder. ValueError: there is no model, or it is damaged."""
    from ipfm.engine.commands import describe
    from ipfm.engine.objectives import OBJECTIVES
    from ipfm.models import read_config
    from ipfm.models.checkpoints.recognise import is_checkpoint
    from ipfm.models.facts import GeneratorFacts
    from ipfm.models.store import load_stored

    stored = read_config(path)
    parameters = sum(p.numel() for p in load_stored(stored).parameters())
    about, source = stored.facts, stored.facts.source
    generator = isinstance(about, GeneratorFacts)
    sigmas, nfe, distilled = None, None, None
    if isinstance(about, GeneratorFacts):
        sigmas, nfe = _sampling(about)
        objective = OBJECTIVES.of(about.objective, about.settings)
        distilled = objective.in_words(about.settings) if objective else about.about.get("info", about.objective)
    facts = _network(stored.network, parameters) | {
        "kind": "generator" if generator else "teacher",
        "taken": path,
        "nfe": nfe,
        "sigmas": sigmas,
        "training": about.to_json(),
    }
    text = rows(
        [
            ("kind", facts["kind"] + (", the average in a checkpoint of a run" if is_checkpoint(path) else "")),
            *_network_rows(stored.network, parameters),
            ("NFE", nfe if generator else "35 (18 steps of Heun's method, unless others are asked for)"),
            ("sigmas", _levels(sigmas)),
            ("distilled by", distilled),
            ("dataset", about.dataset),
            ("average", about.others.get("average")),
            ("began with", _start(about.others.get("transfer"))),
            ("training", describe.training(about.settings, about.optimizer_steps)),
            ("computed", describe.computed(about.settings)),
            ("measured", describe.measured(about.measured)),
            ("converted from", " ".join(str(source[name]) for name in ("file", "network") if name in source)),
        ]
    )
    return facts, text


def _checkpoint(path: Path) -> tuple[dict[str, Any], str]:
    """The same of the network that would be taken from a checkpoint."""
    from ipfm.engine.commands import describe
    from ipfm.models.checkpoints.distillation_state import is_distillation_state
    from ipfm.models.checkpoints.reader import open_checkpoint
    from ipfm.models.checkpoints.training_state import images_seen, is_training_state, training_state_of
    from ipfm.models.facts import GeneratorFacts

    checkpoint = open_checkpoint(path)
    network = checkpoint.read()
    parameters = sum(network.weights[name].numel() for name in network.parameters)
    why, about = checkpoint.why_generator(network.key), checkpoint.facts
    sigmas, nfe = _sampling(about) if isinstance(about, GeneratorFacts) else (None, None)
    facts: dict[str, Any] = _network(network.config, parameters) | {
        "kind": "generator" if why else "teacher",
        "nfe": nfe,
        "sigmas": sigmas,
        "file": {
            "format": checkpoint.origin,
            "networks": ", ".join(checkpoint.networks),
            "taken": network.key,
            "D from": network.D_source,
            "generator": why,
            "dtype": network.dtypes,
        },
    }
    published = checkpoint.published(network)
    if published is not None:
        facts["edm2"] = published.to_json()
    kind = f", {why}; --generator draws from it" if why and sigmas is None else ""
    if checkpoint.may_be_generator(network.key):
        kind = ", or a generator: nothing says which (ipfm sample --generator)"
    lines: list[tuple[str, object]] = [
        ("kind", facts["kind"] + kind),
        *_network_rows(network.config, parameters),
        *([] if published is None else _published_rows(published, network.config)),
        ("NFE", nfe),
        ("sigmas", _levels(sigmas)),
        ("format", f"{checkpoint.origin}, {network.dtypes}"),
        ("networks", f"{facts['file']['networks']}; taken: {network.key}"),
        ("D from", {"file": "the file", "assumed": "nowhere: assumed"}.get(network.D_source, network.D_source)),
    ]
    if about is not None:
        facts["training"] = about.to_json()
        lines.append(("training", describe.training(about.settings, about.optimizer_steps)))
        lines.append(("computed", describe.computed(about.settings)))
    if is_training_state(checkpoint):
        state = training_state_of(checkpoint, path)
        facts["training"] = {
            "images seen": state.images_seen,
            "optimizer steps": state.adam_steps,
            "lr": state.lr,
            "betas": list(state.betas),
            "eps": state.eps,
            "average from": state.ema_from,
        }
        seen = "" if state.images_seen is None else f", {state.images_seen:,} images"
        lines.append(("training", f"{state.adam_steps:,} steps{seen}, lr {state.lr:g}"))
    elif is_distillation_state(checkpoint):
        images = images_seen(checkpoint.entries.get("cur_nimg"), path)
        facts["training"] = {"images seen": images}
        seen = "images seen: its name does not say" if images is None else f"{images:,} images"
        lines.append(("training", f"{seen}; --continue-from of recipes goes on with it"))
    return facts, rows(lines)


def _published_rows(known: Published, network: NetworkConfig) -> list[tuple[str, object]]:
    """What is said of a network of EDM2's family: its size, what its images are, its average, its published name."""
    side = 8 * network.img_resolution
    images = f"latents of {side}x{side} pixels" if known.encoder == "latent" else "pixels"
    kimg = None if known.kimg is None else f"{known.kimg:,} kimg"
    std = None if known.std is None else f"EMA of width {known.std:g}"
    guess = known.name and ("one of " if "*" in known.name else "") + known.name
    return [
        ("size", known.size),
        ("takes", images + ("" if known.encoder_from == "file" else ", by its channels: no encoder is in the file")),
        ("average" if std else "trained", " at ".join(filter(None, (std, kimg))) or None),
        ("published", ", but ".join(filter(None, (guess, known.contradiction))) or None),
    ]


def _network(network: NetworkConfig, parameters: int) -> dict[str, Any]:

    return {
        "architecture": network.family,
        "resolution": network.img_resolution,
        "channels": network.img_channels,
        "classes": network.label_dim,
        "D": network.D,
        "parameters": parameters,
        "network": network.to_json(),
    }


def _network_rows(network: NetworkConfig, parameters: int) -> list[tuple[str, object]]:
    from ipfm.engine.commands import describe

    return [
        ("architecture", describe.architecture(network)),
        ("images", describe.images(network)),
        ("D", number(network.D)),
        ("parameters", f"{parameters:,}"),
    ]


def _sampling(about: GeneratorFacts) -> tuple[list[float] | None, int | None]:
    """Noise levels and network evaluations of a generator, as far as its folder says them."""
    if about.is_trajectory:
        return [sigma for sigma in (about.sigma_max, about.sigma_min) if sigma is not None], 1
    return (None, None) if about.sigmas is None else (list(about.sigmas), len(about.sigmas))


def _levels(sigmas: object) -> str | None:
    return ", ".join(f"{sigma:g}" for sigma in sigmas) if isinstance(sigmas, list) and sigmas else None
