"""`ipfm dataset`: a data set's zip from a folder of pictures, a zip or CIFAR-10's archive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder or zip of images, or CIFAR-10's python or binary archive (.tar.gz or unpacked)."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT.zip")]
    """The zip to write."""
    resolution: int | None = None
    """Side of the images; others are resized (Lanczos). Default: as they are, all alike."""
    crop: Literal["center", "none"] = "none"
    """What to do with images that are not square: cut out the middle, or stop."""
    labels: Literal["auto", "folders", "none"] = "auto"
    """auto: those of dataset.json or CIFAR-10, else the names of the top-level folders if every image lies in one.
    folders: always these names. none: no labels."""
    max_images: int | None = None
    """Keep a random subset of this many images."""
    skip_unreadable: bool = False
    """Leave out images that cannot be decoded, and count them. Default: the first one stops."""
    strict: bool = False
    """Stop where anything in SOURCE would be left out, or where a class has no images."""
    overwrite: bool = False
    """Replace OUT.zip where it exists."""

    json: bool = False
    """Print JSON: out, images, resolution, channels, labels, what was left out."""

    def run(self) -> None:
        """Write the zip and print what is in it."""
        from ipfm.engine.data.decoding import pillow_heard
        from ipfm.engine.data.open_dataset import Subset, check_strictness, empty_classes, label_width
        from ipfm.engine.data.preparation import Shaping, find_pictures
        from ipfm.engine.data.zip_writer import write_dataset_zip

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
            shaping = Shaping(self.resolution, crop=self.crop == "center")
            with pillow_heard() as heard:
                pictures = find_pictures(
                    self.source, shaping, self.labels, Subset(self.max_images), skip_unreadable=self.skip_unreadable
                )
            empty = empty_classes(pictures.labels, pictures.width)
            for said in self._remarks(pictures):
                remarks.add(said)
            if self.strict and (pictures.left_out.beyond_system_files or pictures.remarks or empty):
                raise ValueError(f"strict was given, and {remarks[-1]}")
            # The work as well: a bad image may show only when it is decoded.
            with pillow_heard() as while_decoding:
                write_dataset_zip(self.out, pictures.pngs(), pictures.labels)
            for said in (while_decoding or heard)[:1]:
                remarks.add(f"{self.source}: {said}")
        width = 0 if pictures.labels is None else label_width(pictures.labels)
        classes = pictures.labels is not None and pictures.labels.ndim == 1
        with output(as_json=self.json) as write:
            write(
                {
                    "out": self.out,
                    "images": pictures.count,
                    "resolution": pictures.side,
                    "channels": pictures.channels,
                    "labels": pictures.label_source,
                    "classes": width if classes else None,
                    "label_width": width,
                    "left_out": {reason: len(names) for reason, names in pictures.left_out.items()},
                    "empty_classes": empty,
                    "remarks": list(remarks),
                },
                self._text(pictures, width, classes),
            )

    def _remarks(self, pictures: Pictures) -> list[str]:
        from ipfm.engine.data.open_dataset import remark_on_classes

        said = [f"{self.source}: left out {pictures.left_out.said()}"] if pictures.left_out else []
        said += pictures.remarks
        classes = remark_on_classes(pictures.labels, pictures.width)
        return said if classes is None else [*said, classes]

    def _text(self, pictures: Pictures, width: int, classes: bool) -> str:
        kind = "grey" if pictures.channels == 1 else "RGB"
        lines = [
            f"{pictures.count} images {pictures.side}x{pictures.side}, {kind}: {self.out}",
            f"labels: {pictures.label_source}",
        ]
        if pictures.labels is not None:
            whole = f" (the source has {pictures.width}; the last are not among these)"
            said = f"{width} {'classes' if classes else 'numbers a label'}"
            lines.append(said + ("" if width == pictures.width else whole))
        return "\n".join(lines)
