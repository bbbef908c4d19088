"""Recipes from end to end at reduced width: published file formats in, generator and FID out."""

from __future__ import annotations

import json
from pathlib import Path

import launch
import official_files
import prepared
import pytest
import stand_ins
import tiny_inception
import torch

from ipfm.models import EDMPrecond, load_model, read_config
from ipfm.models.checkpoints.training_state import read_training_state

THIN = {
    "img_resolution": 32, "img_channels": 3, "model_channels": 8, "channel_mult": (1, 1), "num_blocks": 1,
    "attn_resolutions": (), "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
    "resample_filter": (1, 3, 3, 1), "augment_dim": 9, "dropout": 0.1,
}  # fmt: skip


def command(*arguments: object) -> str:
    """Run a program of this project; what it printed. Fails with its errors."""
    program, *rest = arguments
    script = launch.BIN / "ipfm" if program == "ipfm" else launch.ROOT / "recipes" / str(program)
    done = prepared.run(script, *rest, env=launch.environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A thin teacher as PFGM++ stores a training state, CIFAR-10's python archive with few images, an Inception."""
    root = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    net = official_files.randomize(EDMPrecond(**THIN, D=2048.0))
    state = official_files.pfgmpp_state(net, official_files.shifted(net, 0.01), step=512_000, pfgmpp=True, D=2048)
    teacher = official_files.write_torch(root / "training-state-000512.pt", state)
    return {
        "teacher": teacher,
        "data": stand_ins.cifar_archive(root / "cifar-10-python.tar.gz"),
        "inception": tiny_inception.write(root / "inception.pt"),
    }


@pytest.mark.distributed
def test_cifar_from_an_official_file_to_the_fid(files: dict[str, Path], tmp_path: Path) -> None:
    """Distils the file as it is with in-loop FID, then `ipfm evaluate`; D comes from the file."""
    run = tmp_path / "run"
    said = command(
        "cifar_ipfm.py", "--teacher", files["teacher"], "--out", run, "--max-steps", 2, "--batch", 4, "--log-every", 1,
        "--reference", files["data"], "--inception", files["inception"], "--eval-images", 16, "--heun-steps", 2,
    )  # fmt: skip
    assert f"generator: {run / 'generator'}" in said and "FID" in said
    config = json.loads((run / "config.json").read_text())["config"]
    expected = {"D": 2048.0, "student_updates": 1, "augment": 0.12, "dropout": 0.0}
    assert {name: config[name] for name in expected} == expected
    assert json.loads((run / "results.json").read_text())[1]["frechet"] > 0

    facts = json.loads(command(
        "ipfm", "evaluate", run / "generator", "--reference", files["data"], "--inception", files["inception"],
        "--images", 24, "--metrics", "fid", "kid", "is", "pr", "--repeats", 2, "--json",
    ))  # fmt: skip
    assert (facts["D"], facts["nfe"], facts["images"], len(facts["runs"])) == (2048.0, 1, 24, 2)
    assert facts["frechet"] == min(run["distance"] for run in facts["runs"]) > 0
    assert load_model(run / "generator").D == 2048.0


@pytest.mark.distributed
def test_a_teacher_is_trained_and_continued(files: dict[str, Path], tmp_path: Path) -> None:
    """From CIFAR-10's archive; then a PFGM++ training state goes on at the step that its images make."""
    small = ("--data", files["data"], "--batch", 8, "--log-every", 1, "--heun-steps", 2, "--profile-memory", 1)
    fresh = tmp_path / "fresh"
    command(
        "cifar_teacher.py", *small, "--out", fresh, "--D", 128, "--max-steps", 2, "--model-channels", 8,
        "--num-blocks", 1, "--conditional", "--xflip",
    )  # fmt: skip
    stored = read_config(fresh / "model")
    assert (stored.network.D, stored.network.label_dim, stored.network.augment_dim) == (128.0, 10, 9)
    assert len((fresh / "metrics.jsonl").read_text().splitlines()) == 2
    # The data set's memory is not taken for the training's.
    memory = (fresh / "memory" / "memory.md").read_text()
    assert "| teacher: forward and backward |" in memory and "warning" not in memory

    more = tmp_path / "more"
    command(
        "cifar_teacher.py", *small, "--out", more, "--continue-from", files["teacher"], "--kimg", 512.016, "--lr", 1e-30
    )
    lines = [json.loads(line) for line in (more / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [64_000, 64_001]
    state, net = read_training_state(files["teacher"]), load_model(more / "model")
    assert state.ema is not None and net.D == 2048.0
    # At no learning rate the average only moves from where the file's was, towards the file's weights.
    for name, p in net.named_parameters():
        low, high = (
            torch.minimum(state.ema[name], state.weights[name]),
            torch.maximum(state.ema[name], state.weights[name]),
        )
        assert ((p >= low - 1e-6) & (p <= high + 1e-6)).all()
        torch.testing.assert_close(p, state.ema[name], rtol=0, atol=1e-4)
