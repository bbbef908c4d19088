"""ipfm export --format edm: what the programs of EDM, PFGM++ and SiD make of the pickle, and what we read from it."""

from __future__ import annotations

import copy
import json
import math
import pickle
import pickletools
import sys
from dataclasses import replace
from pathlib import Path

import official_files
import pytest
import their_programs
import torch
from random_values import rand, randomise

from ipfm.engine import generate, heun_sample
from ipfm.engine.commands.main import _main
from ipfm.engine.runtime.commandline import run_command
from ipfm.models import NetworkConfig, Precond, build_network, load_model, load_teacher, save_model
from ipfm.models.checkpoints.class_source import class_source
from ipfm.models.checkpoints.pickled_objects import modules
from ipfm.models.checkpoints.reader import open_checkpoint
from ipfm.models.teacher import load_network

FIXTURES = Path(__file__).parents[2] / "fixtures"

SMALL = NetworkConfig(
    img_resolution=4, img_channels=2, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,),
    dropout=0.1,
)  # fmt: skip
NCSNPP = replace(
    SMALL, embedding_type="fourier", encoder_type="residual", resample_filter=(1.0, 3.0, 3.0, 1.0),
    channel_mult_noise=2, label_dim=3, augment_dim=9,
)  # fmt: skip
ADM = replace(
    SMALL, model_type="DhariwalUNet", model_channels=64, channel_mult=(1,), attn_resolutions=(),
    label_dim=3,
)  # fmt: skip
TEACHERS = {
    "DDPM++": SMALL,
    "NCSN++, classes, augmentation": NCSNPP,
    "NCSN++, D = 128": replace(NCSNPP, D=128.0),
    "skip and skip, fp16": replace(SMALL, encoder_type="skip", decoder_type="skip", use_fp16=True),
    "ADM": replace(ADM, augment_dim=9),
    "VP": replace(SMALL, precond="VPPrecond", sigma_min=None, sigma_max=None, beta_d=10.0),
    "VE, D = 64": replace(SMALL, precond="VEPrecond", sigma_min=None, sigma_max=None, D=64.0),
    "iDDPM": replace(SMALL, precond="iDDPMPrecond", sigma_min=None, sigma_max=None, M=40),
}


def stored(folder: Path, config: NetworkConfig, **facts: object) -> Path:
    net = build_network(config)
    randomise(net)
    save_model(net, folder, extra=facts)
    return folder


def ipfm(*arguments: object) -> None:
    run_command("ipfm", _main, [str(argument) for argument in arguments])


