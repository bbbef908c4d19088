"""A distillation that began elsewhere goes on as a plain loop does from the same weights, moments and steps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import equivalence
import official_files as of
import pytest
import torch

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench import plain_loop
from ipfm.engine.commands.main import Command
from ipfm.engine.distributed.world import World
from ipfm.engine.experiments.options import DistillationOptions, options_for
from ipfm.engine.experiments.starts import described_start, read_start
from ipfm.engine.experiments.step_time import StepTime
from ipfm.engine.objectives.pid import PidConfig
from ipfm.engine.runtime.commandline import BadInput, parse, parse_given
from ipfm.engine.training.resolve import complete
from ipfm.engine.training.start import DistillationStart
from ipfm.models import EDMPrecond, NetworkConfig, Precond, load_model, load_teacher, save_model
from ipfm.recipes import ablation_alpha, digits_ipfm, digits_pid, train_teacher

CPU = torch.device("cpu")
BASE: dict[str, Any] = {**equivalence.BASE, "batch": 8, "max_steps": 1000, "zero": 0}
SMALL = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
    embedding_type="fourier", augment_dim=9, dropout=0.0, D=128.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    save_model(of.randomize(EDMPrecond(SMALL), seed=5), folder, extra={"task": "teacher"})
    return folder


def adam(net: torch.nn.Module, *, steps: int, seed: int, lr: float, eps: float, betas: tuple[float, float]) -> dict:
    """The state of torch's Adam after `steps`; nothing has reached the augmentation labels, as in SiD."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, eps=eps, betas=betas)
    generator = torch.Generator().manual_seed(seed)
    for index, (name, p) in enumerate(net.named_parameters()):
        if "map_augment" not in name:
            optimizer.state[p] = {
                "step": torch.tensor(float(steps)),
                "exp_avg": torch.randn(p.shape, generator=generator),
                "exp_avg_sq": torch.rand(p.shape, generator=generator) * (1 + index % 3),
            }
    return optimizer.state_dict()


def begun(teacher: Precond, *, step: int, adam_steps: int = 300, beta1: float = 0.0, **config: Any) -> plain_loop.Begun:
    """A distillation of `teacher` that has begun."""
    G, S, ema = (of.shifted(teacher, shift) for shift in (0.002, -0.002, 0.004))
    for net in (G, S, ema):
        # No gradient ever reaches it.
        net.get_parameter("model.map_augment.weight").data.copy_(teacher.get_parameter("model.map_augment.weight"))
    settings = {"lr": config["lr"], "eps": config["eps"], "betas": (beta1, 0.999), "steps": adam_steps}
    return plain_loop.Begun(S, G, ema, adam(S, seed=1, **settings), adam(G, seed=2, **settings), step)


def write(begun: plain_loop.Begun, path: Path, **options: Any) -> Path:
    """As SiD's program writes its training state."""
    networks = {"fake_score": begun.student, "G": begun.generator, "G_ema": begun.ema}
    root = {name: of.official(net, **options) for name, net in networks.items()}
    adams = {"fake_score_optimizer_state": begun.student_adam, "g_optimizer_state": begun.generator_adam}
    return of.write_torch(path, root | adams)


def start_of(config: Any, teacher: Precond, path: Path | None = None, **options: Any) -> DistillationStart:
    values = {name: value for name, value in vars(config).items() if name not in ("continue_from",)}
    given: DistillationOptions = options_for(type(config))(**values, continue_from=path, **options)
    found = read_start(given, complete(config, teacher.config, CPU), teacher)
    assert found is not None
    return found


