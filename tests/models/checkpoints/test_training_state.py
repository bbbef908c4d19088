"""Training states: moments by name, progress, the average, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import official_files as of
import pytest
import torch
from torch import nn

from ipfm.models import NetworkConfig, build_network
from ipfm.models.checkpoints.training_state import TrainingState, read_training_state

SMALL = NetworkConfig(
    img_resolution=8,
    img_channels=1,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    embedding_type="fourier",
    augment_dim=9,
    dropout=0.13,
)


@pytest.fixture
def net() -> nn.Module:
    return of.randomize(build_network(SMALL))


def assert_same(got: Any, expected: Any) -> None:
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def assert_moments(state: TrainingState, net: nn.Module, adam: dict[str, Any]) -> None:
    """Adam's moments stand under the names of torch's own numbering of the parameters."""
    for index, (name, p) in enumerate(net.named_parameters()):
        for moments, kind in ((state.exp_avg, "exp_avg"), (state.exp_avg_sq, "exp_avg_sq")):
            assert moments[name].shape == p.shape and torch.equal(moments[name], adam["state"][index][kind])
    assert list(state.exp_avg) == list(state.exp_avg_sq) == [name for name, _ in net.named_parameters()]
    assert (state.adam_steps, state.betas, state.lr, state.eps) == (3, (0.9, 0.999), 2e-4, 1e-8)


@pytest.mark.parametrize("style", [of.NEW, of.OLD], ids=["new", "old"])
@pytest.mark.parametrize("kind", ["zip", "older", "pickle"])
def test_state_of_pfgmpp(net, kind, style, tmp_path):
    average = of.shifted(net, 1)
    root = of.pfgmpp_state(net, average, style, step=97_000_448, pfgmpp=True, D=2048)
    path = tmp_path / "training-state-097000.pt"
    if kind == "pickle":
        of.write_pickle(path, root, style)
    else:
        of.write_torch(path, root, style, older_format=kind == "older")
    state = read_training_state(path)
    assert state.config == replace(SMALL, D=2048) and state.D_source == "file"
    assert_same(state.weights, net.state_dict())
    assert state.ema is not None and state.ema_from == path.name
    assert_same(state.ema, average.state_dict())
    assert_moments(state, net, root["optimizer_state"])
    assert state.images_seen == 97_000_448


def test_state_of_edm_with_the_snapshot_beside_it(net, tmp_path):
    average = of.shifted(net, 1)
    root = of.edm_state(net)
    path = of.write_torch(tmp_path / "training-state-003200.pt", root)
    state = read_training_state(path)
    assert state.ema is None and state.ema_from == "network-snapshot-003200.pkl"
    of.write_pickle(tmp_path / "network-snapshot-003200.pkl", of.edm_snapshot(average))
    of.write_pickle(tmp_path / "network-snapshot-003201.pkl", of.edm_snapshot(of.shifted(net, 2)))
    state = read_training_state(str(path), D=128)
    assert state.config == replace(SMALL, D=128) and state.D_source == "caller"
    assert state.ema is not None and state.ema_from == "network-snapshot-003200.pkl"
    assert_same(state.ema, average.state_dict())
    assert_same(state.weights, net.state_dict())
    assert_moments(state, net, root["optimizer_state"])
    assert state.images_seen == 3_200_000
    renamed = path.rename(tmp_path / "state.pt")
    state = read_training_state(renamed)
    assert (state.images_seen, state.ema, state.ema_from) == (None, None, None)
    # The average of another network is a mistake that must not pass.
    renamed.rename(path)
    other = of.randomize(build_network(replace(SMALL, num_blocks=2)))
    of.write_pickle(tmp_path / "network-snapshot-003200.pkl", of.edm_snapshot(other))
    with pytest.raises(ValueError, match=r"network-snapshot-003200.pkl: ema is not the average of net in .*003200.pt"):
        read_training_state(path)
    (tmp_path / "network-snapshot-003200.pkl").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"network-snapshot-003200.pkl: neither a pickle nor"):
        read_training_state(path)


def test_continuing_equals_not_having_stopped(net, tmp_path):
    """Torch's Adam, filled from the file by name, makes the step that the one that was saved makes."""
    adam = torch.optim.Adam(net.parameters(), lr=2e-4)
    generator = torch.Generator().manual_seed(5)

    def step(optimizer: torch.optim.Optimizer, network: nn.Module, seed: int) -> None:
        generator.manual_seed(seed)
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    for i in range(4):
        step(adam, net, i)
    path = of.write_torch(tmp_path / "a.pt", {"net": of.official(net), "optimizer_state": adam.state_dict()})
    state = read_training_state(path)
    again = build_network(state.config)
    again.load_state_dict(state.weights)
    other = torch.optim.Adam(again.parameters(), lr=state.lr, betas=state.betas, eps=state.eps)
    for name, p in again.named_parameters():
        other.state[p] = {
            "step": torch.tensor(float(state.adam_steps)),
            "exp_avg": state.exp_avg[name],
            "exp_avg_sq": state.exp_avg_sq[name],
        }
    step(adam, net, 9)
    step(other, again, 9)
    assert_same(again.state_dict(), net.state_dict())


