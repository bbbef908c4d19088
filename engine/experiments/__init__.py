"""What a recipe file is an instance of: its options, the way from the command line to a run, ablations."""

from ipfm.engine.experiments.ablation import Ablation, AblationOptions, Arch, Variant, as_ablation
from ipfm.engine.experiments.distil import DistilRecipe
from ipfm.engine.experiments.local import TrainAndDistil
from ipfm.engine.experiments.options import DistillationOptions, ema_kimg, options_for, recipe_options
from ipfm.engine.experiments.origins import origins
from ipfm.engine.experiments.teacher import TeacherOptions, TeacherRecipe
from ipfm.engine.runtime.commandline import run_command

__all__ = [
    "Ablation",
    "AblationOptions",
    "Arch",
    "DistilRecipe",
    "DistillationOptions",
    "TeacherOptions",
    "TeacherRecipe",
    "TrainAndDistil",
    "Variant",
    "as_ablation",
    "ema_kimg",
    "options_for",
    "origins",
    "recipe_options",
    "run_command",
]