@pytest.mark.parametrize("D", [128.0, math.inf])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_first_steps_are_those_of_the_plain_loop(tmp_path: Path, D: float, beta1: float) -> None:
    """Losses, then weights and average: what the file does not bring would show in the first of them."""
    net = of.randomize(EDMPrecond(replace(SMALL, D=D)), seed=5)
    at_start = begun(net, step=500, beta1=beta1, **BASE)
    layout = {} if math.isinf(D) else {"pfgmpp": True, "D": D}
    path = write(at_start, tmp_path / "training-state-000004.pt", **layout)
    config = DistillConfig(**BASE, generator_beta1=beta1, student_beta1=beta1)
    plain = plain_loop.distill(net, config, 2, at_start)

    start = start_of(config, net, path)
    distiller = Distiller(config, net, start=start, world=World(0, 1, CPU))
    assert distiller.first_step == 500 and start.images_seen == 4000
    for step in (500, 501):
        sums = distiller.iteration(step).sums
        for which in ("student", "generator"):
            expected = getattr(plain, f"{which}_loss")[step - 500]
            # What a generator's loss sums is of both signs, and as large as a student's.
            rounding = 1e-6 * plain.student_loss[step - 500]
            assert float(sums[f"{which}_loss"]) / 8 == pytest.approx(expected, rel=1e-4, abs=rounding)
    found = {
        f"{which}/{kind}/{name}": tensor.detach()
        for which, network in distiller.networks.items()
        for kind in network.state_kinds
        for name, tensor in network.full(kind)
    }
    assert max(equivalence.difference(plain, found)) <= equivalence.LIMIT
    assert distiller.generator.steps_applied == 302
    # None of it is empty: without the moments, the average or the count the result is another.
    for missing in ("adam", "ema", "step"):
        networks = start.networks if missing == "step" else {
            role: replace(network, **{missing: None}) for role, network in start.networks.items()
        }  # fmt: skip
        other = Distiller(config, net, start=replace(start, networks=networks), world=World(0, 1, CPU))
        for step in (0, 1) if missing == "step" else (500, 501):
            other.iteration(step)
        kinds = ("weight", *other.generator.average_kinds)
        found = {f"generator/{k}/{n}": t.detach() for k in kinds for n, t in other.generator.full(k)}
        found |= {f"student/weight/{n}": t.detach() for n, t in other.networks["student"].full("weight")}
        assert max(equivalence.difference(plain, found)) > 50 * equivalence.LIMIT, missing


@pytest.mark.distributed
def test_two_processes_continue_as_the_plain_loop(teacher: Path, tmp_path: Path) -> None:
    """At ZeRO 1 and 3, where each has a part of the moments and of the average, and of the weights too."""
    net = load_teacher(teacher)
    at_start = begun(net, step=500, **BASE)
    path = write(at_start, tmp_path / "training-state-000004.pt", pfgmpp=True, D=128)
    plain = plain_loop.distill(net, DistillConfig(**BASE), 1, at_start)
    cases = [
        {
            "name": f"z{zero}",
            "steps": 1,
            "config": {**BASE, "zero": zero},
            "continue_from": str(path),
            "persistent": 500,
        }
        for zero in (1, 3)
    ]
    equivalence.launch.run_workers(
        "distill_steps.py", 2, {"teacher": str(teacher), "out": str(tmp_path), "cases": cases}
    )
    for case in cases:
        found = equivalence.load_file(tmp_path / f"{case['name']}-2.safetensors")
        assert max(equivalence.difference(plain, found)) <= equivalence.LIMIT, case["name"]
        assert float(found["loss/generator_loss"]) == pytest.approx(plain.generator_loss[0], rel=1e-4)


# -- what may be given -------------------------------------------------------------------------------------------------