def test_before_the_first_step(net, tmp_path):
    """EDM writes a state at once, when Adam has no moments yet."""
    fresh = torch.optim.Adam(net.parameters(), lr=1e-3).state_dict()
    path = of.write_torch(tmp_path / "training-state-000000.pt", {"net": of.official(net), "optimizer_state": fresh})
    state = read_training_state(path)
    assert state.adam_steps == 0 and state.images_seen == 0
    for moments in (state.exp_avg, state.exp_avg_sq):
        assert {name: m.shape for name, m in moments.items()} == {n: p.shape for n, p in net.named_parameters()}
        assert not any(m.any() for m in moments.values())


def test_step_as_a_whole_number(net, tmp_path):
    """Torch before 1.12 kept the number of steps as an int."""
    root = of.edm_state(net)
    for entry in root["optimizer_state"]["state"].values():
        entry["step"] = 3
    path = of.write_torch(tmp_path / "a.pt", root)
    assert read_training_state(path).adam_steps == 3


def test_what_is_no_state_of_a_teacher(net, tmp_path):
    wanted = "what can be continued: training states of EDM, EDM2 and PFGM\\+\\+, which hold net and optimizer_state"
    for layout, root in (
        ("EDM network snapshot", of.edm_snapshot(net)),
        ("training state of SiD", of.sid_state(net)),
        ("EDM training state", {"net": of.official(net)}),
    ):
        path = of.write_pickle(tmp_path / "a.pkl", root)
        with pytest.raises(ValueError, match=rf"a.pkl is no training state of a teacher \({layout}\); {wanted}"):
            read_training_state(path)
    with pytest.raises(ValueError, match=r"none.pt does not exist"):
        read_training_state(tmp_path / "none.pt")


def group(root: dict[str, Any]) -> dict[str, Any]:
    return root["optimizer_state"]["param_groups"][0]


def moments(root: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return root["optimizer_state"]["state"]


def test_parts_that_do_not_fit(net, tmp_path):
    last = len(list(net.parameters())) - 1
    first = next(name for name, _ in net.named_parameters())
    nan = torch.full((8, 9), math.nan)
    cases: list[tuple[Any, str]] = [
        (lambda r: r.update(optimizer_state=[1]), "optimizer_state is not that of Adam"),
        (lambda r: r["optimizer_state"].update(state=None), "optimizer_state is not that of Adam"),
        (lambda r: r["optimizer_state"]["param_groups"].append({}), "has 2 groups of parameters instead of one"),
        (lambda r: r["optimizer_state"].update(param_groups=[1]), "has 1 groups of parameters instead of one"),
        (lambda r: group(r)["params"].pop(), f"not that of the network's {last + 1} parameters"),
        (lambda r: group(r)["params"].reverse(), f"not that of the network's {last + 1} parameters"),
        (lambda r: group(r).update(amsgrad=True), "its optimiser has amsgrad = True; what can be continued: False"),
        (lambda r: group(r).update(weight_decay=0.1), "its optimiser has weight_decay = 0.1"),
        (lambda r: group(r).update(betas=0.9), "betas of its optimiser are 0.9"),
        (lambda r: group(r).update(betas=(0.9, 1.0)), "beta2 of its optimiser is 1.0"),
        (lambda r: group(r).update(lr=math.nan), "lr of its optimiser is nan"),
        (lambda r: group(r).pop("eps"), "eps of its optimiser is None"),
        (lambda r: moments(r).pop(last), f"has moments of {last} of the {last + 1} parameters"),
        (lambda r: moments(r).update({last + 1: moments(r)[0]}), f"has moments of {last + 2} of the"),
        (lambda r: moments(r).update({0: 1}), f"the moments of {first} are 1"),
        (lambda r: moments(r)[0].pop("exp_avg"), f"exp_avg of {first} is not of its shape"),
        (lambda r: moments(r)[0].update(exp_avg_sq=torch.zeros(9, 8)), f"exp_avg_sq of {first} is not of its shape"),
        (lambda r: moments(r)[0].update(exp_avg=nan), f"exp_avg of {first} holds values that are not finite"),
        (
            lambda r: moments(r)[0].update(exp_avg=nan.double()),
            f"exp_avg of {first} is torch.float64; possible: float32",
        ),
        (lambda r: moments(r)[0].update(exp_avg_sq=-torch.ones(8, 9)), f"exp_avg_sq of {first} is negative"),
        (lambda r: moments(r)[0].update(step=torch.tensor(4.0)), "different numbers of steps: 3 to 4"),
        (lambda r: moments(r)[0].update(step=torch.tensor(2.5)), "the number of the optimiser's steps is 2.5"),
        (lambda r: moments(r)[0].update(step=torch.zeros(2)), r"the number of the optimiser's steps has shape \(2,\)"),
        (lambda r: moments(r)[0].update(step="3"), "the number of the optimiser's steps is '3'"),
        (lambda r: r.update(step=-1), "step, the number of images seen, is -1"),
        (lambda r: r.update(step=1.5), "step, the number of images seen, is 1.5"),
    ]
    for change, message in cases:
        root = of.edm_state(net)
        change(root)
        path = of.write_torch(tmp_path / "training-state-000001.pt", root)
        with pytest.raises(ValueError, match=message) as caught:
            read_training_state(path)
        assert str(caught.value).isprintable() and path.name in str(caught.value)


def test_D_is_the_networks(net, tmp_path: Path):
    path = of.write_torch(tmp_path / "a.pt", of.pfgmpp_state(net, net, step=0, pfgmpp=True, D=128))
    assert read_training_state(path, D=128).config.D == 128
    with pytest.raises(ValueError, match=r"a.pt was trained for D = 128, but D = 64 was asked for"):
        read_training_state(path, D=64)
