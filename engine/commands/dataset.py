"""`ipfm dataset`: a data set's zip from a folder of pictures, a zip or CIFAR-10's archive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from ipfm.engine.runtime.commandline import user_input
from ipfm.engine.runtime.files import check_writable
from ipfm.engine.runtime.json_output import output
from ipfm.engine.runtime.remarks import Remarks

if TYPE_CHECKING:
    from ipfm.engine.data.preparation import Pictures


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Make a data set of square images, as one zip in EDM's format.

    Example: ipfm dataset imagenet/train imagenet-64.zip --resolution 64 --crop center
    """

    ELSEWHERE: ClassVar[Mapping[str, str]] = {
        "transform": "squares are made by --crop center, wide or adm",
        "source": "the source comes first, without an option",
        "vae": "latents are made by --latents VAE_FOLDER",
        "dest": "the zip comes second, without an option",
        **dict.fromkeys(("width", "height"), "the size is --resolution, a side or with --crop wide WxH"),
    }

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder or zip of images, or CIFAR-10, MNIST, tars (WebDataset), parquet or arrow files."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT.zip")]
    """The zip to write."""
    resolution: Annotated[int | str | None, tyro.conf.arg(metavar="N")] = None
    """Side of the images, to which others are resized (Lanczos); WxH for --crop wide. Default: as they are, all alike.
    """
    crop: Literal["center", "wide", "adm", "none"] = "none"
    """Of images that are not square, center takes the middle; wide takes the largest rectangle of the shape WxH, makes
    it WxH and puts black above and below, up to WxW; adm shrinks as for ADM (box, bicubic), then takes the middle; none
    stops."""
    fit: Literal["stretch", "pad", "none"] = "none"
    """Keep all of such images: squeeze them into the square, or put black beside them."""
    channels: Literal[1, 3] | None = None
    """1 makes them grey, 3 RGB. Default: RGB if any is in colour, else grey."""
    labels: Literal["auto", "folders", "none"] = "auto"
    """auto: those of dataset.json or of the set itself, else the names of the top-level folders, unless numbered 00000
    ... or an image lies beside them; folders: always these names."""
    latents: Annotated[Path | None, tyro.conf.arg(metavar="VAE")] = None
    """Write EDM2's latents, by this AutoencoderKL of diffusers."""
    max_images: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Keep so many images."""
    subset: Literal["random", "first"] = "random"
    """Which ones: drawn by --seed, or the first by name, which may be of a few classes alone."""
    seed: int = 0
    """Of the random subset."""
    background: Literal["white", "black", "grey"] | None = None
    """Put transparent images on this colour. Default: the first one stops."""
    first_frame: bool = False
    """Take the first picture of animations and the like. Default: they stop."""
    to_8_bits: bool = False
    """Keep the upper 8 of 16 bits a value. Default: more than 8 stop."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, counted. Default: the first one stops."""
    strict: bool = False
    """Stop where anything in SOURCE would be left out, or where a class has no images."""
    split: str | None = None
    """Part of a set that has several: train, test (t10k), validation. Default: train."""
    overwrite: bool = False
    """Replace OUT.zip where it exists."""

    json: bool = False
    """Print JSON: out, images, resolution, channels, labels, left_out, remarks, …"""

    def run(self) -> None:
        """Write the zip and print what is in it."""
        from ipfm.engine.data.decoding import Leniency, pillow_heard
        from ipfm.engine.data.open_dataset import Subset, check_strictness, empty_classes, label_width
        from ipfm.engine.data.preparation import find_pictures
        from ipfm.engine.data.shaping import Shaping, read_resolution
        from ipfm.engine.data.zip_writer import latent_name, write_dataset_zip
        from ipfm.engine.distributed.device import run_device
        from ipfm.models.autoencoder import LATENT_CHANNELS, load_autoencoder

        remarks = Remarks()
        with user_input():
            check_strictness(skip_unreadable=self.skip_unreadable, strict=self.strict)
            if self.source.suffix.lower() == ".zip" and self.out.is_dir():
                raise ValueError(
                    f"{self.out} is a folder; the images come first: ipfm dataset {self.out} {self.source}"
                )
            if self.out.suffix.lower() != ".zip":
                raise ValueError(f"the data set must be named *.zip, got {self.out}")
            if self.out.is_dir():
                raise ValueError(f"{self.out} is a folder")
            if self.out.exists() and not self.overwrite:
                raise ValueError(f"{self.out} exists already: give --overwrite, or another name")
            check_writable(self.out, self.out.parent)
            if self.latents is not None and self.channels == 1:
                raise ValueError("channels 1 was given, but latents are of RGB images: leave one of them out")
            if self.max_images is None and (self.subset != "random" or self.seed):
                raise ValueError(f"{'seed' if self.seed else 'subset'} needs max-images: --max-images 1000, say")
            if self.subset == "first" and self.seed:
                raise ValueError("seed was given, but subset first draws nothing")
            autoencoder = None if self.latents is None else load_autoencoder(self.latents, run_device())
            for said in () if autoencoder is None else autoencoder.remarks:
                remarks.add(said)
            with pillow_heard() as heard:
                pictures = find_pictures(
                    self.source,
                    Shaping(read_resolution(self.resolution), self.crop, self.fit),
                    self.labels,
                    Subset(self.max_images, self.seed, first=self.subset == "first"),
                    skip_unreadable=self.skip_unreadable,
                    leniency=Leniency(self.background, self.first_frame, self.to_8_bits),
                    channels=self.channels if autoencoder is None else 3,
                    split=self.split,
                )
            if autoencoder is not None and pictures.side % autoencoder.factor:
                raise ValueError(
                    f"the images have {pictures.side} pixels a side, for {self.latents} it must be a multiple of "
                    f"{autoencoder.factor}: give --resolution"
                )
            empty = empty_classes(pictures.labels, pictures.width)
            for said in pictures.notes:
                remarks.add(said)
            for said in self._remarks(pictures):
                remarks.add(said)
            if self.strict and (pictures.left_out.beyond_system_files or pictures.remarks or empty):
                raise ValueError(f"strict was given, and {remarks[-1]}")
            # The work as well: a bad image may show only when it is decoded.
            with pillow_heard() as while_decoding:
                if autoencoder is None:
                    write_dataset_zip(self.out, pictures.pngs(), pictures.labels)
                else:
                    write_dataset_zip(self.out, pictures.encoded(autoencoder), pictures.labels, latent_name)
            for said in (while_decoding or heard)[:1]:
                remarks.add(f"{self.source}: {said}")
        width = 0 if pictures.labels is None else label_width(pictures.labels)
        classes = pictures.labels is not None and pictures.labels.ndim == 1
        side = 0 if autoencoder is None else pictures.side // autoencoder.factor
        shape = None if autoencoder is None else (LATENT_CHANNELS, side, side)
        with output(as_json=self.json) as write:
            write(
                {
                    "out": self.out,
                    "images": pictures.count,
                    "of_images": pictures.whole,
                    "subset": self._subset(pictures),
                    "resolution": pictures.side,
                    "channels": pictures.channels,
                    "labels": pictures.label_source,
                    "classes": width if classes else None,
                    "label_width": width,
                    "left_out": {reason: len(names) for reason, names in pictures.left_out.items()},
                    "empty_classes": empty,
                    "remarks": list(remarks),
                    **({} if shape is None else {"latents": self.latents, "latent_shape": shape}),
                },
                self._text(pictures, width, classes, shape),
            )

    def _subset(self, pictures: Pictures) -> dict[str, object] | None:
        """Which images of more were kept."""
        if self.max_images is None or self.max_images >= pictures.whole:
            return None
        return {"chosen": self.subset, "seed": self.seed if self.subset == "random" else None}

    def _remarks(self, pictures: Pictures) -> list[str]:
        from ipfm.engine.data.open_dataset import remark_on_classes

        said = [f"{self.source}: left out {pictures.left_out.said()}"] if pictures.left_out else []
        said += pictures.remarks
        classes = remark_on_classes(pictures.labels, pictures.width)
        return said if classes is None else [*said, classes]

    def _text(self, pictures: Pictures, width: int, classes: bool, shape: tuple[int, int, int] | None) -> str:
        kind = "grey" if pictures.channels == 1 else "RGB"
        made = "" if shape is None else f", as latents {'x'.join(map(str, shape))}"
        lines = [
            f"{pictures.count} images {pictures.side}x{pictures.side}, {kind}{made}: {self.out}",
            f"labels: {pictures.label_source}",
        ]
        if pictures.labels is not None:
            whole = f" (the source has {pictures.width}; the last are not among these)"
            said = ("1 class" if width == 1 else f"{width} classes") if classes else f"{width} numbers a label"
            lines.append(said + ("" if width == pictures.width else whole))
        return "\n".join(lines)