def test_layouts_of_the_authors_and_images_seen(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The average of pfgmpp-idmd and of the older project; the name, the file, the optimiser or the user says kimg."""
    net, config = load_teacher(teacher), DistillConfig(**BASE)
    sid = of.sid_state(net, of.IDMD, pfgmpp=True, D=128)
    named = of.write_torch(tmp_path / "training-state-000004.pt", sid)
    start = start_of(config, net, named)
    average = of.shifted(net, 2).state_dict()
    ema = start.networks["generator"].ema
    assert ema is not None and all(torch.equal(ema[name], average[name]) for name in average)
    assert start.networks["generator"].words == (
        "G of training-state-000004.pt, its average G_ema, its optimiser's moments and 3 steps"
    )
    lines = described_start(start, complete(config, net.config, CPU))
    assert lines[0] == "continues training-state-000004.pt: 4,000 images seen, goes on at step 500 of 1,000"
    assert "  student: its optimiser goes on with this run's settings (lr is 0.0002 there, 0.001 here; " in lines[-1]

    parse(Command, ["info", str(named)], prog="ipfm", description="").run()
    assert "4,000 images; --continue-from of recipes goes on with it" in capsys.readouterr().out

    other = named.rename(tmp_path / "state.pt")
    start = start_of(config, net, other)
    assert start.images_seen == 24 and "its name does not say how many images it has seen: 3 steps" in start.notes[0]
    start = start_of(config, net, other, continue_at_kimg=1.0)
    assert start.images_seen == 1000 and not any("its name" in note for note in start.notes)

    # Another one of its averages.
    usual, chosen = (start_of(config, net, other, continue_average=name) for name in (None, "G_ema990"))
    assert chosen.networks["generator"].words.startswith("G of state.pt, its average G_ema990,")
    ours, theirs = (one.networks["generator"].ema for one in (usual, chosen))
    assert ours and theirs and any(not torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for name, said in (("G", "G is no average of G"), ("G_ema9", "has no network 'G_ema9'; possible: ")):
        with pytest.raises(ValueError, match=said):
            start_of(config, net, other, continue_average=name)
    with pytest.raises(ValueError, match=r"continue-average chooses among the averages in a file, and .* is a folder"):
        start_of(config, net, tmp_path, continue_average="G_ema990")
    with pytest.raises(ValueError, match="continue-average was given without continue-from"):
        start_of(config, net, continue_average="G_ema990")

    # What was left out to save room starts fresh, or from the weights.
    for name in ("G_ema", "G_ema990", "G_ema995", "G_ema999", "g_optimizer_state", "fake_score_optimizer_state"):
        del sid[name]
    bare = start_of(config, net, of.write_torch(tmp_path / "training-state-000002.pt", sid))
    assert bare.images_seen == 2000 and "has no average of it" in bare.notes[0]
    assert [n.words for n in bare.networks.values()] == [
        f"{key} of training-state-000002.pt, a fresh optimiser" for key in ("G", "fake_score")
    ]

    older = of.write_pickle(tmp_path / "network-snapshot-000001.pkl", of.distillation_snapshot(net))
    start = start_of(config, net, older)
    # The counter in the file, and its slowest average.
    assert start.images_seen == 1024 and "its average ema_0_9990" in start.networks["generator"].words


def test_a_generator_alone_and_a_student(teacher: Path, tmp_path: Path) -> None:
    net, config = load_teacher(teacher), DistillConfig(**BASE)
    snapshot = of.write_pickle(
        tmp_path / "network-snapshot-1.200000-000100.pkl", {"ema": of.official(of.shifted(net, 1))}
    )
    state = of.write_torch(tmp_path / "training-state-000004.pt", of.sid_state(of.shifted(net, 5)))
    start = start_of(config, net, snapshot)
    assert described_start(start, config) == (
        "starts from network-snapshot-1.200000-000100.pkl, at step 0 (--continue-at-kimg sets it)",
        "  generator: ema of network-snapshot-1.200000-000100.pkl, which is its average too, a fresh optimiser",
        "  student: starts from the teacher, with a fresh optimiser",
    )
    assert start_of(config, net, snapshot, continue_at_kimg=4).first_step(8) == 500
    both = start_of(config, net, snapshot, student_from=state)
    distiller = Distiller(config, net, start=both, world=World(0, 1, CPU))
    for role, shift in (("generator", 1), ("student", 5)):
        expected = dict(of.shifted(net, shift).named_parameters())
        assert all(torch.equal(p, expected[name]) for name, p in distiller.networks[role].full("weight")), role
        assert distiller.networks[role].steps_applied == 0
    # A student alone; a model folder.
    save_model(of.shifted(net, 3), tmp_path / "mine")
    start = start_of(config, net, student_from=tmp_path / "mine")
    assert list(start.networks) == ["student"] and "generator: starts from the teacher" in start.notes[0]


def test_a_generator_of_half_the_width(teacher: Path, tmp_path: Path) -> None:
    net = load_teacher(teacher)
    half = of.randomize(EDMPrecond(replace(SMALL, model_channels=4)))
    save_model(half, tmp_path / "half")
    with pytest.raises(
        ValueError,
        match=r"half is another network than the generator .*\(model_channels is 4 there, 8 here\): --width says",
    ):
        start_of(DistillConfig(**BASE), net, tmp_path / "half")
    start = start_of(DistillConfig(**BASE, width=0.5), net, tmp_path / "half")
    distiller = Distiller(DistillConfig(**BASE, width=0.5), net, start=start, world=World(0, 1, CPU))
    distiller.refresh()
    # Its Fourier frequencies are its own, and no new random ones.
    assert all(torch.equal(t, distiller.average.state_dict()[name]) for name, t in half.state_dict().items())


def test_a_generator_of_pid(teacher: Path, tmp_path: Path) -> None:
    net, config = load_teacher(teacher), PidConfig(**{k: v for k, v in BASE.items() if k != "alpha"})
    ends = {"parametrisation": "trajectory", "sigma_max": 80.0, "sigma_min": 0.002}
    save_model(of.shifted(net, 1), tmp_path / "pid", extra={"task": "generator", **ends})
    save_model(of.shifted(net, 1), tmp_path / "sid", extra={"task": "generator", "sigmas": [1.5]})
    start = start_of(config, net, tmp_path / "pid")
    assert Distiller(config, net, start=start, world=World(0, 1, CPU)).generator.steps_applied == 0
    with pytest.raises(ValueError, match="sid is a generator by evaluations at noise levels, which physics informed"):
        start_of(config, net, tmp_path / "sid")
    with pytest.raises(ValueError, match="student-from was given, but physics informed distillation has no student"):
        start_of(config, net, tmp_path / "pid", student_from=tmp_path / "sid")
    state = of.write_torch(tmp_path / "training-state-000004.pt", of.sid_state(net))
    with pytest.raises(
        ValueError, match=r"with a student, and physics informed .* has none: a recipe of inverse Poisson"
    ):
        start_of(config, net, state)
    with pytest.raises(
        ValueError, match="pid is a generator by a trajectory, which inverse Poisson flow matching does"
    ):
        start_of(DistillConfig(**BASE), net, tmp_path / "pid")
    start = start_of(DistillConfig(**BASE), net, tmp_path / "sid")
    assert start.notes[0] == "it was distilled at the noise levels 1.5, this run has 2.5"
    # The same in the form of EDM's files, which say it too.
    words = ["export", str(tmp_path / "sid"), str(tmp_path / "sid.pkl"), "--format", "edm"]
    parse(Command, words, prog="ipfm", description="").run()
    start = start_of(DistillConfig(**BASE), net, tmp_path / "sid.pkl")
    assert start.notes[0] == "it was distilled at the noise levels 1.5, this run has 2.5"
    with pytest.raises(ValueError, match=r"sid\.pkl is a generator by evaluations at noise levels, which physics"):
        start_of(config, net, tmp_path / "sid.pkl")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda net: of.edm_state(net), "is a teacher's (EDM training state) and no generator"),
        (lambda net: of.edm_snapshot(net), "is a teacher's (EDM network snapshot) and no generator"),
        (lambda net: of.sid_state(net, pfgmpp=True, D=64), "was trained for D = 64, but D = 128 was asked for"),
        (
            lambda net: of.sid_state(EDMPrecond(replace(SMALL, num_blocks=2))),
            "is another network than the generator of this run (num_blocks is 2 there, 1 here)",
        ),
        (
            lambda net: of.sid_state(net) | {"g_optimizer_state": {"state": 1}},
            "training-state-000001.pt: g_optimizer_state is not that of Adam",
        ),
        (
            lambda net: of.sid_state(net) | {"G_ema": of.official(EDMPrecond(replace(SMALL, num_blocks=2)))},
            "G_ema is not the average of G: they differ",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_continued(teacher: Path, tmp_path: Path, made, message: str) -> None:
    net = load_teacher(teacher)
    path = of.write_torch(tmp_path / "training-state-000001.pt", made(net))
    with pytest.raises(ValueError) as caught:
        start_of(DistillConfig(**BASE), net, path)
    assert message in str(caught.value) and "training-state-000001.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_moments_that_are_missing_are_damage_but_for_the_augmentation_labels(teacher: Path, tmp_path: Path) -> None:
    net = load_teacher(teacher)
    root = of.sid_state(net)
    del root["g_optimizer_state"]["state"][3]
    path = of.write_torch(tmp_path / "training-state-000001.pt", root)
    with pytest.raises(ValueError, match=r"g_optimizer_state has moments of \d+ of the"):
        start_of(DistillConfig(**BASE), net, path)


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def state(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    net = load_teacher(teacher)
    return write(begun(net, step=4, **BASE), tmp_path / "training-state-000001.pt", pfgmpp=True, D=128)


def arguments(teacher: Path, *more: object) -> list[str]:
    small = ("--teacher", teacher, "--batch", 250, "--heun-steps", 1, "--eval-images", 16)
    return [*map(str, (*small, "--log-every", 1, *more))]


def test_a_run_goes_on_from_a_state_and_is_resumed(
    teacher: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*more: object) -> str:
        digits_ipfm.main(arguments(teacher, "--out", "run", *more))
        return capsys.readouterr().out

    said = run("--continue-from", state, "--max-steps", 5)
    assert "continues training-state-000001.pt: 1,000 images seen, goes on at step 4 of 5" in said
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert steps == [4] and load_model(Path("run/generator")).facts.optimizer_steps == 5
    record = json.loads(Path("run/config.json").read_text())
    assert {"source": "training-state-000001.pt", "images_seen": 1000}.items() <= record["start"].items()
    # The same command, longer; then without the option, and the folder of a fresh run with it.
    run("--continue-from", state, "--max-steps", 6)
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 5]
    with pytest.raises(BadInput, match=r"run belongs to another configuration \(continues is .* there, nothing here\)"):
        run("--max-steps", 6)
    # The file is not needed any more, but to begin anew.
    state.rename(state.with_suffix(".moved"))
    said = run("--continue-from", state, "--max-steps", 7)
    assert "is gone: the run goes on from its checkpoint" in said
    assert load_model(Path("run/generator")).facts.optimizer_steps == 7
    with pytest.raises(BadInput, match=r"training-state-000001\.pt does not exist"):
        run("--continue-from", state, "--max-steps", 7, "--from-step", 0)

    # A run of our own goes on in another folder, with other settings.
    words = arguments(teacher, "--continue-from", "run", "--max-steps", 8, "--alpha", 1.2, "--out", "more")
    given = parse_given(words, default=digits_ipfm.RECIPE.defaults, prog="x", description="")
    plan = digits_ipfm.RECIPE.plan(given)
    lines = described_start(plan.start, plan.config)
    assert lines[0] == "continues run/step-0000007: 1,750 images seen, goes on at step 7 of 8"
    assert "  generator: generator of run/step-0000007, its average, its optimiser's moments and 303 steps" in lines


@pytest.mark.parametrize("kind", [DistillConfig, PidConfig])
def test_a_run_of_ours_continues_as_if_it_had_not_stopped(teacher: Path, tmp_path: Path, kind: Any) -> None:
    """With the same settings; Rectified Adam counts its steps, too."""
    net, world = load_teacher(teacher), World(0, 1, CPU)
    settings = {**BASE, "heun_steps": 1, "ema_kimg": 1.0, "ema_rampup": 1.0}
    config = kind(**{name: value for name, value in settings.items() if name != "alpha" or kind is DistillConfig})
    whole, first = (Distiller(config, net, world=world) for _ in range(2))
    for step in range(3):
        whole.iteration(step)
    Distiller(replace(config, max_steps=2), net, world=world).run(tmp_path / "first")
    on = Distiller(config, net, start=start_of(config, net, tmp_path / "first"), world=world)
    assert on.first_step == 2
    on.iteration(2)
    for name, network in whole.networks.items():
        for state in network.state_kinds:
            here = dict(on.networks[name].full(state))
            assert all(torch.equal(here[key], there) for key, there in network.full(state)), (name, state)
        assert on.networks[name].steps_applied == network.steps_applied == 3
    assert any(not torch.equal(a, b) for (_, a), (_, b) in zip(
        first.generator.full("weight"), whole.generator.full("weight"), strict=True))  # fmt: skip


def test_a_run_of_ours_goes_on_with_its_own_frequencies(teacher: Path, tmp_path: Path) -> None:
    """They lie in its checkpoints: no other network's, and no new random ones."""
    net, half = load_teacher(teacher), of.randomize(EDMPrecond(replace(SMALL, model_channels=4)))
    save_model(half, tmp_path / "half")
    config = DistillConfig(**{**BASE, "max_steps": 1, "width": 0.5, "heun_steps": 1})
    start, world = start_of(config, net, tmp_path / "half"), World(0, 1, CPU)
    first = Distiller(config, net, start=start, world=world)
    first.run(tmp_path / "first")
    again = DistillConfig(**{**BASE, "max_steps": 2, "width": 0.5, "alpha": 0.5})
    second = Distiller(again, net, start=start_of(again, net, tmp_path / "first"), world=world)
    assert second.first_step == 1
    for name, network in first.networks.items():
        for kind in network.state_kinds:
            there, here = dict(network.full(kind)), dict(second.networks[name].full(kind))
            assert all(torch.equal(here[key], there[key]) for key in there), (name, kind)
        there, here = network.exact_buffers, second.networks[name].exact_buffers
        assert any("freqs" in key for key in there) and all(torch.equal(here[key], there[key]) for key in there)
    assert torch.equal(
        second.generator.exact_buffers["model.map_noise.freqs"], half.get_buffer("model.map_noise.freqs")
    )
    # Another width, and its student alone.
    with pytest.raises(
        ValueError, match=r"generator of first/step-0000001 is another network .*\(model_channels is 4 there, 8 here\)"
    ):
        start_of(DistillConfig(**BASE), net, tmp_path / "first" / "checkpoints" / "step-0000001")
    student = start_of(DistillConfig(**BASE), net, student_from=tmp_path / "first").networks
    assert list(student) == ["student"] and student["student"].adam is None


def test_a_dry_run_expects_the_steps_that_are_left(
    teacher: Path, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.step_time", lambda *_: StepTime(1.0))
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.layout_table", lambda *_, **__: "layouts")
    digits_ipfm.main(arguments(teacher, "--continue-from", state, "--max-steps", 9, "--dry-run"))
    assert "expected duration on this CPU: 5 s for 5 steps (1" in capsys.readouterr().out
    net = load_teacher(teacher)
    theirs = of.pfgmpp_state(net, net, step=1000, pfgmpp=True, D=128)
    own = of.write_torch(tmp_path / "training-state-000002.pt", theirs)
    train_teacher.main(["--continue-from", str(own), "--batch", "250", "--max-steps", "9", "--dry-run"])
    assert "expected duration on this CPU: 5 s for 5 steps (1" in capsys.readouterr().out


def test_bad_command_lines_are_one_line(teacher: Path, state: Path) -> None:
    def refused(*more: object, main: Any = digits_ipfm.main) -> str:
        with pytest.raises(BadInput) as caught:
            main(arguments(teacher, "--out", "run", *more))
        assert "\n" not in str(caught.value) and not Path("run").exists()
        return str(caught.value)

    assert refused("--continue-from", "no.pt").startswith("no.pt does not exist in ")
    ends = refused("--continue-from", state, "--max-steps", 3)
    assert "has seen 1 kimg, 4 steps of 250 images, and the run is to end at step 3" in ends
    assert ends.endswith("or --continue-at-kimg 0 to count from here")
    assert "--continue-at-kimg was given without continue-from" in refused("--continue-at-kimg", 3)
    assert "--continue-at-kimg must be" in refused("--continue-from", state, "--continue-at-kimg", -3)
    assert "--init was given, but continue-from says" in refused("--continue-from", state, "--init", "random")
    assert "leave student-from out" in refused("--continue-from", state, "--student-from", state)
    assert "is a teacher and no generator" in refused("--continue-from", teacher)
    assert "holds 1 training state: give one, such as " in refused("--continue-from", state.parent)
    assert "--resume takes no value: --resume or --no-resume; --continue-from takes a file" in refused(
        "--resume", state
    )
    assert "recipes that train a teacher have it" in refused("--transfer", state)
    assert "model is a generator and no student" not in refused("--student-from", "nowhere")
    assert "with a student" in refused("--continue-from", state, main=digits_pid.main)
    said = refused("--continue-from", state, main=ablation_alpha.main)
    assert "but an ablation says itself what its runs begin with" in said
    with pytest.raises(BadInput, match="continue-from was given: give the teacher that it was distilled from too"):
        digits_ipfm.main(["--continue-from", str(state), "--dry-run"])
