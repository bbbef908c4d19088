"""ipfm export: what other programs make of the files, and what is refused."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from random_values import randomise
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from traced_once import traced_once

from ipfm.engine import generate
from ipfm.engine.commands.export import onnx_file, plain
from ipfm.engine.commands.export import program as program_module
from ipfm.engine.commands.export.comparison import LIMIT, ExportFailed
from ipfm.engine.commands.export.hub_folder import export_folder, obstacle
from ipfm.engine.commands.export.model_card import Origin
from ipfm.engine.commands.export.network import ExportedNetwork, open_network
from ipfm.engine.commands.export.onnx_file import export_onnx
from ipfm.engine.commands.export.program import export_program, foreign_operators
from ipfm.engine.commands.main import _main
from ipfm.engine.evaluation.results import EvaluationRow, write_results
from ipfm.engine.random_streams import Stream
from ipfm.engine.runtime.commandline import run_command
from ipfm.engine.sampling.samplers import draw_prior, trajectory_sample
from ipfm.engine.sampling.seeds import SampleNoise
from ipfm.kernels.group_norm import _forward as triton_group_norm
from ipfm.models import NetworkConfig, build_network, load_model, save_model

PAGE = (Path(__file__).parents[3] / "docs" / "checkpoints-and-export.md").read_text(encoding="utf-8")
# Attention in the innermost block, resampling between two levels.
DDPMPP = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(),
    dropout=0.1, D=128.0,
)  # fmt: skip
NCSNPP = replace(
    DDPMPP, embedding_type="fourier", encoder_type="residual", resample_filter=(1.0, 3.0, 3.0, 1.0),
    channel_mult_noise=2, label_dim=3, D=math.inf,
)  # fmt: skip
TINY = replace(DDPMPP, img_resolution=4, img_channels=2, channel_mult=(1,))
ADM = replace(TINY, model_type="DhariwalUNet", model_channels=64)
ENDS = {"parametrisation": "trajectory", "sigma_max": 60.0, "sigma_min": 0.004}
MODELS: dict[str, tuple[NetworkConfig, dict[str, object]]] = {
    "run/generator": (DDPMPP, {"task": "generator", "sigmas": [2.5], "D": 128.0, "alpha": 1.0, "optimizer_steps": 7}),
    "two": (NCSNPP, {"task": "generator", "sigmas": [2.5, 1.25]}),
    "two-128": (replace(TINY, label_dim=3), {"task": "generator", "sigmas": [2.5, 0.5]}),
    "one-inf": (replace(TINY, D=math.inf), {"task": "generator", "sigmas": [2.0]}),
    "trajectory": (ADM, {"task": "generator", **ENDS}),
    "teacher": (replace(ADM, label_dim=3), {"task": "teacher"}),
}


class Traced(NamedTuple):
    """A model, and its program as torch.export made it."""

    network: ExportedNetwork
    program: ExportedProgram


@pytest.fixture(scope="module", autouse=True)
def once() -> Iterator[None]:
    """Each network is traced once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program_module, "make_program", traced_once(program_module.make_program))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model by its name, "run/generator" within a run folder."""
    root = tmp_path_factory.mktemp("models")
    for seed, (name, (config, facts)) in enumerate(MODELS.items()):
        net = build_network(config)
        randomise(net, seed)
        save_model(net, root / name, extra=facts)
    record = {"kind": "distill", "config": {"teacher": "/elsewhere/edm-digits.pkl"}, "teacher": "abc123"}
    (root / "run" / "config.json").write_text(json.dumps(record))
    rows = [
        EvaluationRow("teacher", None, 35, 0.1978, 2000, 274.8),
        EvaluationRow("generator", 1, 1, 0.4, 2000, 7101.0),
    ]
    write_results(root / "run", rows)
    return root


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generator of the run as a folder for Hugging Face."""
    out = tmp_path_factory.mktemp("hub") / "digits-D128"
    ipfm("export", models / "run" / "generator", out, "--samples", 6)
    return out


@pytest.fixture(scope="module")
def traced(models: Path, folder: Path) -> dict[str, Traced]:
    networks = {name: open_network(models / name, D=None) for name in MODELS}
    written = torch.export.load(folder / "generator.pt2")
    return {
        name: Traced(network, written if name == "run/generator" else program_module.make_program(network))
        for name, network in networks.items()
    }


