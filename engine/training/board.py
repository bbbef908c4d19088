"""What a run leaves for TensorBoard: curves and pictures with descriptions, and its settings beside its last distance.

Tags are the words of metrics.jsonl, evaluations.jsonl and the settings. The files lie in the run folder itself: so
`tensorboard --logdir runs` names a run as its folder is named. Version 0.1.0 had them in tensorboard/ within it: there
they are still read, and a run that began so goes on.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ipfm.engine.evaluation.metrics.measures import MEASURES, Metric, measures_of
from ipfm.engine.evaluation.results import EvaluationHistory, read_results

FILES = "events.out.tfevents.*"
FORMER = "tensorboard"
SAMPLES, COMPARISON = "samples", "comparison"
# Begins the tag of what was measured of the teacher.
TEACHER = "teacher_"

DESCRIPTIONS = {
    **{measure.key: measure.about for measure in MEASURES},
    **{
        f"{TEACHER}{measure.key}": f"The {measure.otherwise} of the teacher's own samples, measured as the run's."
        for measure in MEASURES
    },
    "images_per_second": "Images trained on a second, over all processes; evaluations and checkpoints left out.",
    SAMPLES: "Images of the averaged network, of the same latents at every step.",
    COMPARISON: "At the end of the run: teacher and generator of the same latents, and data where there are some.",
}
# Ends of tags whose beginning is a network's name.
ENDINGS = {
    "_loss": "Loss of the {}: the mean over the images of a step, over all processes.",
    "_bad": "Images of a step that were not finite, left out of the {}'s update; one more where it was not made.",
    "_lr": "Learning rate of the {} in the step.",
    "_ema_decay": "Decay of the {}'s moving average in the step: 1 keeps all of it.",
}


class Board:
    """A TensorBoard file of a run. Whatever it raises is for the caller to forgive.

    Args:
        run: the run folder.
        first_step: where the run begins or resumes: events with more steps done are dropped, for they come again. None
            adds to what there is.
        readings: name of a loss -> a sentence on how to read it.
        settings: of the run, by name, as JSON has them; shown under HPARAMS. Empty where they are there already.
        metrics: what the run measures, each in a chart of its own with the teacher's; the Fréchet distance where it
            measures nothing.
    """

    def __init__(
        self,
        run: Path,
        first_step: int | None,
        *,
        readings: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        metrics: Sequence[Metric] = (),
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter, summary

        threading.excepthook = _quiet
        self._readings = dict(readings or {})
        self._described: set[str] = set()
        folder = board_folder(run)
        # Without events from before there is nothing to purge.
        purge = None if first_step is None or not any(folder.glob(FILES)) else first_step + 1
        self._make: Any = summary
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)
        if settings:
            self._add_settings(settings, [measure.key for measure in measures_of(metrics or ("fid",))])

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """A point of a curve, after `step` steps."""
        self._add(self._make.scalar(tag, value), step)

    def add_image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """A picture uint8 (H, W, 3), after `step` steps."""
        self._add(self._make.image(tag, picture, dataformats="HWC"), step)

    def finish(self) -> None:
        """Say that the run has come to its end."""
        _, _, end = self._make.hparams({}, {})
        self._writer.file_writer.add_summary(end)

    def close(self) -> None:
        """Write what waits."""
        self._writer.close()

    def _add(self, summary: Any, step: int) -> None:
        (value,) = summary.value
        if value.tag not in self._described:
            self._described.add(value.tag)
            self._describe(value)
        self._writer.file_writer.add_summary(summary, step)

    def _describe(self, value: Any) -> None:
        """Say of a tag's first value what it is; TensorBoard takes it from there."""
        from tensorboard.compat.proto import summary_pb2
        from tensorboard.plugins.image import metadata as image
        from tensorboard.plugins.scalar import metadata as scalar

        about = value.tag, self._description(value.tag)
        if value.HasField("simple_value"):
            value.metadata.CopyFrom(scalar.create_summary_metadata(*about))
            value.metadata.data_class = summary_pb2.DATA_CLASS_SCALAR
        else:
            value.metadata.CopyFrom(image.create_summary_metadata(*about, converted_to_tensor=True))
            value.metadata.data_class = summary_pb2.DATA_CLASS_BLOB_SEQUENCE
        # Without that class the faster of TensorBoard's readers, the usual one, drops the description.

    def _description(self, tag: str) -> str:
        # Of several averages: whose it is comes last.
        if several := re.fullmatch(r"(.+)_(ema[0-9.]+k?)", tag):
            return f"{self._description(several[1])} Of the average {several[2]}."
        for ending, words in ENDINGS.items():
            if tag.endswith(ending):
                return " ".join((words.format(tag.removesuffix(ending)), self._readings.get(tag, ""))).strip()
        return DESCRIPTIONS.get(tag, "")

    def _add_settings(self, settings: Mapping[str, Any], measured: Sequence[str]) -> None:
        """Settings and what is measured, as a row of a table of runs; the teacher's numbers as lines in their charts.

        Args:
            settings: by name.
            measured: tags of the run's numbers.
        """
        shown = {name: _plain(value) for name, value in settings.items() if value is not None}
        tags = [name for key in measured for name in (key, f"{TEACHER}{key}")]
        results = dict.fromkeys((*tags, *self._readings), 0.0)
        experiment, start, _ = self._make.hparams(shown, results)
        charts = {key: ["Multiline", [f"^{key}$", f"^{TEACHER}{key}$"]] for key in measured}
        for summary in (experiment, start, self._make.custom_scalars({"distance": charts})):
            self._writer.file_writer.add_summary(summary)


def board_folder(run: Path) -> Path:
    """Where the run `run` has its files for TensorBoard, or is to have them."""
    former = run / FORMER
    return former if any(former.glob(FILES)) else run


def board_files(run: Path) -> list[Path]:
    """The run's files for TensorBoard, as they were begun."""
    return sorted((*run.glob(FILES), *(run / FORMER).glob(FILES)), key=lambda path: path.name)


def conclude(run: Path, step: int, picture: np.ndarray | None) -> None:
    """Add the end of the run `run`: its picture, the teacher's numbers along the run's own ones, that it is done.

    Args:
        run: the run folder.
        step: steps done.
        picture: uint8 (H, W, 3), or None.

    Raises:
        Exception: whatever TensorBoard or the disk raise.
    """
    board = Board(run, None)
    if picture is not None:
        board.add_image(COMPARISON, picture, step)
    for row in read_results(run):
        if row.label != "teacher":
            continue
        for key, value in row.values.items():
            for at, _ in EvaluationHistory(run).points_of(key) if math.isfinite(value) else ():
                board.add_scalar(f"{TEACHER}{key}", value, at)
    board.finish()
    board.close()


def _plain(value: Any) -> str | float | bool:
    """A setting as HPARAMS takes it."""
    if isinstance(value, (bool, int, float, str)):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _quiet(args: threading.ExceptHookArgs) -> None:
    """No traceback of TensorBoard's writer thread when the disk refuses: the board's next call raises the same."""
    thread = type(args.thread).__module__
    if not (issubclass(args.exc_type, OSError) and thread.startswith("tensorboard.")):
        threading.__excepthook__(args)
