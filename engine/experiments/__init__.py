"""What a recipe file is an instance of: its options, the way from the command line to a run, ablations."""

from ipfm.engine.experiments.ablation import Ablation, AblationOptions, Arch, Variant, as_ablation
from ipfm.engine.experiments.claims import Claim, Diverge, EndsLower, FasterEarly, ReachesTeacher
from ipfm.engine.experiments.defaults_by_size import STUDENT_BY_SIZE, TRAJECTORY_BY_SIZE, Facts, RowName
from ipfm.engine.experiments.distil import DistilRecipe
from ipfm.engine.experiments.local import ByOptions, TrainAndDistil
from ipfm.engine.experiments.options import DistillationOptions, ema_kimg, options_for, recipe_options
from ipfm.engine.experiments.origins import Origin, origins
from ipfm.engine.experiments.out_of_law import OutOfLaw, OutOfLawOptions
from ipfm.engine.experiments.own_distil import OwnDistillationOptions, OwnDistilRecipe
from ipfm.engine.experiments.own_teacher import OwnTeacherOptions, OwnTeacherRecipe
from ipfm.engine.experiments.real_data import OWN
from ipfm.engine.experiments.sized import Size, SizedDistillationOptions, SizedDistilRecipe
from ipfm.engine.experiments.teacher import TeacherOptions, TeacherRecipe
from ipfm.engine.runtime.commandline import run_command

__all__ = [
    "OWN",
    "STUDENT_BY_SIZE",
    "TRAJECTORY_BY_SIZE",
    "Ablation",
    "AblationOptions",
    "Arch",
    "ByOptions",
    "Claim",
    "DistilRecipe",
    "DistillationOptions",
    "Diverge",
    "EndsLower",
    "Facts",
    "FasterEarly",
    "Origin",
    "OutOfLaw",
    "OutOfLawOptions",
    "OwnDistilRecipe",
    "OwnDistillationOptions",
    "OwnTeacherOptions",
    "OwnTeacherRecipe",
    "ReachesTeacher",
    "RowName",
    "Size",
    "SizedDistilRecipe",
    "SizedDistillationOptions",
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
