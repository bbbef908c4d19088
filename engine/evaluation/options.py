"""What the samples of a recipe are compared with while it trains: its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

if TYPE_CHECKING:
    from ipfm.engine.data.dataset import ImageDataset
    from ipfm.engine.distributed.world import World
    from ipfm.engine.evaluation.evaluation import Comparison, Evaluation, FeatureName
    from ipfm.models.autoencoder import Autoencoder


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of the evaluation; without a reference there is none.

    Raises:
        ValueError: options that do not go together.
    """

    FEATURES: ClassVar[tuple[str, ...]] = ("auto", "inception", "dinov2", "pixels", "blocks")

    reference: Path | None = None
    """What samples are compared with: statistics (.npz with mu and sigma, .pkl of EDM2) or images (folder, zip,
    CIFAR-10 archive)."""
    inception: Path | None = None
    """The TorchScript Inception network (inception-2015-12-05.pt), which makes the distance an FID."""
    dinov2: Path | None = None
    """The DINOv2 of FD-DINOv2: dinov2_vitl14_pretrain.pth or a TorchScript network, with --features dinov2."""
    features: Literal["auto", "inception", "dinov2", "pixels", "blocks"] = "inception"
    """What images are compared by. pixels: the images themselves; blocks: means and deviations of blocks of pixels,
    for any size and without a network; auto: inception with --inception, dinov2 with --dinov2, else blocks."""
    vae: Path | None = None
    """Of latents: the folder of the AutoencoderKL (diffusers) that makes pictures of samples, for grids and
    distances."""
    skip_unreadable: bool = False
    """Put the next image in the place of one that cannot be decoded. Default: the first one stops."""
    strict: bool = False
    """Stop where anything of a data set would be left out, or where a class has no images."""
    eval_images: int = 10_000
    """Images drawn for each distance; published figures take 50 000."""
    metrics: tuple[Literal["fid", "kid", "is", "pr"], ...] = ("fid",)
    """What is measured at each evaluation, of the same samples; the best generator is that by the first."""

    def check_evaluation(self) -> None:
        """Check that these options go together; called when the options are made.

        Raises:
            ValueError: they do not.
        """
        from ipfm.engine.data.open_dataset import check_strictness
        from ipfm.engine.evaluation.evaluation import OF_PIXELS, check_sizes
        from ipfm.engine.evaluation.metrics.collection import MOST_IMAGES
        from ipfm.engine.evaluation.metrics.dinov2 import WHERE_TO_GET_DINOV2
        from ipfm.engine.evaluation.metrics.evaluate import check_known
        from ipfm.engine.evaluation.metrics.features import WHERE_TO_GET_INCEPTION

        check_strictness(skip_unreadable=self.skip_unreadable, strict=self.strict)
        if self.eval_images < 2:
            raise ValueError(f"eval-images must be at least 2, got {self.eval_images}")
        if self.eval_images > MOST_IMAGES:
            raise ValueError(f"eval-images must be at most {MOST_IMAGES:,}, got {self.eval_images:,}")
        check_known(self.metrics)
        check_sizes(self.metrics, self.eval_images)
        if self.features not in self.FEATURES:
            possible = f"{', '.join(self.FEATURES[:-1])} or {self.FEATURES[-1]}"
            raise ValueError(f"features must be {possible}, got {self.features!r}")
        if self.compared_with is None and self.inception is not None and not self._needs_no_reference:
            raise ValueError("inception was given without reference: there is nothing to compare with")
        if self.compared_with is None and self.dinov2 is not None:
            raise ValueError("dinov2 was given without reference: there is nothing to compare with")
        if self.dinov2 is not None and self.compared_by != "dinov2":
            raise ValueError(f"dinov2 was given, but features is {self.compared_by}: give --features dinov2")
        if self.compared_by == "dinov2" and self.dinov2 is None:
            raise ValueError(f"features dinov2 needs --dinov2 FILE ({WHERE_TO_GET_DINOV2})")
        if self.compared_with is None and self.features in OF_PIXELS:
            raise ValueError(f"features {self.features} was given without reference: there is nothing to compare with")
        if self.compared_with is not None and self.compared_by == "inception" and self.inception is None:
            raise ValueError(
                f"reference needs --inception FILE ({WHERE_TO_GET_INCEPTION}), or --features blocks to compare "
                "blocks of pixels"
            )

    @property
    def compared_with(self) -> Path | None:
        """What samples are compared with: --reference; a recipe may have something else without one."""
        return self.reference

    @property
    def compared_by(self) -> FeatureName:
        """What images are compared by, decided."""
        if self.features != "auto":
            return self.features
        if self.inception is not None:
            return "inception"
        return "blocks" if self.dinov2 is None else "dinov2"

    @property
    def _needs_no_reference(self) -> bool:
        """The Inception score alone is asked for."""
        return set(self.metrics) == {"is"}

    def autoencoder(self, shape: tuple[int, int, int], device: torch.device) -> Autoencoder | None:
        """What makes pictures of samples that are latents; None without --vae, which is said of latents on stderr.

        Args:
            shape: (C, H, W) of the samples.
            device: where it computes.

        Raises:
            ValueError: --vae names none that can be used, or the samples are no latents.
        """
        from ipfm.engine.runtime.launcher import is_first_process
        from ipfm.engine.runtime.remarks import Remarks
        from ipfm.models.autoencoder import SHOWS, is_latent, load_autoencoder

        if self.vae is None:
            if is_latent(shape) and is_first_process():
                Remarks().add(f"the samples are latents, whose channels grids show in grey, side by side: {SHOWS}")
            return None
        found = load_autoencoder(self.vae, device)
        found.shape_of_pictures(shape)
        for said in found.remarks if is_first_process() else ():
            Remarks().add(said)
        return found

    def comparison(
        self,
        shape: tuple[int, int, int],
        device: torch.device,
        *,
        images: ImageDataset | None = None,
        autoencoder: Autoencoder | None = None,
    ) -> Comparison | None:
        """The files that these options name, open and checked; None where nothing is to be measured.

        What is to be known of the numbers is said on stderr, such as a reference of images of another size.

        Args:
            shape: (C, H, W) of the samples.
            device: where features are computed.
            images: those that the samples are compared with, where they are open already.
            autoencoder: of samples that are latents, see `autoencoder`.

        Raises:
            ValueError: a file that cannot be used, does not fit the samples, or does not allow what is to be measured;
                or too little memory for it.
        """
        from ipfm.engine.evaluation.evaluation import check_sizes, open_comparison
        from ipfm.engine.runtime.host_memory import check_memory
        from ipfm.engine.runtime.launcher import is_first_process
        from ipfm.engine.runtime.remarks import Remarks

        if self.compared_with is None and self.inception is None:
            if self._needs_no_reference:
                raise ValueError("metrics is needs --inception FILE; the Inception score alone needs no --reference")
            if self.metrics != ("fid",):
                raise ValueError(
                    f"metrics {' '.join(self.metrics)} was given without reference: there is nothing to compare with"
                )
            return None
        found = open_comparison(
            self.compared_with,
            shape,
            device,
            features=self.compared_by,
            inception=self.inception,
            metrics=self.metrics,
            skip_unreadable=self.skip_unreadable,
            strict=self.strict,
            images=images,
            autoencoder=autoencoder,
            dinov2=self.dinov2,
        )
        if found.file is not None and found.file.images is not None:
            check_sizes(self.metrics, self.eval_images, real=len(found.file.images))
        if device.type == "cpu":
            kept = found.kept_bytes(self.eval_images, batch=256)
            check_memory(kept, f"a comparison of {self.eval_images:,} images", "give a smaller --eval-images")
        remarks = Remarks()
        for remark in found.remarks(shape, self.eval_images) if is_first_process() else ():
            remarks.add(remark)
        return found

    def evaluation(self, comparison: Comparison | None, world: World) -> Evaluation | None:
        """The evaluation of a run; features of reference images are computed here. Every rank calls it."""
        return None if comparison is None else comparison.evaluation(world, images=self.eval_images)
