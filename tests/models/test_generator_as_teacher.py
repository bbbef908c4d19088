"""A generator is no teacher: what a file says of itself is believed, in Python and in every recipe."""

import shutil

import official_files as of
import pytest

from ipfm.engine.runtime.commandline import BadInput
from ipfm.models import EDMPrecond, NetworkConfig, load_teacher, save_model
from ipfm.models.teacher import load_network
from ipfm.recipes.cifar_ipfm import RECIPE as CIFAR
from ipfm.recipes.digits_ipfm import RECIPE as DIGITS
from ipfm.recipes.digits_pid import RECIPE as PID

SMALL = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=()
)


@pytest.fixture
def net():
    return of.randomize(EDMPrecond(SMALL))


@pytest.fixture
def run(net, tmp_path):
    """A run folder with a generator, by IPFM and by PID, and their teacher."""
    save_model(net, tmp_path / "run" / "generator", extra={"task": "generator", "sigmas": [2.5]})
    save_model(net, tmp_path / "pid", extra={"task": "generator", "parametrisation": "trajectory"})
    save_model(net, tmp_path / "run" / "teacher" / "model", extra={"task": "teacher"})
    return tmp_path / "run"


def refusal(path, **keywords) -> str:
    with pytest.raises(ValueError) as caught:
        load_teacher(path, **keywords)
    return str(caught.value)


@pytest.mark.quick
def test_a_generators_folder_is_refused_and_its_teacher_named(run):
    said = "is a generator, which knows its own few noise levels alone, and no teacher, a denoiser at all levels"
    assert refusal(run / "generator") == f"{run}/generator {said}; the teacher of its run is {run}/teacher/model"
    assert refusal(run.parent / "pid") == f"{run.parent}/pid {said}"
    assert load_network(run / "generator").facts.sigmas == [2.5]
    assert load_teacher(run / "teacher" / "model").facts.task == "teacher"


def test_the_training_state_and_the_snapshot_of_a_generator_are_refused(net, tmp_path):
    state = of.write_torch(tmp_path / "training-state-000100.pt", of.sid_state(net))
    assert "G_ema is a generator (training state of SiD), which knows its own few noise levels" in refusal(state)
    # Its student is a denoiser at all levels.
    assert load_teacher(state, network="fake_score").config == SMALL
    snapshot = of.write_pickle(tmp_path / "network-snapshot-1.200000-403968.pkl", {"ema": of.edm_snapshot(net)["ema"]})
    assert "ema is a generator (network snapshot of EDM or SiD), which knows" in refusal(snapshot)
    assert load_network(snapshot).config == SMALL
    shutil.copy(snapshot, tmp_path / "network-snapshot-403968.pkl")
    assert load_teacher(tmp_path / "network-snapshot-403968.pkl").config == SMALL


@pytest.mark.parametrize("recipe", [DIGITS, PID, CIFAR], ids=lambda recipe: recipe.file)
def test_a_recipe_refuses_a_generator_as_its_teacher(run, recipe):
    for more in ((), ("--dry-run",)):
        with pytest.raises(BadInput, match=r"is a generator, which .* the teacher of its run is .*/teacher/model"):
            recipe.main(["--teacher", str(run / "generator"), "--out", str(run.parent / "out"), *more])
        assert not (run.parent / "out").exists()


def test_the_folder_of_the_run_leads_to_the_teacher(run):
    (run / "config.json").write_text('{"format": 1, "kind": "distill", "config": {}}')
    with pytest.warns(UserWarning, match=f"^the teacher of {run} is taken, {run}/teacher/model$"):
        assert load_teacher(run).facts.task == "teacher"
    with pytest.warns(UserWarning, match="the generator at its end is taken"):
        assert load_network(run).facts.sigmas == [2.5]
    shutil.rmtree(run / "teacher")
    assert refusal(run).endswith(f"it is the folder of a distillation; its generator is {run}/generator")
