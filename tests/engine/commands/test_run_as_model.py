"""A run folder, a checkpoint or a snapshot where a command takes a model."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ipfm.engine.commands.main import _main as ipfm
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.evaluation import Evaluation
from ipfm.engine.evaluation.metrics import FrechetResult, PixelFeatures, Statistics
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.runtime.commandline import BadInput
from ipfm.engine.training.distiller import Distiller
from ipfm.engine.training.run_folder import release_folder
from ipfm.models import NetworkConfig, build_network, load_model, load_teacher, read_config, save_model
from ipfm.models.store import load_stored

# Fourier features: buffers that no architecture says.
NETWORK = NetworkConfig(
    model_type="SongUNet", embedding_type="fourier", img_resolution=4, img_channels=1, model_channels=4,
    channel_mult=(1,), num_blocks=1, attn_resolutions=(), D=64.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps, whose best is that of step 2."""
    path = tmp_path_factory.mktemp("run") / "run"
    torch.manual_seed(0)
    evaluation = Evaluation(PixelFeatures((1, 4, 4)), Statistics(torch.zeros(16), torch.eye(16)), images=16)
    config = DistillConfig(
        batch=2, max_steps=6, eval_every=2, checkpoint_every=2, snapshot_every=2, keep_checkpoints=3, heun_steps=1,
        zero=0, precision="fp32", ema_kimg=1e-3, lr=1e-2,
    )  # fmt: skip
    world = World(0, 1, torch.device("cpu"))
    distiller = Distiller(config, build_network(NETWORK).eval(), evaluation=evaluation, world=world)
    distances = iter((0.25, 0.5, 0.75))
    distiller.evaluate = lambda: FrechetResult(next(distances), 16, 0.1, 160.0)  # type: ignore[method-assign]
    distiller.run(path)
    release_folder(path)
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def stopped(run: Path) -> Path:
    """The same, as after a kill at step 6."""
    shutil.rmtree(run / "generator")
    return run


def images(tmp_path: Path, model: Path, *more: object) -> np.ndarray:
    out = tmp_path / "images.npz"
    assert ipfm(["sample", str(model), "--n", "2", "--out", str(out), *map(str, more)]) is None
    with np.load(out) as file:
        return file[file.files[0]]


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict, str]:
    capsys.readouterr()
    ipfm([*map(str, arguments), "--json"])
    found = capsys.readouterr()
    return json.loads(found.out), found.err


def test_a_run_and_its_checkpoints_are_sampled_as_its_models(run: Path, tmp_path: Path, capsys) -> None:
    last, best = (images(tmp_path, run / name) for name in ("generator", "generator-best"))
    assert not np.array_equal(last, best)
    capsys.readouterr()
    assert np.array_equal(images(tmp_path, run), last)
    assert capsys.readouterr().err == (
        f"ipfm: note: of {run} the generator at its end (step 6) is taken; --which best is its best generator "
        "(step 2, 0.25)\n"
    )
    for place, more in ((run, ("--which", "best")), (run, ("--which", 2)), (run / "snapshots", ("--which", 2))):
        assert np.array_equal(images(tmp_path, place, *more), best)
    # The average, with buffers that the architecture does not say.
    assert np.array_equal(images(tmp_path, run / "checkpoints" / "step-0000002"), best)
    assert np.array_equal(images(tmp_path, run / "snapshots" / "step-0000006"), last)
    assert capsys.readouterr().err == ""


