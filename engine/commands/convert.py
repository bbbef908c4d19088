"""`ipfm convert`: a checkpoint of EDM, EDM2, PFGM++ or SiD becomes a model folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from ipfm.engine.runtime.commandline import user_input
from ipfm.engine.runtime.json_output import output

if TYPE_CHECKING:
    from ipfm.models.checkpoints.reader import Checkpoint, ImportedNetwork
    from ipfm.models.checkpoints.run_models import Located
    from ipfm.models.facts import ModelFacts


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a network of a checkpoint as a model folder, running nothing from the file.

    Reads the network snapshots and training states of EDM, EDM2, SiD and SiDA, PFGM++'s training states (.pt, .pkl),
    and those of the distillation projects built on SiD.

    Example: ipfm convert training-state-097000.pt models/cifar10-D2048
    """

    ELSEWHERE: ClassVar[Mapping[str, str]] = {"out": "the folder to write is the second name, OUT"}

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IN")]
    """Checkpoint file, or a checkpoint or the folder of a run."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Model folder to write; a network stored there before is replaced."""
    D: float | None = None
    """Auxiliary dimensions the network was trained for, where the file does not say; inf is diffusion."""
    network: str | None = None
    """Which of the file's networks. Default: the average of the weights (ema, G_ema), where there is one."""
    generator: bool = False
    """The network is a generator, not a teacher; known by itself by the name of the network or the file."""
    sigmas: tuple[float, ...] = ()
    """A generator's noise levels, highest first; 2.5 for SiD's."""
    teacher: bool = False
    """The network is a teacher, whatever its name and place say."""
    json: bool = False
    """Print JSON: what the file holds, the network taken, its parameters, its facts."""

    def run(self) -> None:
        """Print what the file holds and write the folder."""
        import torch

        from ipfm.engine.noise_levels import check_sigmas
        from ipfm.models import build_network, save_model
        from ipfm.models.checkpoints.reader import open_checkpoint
        from ipfm.models.checkpoints.recognise import is_checkpoint, missing
        from ipfm.models.checkpoints.run_models import locate

        with user_input():
            if self.sigmas:
                check_sigmas(self.sigmas)
            if self.out.exists() and not self.source.exists():
                raise ValueError(f"{missing(self.source)}; the checkpoint comes first: ipfm convert IN OUT")
            taken = locate(self.source)
            if is_checkpoint(taken.path) or taken.taken:
                self._of_run(taken)
                return
            checkpoint = open_checkpoint(self.source)
            name = checkpoint.choose(self.network)
            generator = self._is_generator(checkpoint, name)
            imported = checkpoint.read(name, D=self.D)
            about = self._about(checkpoint.facts, generator, imported, self._source(checkpoint, imported))
            facts = about.to_json()
            # The file's weights go into the folder as they are: no network is made of them.
            with torch.device("meta"):
                net = build_network(imported.config)
            save_model(net, self.out, extra=facts, state=imported.weights)
        size = sum(p.numel() for p in net.parameters())
        told = {"out": self.out, "networks": list(checkpoint.networks), "parameters": size, **facts}
        lines = (*describe(checkpoint, imported), ("parameters", f"{size:,}"), ("written", str(self.out)))
        with output(as_json=self.json) as write:
            write(
                told | {"network": imported.config.to_json()},
                "\n".join(f"{name + ':':<14}{value}" for name, value in lines),
            )

    def _of_run(self, taken: Located) -> None:
        """Write the average in a checkpoint of a run, or what is taken of a run folder. ValueError: it cannot be."""
        from ipfm.engine.runtime.remarks import Remarks
        from ipfm.models import load_model, read_config, save_model

        given = [name for name in ("D", "network", "generator", "sigmas", "teacher") if getattr(self, name)]
        if given:
            raise ValueError(f"{' and '.join(given)} cannot be given: {taken.path} says itself what it is")
        stored = read_config(taken.path)
        remarks = Remarks()
        if taken.taken:
            remarks.add(taken.taken)
        net = load_model(taken.path)
        save_model(net, self.out, extra=stored.extra)
        size = sum(p.numel() for p in net.parameters())
        told = {"out": self.out, "taken": taken.path, "parameters": size, **stored.extra, "remarks": list(remarks)}
        with output(as_json=self.json) as write:
            write(
                told | {"network": stored.network.to_json()},
                f"{taken.path}: {size:,} parameters, written to {self.out}",
            )

    def _is_generator(self, checkpoint: Checkpoint, name: str) -> bool:
        """ValueError: it needs noise levels and has none, or the other way round."""
        from ipfm.models.facts import GeneratorFacts

        if self.generator and self.teacher:
            raise ValueError("generator and teacher exclude each other: give one of them")
        why = None if self.teacher else checkpoint.why_generator(name)
        generator = self.generator or why is not None
        if generator and not self.sigmas and not isinstance(checkpoint.facts, GeneratorFacts):
            raise ValueError(
                f"{checkpoint.where}: {name} is a generator; give its noise levels with --sigmas (2.5 for SiD's)"
                + ("" if self.generator else f"; it is known {why}: --teacher if it is a teacher after all")
            )
        if self.sigmas and not generator:
            raise ValueError(f"sigmas are a generator's; give --generator if {name} of {checkpoint.where} is one")
        return generator

    def _about(
        self, known: ModelFacts | None, generator: bool, imported: ImportedNetwork, source: dict[str, str]
    ) -> ModelFacts:
        """What the folder says of the network, its noise levels first; `known`: what the file says, if it is ours."""
        from ipfm.models.facts import GeneratorFacts, TeacherFacts

        if isinstance(known, GeneratorFacts) and generator:
            return replace(known, source=source, sigmas=self.sigmas or known.sigmas)
        if isinstance(known, TeacherFacts) and not generator:
            return replace(known, source=source)
        if generator:
            return GeneratorFacts(sigmas=self.sigmas, D=imported.config.D, source=source, order=("task", "sigmas"))
        return TeacherFacts(D=imported.config.D, source=source)

    def _source(self, checkpoint: Checkpoint, imported: ImportedNetwork) -> dict[str, str]:
        with self.source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "file": self.source.name,
            "format": checkpoint.origin,
            "network": imported.key,
            "sha256": digest,
            "D": imported.D_source,
            **checkpoint.source_facts(imported),
        }


def describe(checkpoint: Checkpoint, imported: ImportedNetwork) -> list[tuple[str, str]]:
    """What there is to say about a checkpoint and the network taken from it, as (name, value) lines."""
    config = imported.config
    sources = {"file": "says the file", "caller": "as given", "assumed": "assumed: neither the file nor --D says it"}
    labels = f", {config.label_dim} classes" if config.label_dim else ""
    return [
        ("file", f"{checkpoint.origin} ({checkpoint.container})"),
        ("networks", ", ".join(checkpoint.networks)),
        ("taken", imported.key),
        (
            "architecture",
            f"{imported.class_name}, {config.model_type}, {config.img_channels}×{config.img_resolution}×"
            f"{config.img_resolution}{labels}, {config.model_channels} channels × {tuple(config.channel_mult)}",
        ),
        ("D", f"{config.D:g} ({sources[imported.D_source]})"),
        *([("stored in", f"{imported.dtypes}, raised to float32")] if imported.dtypes != "float32" else []),
    ]
