"""Our own storage format: round trips, interruption, damage."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ipfm.engine.memory.live import LiveBytes
from ipfm.models import EDMPrecond, NetworkConfig, load_model, read_config, save_model

SMALL = NetworkConfig(
    img_resolution=8,
    img_channels=1,
    model_channels=8,
    channel_mult=(1, 1),
    num_blocks=1,
    embedding_type="fourier",
    dropout=0.1,
    D=128,
)


@pytest.fixture
def net() -> EDMPrecond:
    torch.manual_seed(0)
    return EDMPrecond(SMALL)


@pytest.fixture
def stored(net, tmp_path) -> Path:
    save_model(net, tmp_path / "net", extra={"alpha": 1.0})
    return tmp_path / "net"


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def rewrite_tensors(folder: Path, payload: bytes) -> None:
    """Replaces the tensor file, checksum included: damage that a checksum does not show."""
    (folder / "model.safetensors").write_bytes(payload)
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = hashlib.sha256(payload).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def rewrite_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_round_trip(net, tmp_path, dtype, memory_format):
    net.to(dtype).to(memory_format=memory_format)
    save_model(net, tmp_path / "net")
    back = load_model(tmp_path / "net")
    assert_same(net.state_dict(), back.state_dict())
    assert back.config == SMALL and not back.training
    assert all(p.requires_grad for p in back.parameters())
    assert back.model.map_noise.freqs.dtype == torch.float32
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x, 1.0), back(x, 1.0), rtol=0, atol=1e-5)


def test_config_and_extra_facts(net, tmp_path):
    extra = {"D": math.inf, "sigmas": [80.0, 2.5], "training": {"kimg": 12, "teacher": None, "limits": (-math.inf, 1)}}
    save_model(net, tmp_path / "net", extra=extra)
    config = read_config(tmp_path / "net")
    assert config.network == SMALL and config.class_name == "EDMPrecond" and config.dtype == torch.float32
    assert config.extra == {**extra, "training": {**extra["training"], "limits": [-math.inf, 1]}}

    def refuse(name):
        raise AssertionError(f"{name} is not portable JSON")

    raw = json.loads((tmp_path / "net" / "config.json").read_text(), parse_constant=refuse)
    assert raw["format"] == "ipfm-network" and raw["version"] == 1
    for bad in ({"a": {1: 2}}, {"a": torch.zeros(1)}, {"a": {"b": [object()]}}):
        with pytest.raises(ValueError, match=r"extra\.a"):
            save_model(net, tmp_path / "net", extra=bad)
    assert read_config(tmp_path / "net") == config


def test_other_values_than_the_networks_own(net, tmp_path):
    """An average of the weights is stored without a second network; views of one flat buffer are fine."""
    flat = torch.cat([p.detach().flatten() for p in net.parameters()]) + 1
    sizes = [p.numel() for p in net.parameters()]
    average = dict(net.state_dict())
    for (name, p), part in zip(net.named_parameters(), flat.split(sizes), strict=True):
        average[name] = part.view_as(p)
    save_model(net, tmp_path / "net", state=average)
    assert_same(load_model(tmp_path / "net").state_dict(), average)
    name = "model.map_layer0.weight"
    with pytest.raises(ValueError, match=f"the state to store lacks tensor {name}"):
        save_model(net, tmp_path / "x", state={key: value for key, value in average.items() if key != name})
    with pytest.raises(ValueError, match=rf"{name} has shape \(0,\), expected \(32, 8\)"):
        save_model(net, tmp_path / "x", state={**average, name: torch.zeros(0)})
    assert not (tmp_path / "x").exists()


def test_what_is_no_stored_network(stored, tmp_path):
    readable = "what can be read: a folder with config.json and model.safetensors"
    others = "a run folder, or a published checkpoint"
    other = tmp_path / "teacher.pkl"
    other.write_bytes(b"\x80\x04N.")
    for read in (load_model, read_config):
        with pytest.raises(ValueError, match=rf"teacher.pkl is a file; {readable}"):
            read(other)
        with pytest.raises(ValueError, match=rf"nowhere does not exist; {readable}, {others}"):
            read(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"is no model: it holds the model folder 'net': give that"):
            read(tmp_path)
    (stored / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"net has no model.safetensors"):
        load_model(stored)


def test_saving_replaces_but_never_deletes_other_files(net, stored, tmp_path):
    with torch.no_grad():
        net.model.map_layer0.weight.add_(1)
    save_model(net, stored)
    assert_same(load_model(stored).state_dict(), net.state_dict())
    assert read_config(stored).extra == {}
    assert [entry.name for entry in tmp_path.iterdir()] == ["net"]
    (stored / "samples.png").write_bytes(b"kept")
    with pytest.raises(ValueError, match=r"holds 'samples.png', which storing a network there would delete"):
        save_model(net, stored)
    with pytest.raises(ValueError, match="is a file; a network is stored as a folder"):
        save_model(net, stored / "config.json")
    assert (stored / "samples.png").read_bytes() == b"kept"
    save_model(net, tmp_path / "new" / "deep" / "net")
    (tmp_path / "empty").mkdir()
    save_model(net, tmp_path / "empty")
    assert_same(load_model(tmp_path / "empty").state_dict(), load_model(tmp_path / "new/deep/net").state_dict())


CALLS = 6  # of the operating system: sync two files and their folder, rename twice, sync the folder above


def failing_at(patch: pytest.MonkeyPatch, call: int, fail: Callable[[], None]) -> None:
    """Lets `fail` happen instead of the call-th (from 0) fsync or rename."""
    count = iter(range(1000))

    def guarded(original):
        def wrapped(*args):
            if next(count) == call:
                fail()
            return original(*args)

        return wrapped

    patch.setattr(os, "fsync", guarded(os.fsync))
    patch.setattr(Path, "rename", guarded(Path.rename))


def disk_error() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", range(CALLS))
@pytest.mark.parametrize("how", ["error", "kill"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_interruption_at_every_system_call(net, stored, tmp_path, monkeypatch, call, how):
    """The disk fails, or the process dies, at the n-th fsync or rename: the old network or the new one is whole."""
    old = load_model(stored).state_dict()
    with torch.no_grad():
        net.model.map_layer0.weight.add_(1)
    new = net.state_dict()
    if how == "error":
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            failing_at(patch, call, disk_error)
            save_model(net, stored)
    else:
        child = os.fork()
        if child == 0:
            failing_at(monkeypatch, call, lambda: os._exit(9))
            save_model(net, stored)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert_same(load_model(stored).state_dict(), old if call < CALLS - 1 else new)
    if how == "error":
        leftover = [".net.previous"] if call == CALLS - 1 else []
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [*leftover, "net"]
    # The next save finds its way out of what was left, and leaves nothing behind.
    with torch.no_grad():
        net.model.map_layer0.weight.add_(1)
    save_model(net, stored)
    assert_same(load_model(stored).state_dict(), net.state_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == ["net"]


def test_a_failing_save_does_not_lose_what_a_killed_one_left(net, stored, monkeypatch):
    """Killed between its renames, a writer leaves the old network under another name; the next failure keeps it."""
    stored.rename(stored.with_name(".net.previous"))
    old = load_model(stored).state_dict()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        failing_at(patch, 1, disk_error)
        save_model(net, stored)
    assert_same(load_model(stored).state_dict(), old)


def test_the_number_of_system_calls_is_the_number_tested(net, stored, monkeypatch):
    with monkeypatch.context() as patch:
        failing_at(patch, CALLS, disk_error)
        save_model(net, stored)


def test_a_first_save_that_fails_leaves_nothing(net, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        failing_at(patch, 0, disk_error)
        save_model(net, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_while_the_weights_are_written_is_named_and_harms_nothing(net, stored, monkeypatch):
    def full(*_):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    before = load_model(stored).state_dict()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device") as caught:
        patch.setattr(safetensors.torch, "save_file", full)
        save_model(net, stored)
    assert caught.value.errno == 28 and str(caught.value.filename).endswith("model.safetensors")
    assert_same(load_model(stored).state_dict(), before)


def test_storing_copies_nothing_and_reading_makes_the_network_alone(tmp_path, monkeypatch):
    """Of a network of gigabytes neither the weights nor the file are in memory a second time."""

    def whole(*_):
        raise AssertionError("the file is in memory as a whole")

    monkeypatch.setattr(safetensors.torch, "save", whole)
    monkeypatch.setattr(safetensors.torch, "load", whole)
    large = EDMPrecond(replace(SMALL, model_channels=32))
    size = sum(p.nbytes for p in large.parameters())
    with LiveBytes() as live:
        save_model(large, tmp_path / "net")
        written = live.peak
        read_bytes = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda p: (whole if p.suffix == ".safetensors" else read_bytes)(p))
        back = load_model(tmp_path / "net")
    assert written < 0.01 * size and live.peak < 1.1 * size
    assert_same(large.state_dict(), back.state_dict())


def one_line(folder: Path, file: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder / file) in message
    return message


@pytest.mark.parametrize("with_checksum", [True, False], ids=["checksummed", "unnoticed"])
def test_truncated_tensor_file(stored, with_checksum):
    whole = (stored / "model.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for length in (0, 1, 7, 8, 9, 100, header // 2, 8 + header - 1, 8 + header, 8 + header + 1, len(whole) - 1):
        if with_checksum:
            (stored / "model.safetensors").write_bytes(whole[:length])
            assert "SHA-256" in one_line(stored, "model.safetensors")
        else:
            rewrite_tensors(stored, whole[:length])
            assert "SHA-256" not in one_line(stored, "model.safetensors")
    rewrite_tensors(stored, whole)
    load_model(stored)


def test_flipped_bytes(stored):
    """In the header and in the data: every flip is noticed by the checksum."""
    whole = (stored / "model.safetensors").read_bytes()
    for position in [*range(0, 400, 37), len(whole) // 2, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 0x20
        (stored / "model.safetensors").write_bytes(damaged)
        assert "SHA-256" in one_line(stored, "model.safetensors")


def test_flipped_header_with_a_matching_checksum(stored):
    """Whatever gets past the checksum is still either refused in one line or gives the right names and shapes."""
    whole, expected = (stored / "model.safetensors").read_bytes(), load_model(stored).state_dict()
    refused = 0
    for position in range(0, 1200, 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x11
        rewrite_tensors(stored, bytes(damaged))
        try:
            state = load_model(stored).state_dict()
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and "model.safetensors" in str(error)
        else:
            assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in expected.items()}
    assert refused > 150


def test_tensors_that_do_not_fit_the_config(stored):
    tensors = dict(load_model(stored).state_dict())
    name = "model.map_layer0.weight"

    def with_tensors(**changes: Tensor) -> str:
        merged = {key: value for key, value in {**tensors, **changes}.items() if value is not None}
        rewrite_tensors(stored, safetensors.torch.save(merged))
        return one_line(stored, "model.safetensors")

    assert f"lacks tensor {name}" in with_tensors(**{name: None})
    several = with_tensors(**{name: None, "model.map_layer0.bias": None})
    assert f"lacks tensor {name} and 1 more" in several
    assert "has the unknown tensor extra" in with_tensors(extra=torch.zeros(1))
    assert "has shape (4, 4), expected (32, 8)" in with_tensors(**{name: torch.zeros(4, 4)})
    assert "is torch.float64, expected torch.float32" in with_tensors(**{name: tensors[name].double()})
    filtered = next(key for key in tensors if key.endswith("resample_filter"))
    assert "not the one of the taps" in with_tensors(**{filtered: torch.eye(2)[None, None]})


def test_damaged_config(stored):
    good = (stored / "config.json").read_text()
    for length in range(0, len(good) - 2, 23):
        (stored / "config.json").write_text(good[:length])
        one_line(stored, "config.json")
    for junk in (b"\xff\xfe\x00", b"[]", b"null", b"{}", b"[" * 100_000):
        (stored / "config.json").write_bytes(junk)
        one_line(stored, "config.json")
    cases = [
        ({"format": "other"}, "does not describe a stored network"),
        ({"version": 2}, "is of version 2; what can be read: version 1"),
        ({"class": "UNet"}, "class 'UNet' is unknown; possible: EDMPrecond"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown; possible: float32"),
        ({"sha256": None}, "'sha256' must be a str, got None"),
        ({"network": []}, "'network' must be a dict"),
        ({"network": {**SMALL.to_json(), "heads": 4}}, "unknown key 'heads'"),
        ({"network": {**SMALL.to_json(), "D": -1}}, "D must be a number above 0"),
        ({"extra": 3}, "'extra' must be a dict"),
    ]
    for change, message in cases:
        (stored / "config.json").write_text(good)
        rewrite_config(stored, **change)
        assert message in one_line(stored, "config.json")
    (stored / "config.json").write_text(good)
    load_model(stored)


def test_files_of_two_networks_mixed_up(net, stored, tmp_path):
    with torch.no_grad():
        net.model.map_layer0.weight.add_(1)
    save_model(net, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", stored / "model.safetensors")
    assert "damaged or belongs to another network" in one_line(stored, "model.safetensors")


def test_no_network_of_mixed_or_strange_dtypes(net, tmp_path):
    net.model.map_layer0.bfloat16()
    with pytest.raises(ValueError, match=r"of one dtype to be stored, got torch.bfloat16, torch.float32"):
        save_model(net, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []
