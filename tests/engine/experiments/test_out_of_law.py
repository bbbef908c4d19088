"""Teachers on images that are none of the data's: what is measured, and what is refused."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import idx_files
import pytest
import scipy.stats
import torch

from ipfm.engine.experiments.claims import verdicts_table
from ipfm.engine.experiments.fashion import training_images
from ipfm.engine.experiments.out_of_law import (
    QUESTIONS,
    Measured,
    OutOfLawOptions,
    levels,
    log_mixture,
    measure,
    read_csv,
    verdicts,
    write_csv,
)
from ipfm.engine.runtime.commandline import BadInput
from ipfm.models import EDMPrecond, save_model
from ipfm.recipes import ablation_out_of_law, fashion_ipfm

SHORT = ["--images", "8", "--levels", "2", "--batch", "5"]


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Untrained ones of D = inf and 128, in an empty folder, with a small set where Debian's would be."""
    place = idx_files.write_idx(tmp_path / "debian")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ipfm.engine.experiments.fashion.DEBIAN", place)
    for D in (math.inf, 128.0):
        torch.manual_seed(0)
        save_model(EDMPrecond(network(D)), Path(f"D{D:g}"))
    return ["Dinf", "D128"]


def network(D: float):
    return replace(fashion_ipfm.small_network("ddpmpp", D, 4), channel_mult=(1,), attn_resolutions=())


def test_from_teachers_to_verdicts(teachers: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    ablation_out_of_law.main([*SHORT, "--teachers", *teachers])
    out = capsys.readouterr().out
    # What decides is said before anything is measured.
    assert out.index("claim: a teacher of D = 128 is more robust") < out.index("| D | sigma |")
    folder = Path("runs/ablation-out-of-law")
    with open(folder / "out-of-law.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["D"] + row["seed"] for row in rows] == [D + s for D in ("128", "inf") for s in "012" for _ in range(2)]
    assert all(float(row["error_out"]) > 0 and 0 <= float(row["told_wrongly"]) <= 1 for row in rows)
    for row in rows:
        assert float(row["share"]) == pytest.approx(1 - float(row["error_data"]) / float(row["error_out"]))
    text = (folder / "out-of-law.md").read_text()
    assert text.count("| mean |") == 2 and "at D = 128 the noise hides the distance" in text and text in out
    assert len((folder / "claims.csv").read_text().splitlines()) == 3
    measured = read_csv(folder / "out-of-law.csv")
    write_csv(measured, Path("again.csv"))
    assert Path("again.csv").read_text() == (folder / "out-of-law.csv").read_text()
    assert verdicts_table(verdicts(measured)) in text
    with pytest.raises(ValueError, match=r"claims\.csv has not the columns D, seed"):
        read_csv(folder / "claims.csv")
    ablation_out_of_law.main([*SHORT, "--teachers", *teachers, "--out", "again"])
    assert Path("again/out-of-law.csv").read_text() == (folder / "out-of-law.csv").read_text()


def test_images_of_the_data_are_not_out_of_law(teachers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the generator draws the data themselves both errors agree but for noise, and nothing tells them apart."""
    data = training_images(replace(fashion_ipfm.BASE, features="pixels"))
    options = OutOfLawOptions(images=20, levels=2)
    torch.manual_seed(0)
    net = EDMPrecond(network(128.0)).eval()
    given = iter([data.take(20, 20)])
    monkeypatch.setattr("ipfm.engine.experiments.out_of_law.sample_generator", lambda *_, **__: next(given))
    near, far = measure(net, data, replace(options, batch=20), 0, lambda _: None)
    assert abs(near.relative) < 0.2 and abs(far.relative) < 0.2 and 0.2 < far.told_wrongly < 0.8


@pytest.mark.parametrize("D", [3.0, math.inf])
def test_the_mixture_is_that_of_the_kernel(D: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, centres = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (4, 5))
    sigma = 0.7
    shape = {"shape": sigma**2 * torch.eye(2).numpy()}
    laws = [
        scipy.stats.multivariate_normal(y, shape["shape"])
        if math.isinf(D)
        else scipy.stats.multivariate_t(y, **shape, df=D)
        for y in centres.numpy()
    ]
    expected = [math.log(sum(law.pdf(row) for law in laws)) for row in x.numpy()]
    found = log_mixture(x, centres, sigma, D)
    assert (found - found[0]).tolist() == pytest.approx([value - expected[0] for value in expected])


@pytest.mark.quick
def test_levels_and_verdicts_are_by_the_law_of_the_step() -> None:
    sigmas = levels(4)
    assert sigmas == sorted(sigmas) and sigmas[0] > 0.002 and sigmas[-1] < 24.4
    robust, hidden = QUESTIONS
    small = [Measured(128.0, seed, 1.0, 10.0, 11.0 + 0.1 * seed, 0.3) for seed in range(3)]
    large = [Measured(math.inf, seed, 1.0, 10.0, 13.0, 0.2 + 0.01 * seed) for seed in range(3)]
    found = [*small, *large]
    assert robust.judged(found, 128.0, math.inf).verdict.outcome == "confirmed"
    assert hidden.judged(found, 128.0, math.inf).verdict.outcome == "confirmed"
    swapped = [replace(m, D=math.inf if m.D == 128 else 128.0) for m in found]
    assert [q.judged(swapped, 128.0, math.inf).verdict.outcome for q in QUESTIONS] == ["refuted", "refuted"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --teachers with at least two teachers of different D"),
        (["--teachers", "D128"], "give --teachers with at least two"),
        (["--teachers", "D128", "D128"], "the teachers must be of different D, got 128, 128"),
        (["--teachers", "D128", "nowhere"], "nowhere does not exist"),
        (["--teachers", "D128", "Dinf", "--images", "41"], "images must be at most the 40 of the data, got 41"),
        (["--images", "1"], "images must be at least 2, got 1"),
        (["--seeds", "1", "1"], "seeds must be different integers >= 0"),
        (["--sigma-init", "0"], "sigma-init must be a finite number > 0, got 0.0"),
        (["--teachers", "D128", "Dinf", "--data", "none"], "none does not exist"),
    ],
)
def test_bad_input_is_one_line(teachers: list[str], arguments: list[str], message: str) -> None:
    with pytest.raises(BadInput) as refused:
        ablation_out_of_law.main(arguments)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not Path("runs").exists()


def test_a_dry_run_measures_nothing(teachers: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    ablation_out_of_law.main(["--teachers", *teachers, "--images", "8", "--dry-run"])
    out = capsys.readouterr().out
    assert "teachers of D = 128, inf" in out and out.count("claim: ") == 2 and not Path("runs").exists()