def test_a_checkpoint_says_its_network_itself(run: Path, tmp_path: Path) -> None:
    """It is a model where nothing else of its run is."""
    last = load_model(run / "generator")
    step = Path(shutil.copytree(run / "checkpoints" / "step-0000006", tmp_path / "elsewhere"))
    found = load_model(step)
    assert found.facts == last.facts and found.config == last.config
    assert all(torch.equal(tensor, last.state_dict()[name]) for name, tensor in found.state_dict().items())
    (step / "averaged.json").write_text("{}")
    with pytest.raises(ValueError, match=r"averaged\.json is damaged: its SHA-256 is not that of manifest\.json"):
        load_model(step)
    other = Path(shutil.copytree(run / "checkpoints" / "step-0000004", tmp_path / "other"))
    (other / "generator.safetensors").write_bytes((other / "generator.safetensors").read_bytes()[:-8])
    with pytest.raises(
        ValueError, match=r"generator\.safetensors is cut short, .* \(its SHA-256 .* of manifest\.json\)"
    ):
        load_model(other)
    (other / "generator.safetensors").unlink()
    with pytest.raises(ValueError, match=r"generator\.safetensors cannot be read: .*No such file"):
        load_model(other)
    about = json.dumps({**json.loads((other / "averaged.json").read_text()), "tensors": "../step-0000002/generator"})
    (other / "averaged.json").write_text(about)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["averaged.json"] = hashlib.sha256(about.encode()).hexdigest()
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="which the checkpoint does not hold"):
        load_model(other)
    (other / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read as JSON: it holds no object"):
        load_model(other)


def test_a_checkpoint_of_an_older_version_is_told_by_the_networks_of_its_run(run: Path, tmp_path: Path) -> None:
    step = run / "checkpoints" / "step-0000002"
    (step / "averaged.json").unlink()
    path = step / "generator.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.startswith("buffer/")}, path)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    del manifest["averaged.json"]
    (step / "manifest.json").write_text(json.dumps(manifest))
    found, best = load_model(step), load_model(run / "generator-best")
    assert all(torch.equal(tensor, best.state_dict()[name]) for name, tensor in found.state_dict().items())
    assert found.facts.optimizer_steps == 2 and not found.facts.measured
    for name in ("generator", "generator-best"):
        shutil.rmtree(run / name)
    with pytest.raises(ValueError, match=r"does not say which network it is of, as checkpoints of version 0\.1 do not"):
        load_model(step)


def test_a_stopped_run_is_its_best_in_every_command(stopped: Path, tmp_path: Path, capsys) -> None:
    note = (
        f"{stopped} has not ended: its best generator (step 2, 0.25) is taken; --which last is its newest snapshot of "
        "the generator (step 6, 0.75)"
    )
    best = stopped / "generator-best"
    found, said = answer(capsys, "sample", stopped, "--n", 2, "--out", tmp_path / "a.png")
    assert said == f"ipfm: note: {note}\n" and found["remarks"] == [note]
    assert found["model"] == str(stopped) and found["taken"] == str(best)
    reference = tmp_path / "reference.npz"
    np.savez(reference, mu=np.zeros(16), sigma=np.eye(16))
    arguments = ("--reference", reference, "--features", "pixels", "--images", 20)
    found, said = answer(capsys, "evaluate", stopped, *arguments)
    assert f"ipfm: note: {note}\n" in said and note in found["remarks"] and found["taken"] == str(best)
    assert found["frechet"] == answer(capsys, "evaluate", best, *arguments)[0]["frechet"]
    last = answer(capsys, "evaluate", stopped, "--which", "last", *arguments)[0]
    assert last["taken"] == str(stopped / "snapshots" / "step-0000006") and last["frechet"] != found["frechet"]
    found, said = answer(capsys, "export", stopped, tmp_path / "hub", "--samples", 0)
    assert said == f"ipfm: note: {note}\n" and found["remarks"] == [note] and found["taken"] == str(best)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| measured of it in its run | Fréchet distance 0.2500 over 16 images |" in card
    assert "SHA-256 of the teacher's weights" in card and "## Results" not in card


def test_info_describes_the_run_and_with_which_its_network(run: Path, capsys) -> None:
    found, _ = answer(capsys, "info", run)
    about = {"distance": 0.25, "chosen_by": "fid", "measured": {"frechet": 0.25}}
    assert found["best"] == {"path": str(run / "generator-best"), "step": 2, **about}
    assert [(one["step"], one["distance"]) for one in found["snapshots"]] == [(2, 0.25), (4, 0.5), (6, 0.75)]
    ipfm(["info", str(run)])
    text = capsys.readouterr().out
    assert f"{run}/generator-best: step 2, 0.2500" in text and f"3 of steps 2 to 6: {run}/snapshots" in text
    found, said = answer(capsys, "info", run, "--which", 4)
    assert found["kind"] == "generator" and found["training"]["optimizer_steps"] == 4 and said == ""
    assert found["training"]["measured"]["distance"] == 0.5
    found, _ = answer(capsys, "info", run / "checkpoints" / "step-0000004")
    assert found["training"]["optimizer_steps"] == 4
    ipfm(["info", str(run / "checkpoints")])
    found = capsys.readouterr()
    assert "the average in a checkpoint of a run" in found.out and "(step 6) is taken" in found.err


def test_a_model_folder_is_made_of_a_checkpoint(run: Path, tmp_path: Path, capsys) -> None:
    step = run / "checkpoints" / "step-0000004"
    found, said = answer(capsys, "convert", step, tmp_path / "made")
    assert said == "" and found["taken"] == str(step) and found["optimizer_steps"] == 4
    made, kept = load_model(tmp_path / "made"), load_model(run / "snapshots" / "step-0000004")
    assert all(torch.equal(tensor, kept.state_dict()[name]) for name, tensor in made.state_dict().items())
    assert made.facts == replace(kept.facts, measured={}, order=made.facts.order)
    found, said = answer(capsys, "convert", run, tmp_path / "made")
    assert found["optimizer_steps"] == 6 and "the generator at its end (step 6) is taken" in said
    with pytest.raises(BadInput, match=r"sigmas cannot be given: .* says itself what it is"):
        ipfm(["convert", str(step), str(tmp_path / "made"), "--sigmas", "2"])


def test_a_network_that_is_replaced_while_it_is_read_is_read_anew(run: Path) -> None:
    stored = read_config(run / "generator-best")
    newer = load_model(run / "generator")
    save_model(newer, run / "generator-best", extra={**stored.extra, "optimizer_steps": 6})
    found = load_stored(stored)
    assert found.facts.optimizer_steps == 6
    assert all(torch.equal(tensor, newer.state_dict()[name]) for name, tensor in found.state_dict().items())
    (run / "generator-best" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged or belongs to another network"):
        load_stored(stored)


def test_the_report_shows_the_best_and_how_to_use_it(run: Path, tmp_path: Path, capsys) -> None:
    found, _ = answer(capsys, "report", run)
    assert found["kept"] == {"path": "run/generator-best", "step": 2, "number": "0.2500"}
    said = "The best network, of step 2 (0.2500), is in generator-best/."
    assert said in found["summary"] and "ipfm sample run/generator " in found["uses"][0][1]
    ipfm(["report", str(run), "--out", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert "After 2 steps: the best (0.2500), kept in run/generator-best." in page
    assert (tmp_path / "page_files" / "page-samples-best.png").is_file()
    ipfm(["report", str(run), "--out", str(tmp_path / "page.html")])
    assert "After 2 steps: the best (0.2500), kept in run/generator-best." in (tmp_path / "page.html").read_text()
    # Without a result the best is what there is to use.
    shutil.rmtree(run / "generator")
    found, _ = answer(capsys, "report", run)
    assert found["state"] == "stopped" and "ipfm sample run/generator-best " in found["uses"][0][1]
    assert "The best so far is in generator-best/." in " ".join(found["missing"])


def test_a_choice_that_there_is_not_is_one_line(run: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (("sample", run, "--which", "3"), "has no network of step 3; it has those of steps 2, 4, 6"),
        (("sample", run / "generator", "--which", "best"), "is no run folder: leave it out"),
        (
            ("export", run, tmp_path / "x.pt2", "--which", "newest"),
            "which must be best, last, a step or an average such as ema0.05, got 'newest'",
        ),
        (("info", run, "--which", "7"), "has no network of step 7"),
    ):
        with pytest.raises(BadInput, match=re.escape(said)) as refused:
            ipfm(list(map(str, arguments)))
        assert "\n" not in str(refused.value)


def test_python_takes_a_run_folder_and_says_what_it_took(run: Path) -> None:
    with pytest.warns(UserWarning, match=r"\(step 6\) is taken; which='best' is its best generator \(step 2, 0\.25\)"):
        assert load_model(run).facts.optimizer_steps == 6
    assert load_model(run, which="best").facts.optimizer_steps == load_model(run, which=2).facts.optimizer_steps == 2
    assert load_model(run / "checkpoints" / "step-0000004").facts.optimizer_steps == 4
    with pytest.raises(ValueError, match="it is the folder of a distillation"):
        load_teacher(run)
    with pytest.raises(ValueError, match="is a generator, which knows its own few noise levels"):
        load_teacher(run / "checkpoints" / "step-0000004")
    save_model(build_network(NETWORK), run / "teacher" / "model", extra={"task": "teacher"})
    with pytest.warns(UserWarning, match=f"the teacher of {run} is taken"):
        assert load_teacher(run).config == NETWORK
