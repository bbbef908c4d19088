"""Options of recipes: made from the settings of any objective, none of which is known here by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

import ipfm.engine.experiments
from ipfm.engine import DistillConfig, PidConfig
from ipfm.engine.evaluation.options import EvaluationOptions
from ipfm.engine.experiments import AblationOptions, as_ablation, ema_kimg, options_for, recipe_options
from ipfm.engine.objectives.base import Distillation, Objective
from ipfm.engine.runtime.commandline import BadInput, parse
from ipfm.models import NetworkConfig, presets
from ipfm.recipes import cifar_ipfm, digits_ipfm


@dataclass(frozen=True, kw_only=True)
class ToyConfig(Distillation):
    """A third objective."""

    strength: float = 2.0
    """How strong it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength < 0:
            raise ValueError(f"strength must be at least 0, got {self.strength}")

    def objective(self, network: NetworkConfig) -> Objective:
        raise NotImplementedError

    def name(self) -> str:
        return f"toy-{self.strength:g}"


def names(kind: type) -> set[str]:
    return {f.name for f in fields(kind)}


@pytest.mark.parametrize("settings", [DistillConfig, PidConfig, ToyConfig])
@pytest.mark.parametrize("make", [options_for, lambda kind: options_for(kind, AblationOptions)])
def test_any_settings_have_options(settings: type[Distillation], make: Callable[[type], type]) -> None:
    kind = make(settings)
    assert make(settings) is kind and issubclass(kind, settings) and kind.settings_class() is settings
    assert names(settings) | names(EvaluationOptions) | {"teacher_steps", "dry_run"} <= names(kind)
    assert kind.__name__.startswith(settings.__name__.removesuffix("Config")) and kind.__name__.endswith("Options")


def test_settings_and_options_come_apart_again() -> None:
    settings = ToyConfig(strength=3.0, max_steps=7, lr=1e-3)
    options = recipe_options(settings, eval_images=30, teacher_steps=5)
    assert (options.eval_images, options.teacher_steps, options.dry_run) == (30, 5, False)
    assert type(options.distillation()) is ToyConfig and options.distillation() == settings


def test_a_third_objective_has_a_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    base = recipe_options(ToyConfig(max_steps=7))

    def read(*arguments: str) -> object:
        return parse(type(base), arguments, default=base, prog="toy.py", description="")

    assert read("--strength", "4", "--eval-images", "9") == replace(base, strength=4.0, eval_images=9)
    with pytest.raises(BadInput, match=r"^--strength must be at least 0, got -1.0$"):
        read("--strength", "-1")
    with pytest.raises(SystemExit):
        read("--help")
    assert "How strong it is. (default: 2.0)" in capsys.readouterr().out


def test_recipes_and_ablations_of_a_third_objective() -> None:
    base = recipe_options(ToyConfig(max_steps=7))
    toy = cifar_ipfm.RECIPE.with_options("toy.py", "A toy.", base, D=2.0, settings_of="nobody")
    assert (toy.file, toy.shape, toy.settings_from) == ("toy.py", (3, 32, 32), "CIFAR-10: the settings of nobody")
    assert toy.varied({}, presets.get("cifar10-ncsnpp-cond", D=2048.0)) == base
    local = digits_ipfm.RECIPE.with_options("toy.py", "A toy.", base)
    assert local.base is base and local.data is digits_ipfm.RECIPE.data
    ablation = as_ablation(base, seeds=(3,), max_steps=9)
    assert isinstance(ablation, AblationOptions) and ablation.distillation() == ToyConfig(max_steps=9)


def test_no_objective_is_named_here() -> None:
    """Recipes name theirs; what recipes are made of knows none."""
    for file in Path(ipfm.engine.experiments.__file__).parent.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"\bpid\b|PidConfig|physics.informed|objectives\.(pid|ipfm)\b", text, re.I), file.name


@pytest.mark.parametrize(
    ("decay", "batch", "millions"),
    [
        (0.999, 256, 0.18), (0.9996, 256, 0.44), (0.9999, 256, 1.77),  # RealUID
        (0.9996, 2048, 3.5), (0.9999, 2048, 14.2), (0.99995, 2048, 28.4),  # FastGen
        (0.999, 128, 0.09), (0.9999, 128, 0.89),  # CMT, ECT
    ],
)  # fmt: skip
def test_half_lives_of_published_decays(decay: float, batch: int, millions: float) -> None:
    assert ema_kimg(decay, batch) / 1000 == pytest.approx(millions, rel=0.02)
