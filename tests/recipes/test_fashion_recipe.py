"""Fashion-MNIST's recipe on a small set in its format: from end to end, what it says, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import idx_files
import pytest
import torch

from ipfm.engine.commands.compare.command import Compare
from ipfm.engine.commands.info import Info
from ipfm.engine.commands.report.reproduce import reproduce, use
from ipfm.engine.data.open_dataset import open_dataset
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.classifier_training import FILE, train_classifier
from ipfm.engine.evaluation.metrics.classifier import ClassifierFeatures, save_classifier
from ipfm.engine.experiments.fashion import compared_by, training_images
from ipfm.engine.experiments.step_time import StepTime
from ipfm.engine.runtime.commandline import BadInput
from ipfm.engine.training.run_state import read_run
from ipfm.models import load_model, read_config
from ipfm.recipes import fashion_ipfm

SHORT = [
    "--channels", "4", "--teacher-steps", "2", "--max-steps", "2", "--batch", "4", "--eval-images", "8", "--heun-steps",
    "1", "--eval-every", "0", "--zero", "0", "--backward", "joint", "--activation-checkpointing", "off",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """In an empty folder, with a small set where Debian's would be; nothing is timed or laid out."""
    place = idx_files.write_idx(tmp_path / "debian")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ipfm.engine.experiments.fashion.DEBIAN", place)
    monkeypatch.setattr("ipfm.engine.training.loop.PICTURE_IMAGES", 2)
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.step_time", lambda *_: StepTime(0.001))
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.layout_table", lambda *_, **__: "layouts")
    return place


def test_from_end_to_end_and_on_from_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classifier comes first; a second run takes the first one's, and a finished one is only shown."""
    monkeypatch.setattr("ipfm.engine.experiments.fashion.FIRST", (0, 1, 2))
    run = tmp_path / "runs" / "fashion-ddpmpp4-cond-D128-alpha1-K1"
    fashion_ipfm.main([*SHORT, "--conditional"])
    out, err = capsys.readouterr()
    assert re.search(r"compared by classifier \w{12}: [\d.]+ % of 12 held-out images right, trained on 40 ", err)
    assert "of a classifier's features against all 40 clothes" in out
    rows = json.loads((run / "results.json").read_text())
    assert [(row["label"], row["metric"]) for row in rows] == [
        ("teacher", "Fréchet distance"), ("generator", "Fréchet distance"),
    ]  # fmt: skip
    net, config = load_model(run / "generator"), json.loads((run / "config.json").read_text())
    assert (net.config.image_shape, net.label_dim) == ((1, 28, 28), 10)
    assert config["features"] in err and (run / FILE).exists()
    assert len(list(run.parent.glob("classifier-*.safetensors"))) == 1
    assert read_config(run / "teacher" / "model").extra["dataset"] == "clothes"
    line = reproduce(read_run(run)).line
    assert line is not None and line.startswith("deepspeed recipes/fashion_ipfm.py --teacher-steps 2 ")
    assert use(read_run(run), "r/generator")[2][1] == (
        "ipfm evaluate r/generator --reference REFERENCE --features classifier --classifier r/classifier.safetensors"
    )
    fashion_ipfm.main([*SHORT, "--conditional"])
    assert "is finished" in capsys.readouterr().err
    # A branch, which says what it goes on from, takes the classifier that lies beside it too.
    fashion_ipfm.main(["--branch", str(run), "--out", "runs/again", "--max-steps", "3", "--eval-every", "0"])
    assert config["features"] in capsys.readouterr().err