def exported(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    ipfm("export", *arguments, "--json")
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    assert found["format"] == "edm" and found["difference"] <= found["limit"]
    return found


def latents_of(net: Precond, n: int = 3) -> tuple[torch.Tensor, torch.Tensor | None]:
    labels = torch.eye(net.label_dim)[[2, 0, 1][:n]] if net.label_dim else None
    return rand(n, *net.config.image_shape, seed=4).float(), labels


@pytest.mark.parametrize("name", TEACHERS)
def test_generate_of_edm_draws_the_same_images(name, tmp_path, capsys):
    folder, out = stored(tmp_path / "teacher", TEACHERS[name], task="teacher", dataset="mine"), tmp_path / "net.pkl"
    told = exported(capsys, folder, out)
    own, back = load_model(folder), load_teacher(out)
    assert told["inputs"] == ["x", "sigma", "class_labels"][: 3 if own.label_dim else 2]
    assert back.config == own.config and back.D == own.D and back.facts.dataset == "mine"
    assert all(torch.equal(tensor, own.state_dict()[key]) for key, tensor in back.state_dict().items())
    latents, labels = latents_of(own)
    with their_programs.their_modules():
        theirs = their_programs.edm_generate(out, latents, 3, labels)
        net = their_programs.load(out)
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        assert list(net.state_dict()) == list(own.state_dict())
        assert [n for n, _ in net.named_parameters()] == [n for n, _ in own.named_parameters()]
        # What is copied or stored again is a record of their own.
        again = pickle.loads(pickle.dumps(copy.deepcopy(net)))
        with torch.no_grad():
            more = {"augment_labels": rand(3, 9, seed=1).float()} if own.config.augment_dim else {}
            level = own.round_sigma(torch.tensor(1.3))
            torch.testing.assert_close(
                again(latents, level, labels, **more), own(latents, level, labels, **more), rtol=1e-4, atol=1e-4
            )
    high = float(own.round_sigma(torch.tensor(min(80, own.sigma_max), dtype=torch.float64)))
    for net in (own, back):
        ours = heun_sample(
            net, 3, steps=3, seed=0, latents=high * latents.double(), class_labels=labels,
            sigma_min=max(0.002, net.sigma_min), sigma_max=min(80, net.sigma_max),
        )  # fmt: skip
        scale = theirs.abs().amax()
        assert float((ours - theirs).abs().max() / scale) < 2e-5


def test_generate_of_pfgmpp_finds_its_D_and_draws_the_same_images(tmp_path, capsys):
    folder = stored(tmp_path / "teacher", replace(NCSNPP, D=128.0))
    told = exported(capsys, folder, tmp_path / "run" / "training-state-000250.pkl")
    assert told["remarks"] == [
        "D = 128 is in the file, but EDM's generate.py draws Gaussian latents; PFGM++'s draws those of --aug_dim 128"
    ]
    told = exported(capsys, folder, tmp_path / "teacher.pkl")
    assert told["remarks"][1] == "PFGM++'s generate.py --use_pickle=1 looks for names like training-state-000000.pkl"
    own = load_model(folder)
    latents, labels = latents_of(own)
    with their_programs.their_modules():
        found = their_programs.pfgmpp_generate(tmp_path / "run", 128, 80 * latents, 4, labels)
    assert list(found) == [250]
    ours = heun_sample(own, 3, steps=4, seed=0, latents=80 * latents.double(), class_labels=labels)
    torch.testing.assert_close(ours.double(), found[250], rtol=1e-4, atol=1e-4)
    assert load_teacher(tmp_path / "teacher.pkl").D == 128


@pytest.mark.parametrize("D", [math.inf, 128.0])
def test_sid_generate_draws_the_same_images_of_a_generator(D, tmp_path, capsys):
    folder = stored(tmp_path / "g", replace(NCSNPP, D=D), task="generator", sigmas=[2.5], alpha=1.2, D=D)
    out = tmp_path / "generator.pkl"
    remarks = exported(capsys, folder, out)["remarks"]
    assert remarks[0] == "the noise level 2.5 is no part of the layout: give it to sid_generate.py as init_sigma"
    assert (len(remarks) == 2) == (D == 128) and (len(remarks) == 1 or "Gaussian latents" in remarks[1])
    own = load_model(folder)
    latents, labels = latents_of(own)
    with their_programs.their_modules():
        theirs = their_programs.sid_generate(out, latents, 2.5, labels)
        assert list(pickle.loads(out.read_bytes())) == ["ema", "ipfm"]
    # Our own reader knows that it is a generator, its level and its D.
    back = load_network(out)
    for net in (own, back):
        ours = generate(net, 3, seed=0, latents=2.5 * latents, class_labels=labels)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert back.facts.sigmas == [2.5] and back.facts.alpha == 1.2 and D == back.D
    with pytest.raises(ValueError, match="ema is a generator"):
        load_teacher(out)
    for path in (folder, out):
        ipfm("sample", path, "--n", 3, "--out", tmp_path / f"{path.stem}.npz")
    assert (tmp_path / "g.npz").read_bytes() == (tmp_path / "generator.npz").read_bytes()
    capsys.readouterr()
    ipfm("info", out, "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["nfe"], told["sigmas"]) == ("generator", 1, [2.5])
    assert told["file"]["format"] == "export of ipfm in EDM's layout"
    ipfm("convert", out, tmp_path / "again")
    assert load_model(tmp_path / "again").facts.sigmas == [2.5] and load_model(tmp_path / "again").facts.alpha == 1.2


def test_a_generator_of_several_steps_says_what_their_programs_lack(tmp_path, capsys):
    folder = stored(tmp_path / "g", SMALL, task="generator", sigmas=[2.5, 1.25])
    (remark,) = exported(capsys, folder, tmp_path / "g.pkl")["remarks"]
    assert remark == (
        "the noise levels 2.5, 1.25 are no part of the layout: sid_generate.py draws in one step, and this generator "
        "takes 2 evaluations"
    )
    assert load_network(tmp_path / "g.pkl").facts.sigmas == [2.5, 1.25]


def test_the_file_holds_names_and_tensors_alone(tmp_path, capsys):
    """No source but ours; the same model gives the same bytes; every part has what their code uses."""
    folder, out = stored(tmp_path / "teacher", NCSNPP), tmp_path / "net.pkl"
    exported(capsys, folder, out)
    first = out.read_bytes()
    exported(capsys, folder, out)
    assert out.read_bytes() == first and first[:2] == b"\x80\x04"
    texts = {argument for _, argument, _ in pickletools.genops(first) if isinstance(argument, str)}
    (source,) = (text for text in texts if "import" in text)
    names = ("Conv2d", "EDMPrecond", "FourierEmbedding", "GroupNorm", "Linear", "SongUNet", "UNetBlock")
    assert source == class_source(names)
    assert [text for text in texts if "\n" in text] == [source]
    with their_programs.their_modules():
        root = pickle.loads(first)
        net = root.pop("ema")
        assert {k: v for k, v in root.items() if k != "ipfm"} == {
            "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {},
        }  # fmt: skip
        # The official object of the same network has the same attributes, part by part, with the same values.
        expected = official_files.official(load_model(folder), pfgmpp=False)
        _compare(net, expected)
        assert net._init_kwargs["augment_dim"] == 9 and "D" not in net._init_kwargs


def test_classes_are_found_where_the_program_has_them(tmp_path, monkeypatch):
    """In one file for all of them, beside `torch_utils`; where there is none, that is said."""
    files = {
        "torch_utils/__init__.py": "", "torch_utils/persistence.py": "",
        "other_parts/first.py": "class Trunk(object): pass\n",
        "parts_of_theirs/nets.py": "class Trunk(object):\n    own = 1\nclass Twig(object): pass\n",
        "parts_of_theirs/broken.py": "raise SystemExit\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        found: dict[str, object] = {}
        exec(class_source(("Trunk", "Twig")), found)
        assert found["Trunk"].own == 1 and found["Twig"].__module__ == "parts_of_theirs.nets"
        with pytest.raises(ImportError, match=f"no file in {tmp_path} has the classes Absent, Trunk"):
            exec(class_source(("Trunk", "Absent")), {})
    finally:
        for name in ("torch_utils", "torch_utils.persistence", "parts_of_theirs", "parts_of_theirs.nets"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["edm_ddpmpp_uncond", "edm_ncsnpp_uncond"])
def test_a_checkpoint_of_edm_written_again_has_all_that_edm_wrote(name, tmp_path, capsys):
    """Attributes and arguments of every part, but for what says how first weights are drawn."""
    exported(capsys, FIXTURES / f"{name}.pkl", tmp_path / "again.pkl")
    theirs, ours = (dict(modules(open_checkpoint(p).networks["ema"])) for p in (FIXTURES / f"{name}.pkl",
                                                                              tmp_path / "again.pkl"))  # fmt: skip
    assert list(theirs) == list(ours)
    for path, record in theirs.items():
        found = ours[path].state
        # A newer torch has more hooks, all empty.
        more = {key for key in set(found) - set(record.state) if not key.endswith("hooks") and "_hooks_" not in key}
        assert ours[path].class_name == record.class_name
        assert set(record.state) <= set(found) and more == ({"D", "N", "pfgmpp"} if path == "" else set())
        for key in set(record.state) - {"_parameters", "_buffers", "_modules", "_init_kwargs"}:
            assert found[key] == record.state[key], (path, key)
        if "_init_kwargs" in found:
            given = {k: v for k, v in record.state["_init_kwargs"].items() if not k.startswith("init")}
            used = {k: v for k, v in given.items() if v is not False and k not in ("num_heads", "resample_filter")}
            assert used.items() <= found["_init_kwargs"].items(), path
    side = theirs[""].state["img_resolution"]
    assert [ours[""].state[key] for key in ("D", "N", "pfgmpp")] == [128, 3 * side**2, False]


def _compare(found: torch.nn.Module, official: official_files.Official | torch.nn.ModuleDict) -> None:
    state = official.meta["state"] if isinstance(official, official_files.Official) else vars(official)
    skipped = {"_init_kwargs", "_parameters", "_buffers", "_modules"}
    assert set(vars(found)) == set(state)
    assert {k: v for k, v in vars(found).items() if k not in skipped} == {
        k: v for k, v in state.items() if k not in skipped
    }
    for kind in ("_parameters", "_buffers", "_modules"):
        assert list(getattr(found, kind)) == list(state[kind])
    for name, part in found._modules.items():
        _compare(part, state["_modules"][name])


def test_a_network_that_has_diverged_is_not_written(tmp_path, capsys):
    net = build_network(SMALL)
    net.model.map_layer0.weight.data[0, 0] = math.nan
    save_model(net, tmp_path / "bad")
    with pytest.raises(SystemExit) as stop:
        ipfm("export", tmp_path / "bad", tmp_path / "a.pkl")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "map_layer0.weight holds values that are not finite" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_damaged_facts_are_no_reason_to_take_a_generator_for_a_teacher(tmp_path, capsys):
    folder, out = stored(tmp_path / "g", SMALL, task="generator", sigmas=[2.5]), tmp_path / "g.pkl"
    exported(capsys, folder, out)
    out.write_bytes(out.read_bytes().replace(b'{"task"', b'{"task?'))
    for load in (load_teacher, load_network):
        with pytest.raises(ValueError, match=r"g\.pkl: what it says of its network, under 'ipfm', is damaged"):
            load(out)


def test_a_network_in_float64_is_rounded_and_says_so(tmp_path, capsys):
    net = build_network(SMALL).double()
    randomise(net)
    save_model(net, tmp_path / "wide")
    (remark,) = exported(capsys, tmp_path / "wide", tmp_path / "a.pkl")["remarks"]
    assert remark == "the weights are stored in float32, as all of the layout are"
    assert load_teacher(tmp_path / "a.pkl").model.map_layer0.weight.dtype == torch.float32


def test_a_checkpoint_becomes_another_and_nothing_else_is_replaced(tmp_path, capsys):
    net = official_files.randomize(build_network(replace(SMALL, D=64.0)))
    state = official_files.pfgmpp_state(net, official_files.shifted(net, 0.1), step=4000, pfgmpp=True, D=64)
    theirs = official_files.write_torch(tmp_path / "training-state-000004.pt", state)
    told = exported(capsys, theirs, tmp_path / "training-state-000004.pkl", "--format", "edm")
    assert told["out"] == str(tmp_path / "training-state-000004.pkl")
    assert load_teacher(tmp_path / "training-state-000004.pkl").D == 64
    official = official_files.write_pickle(tmp_path / "network-snapshot-000004.pkl", official_files.edm_snapshot(net))
    before = official.read_bytes()
    trajectory = {"parametrisation": "trajectory", "sigma_max": 60.0, "sigma_min": 0.004}
    pid = stored(tmp_path / "pid", SMALL, task="generator", **trajectory)
    refusals = {
        (theirs, official): "it is no export in the format edm: move it away",
        (theirs, tmp_path / "a.pt", "--format", "edm"): "OUT must end in .pkl for the format edm",
        (theirs, tmp_path / "a.pkl", "--format", "torch"): "OUT must end in .pt2 for the format torch",
        (theirs, theirs.with_suffix(".pkl"), "--samples", 4): "samples are for the format huggingface",
        (pid, tmp_path / "pid.pkl"): "this generator is none: its image is the end of a trajectory",
        (official, official): "belongs to the model itself",
    }
    for arguments, words in refusals.items():
        with pytest.raises(SystemExit) as stop:
            ipfm("export", *arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and words in line
    assert official.read_bytes() == before and not (tmp_path / "pid.pkl").exists()