def ipfm(*arguments: object) -> None:
    run_command("ipfm", _main, [str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as stop:
        ipfm("export", *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == code
    return line


def snippet(containing: str) -> str:
    """The Python on the page that contains a text."""
    (found,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if containing in code)
    return found


def expected(network: ExportedNetwork, draws: list[Tensor], labels: Tensor | None) -> Tensor:
    """Images by `generate` and `trajectory_sample`, from latents of draws[0] at sigma = 1."""
    net, levels = network.net, network.facts["sigmas"]
    given = {"D": net.D, "seed": 5, "latents": levels[0] * draws[0], "class_labels": labels}
    if network.facts["parametrisation"] == "trajectory":
        return trajectory_sample(net, len(draws[0]), sigma_max=60.0, sigma_min=0.004, **given)
    return generate(net, len(draws[0]), sigmas=tuple(levels), **given)


def noise_of(network: ExportedNetwork, n: int) -> list[Tensor]:
    """What `generate` with seed 5 adds at each step, at sigma = 1."""
    net, steps = network.net, SampleNoise.of(n, 5, 0, torch.device("cpu"))
    start = draw_prior(net, torch.arange(n), 1.0, net.D, seed=5)
    zeros, ones = torch.zeros_like(start), torch.ones(n)
    later = range(1, len(network.facts["sigmas"]))
    return [start, *(steps.perturb(zeros, ones, net.D, stream=Stream.SAMPLER_NOISE, step=k) for k in later)]


@pytest.mark.parametrize("name", MODELS)
def test_a_program_holds_torchs_operators_alone_and_every_batch_size(traced: dict[str, Traced], name: str) -> None:
    """Attention and normalisation are one node each; no constant or check binds it to the CPU."""
    network, program = traced[name]
    assert foreign_operators(program) == []
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"aten.scaled_dot_product_attention.default", "aten.group_norm.default"} <= called
    assert not [node for node in program.graph.nodes if "stack_trace" in node.meta]
    for batch in (1, 5):
        inputs = network.fresh(batch, seed=batch)
        with torch.no_grad():
            found, wanted = program.module()(*inputs.values()), network.function(**inputs)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert found.dtype == torch.float32
    if network.net.label_dim:
        other = {**inputs, "class_labels": inputs["class_labels"].roll(1, 1)}
        assert not torch.allclose(found, program.module()(*other.values()), atol=1e-3)


def test_an_operator_of_our_own_is_noticed() -> None:
    class Ours(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = triton_group_norm(x, x[0, :, 0, 0], x[0, :, 0, 0], None, None, 2, 1e-5, True)[0]
            return out

    program = torch.export.export(Ours(), (torch.ones(2, 4, 2, 2),), strict=False)
    assert foreign_operators(program) == ["ipfm.group_norm_silu.default"]


DRIVER = """
import sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ipfm", "triton", "xformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, NoPackage())
exec(open(sys.argv[1], encoding="utf-8").read())
for name in sys.argv[2:]:
    network, facts = load(f"{name}.pt2")
    given = dict(np.load(f"{name}.npz"))
    steps = range(len(facts["sigmas"]))
    images = generate(network, facts, 4, draws=[torch.from_numpy(given[f"draw{k}"]) for k in steps],
                      classes=given["classes"] if facts["label_dim"] else None)
    own = generate(network, facts, 2, seed=1)
    assert own.isfinite().all() and not torch.equal(own, generate(network, facts, 2, seed=2))
    np.savez(f"{name}-found.npz", images=images.numpy(), own=own.numpy())
assert not [name for name in sys.modules if name.partition(".")[0] == "ipfm"]
"""


def test_the_documented_loader_draws_the_same_images_without_this_package(
    traced: dict[str, Traced], folder: Path, tmp_path: Path
) -> None:
    """D = 128 and inf, one step and two, and the end of a trajectory."""
    loader = snippet("def generate")
    assert len(loader.splitlines()) <= 30 and "ipfm" not in loader
    (tmp_path / "loader.py").write_text(loader)
    (tmp_path / "driver.py").write_text(DRIVER)
    names, wanted = ["one-128", "two", "two-128", "one-inf", "trajectory"], {}
    classes = torch.tensor([2, 0, 1, 1])
    for name in names:
        network, program = traced["run/generator" if name == "one-128" else name]
        if name == "one-128":
            (tmp_path / "one-128.pt2").write_bytes((folder / "generator.pt2").read_bytes())
        else:
            assert export_program(network, program, tmp_path / f"{name}.pt2") <= LIMIT
        draws = noise_of(network, 4)
        labels = torch.eye(network.net.label_dim)[classes] if network.net.label_dim else None
        wanted[name] = expected(network, draws, labels)
        arrays = {f"draw{k}": draw.numpy() for k, draw in enumerate(draws)}
        np.savez(tmp_path / f"{name}.npz", classes=classes.numpy(), **arrays)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "driver.py", "loader.py", *names], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in names:
        found = torch.from_numpy(np.load(tmp_path / f"{name}-found.npz")["images"])
        assert (found - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max(), name
    program = move_to_device_pass(torch.export.load(tmp_path / "two.pt2"), "meta")
    inputs = [value.to("meta") for value in traced["two"].network.fresh(5, 0).values()]
    assert program.module()(*inputs).shape == (5, 1, 8, 8) and "cpu" not in str(program.graph)


def test_the_loaders_noise_follows_the_radial_law() -> None:
    """N/D times the squared radius at sigma = 1 is F(N, D), which at D = inf is chi-squared over N."""
    from scipy import stats

    for D, law in ((3.0, stats.f(48, 3)), (128.0, stats.f(48, 128)), ("inf", stats.chi2(48, scale=1 / 48))):
        facts = {"image_shape": [3, 4, 4], "D": D}
        radii = plain.noise(4000, facts, np.random.default_rng(0)).double().square().sum((1, 2, 3)) / 48
        assert stats.kstest(radii.numpy(), law.cdf).pvalue > 0.01


def test_a_one_step_generator_in_onnx(
    models: Path, traced: dict[str, Traced], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The page's lines draw from it; what they draw is what the network makes of the same latents."""
    ipfm("export", models / "trajectory", tmp_path / "generator.onnx", "--format", "onnx")
    out, err = capfd.readouterr()
    assert re.fullmatch(
        rf"{tmp_path}/generator.onnx: onnx, x -> images\n"
        r"largest difference from the network: \d\.\de-\d\d \(batches of 1 and 3; limit 1e-04\)\n",
        out,
    )
    assert err == ""
    model = onnx.load(tmp_path / "generator.onnx")
    onnx.checker.check_model(model, full_check=True)
    (given,) = model.graph.input
    assert [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim] == ["batch", 2, 4, 4]
    assert str(Path(__file__).parents[3]).encode() not in (tmp_path / "generator.onnx").read_bytes()
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert (facts["D"], facts["sigmas"], facts["prior"], facts["parametrisation"], facts["sigma_min"]) == (
        "128.0", "[60.0]", "student-t", "trajectory", "0.004",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    names: dict[str, np.ndarray] = {}
    exec(snippet("onnxruntime"), names)
    wanted = expected(traced["trajectory"].network, [torch.from_numpy(names["x"].astype(np.float32)) / 60], None)
    assert names["images"].shape == (16, 2, 4, 4)
    torch.testing.assert_close(torch.from_numpy(names["images"]), wanted, rtol=1e-4, atol=1e-4)

    # An export of its own is replaced; what is none stays.
    onnx_file.check_onnx()
    assert onnx_file.is_exported(tmp_path / "generator.onnx")
    (tmp_path / "other.onnx").write_bytes(b"somebody's")
    assert not onnx_file.is_exported(tmp_path / "other.onnx")


def test_a_conditional_denoiser_in_onnx(traced: dict[str, Traced], tmp_path: Path) -> None:
    network, program = traced["two"]
    assert export_onnx(network, program, tmp_path / "a.onnx") <= LIMIT
    graph = onnx.load(tmp_path / "a.onnx").graph
    assert [value.name for value in graph.input] == ["x", "sigma", "class_labels"] == network.facts["inputs"]
    assert {node.domain for node in graph.node} == {""}
    assert [value.name for value in graph.output] == ["denoised"]


def test_a_graph_that_computes_something_else_is_not_written(traced: dict[str, Traced], tmp_path: Path) -> None:
    network, program = traced["one-inf"]
    net = build_network(network.net.config)
    randomise(net, 99)
    other = replace(network, net=net, function=type(network.function)(net, 2.0))
    (tmp_path / "a.pt2").write_bytes(b"before")
    with pytest.raises(ExportFailed, match=r"differs from the network by .* at a batch of 1, more than 1e-04"):
        export_program(other, program, tmp_path / "a.pt2")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.pt2", b"before")]


def test_a_folder_for_hugging_face(models: Path, folder: Path, tmp_path: Path) -> None:
    """Our model folder, which the commands read as it is, with a card made of what the run says."""
    names = {"README.md", "config.json", "generate.py", "generator.pt2", "model.safetensors", "samples.png"}
    assert {file.name for file in folder.iterdir()} == names
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (models / "run" / "generator" / name).read_bytes()
    assert torch.equal(next(load_model(folder).parameters()), next(load_model(models / "run/generator").parameters()))
    ipfm("sample", folder, "--n", 6, "--out", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == (folder / "samples.png").read_bytes()
    assert (folder / "generate.py").read_text() == snippet("def generate")

    card = (folder / "README.md").read_text(encoding="utf-8")
    front = card.split("---\n")[1]
    assert "license: other\n" in front and "# Fill in: the weights inherit the licence of their teacher." in front
    for row in (
        "| auxiliary dimensions D | 128 |", "| network evaluations an image | 1 |", "| noise levels σ | 2.5 |",
        "| teacher | edm-digits.pkl |", "| SHA-256 of the teacher's weights | abc123 |", "| optimizer steps | 7 |",
        "![images of seed 0](samples.png)", '"alpha": 1.0', "teacher        -   35            0.1978    2000     274.8",
    ):  # fmt: skip
        assert row in card
    assert "/elsewhere" not in card


def test_a_teachers_folder_is_replaced_until_it_is_edited(
    models: Path, traced: dict[str, Traced], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hub"
    export_folder(*traced["teacher"], out, origin=Origin(), draw=None)
    assert {file.name for file in out.iterdir()} == {"README.md", "config.json", "denoiser.pt2", "model.safetensors"}
    assert obstacle(out) is None
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "network(x, sigma, class_labels)" in card and "generate.py" not in card and "![" not in card
    (out / "README.md").write_text(card.replace("license: other", "license: apache-2.0"), encoding="utf-8")
    assert "its README.md was edited: move it away" in refused(capsys, models / "teacher", out)
    assert "apache-2.0" in (out / "README.md").read_text(encoding="utf-8")


def test_what_is_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each, and nothing written or lost."""
    one = models / "one-inf"
    (tmp_path / "notes.onnx").write_text("mine")
    (tmp_path / "notes.pt2").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    lines = {
        "exists and would be lost, it is no export in the format onnx": (one, tmp_path / "notes.onnx"),
        "exists and would be lost, it is no export in the format torch": (one, tmp_path / "notes.pt2"),
        "exists and would be lost, it holds 'notes.txt'": (one, tmp_path / "full"),
        "it has no README.md of an export": (one, models / "trajectory"),
        "one-inf belongs to the model itself": (one, one),
        "a.pt2 belongs to the model itself": (one, one / "a.pt2"),
        "notes.txt is a file: name another OUT": (one, tmp_path / "full" / "notes.txt"),
        "is no folder that takes files": (one, tmp_path / "full" / "notes.txt" / "a.pt2"),
        "OUT must end in .onnx for the format onnx": (one, tmp_path / "a.pt2", "--format", "onnx"),
        "OUT must end in .onnx, .pt2, .pkl, or be a folder for Hugging Face, whose name has no": (
            one,
            tmp_path / "a.pt",
        ),
        "OUT must be a folder for the format huggingface": (one, tmp_path / "a.pt2", "--format", "huggingface"),
        "samples are for the format huggingface": (one, tmp_path / "a.pt2", "--samples", 3),
        "samples must be at least 0, got -1": (one, tmp_path / "a", "--samples", -1),
        "nowhere does not exist": (tmp_path / "nowhere", tmp_path / "a.pt2"),
        # the two arguments swapped, before and after an export
        "new.onnx does not exist; the model comes first: ipfm export MODEL OUT": (tmp_path / "new.onnx", one),
        f"notes.onnx is an export, and {one} a model, which comes first": (tmp_path / "notes.onnx", one),
    }
    for message, arguments in lines.items():
        assert message in refused(capsys, *arguments)
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 1000)
    assert "an ONNX file holds 2 GiB" in refused(capsys, one, tmp_path / "a.onnx")
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert "needs onnxscript: pip install onnxscript" in refused(capsys, one, tmp_path / "a.onnx")
    assert sorted(tmp_path.rglob("*")) == before
