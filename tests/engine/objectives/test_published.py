"""Published figures beside a result: what differs is said with them."""

from __future__ import annotations

import pytest

from ipfm.engine import DistillConfig
from ipfm.engine.objectives.published import paper_result
from ipfm.models import presets


@pytest.mark.parametrize(
    ("settings", "preset", "differs"),
    [
        ({}, "cifar10-ncsnpp", ()),
        ({"width": 0.5}, "cifar10-ncsnpp", ("width 1 there, 0.5 here", "first weights teacher there, random here")),
        ({"init": "random"}, "cifar10-ncsnpp", ("first weights teacher there, random here",)),
        (
            {"student_width": 0.5},
            "cifar10-ncsnpp",
            ("width of the student 1 there, 0.5 here", "first weights of the student teacher there, random here"),
        ),
        ({"sigmas": (2.0,)}, "cifar10-ncsnpp", ("noise levels 2.5 there, 2 here",)),
        ({}, "cifar10-ddpmpp", ("ncsn++ there, ddpm++ here",)),
        ({"steps": 2}, "cifar10-ncsnpp", ("its noise levels are not printed",)),
        (
            {"steps": 2, "gradient": "last"},
            "cifar10-ncsnpp",
            ("gradient through evaluations all there, last here", "its noise levels are not printed"),
        ),
    ],
)
def test_a_published_figure_says_what_differs(settings: dict, preset: str, differs: tuple[str, ...]) -> None:
    """A run of half the width, say, is not what the paper's 3.31 is of."""
    config = DistillConfig(D=128.0, **settings)
    network = presets.get(preset, D=128.0)
    figure = config.figure("cifar10", config.completed(network).to_json(), network)
    assert figure is not None and figure.differs == differs
    assert str(figure) == f"FID {figure.fid:g} ({'; '.join(('arXiv 2509.22454', *differs))})"


@pytest.mark.parametrize("width", ["wide", "a\nb", "x" * 10_000, None, [[1]], {"a": 1}, float("nan"), True, -1])
def test_what_a_folder_says_is_shown_in_one_line(width: object) -> None:
    found = paper_result("cifar10", 128, 1.0, 1)
    assert found is not None
    text = str(found.beside({"width": width, "sigmas": {}}, presets.get("cifar10-ncsnpp", D=128.0)))
    assert text.startswith("FID 3.31 (arXiv 2509.22454") and "\n" not in text and len(text) < 300


def test_a_teachers_figure_says_with_how_many_evaluations() -> None:
    found = paper_result("cifar10", 2048, 1.0, 1)
    network = presets.get("cifar10-ncsnpp", D=2048.0)
    assert found is not None and found.teacher(network, 35) == "FID 1.91 (arXiv 2509.22454)"
    assert found.teacher(network, 3) == "FID 1.91 (arXiv 2509.22454; 35 evaluations there, 3 here)"
