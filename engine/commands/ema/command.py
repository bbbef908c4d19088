"""`ipfm ema`: averages of other widths, made of stored ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ipfm.engine.averages import Average, Profile, check_std, combination, missed
from ipfm.engine.runtime.commandline import user_input
from ipfm.engine.runtime.json_output import output

if TYPE_CHECKING:
    import numpy as np

    from ipfm.engine.commands.ema.stored import StoredAverage
    from ipfm.engine.runtime.remarks import Remarks

# How far from its profile an average may be: beyond the first this is said, beyond the second nothing is made.
SAID, MOST_MISSED = 0.1, 0.5
# Sum of the coefficients' sizes: how they amplify what was rounded. Likewise; fp16 rounds by up to 1 / 2048.
AMPLIFIED, MOST_AMPLIFIED = 4.0, 1000.0


@dataclass(frozen=True, kw_only=True)
class Ema:
    """Make averages of the weights of other widths, of those that a training stored.

    Takes a run that was trained with --ema and --snapshot-every, or a folder of EDM2's raw snapshots. Without --std it
    lists what is there.

    Example: ipfm ema runs/teacher --std 0.075 --out models/teacher-0.075
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder, or folder of network-snapshot-KIMG-STD.pkl."""
    std: tuple[float, ...] = ()
    """Relative width of the average; several make several in one pass, each in a folder ema0.075, … in --out."""
    at: float | None = None
    """Time of the average, in thousands of images; one of those stored. Default: the last."""
    out: Path | None = None
    """Model folder to write; a network stored there before is replaced."""
    D: float | None = None
    """Auxiliary dimensions of raw snapshots, whose files do not say them; inf, the default, is diffusion."""
    json: bool = False
    """Print JSON: what is stored, and of each average made its coefficients and how far it is from its profile."""

    def run(self) -> None:
        """Print what is there, or make the averages."""
        from ipfm.engine.commands.ema.stored import stored_averages
        from ipfm.engine.runtime.remarks import Remarks

        remarks = Remarks()
        with user_input():
            self._check()
            stored = stored_averages(self.source, self.D)
            if not self.std:
                self._list(stored)
                return
            used, images = self._used(stored)
            rows = [self._coefficients(used, Profile(images, std), remarks) for std in self.std]
        self._make(used, images, rows, remarks)

    def _check(self) -> None:
        """ValueError: the options do not go together."""
        from ipfm.engine.runtime.files import check_writable
        from ipfm.models.store import in_the_way

        if bool(self.std) != (self.out is not None):
            raise ValueError("std and out go together: ipfm ema RUN --std 0.075 --out FOLDER")
        if self.at is not None and not self.std:
            raise ValueError("at is the time of the average that --std and --out make")
        for std in self.std:
            check_std("std", std)
        if len(set(self.std)) < len(self.std):
            raise ValueError(f"std must be different widths, got {' '.join(f'{std:g}' for std in self.std)}")
        if self.out is not None and self.out.suffix in (".pkl", ".pt", ".safetensors"):
            raise ValueError(f"out must be a folder, got {self.out}: ipfm export makes a file of it")
        for _, place in self._places():
            if reason := in_the_way(place):
                raise ValueError(f"{reason}: name another folder")
            check_writable(place, place.parent)

    def _places(self) -> list[tuple[float, Path]]:
        """Each width, and where its network is written."""
        if self.out is None:
            return []
        if len(self.std) == 1:
            return [(self.std[0], self.out)]
        return [(std, self.out / Average(std=std).name) for std in self.std]

    def _used(self, stored: Sequence[StoredAverage]) -> tuple[list[StoredAverage], float]:
        """The averages up to the time, and its images. ValueError: nothing is stored of that time."""
        times = sorted({one.profile.images for one in stored})
        images = times[-1]
        if self.at is not None:
            # As names say it, rounded down, or to the digit.
            near = [t for t in times if abs(t / 1000 - self.at) < 1e-6 * self.at or int(t // 1000) == self.at]
            if not near:
                shown = ", ".join(f"{t / 1000:g}" for t in times[-12:])
                raise ValueError(
                    f"at must be a time of which an average is stored, got {self.at:g}; in {self.source} those of "
                    f"{'… ' if len(times) > 12 else ''}{shown} kimg"
                )
            images = near[-1]
        return [one for one in stored if one.profile.images <= images], images

    def _coefficients(self, used: Sequence[StoredAverage], wanted: Profile, remarks: Remarks) -> np.ndarray:
        """ValueError: what is stored is too far from it."""
        profiles = [one.profile for one in used]
        found = combination(profiles, wanted)
        off, amplified = missed(profiles, wanted, found), float(abs(found).sum())
        what = f"std {wanted.std:g} at {wanted.images / 1000:g} kimg"
        if off > MOST_MISSED or amplified > MOST_AMPLIFIED:
            widths = ", ".join(f"{std:g}" for std in sorted({p.std for p in profiles}))
            times = len({p.images for p in profiles})
            why = f"it would be off its profile by {off:.0%}"
            if off <= MOST_MISSED:
                why = f"its coefficients would amplify the rounding of what is stored {amplified:,.0f} fold"
            raise ValueError(f"{what} cannot be made of the widths {widths} at {times} time{'s' * (times > 1)}: {why}")
        if off > SAID:
            remarks.add(f"{what} is off its profile by {off:.0%}: more snapshots, or a nearer width, are better")
        if amplified > AMPLIFIED:
            remarks.add(
                f"{what} has large coefficients, which amplify the rounding of what is stored: {amplified:.1f} fold"
            )
        return found

    def _list(self, stored: Sequence[StoredAverage]) -> None:
        said = [{"kimg": one.profile.images / 1000, "std": one.profile.std, "path": one.where} for one in stored]
        rows = [f"{one['kimg']:>12g}  {one['std']:<6g}  {one['path']}" for one in said]
        with output(as_json=self.json) as write:
            write({"stored": said}, "\n".join([f"{'kimg':>12}  {'std':<6}", *rows]))

    def _make(self, used: Sequence[StoredAverage], images: float, rows: Sequence[np.ndarray], remarks: Remarks) -> None:
        """Write the networks."""
        import numpy as np
        import torch

        from ipfm.engine.commands.ema.combine import combined
        from ipfm.models import build_network, save_model

        with user_input():
            states = combined(used, np.stack(rows))
        with torch.device("meta"):
            net = build_network(used[-1].network)
        made: list[dict[str, Any]] = []
        for (std, place), row, state in zip(self._places(), rows, states, strict=True):
            profiles = [one.profile for one in used]
            facts: dict[str, Any] = {
                "kimg": images / 1000,
                "std": std,
                "of": [
                    {"kimg": p.images / 1000, "std": p.std, "coefficient": float(c)}
                    for p, c in zip(profiles, row, strict=True)
                ],
                "missed": missed(profiles, Profile(images, std), row),
            }
            extra = {key: value for key, value in used[-1].facts.items() if key != "measured"}
            if "ema_std" in (source := extra.get("source", {})):
                extra["source"] = {**source, "ema_std": f"{std:g}"}
            save_model(net, place, extra={**extra, "average": Average(std=std).name, "combined": facts}, state=state)
            made.append({"out": place, "average": Average(std=std).name, **facts})
        size = sum(p.numel() for p in net.parameters())
        text = "\n".join(
            f"{one['average']} at {one['kimg']:g} kimg, of {len(used)} stored averages: {one['out']}" for one in made
        )
        with output(as_json=self.json) as write:
            write({"made": made, "parameters": size, "remarks": list(remarks)}, text)
