"""A new teacher begins with the weights of another network that fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import official_files as of
import pytest
import torch

from ipfm.engine.commands.main import Command
from ipfm.engine.config import TeacherConfig
from ipfm.engine.data.dataset import digits
from ipfm.engine.distributed.world import World
from ipfm.engine.experiments.starts import read_teacher_state
from ipfm.engine.experiments.teacher import state_notes
from ipfm.engine.runtime.commandline import BadInput, parse, parse_given
from ipfm.engine.training.run_folder import check_run_folder
from ipfm.engine.training.teacher import TeacherTraining, training_facts
from ipfm.engine.training.transfer import transfer_from
from ipfm.models import NetworkConfig, build_network, load_model, save_model
from ipfm.recipes import cifar_teacher

SMALL = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(),
    embedding_type="fourier", dropout=0.0, D=128.0,
)  # fmt: skip
ONE = TeacherConfig(batch=8, max_steps=1, zero=0, precision="fp32", heun_steps=1, lr_rampup_kimg=0)


def network(**changes: Any) -> NetworkConfig:
    return replace(SMALL, **changes)


@pytest.fixture(scope="module")
def other() -> Any:
    return of.randomize(build_network(SMALL), seed=3)


def test_a_conditional_teacher_at_another_D_from_an_unconditional_one(other: Any) -> None:
    conditional = network(label_dim=10, D=64.0)
    transfer = transfer_from("cifar.pkl", other, conditional)
    assert transfer.fresh == ("model.map_label.weight", "model.map_label.bias") and not transfer.unused
    lines = transfer.words
    total = len(list(other.parameters())) + 3
    assert lines[0].startswith(f"transfer from cifar.pkl: {total - 2} of {total} tensors fit by name and shape, ")
    assert lines[1:] == (
        "  start fresh: model.map_label.weight, model.map_label.bias",
        "  it was trained at D = 128, this one is at D = 64",
    )
    training = TeacherTraining(ONE, conditional, digits(), transfer=transfer, world=World(0, 1, torch.device("cpu")))
    fresh = TeacherTraining(ONE, conditional, digits(), world=World(0, 1, torch.device("cpu")))
    expected = dict(other.named_parameters())
    for kind in ("weight", "ema"):
        for (name, p), (_, new) in zip(training.net.full(kind), fresh.net.full(kind), strict=True):
            assert torch.equal(p, expected.get(name, new)), (kind, name)
    # Its weights mean nothing under other frequencies.
    training.refresh()
    assert torch.equal(training.average.get_buffer("model.map_noise.freqs"), other.get_buffer("model.map_noise.freqs"))
    assert training.net.steps_applied == 0 and training.first_step == 0


def test_another_size_another_width_and_what_fits_nowhere(other: Any) -> None:
    larger_network = network(img_resolution=16, channel_mult=(1, 1, 2))
    larger = transfer_from("x", other, larger_network)
    vp = replace(SMALL, precond="VPPrecond", D=float("inf"), sigma_min=None, sigma_max=None)
    assert "it has EDMPrecond, this one VPPrecond" in transfer_from("x", other, vp).words[-1]
    # The levels of the same side.
    assert any("8x8" in name for name in larger.weights) and any("16x16" in name for name in larger.fresh)
    assert any("4x4" in name for name in larger.weights)
    assert [line.partition(":")[0].strip() for line in larger.words[1:]] == ["start fresh", "not used of x"]
    smaller = transfer_from("x", of.randomize(build_network(larger_network)), SMALL)
    assert any("4x4" in name for name in smaller.weights) and any("16x16" in name for name in smaller.unused)
    wide = transfer_from("x", other, network(model_channels=16))
    taken, whole = wide.parameters
    assert taken < whole / 2 and "(little of the network)" in wide.words[0]
    assert f"({'x'.join(map(str, wide.shapes[0][1]))} there, " in wide.words[1]
    grey = of.randomize(build_network(network(model_channels=16, img_channels=3, model_type="DhariwalUNet",
        embedding_type="positional", channel_mult=(1,))))  # fmt: skip
    with pytest.raises(ValueError, match=r"nothing of y fits by name and shape \(ADM, 16 channels, sides 8; here"):
        transfer_from("y", grey, network())


def test_a_size_that_shares_no_side_takes_level_for_level(other: Any) -> None:
    there, here = dict(other.named_parameters()), network(img_resolution=12, D=64.0)
    transfer = transfer_from("x", other, here)
    assert not transfer.fresh and not transfer.unused and transfer.parameters[0] == transfer.parameters[1]
    assert "  level by level: its sides 8, 4 are taken for 12, 6 here" in transfer.words
    weights = transfer.weights
    assert torch.equal(weights["model.enc.6x6_block0.conv0.weight"], there["model.enc.4x4_block0.conv0.weight"])
    assert torch.equal(weights["model.dec.12x12_up.conv0.weight"], there["model.dec.8x8_up.conv0.weight"])
    transfer.put_into(build_network(here))
    # A level more, at the end or at the start of either, is never taken for another.
    deeper = transfer_from("x", other, network(img_resolution=12, channel_mult=(1, 2, 2)))
    assert deeper.fresh and all("3x3" in name or "6x6" in name for name in deeper.fresh)
    shallower = transfer_from("x", other, network(img_resolution=12, channel_mult=(1,)))
    assert all("4x4" in name or "8x8" in name for name in shallower.unused) and shallower.unused


def test_a_run_says_what_it_began_with_and_its_folder_takes_no_other(
    other: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transfer = transfer_from("cifar.pkl", other, network(label_dim=10))
    run = tmp_path / "run"
    world = World(0, 1, torch.device("cpu"))
    config = replace(ONE, D=128.0)
    TeacherTraining(config, network(label_dim=10), digits(), transfer=transfer, world=world).run(run)
    total = len(transfer.weights) + 2
    assert load_model(run / "model").facts.others == {
        "transfer": {"source": "cifar.pkl", "tensors": total - 2, "of": total}
    }
    for place in (run, run / "model"):
        parse(Command, ["info", str(place)], prog="ipfm", description="").run()
        assert f"{total - 2} of {total} tensors of cifar.pkl" in capsys.readouterr().out
    parse(Command, ["report", str(run), "--out", str(tmp_path / "report.md")], prog="ipfm", description="").run()
    text = (tmp_path / "report.md").read_text()
    assert f"It began with {total - 2} of {total} tensors of cifar.pkl." in text

    stored = json.loads((run / "config.json").read_text())
    facts = training_facts(config, network(label_dim=10), digits(), None)
    config = replace(config, **{name: stored["config"][name] for name in ("zero", "precision")})
    check_run_folder(run, "teacher", config, {**facts, **transfer.facts()})
    with pytest.raises(ValueError, match=r"belongs to another configuration \(transfers is .* there, nothing here\)"):
        check_run_folder(run, "teacher", config, facts)


def test_the_option_of_the_recipes(tmp_path: Path) -> None:
    source = of.randomize(build_network(replace(SMALL, img_resolution=32, img_channels=3)))
    save_model(source, tmp_path / "small", extra={"task": "teacher"})
    recipe = cifar_teacher.RECIPE
    like = ["--model-channels", "8", "--channel-mult", "1", "2", "--num-blocks", "1", "--attention", "0"]

    def planned(*more: object) -> Any:
        words = [*like, *map(str, more), "--dry-run"]
        return recipe.plan(parse_given(words, default=recipe.defaults, prog="x", description=""))

    # Of another D, another encoder and with augmentation labels.
    lines = planned("--transfer", tmp_path / "small").begins_with
    assert lines[0].startswith("transfer from small: ") and "map_augment" in lines[1]
    state = of.write_torch(tmp_path / "training-state-000001.pt", of.edm_state(source))
    lines = planned(*[], "--transfer", state).begins_with
    assert lines[0].startswith("transfer from training-state-000001.pt: ")
    for words, message in (
        (["--transfer", "nowhere"], "nowhere does not exist"),
        (["--transfer", "a", "--continue-from", "b"], "--transfer was given, but continue-from says what the weights"),
    ):
        with pytest.raises(BadInput) as caught:
            cifar_teacher.main([*words, "--dry-run"])
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_state_that_is_continued_is_said_and_must_not_be_over(tmp_path: Path) -> None:
    net = of.randomize(build_network(replace(SMALL, img_resolution=32, img_channels=3)))
    path = of.write_torch(tmp_path / "training-state-000512.pt", of.pfgmpp_state(
        net, of.shifted(net, 1), step=512_000, pfgmpp=True, D=128))  # fmt: skip
    recipe = cifar_teacher.RECIPE

    def planned(*more: object) -> Any:
        words = ["--continue-from", str(path), "--augment", "0", *map(str, more), "--dry-run"]
        return recipe.plan(parse_given(words, default=recipe.defaults, prog="x", description=""))

    assert planned("--max-steps", 1001).begins_with == [
        "continues training-state-000512.pt: 512,000 images seen, goes on at step 1,000 of 1,001",
        "  teacher: its weights, its average from training-state-000512.pt, its optimiser's moments and 3 steps",
    ]
    with pytest.raises(ValueError, match="is at step 1,000 of 512 images already, and the run is to end at step 1,000"):
        planned("--max-steps", 1000)


def test_a_run_of_ours_is_continued_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """In another folder, where other settings are possible."""
    config, world = replace(ONE, max_steps=3, D=128.0, ema_rampup=1.0), World(0, 1, torch.device("cpu"))
    whole = TeacherTraining(config, SMALL, digits(), world=world)
    for step in range(3):
        whole.iteration(step)
    TeacherTraining(replace(config, max_steps=2), SMALL, digits(), world=world).run(tmp_path / "first")
    state = read_teacher_state(tmp_path / "first")
    assert state_notes(state, str(tmp_path / "first"), config) == [
        "continues first: 16 images seen, goes on at step 2 of 3",
        "  teacher: its weights, its average from first/step-0000002, its optimiser's moments and 2 steps",
    ]
    on = TeacherTraining(config, state.config, digits(), start=state, world=world)
    assert on.first_step == 2
    on.iteration(2)
    for kind in whole.net.state_kinds:
        here = dict(on.net.full(kind))
        assert all(torch.equal(here[name], there) for name, there in whole.net.full(kind)), kind
    assert all(torch.equal(on.net.exact_buffers[name], there) for name, there in whole.net.exact_buffers.items())
    facts = training_facts(config, SMALL, digits(), state)
    assert facts["start"] == {"source": "first/step-0000002", "images_seen": 16}
    for place, message in (
        (tmp_path / "first" / "model", "model is a network without its optimiser: --transfer begins with its weights"),
        (tmp_path / "nowhere", "nowhere does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            read_teacher_state(place)
    with pytest.raises(ValueError, match="first was trained for D = 128, but D = 64 was asked for"):
        read_teacher_state(tmp_path / "first" / "checkpoints", D=64)