def test_a_run_does_not_go_on_with_another_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--out", "runs/a", *SHORT]
    fashion_ipfm.main(run)
    data = open_dataset(idx_files.write_idx(tmp_path / "other", seed=1), split="train")
    other, longer = tmp_path / "other.safetensors", ["--max-steps", "3"]
    save_classifier(other, train_classifier(data, data, World(0, 1, torch.device("cpu"))))
    with pytest.raises(BadInput, match=r"features is classifier \w+ there, classifier \w+ here"):
        fashion_ipfm.main([*run, *longer, "--classifier", str(other)])
    with pytest.raises(BadInput, match=r"features is classifier \w+ there, pixels here"):
        fashion_ipfm.main([*run, *longer, "--features", "pixels"])
    capsys.readouterr()
    Info(model=Path("runs/a"), json=True).run()
    found = json.loads(capsys.readouterr().out)["features"]
    # Where its folder is changed by hand, the two are still not ranked beside each other.
    shutil.copytree("runs/a", "runs/b")
    config = Path("runs/b/config.json")
    config.write_text(config.read_text().replace(found, "classifier 0123456789ab"))
    Compare(runs=(Path("runs/a"), Path("runs/b")), json=True).run()
    assert f"features: {found} and classifier 0123456789ab" in capsys.readouterr().out
    fashion_ipfm.main([*run, *longer])
    assert read_run(tmp_path / "runs" / "a").identity["features"].startswith("classifier ")


def test_dry_run_says_what_would_run_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: Path
) -> None:
    for arguments, parts in {
        (): ["runs/fashion-ddpmpp16-D128-alpha1-K1", "SongUNet, 1x28x28, 744,225 parameters"],
        ("--arch", "ncsnpp", "--D", "inf", "--conditional"): ["runs/fashion-ncsnpp16-cond-Dinf-", "28, 10 classes"],
        ("--data", str(quick / "t10k-images-idx3-ubyte.gz")): ["runs/t10k-images-idx3-ubyte-ddpmpp16-D128"],
    }.items():
        fashion_ipfm.main([*arguments, "--dry-run"])
        printed = capsys.readouterr().out
        for part in [*parts, "memory of one process", "training of the teacher, before it"]:
            assert part in printed
    assert [path.name for path in tmp_path.iterdir()] == ["debian"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere does not exist"),
        (
            ["--data", "large"],
            "has images 1x32x32, this recipe takes 1x28x28: train_teacher.py and distill_ipfm.py take",
        ),
        (["--data", "plain"], "has no classes, which a classifier would learn: --features pixels or blocks needs none"),
        (
            ["--data", "plain", "--features", "pixels", "--conditional"],
            "conditional was given, but plain has no labels",
        ),
        (["--features", "inception"], "--features must be one of blocks, classifier, pixels"),
        (["--inception", "x.pt"], "inception was given, but this recipe compares by classifier"),
        (["--classifier", "none.safetensors"], "none.safetensors does not exist"),
        (["--classifier", "x", "--features", "pixels"], "classifier was given, but features is pixels"),
        (["--metrics", "is"], "metrics must be among fid, kid, pr, got is"),
        (["--reference", "x.npz"], "this recipe compares with the images themselves"),
        (["--channels", "0"], "--channels must be at least 1, got 0"),
        (["--teacher", "x", "--arch", "ncsnpp"], "--arch was given, but the teacher says what the network is"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(
    tmp_path: Path, quick: Path, arguments: list[str], message: str
) -> None:
    idx_files.write_idx(tmp_path / "large", side=32)
    (idx_files.write_idx(tmp_path / "plain") / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(BadInput) as error:
        fashion_ipfm.main(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_where_the_set_is_not_installed_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ipfm.engine.experiments.fashion.DEBIAN", tmp_path / "nowhere")
    for arguments in ([], ["--dry-run"]):
        with pytest.raises(BadInput, match=r"apt-get install dataset-fashion-mnist.* zalandoresearch/fashion-mnist"):
            fashion_ipfm.main(arguments)


def test_without_test_images_a_tenth_is_held_out(tmp_path: Path, quick: Path) -> None:
    options = replace(fashion_ipfm.BASE, data=quick / "train-images-idx3-ubyte.gz")
    data = training_images(options)
    (tmp_path / "run").mkdir()
    found = compared_by(options, data, tmp_path / "run", World(0, 1, torch.device("cpu")))
    assert isinstance(found, ClassifierFeatures) and (found.facts.held_out, found.facts.trained_on) == (4, 36)
    assert len(data) == 40
