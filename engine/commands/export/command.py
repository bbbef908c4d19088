"""`ipfm export`: a model for other programs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from ipfm.engine.runtime.commandline import user_input
from ipfm.engine.runtime.json_output import output

if TYPE_CHECKING:
    from torch import Tensor

    from ipfm.engine.commands.export.destination import Format
    from ipfm.engine.commands.export.network import ExportedNetwork


# Images in the picture of a model card, of a generator and of a teacher, whose images take 35 evaluations each.
IMAGES, IMAGES_OF_TEACHER, HEUN_STEPS = 64, 16, 18


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model as ONNX, plain PyTorch, a Hugging Face folder or a checkpoint of EDM.

    A one-step generator becomes a graph from latents to images, a generator of several steps and a teacher the
    denoiser (x, sigma) -> x. D, noise levels and training facts are stored with it; what was written is compared with
    the network. How to use it: docs/checkpoints-and-export.md.

    Example: ipfm export runs/digits-D128-alpha1-K1/generator generator.onnx
    """

    ELSEWHERE: ClassVar[Mapping[str, str]] = {"out": "the file or folder to write is the second name, OUT"}

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Model folder, run folder or checkpoint of one, or a checkpoint of EDM, EDM2, PFGM++ or SiD."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """File or folder to write; an earlier export there is replaced, nothing else is."""
    format: Literal["onnx", "torch", "huggingface", "edm"] | None = None
    """onnx needs pip install onnx onnxscript onnxruntime; edm is a pickle for generate.py of EDM and PFGM++ and for
    sid_generate.py. Default: by OUT, onnx for .onnx, torch for .pt2, edm for .pkl, else huggingface."""
    samples: int | None = None
    """Images in the picture of a Hugging Face folder, 0 for none. Default: 64, of a teacher 16."""
    D: float | None = None
    """Auxiliary dimensions of a checkpoint that does not say them."""
    which: Annotated[str | None, tyro.conf.arg(metavar="WHICH")] = None
    """Of a run: best, last, a step, ema0.05. Default: the end's, else the best."""
    generator: bool = False
    """The checkpoint is a generator: one step at sigma 2.5, or at --sigmas."""
    sigmas: tuple[float, ...] = ()
    """Noise levels of --generator, highest first."""
    teacher: bool = False
    """The checkpoint is a teacher, whatever its name and place say."""
    json: bool = False
    """Print JSON: what was written, its inputs and output, the largest difference from the network, remarks."""

    def run(self) -> None:
        """Write `out` and print how far it is from the network."""
        from ipfm.engine.commands.export.comparison import BATCHES, LIMIT
        from ipfm.engine.commands.export.destination import check_place, choose_format
        from ipfm.engine.commands.export.edm_file import check_edm, inputs_of, remarks_of
        from ipfm.engine.commands.export.network import open_network
        from ipfm.engine.commands.export.onnx_file import check_onnx
        from ipfm.engine.runtime.remarks import Remarks
        from ipfm.engine.sampling.stored_model import Claim, taken_for_granted
        from ipfm.models.checkpoints.run_models import locate

        with user_input():
            format = choose_format(self.out, self.format)
            self._check_samples(format)
            if format == "onnx":
                check_onnx()
            claim = Claim.of(generator=self.generator, teacher=self.teacher, sigmas=self.sigmas)
            taken = locate(self.model, self.which)
            check_place(self.out, format, taken.path)
            network = open_network(taken.path, D=self.D, claim=claim)
            if format == "onnx":
                check_onnx(network)
            elif format == "edm":
                check_edm(network)
        remarks = Remarks()
        if taken.taken:
            remarks.add(taken.said())
        if isinstance(network.levels, tuple):
            for remark in taken_for_granted(taken.path, network.about, network.levels, claim):
                remarks.add(remark)
        difference = self._write(network, format, taken.path)
        inputs, output_name = network.inputs, network.output
        if format == "edm":
            inputs, output_name = inputs_of(network), "denoised"
            for remark in remarks_of(network, self.out):
                remarks.add(remark)
        batches = " and ".join(map(str, BATCHES))
        told = {
            "out": self.out,
            "taken": taken.path,
            "format": format,
            "inputs": inputs,
            "output": output_name,
            "difference": difference,
            "batches": BATCHES,
            "limit": LIMIT,
            "remarks": list(remarks),
        }
        with output(as_json=self.json) as write:
            write(
                told,
                f"{self.out}: {format}, {', '.join(inputs)} -> {output_name}\n"
                f"largest difference from the network: {difference:.1e} (batches of {batches}; limit {LIMIT:.0e})",
            )

    def _write(self, network: ExportedNetwork, format: Format, model: Path) -> float:
        """Write `out`, of what lies at `model`; how far what it computes is from the network."""
        from ipfm.engine.commands.export.edm_file import export_edm
        from ipfm.engine.commands.export.hub_folder import export_folder
        from ipfm.engine.commands.export.model_card import origin_of
        from ipfm.engine.commands.export.onnx_file import export_onnx
        from ipfm.engine.commands.export.program import export_program, make_program

        if format == "edm":
            return export_edm(network, self.out)
        program = make_program(network)
        if format == "onnx":
            return export_onnx(network, program, self.out)
        if format == "torch":
            return export_program(network, program, self.out)
        count = self._count(network)
        draw = (lambda: self._draw(network, count, model)) if count else None
        return export_folder(network, program, self.out, origin=origin_of(model), draw=draw)

    def _check_samples(self, format: str) -> None:
        if self.samples is not None and self.samples < 0:
            raise ValueError(f"samples must be at least 0, got {self.samples}")
        if self.samples is not None and format != "huggingface":
            raise ValueError(f"samples are for the format huggingface, got the format {format}")

    def _count(self, network: ExportedNetwork) -> int:
        """Images in the picture; PNG knows one and three channels."""
        if network.net.img_channels not in (1, 3):
            return 0
        if self.samples is not None:
            return self.samples
        return IMAGES if network.is_generator else IMAGES_OF_TEACHER

    def _draw(self, network: ExportedNetwork, count: int, model: Path) -> Tensor:
        """`count` images of seed 0, (count, C, H, W) in [-1, 1], on the run's device."""
        from ipfm.engine.distributed.device import run_device
        from ipfm.engine.sampling.memory_format import set_memory_format
        from ipfm.engine.sampling.stored_model import sample_network

        # A copy: what is exported stays on the CPU.
        net, device = copy.deepcopy(network.net), run_device()
        set_memory_format(net, "auto", device)
        net = net.to(device)
        return sample_network(net, network.about, model, heun_steps=HEUN_STEPS, seed=0).draw(0, count)
