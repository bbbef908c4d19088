"""`ipfm evaluate`: how far a model's samples, or other images, are from real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from ipfm.engine.commands.processes import joined
from ipfm.engine.runtime.commandline import user_input
from ipfm.engine.runtime.files import check_writable
from ipfm.engine.runtime.json_output import Write, output

if TYPE_CHECKING:
    from torch import Tensor

    from ipfm.engine.distributed.world import World
    from ipfm.engine.evaluation.evaluation import Comparison, Evaluation
    from ipfm.engine.evaluation.metrics import FrechetResult
    from ipfm.engine.evaluation.metrics.measures import Measure
    from ipfm.engine.evaluation.subject import Subject
    from ipfm.engine.runtime.progress import ProgressBar
    from ipfm.engine.runtime.remarks import Remarks


# Images of a published FID.
PUBLISHED_IMAGES = 50_000


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure FID, KID, Inception score, precision and recall of a model or of images.

    A model is drawn at its own D. Processes share the work: deepspeed .venv/bin/ipfm evaluate ...
    Example: ipfm evaluate runs/cifar --reference cifar10-32x32.npz --inception inception-2015-12-05.pt
    """

    ELSEWHERE: ClassVar[Mapping[str, str]] = {
        **{name: f"it is one of --metrics, as in --metrics {name}" for name in ("fid", "kid", "is", "pr")},
        "data": "images to compare with are --reference",
        "n": "the number of images is --images",
        "steps": "the number of steps is a generator's own; --heun-steps is for a teacher",
        "gnet": "the network that guides is --guide",
    }

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Model or run folder, checkpoint, or images (folder, archive, .npz)."""
    reference: Annotated[Path | None, tyro.conf.arg(metavar="F")] = None
    """Real images, or their statistics (.npz, .pkl of EDM2). Only "is" needs none."""
    inception: Annotated[Path | None, tyro.conf.arg(metavar="F")] = None
    """The Inception network: inception-2015-12-05.pt of NVIDIA's StyleGAN2-ADA."""
    features: Literal["inception", "dinov2", "pixels", "blocks", "classifier"] = "inception"
    """What images are compared by; only inception gives an FID."""
    dinov2: Annotated[Path | None, tyro.conf.arg(metavar="F")] = None
    """The DINOv2 of FD-DINOv2: dinov2_vitl14_pretrain.pth, or a TorchScript file."""
    classifier: Annotated[Path | None, tyro.conf.arg(metavar="F")] = None
    """The classifier.safetensors that recipes/fashion_ipfm.py leaves."""
    vae: Annotated[Path | None, tyro.conf.arg(metavar="VAE")] = None
    """Measure pictures of latents, by this AutoencoderKL (diffusers)."""
    metrics: tuple[Literal["fid", "kid", "is", "pr"], ...] = ("fid",)
    """kid and pr need real images. KID of 100 subsets; pr: k = 3."""
    images: int | None = None
    """Images that are measured. Default: 50000 of a model, otherwise all."""
    repeats: int = 1
    """Sets of samples, each of other latents; papers print the best of 3."""
    pr_images: Annotated[int, tyro.conf.arg(metavar="N")] = 10_000
    """Images of a set for precision and recall, quadratic in time."""
    batch: int = 256
    """Images a process handles at a time."""
    seed: int = 0
    """Image i of a seed is the same whatever the batch and the ranks."""
    heun_steps: int = 18
    """Steps of a teacher's sampler; 18 are 35 network evaluations."""
    rho: float | None = None
    """Of a teacher's sampler: the spacing of its noise levels. Default: 7."""
    sigma_min: Annotated[float | None, tyro.conf.arg(metavar="S")] = None
    """The lowest of them. Default: 0.002 or the network's."""
    sigma_max: Annotated[float | None, tyro.conf.arg(metavar="S")] = None
    """The highest. Default: 80 or the network's."""
    guide: Annotated[Path | None, tyro.conf.arg(metavar="MODEL")] = None
    """Guide a teacher by this weaker one, see ipfm sample."""
    guidance: Annotated[float | None, tyro.conf.arg(metavar="W")] = None
    """How far from --guide, such as 1.4; 1 is without."""
    D: float | None = None
    """Auxiliary dimensions of a checkpoint that does not say them."""
    which: Annotated[str | None, tyro.conf.arg(metavar="WHICH")] = None
    """Of a run: best, last, a step, ema0.05. Default: the end's, else the best."""
    generator: bool = False
    """The checkpoint is a generator: one step at sigma 2.5, or at --sigmas."""
    sigmas: Annotated[tuple[float, ...], tyro.conf.arg(metavar="S")] = ()
    """Noise levels of --generator, one or more, highest first."""
    teacher: bool = False
    """The checkpoint is a teacher, whatever its name and place say."""
    skip_unreadable: bool = False
    """Put the next image in the place of one that cannot be read."""
    strict: bool = False
    """Stop where an image would be left out, or a sample is not finite."""
    json: bool = False
    """Print JSON: the distances of each set, nfe, D, the published figure, remarks."""
    save_reference: Annotated[Path | None, tyro.conf.arg(metavar="F")] = None
    """Keep the statistics of a reference that is images in this .npz."""

    def run(self) -> None:
        """Print what was measured."""
        with output(as_json=self.json) as write:
            self._run(write)

    def _run(self, write: Write) -> None:
        from ipfm.engine.distributed.device import run_device
        from ipfm.engine.distributed.launch_environment import check_environment, environment_remarks
        from ipfm.engine.evaluation.evaluation import open_comparison
        from ipfm.engine.evaluation.subject import open_subject
        from ipfm.engine.runtime.host_memory import check_memory, enough_memory
        from ipfm.engine.runtime.remarks import Remarks
        from ipfm.engine.sampling.stored_model import Claim, Schedule, load_guidance
        from ipfm.models.autoencoder import load_autoencoder

        with user_input():
            self._check()
            check_environment()
            subject = open_subject(
                self.model,
                run_device(),
                heun_steps=self.heun_steps,
                seed=self.seed,
                schedule=Schedule(self.sigma_min, self.sigma_max, self.rho),
                guidance=load_guidance(self.guide, self.guidance, run_device()),
                D=self.D,
                claim=Claim.of(generator=self.generator, teacher=self.teacher, sigmas=self.sigmas),
                which=self.which,
                limit=self.images,
                skip_unreadable=self.skip_unreadable,
                strict=self.strict,
            )
            if subject.available is not None and self.repeats > 1:
                raise ValueError(f"repeats must be 1 for images, got {self.repeats}: {self.model} is no model")
            autoencoder = None if self.vae is None else load_autoencoder(self.vae, run_device())
            comparison = open_comparison(
                self.reference,
                subject.shape,
                run_device(),
                features=self.features,
                inception=self.inception,
                classifier=self.classifier,
                dinov2=self.dinov2,
                metrics=self.metrics,
                skip_unreadable=self.skip_unreadable,
                strict=self.strict,
                autoencoder=autoencoder,
            )
            if self.save_reference and (comparison.file is None or comparison.file.statistics is not None):
                raise ValueError("save-reference needs a --reference of images, whose statistics are not known yet")
            images = self.images or subject.available or PUBLISHED_IMAGES
            check_memory(
                math.prod(subject.shape) * 4 * min(self.batch, images),
                f"a batch of {min(self.batch, images):,} images",
                "give a smaller --batch",
            )
            if run_device().type == "cpu":
                kept = comparison.kept_bytes(images, self.batch)
                check_memory(kept, f"a comparison of {images:,} images", "give a smaller --images")
        with user_input():
            world = joined()
        remarks = Remarks()
        remarks.extend((*subject.said, *comparison.said))
        remarked = (*environment_remarks(), *subject.remarks, *comparison.remarks(subject.shape, images))
        remarked += () if autoencoder is None else autoencoder.remarks
        for remark in remarked if world.is_main else ():
            remarks.add(remark)
        with enough_memory("give a smaller --batch"):
            self._measure(write, subject, comparison, world, images, remarks)

    def _measure(
        self,
        write: Write,
        subject: Subject,
        comparison: Comparison,
        world: World,
        images: int,
        remarks: Remarks,
    ) -> None:
        from ipfm.engine.evaluation.metrics.measures import notes
        from ipfm.engine.evaluation.reference_data import save_statistics

        with user_input():
            evaluation = comparison.evaluation(
                world,
                images=images,
                batch=self.batch,
                seed=self.seed,
                pr_images=self.pr_images,
            )
        if self.save_reference and world.is_main:
            with user_input():
                save_statistics(self.save_reference, evaluation.statistics, evaluation.features.name)
        results = []
        # A bad file of a large data set shows when it is read.
        with user_input(), self._bar(evaluation, world) as bar:
            for repeat in range(self.repeats):
                draw = _counting(subject.draw, bar)
                result = evaluation.measure(
                    draw, world, first_index=repeat * evaluation.images, leave_out=not self.strict
                )
                results.append(result)
        for result in results:
            if result.left_out and world.is_main:
                drawn = result.images + result.left_out
                remarks.add(f"{result.left_out:,} of {drawn:,} images were not finite; --strict refuses them")
        for note in notes(results, results[0].name) if world.is_main else ():
            remarks.add(note)
        if world.is_main:
            # Of a classifier there are many: which one it was is a part of the number.
            named: dict[str, object] = {}
            if self.features == "classifier":
                named["features_name"] = evaluation.features.name
            if self.vae is not None:
                named["vae"] = self.vae
            facts = self._facts(subject, results) | named | {"remarks": list(remarks)}
            write(facts, self._text(subject, evaluation, results))

    def _check(self) -> None:
        from ipfm.engine.data.open_dataset import check_strictness
        from ipfm.engine.evaluation.metrics.collection import MOST_IMAGES

        check_strictness(skip_unreadable=self.skip_unreadable, strict=self.strict)
        for name, least in (("repeats", 1), ("batch", 1), ("heun_steps", 1), ("images", 2), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name.replace('_', '-')} must be at least {least}, got {value}")
        if self.images is not None and self.images > MOST_IMAGES:
            raise ValueError(f"images must be at most {MOST_IMAGES:,}, got {self.images:,}")
        if self.save_reference and (self.save_reference.suffix.lower() != ".npz" or self.save_reference.is_dir()):
            raise ValueError(f"save-reference must be a file that ends in .npz, got {self.save_reference}")
        if self.save_reference:
            check_writable(self.save_reference, self.save_reference.parent)
        if self.reference is None and set(self.metrics) != {"is"}:
            raise ValueError("give --reference, statistics (.npz) or real images; only the Inception score needs none")
        if self.features == "inception" and self.inception is None:
            from ipfm.engine.evaluation.metrics.features import WHERE_TO_GET_INCEPTION

            raise ValueError(
                f"give --inception FILE ({WHERE_TO_GET_INCEPTION}), or compare pixels with --features pixels, "
                "blocks of them with --features blocks"
            )

    def _bar(self, evaluation: Evaluation, world: World) -> ProgressBar:
        """Counts the images of this process."""
        from ipfm.engine.evaluation.metrics import index_ranges
        from ipfm.engine.runtime.progress import ProgressBar

        ranges = index_ranges(evaluation.images, evaluation.batch, world.rank, world.size)
        return ProgressBar("evaluate", self.repeats * sum(count for _, count in ranges), enabled=world.is_main)

    def _paper(self, subject: Subject, images: int) -> str | None:
        """The published figure, where these numbers are measured as it was."""
        return subject.paper if self.features == "inception" and images == PUBLISHED_IMAGES else None

    def _facts(self, subject: Subject, results: list[FrechetResult]) -> dict[str, object]:
        return {
            "model": self.model,
            "taken": subject.path,
            "kind": subject.kind,
            "D": subject.D,
            "nfe": subject.nfe,
            "guide": self.guide,
            "guidance": self.guidance,
            "features": self.features,
            "metrics": list(dict.fromkeys(self.metrics)),
            "reference": self.reference,
            "seed": self.seed if subject.nfe else None,
            "images": results[0].images,
            "left_out": sum(result.left_out for result in results),
            "frechet": _smallest(results) if "fid" in self.metrics else None,
            "runs": [
                {
                    name: value
                    for name, value in result.to_json().items()
                    if not _unmeasured(value) and name != "metrics"
                }
                for result in results
            ],
            "paper": self._paper(subject, results[0].images),
        }

    def _text(self, subject: Subject, evaluation: Evaluation, results: list[FrechetResult]) -> str:
        from ipfm.engine.evaluation.metrics.measures import measures_of
        from ipfm.engine.runtime.wording import counted, significant

        count, seconds = results[0].images, sum(result.seconds for result in results)
        about = f"{subject.kind} {self.model}"
        if subject.D is not None:
            about += f", sampled at its own D = {subject.D:g}"
            about += f", {counted(subject.nfe, 'network evaluation')} an image"
        sets = f"{len(results)} x " if len(results) > 1 else ""
        drawn = f"seed {self.seed}, " if subject.nfe else ""
        name = evaluation.features.name if self.features == "classifier" else self.features
        lines = [
            about,
            f"{sets}{count} images, {drawn}{significant(seconds)} s, "
            f"{significant(len(results) * count / max(seconds, 1e-9))} images/s",
            f"features: {name} ({evaluation.features.dim}), reference: {self.reference or 'none'}",
            "",
        ]
        rows: list[tuple[str, list[str]]] = []
        for measure in measures_of(self.metrics):
            shown = ["not finite" if math.isnan(r.values[measure.key]) else r.shown(measure) for r in results]
            how = {_how(r, measure) for r in results}
            rows.append((measure.called(results[0].name), [*shown, *(f"({words})" for words in how if words)]))
        if "fid" in self.metrics and len(results) > 1:
            smallest = _smallest(results)
            rows.append((f"smallest {results[0].name}", [_number(smallest)]))
        if "fid" in self.metrics and (paper := self._paper(subject, count)):
            rows.append(("paper", [paper]))
        width = max(len(name) for name, _ in rows)
        return "\n".join([*lines, *(f"{name:<{width}}  {'   '.join(values)}" for name, values in rows)])


def _smallest(results: list[FrechetResult]) -> float:
    """The smallest distance; NaN, which is smaller than nothing, where none could be measured."""
    return min((result.distance for result in results if not math.isnan(result.distance)), default=math.nan)


def _unmeasured(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _how(result: FrechetResult, measure: Measure) -> str:
    """What a number depends on beside the images, for who compares it."""
    if measure.metric == "kid" and result.kid_subset_size is not None:
        return f"subsets of {result.kid_subset_size}"
    if measure.metric == "pr" and result.pr_images is not None:
        return f"k = 3, {result.pr_images} samples, {result.pr_real_images} real images"
    return ""


def _number(value: float | None) -> str:
    """A number for people; "not finite" where too few samples were finite to measure it."""
    from ipfm.engine.runtime.wording import significant

    return "not finite" if value is None or math.isnan(value) else significant(value)


def _counting(draw: Callable[[int, int], Tensor], bar: ProgressBar) -> Callable[[int, int], Tensor]:
    """`draw`, seen by the bar."""

    def counted(first: int, count: int) -> Tensor:
        images = draw(first, count)
        bar.advance(count)
        return images

    return counted
