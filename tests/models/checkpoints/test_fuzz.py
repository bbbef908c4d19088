"""Damaged and hostile checkpoints: nothing runs, and every failure is one clean line.

`make fuzz` damages every byte; here a part of them, always the same.
"""

import collections
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import launch
import numpy as np
import official_edm2 as e2
import official_files as of
import prepared
import pytest
from fuzz_checkpoints import SLOWEST, Target, Wrong, check_message, run_cases
from hostile import write_corpus
from hostile_records import edm2_records, records
from parts import parts

from ipfm.models import NetworkConfig, build_network, load_teacher

TESTS = Path(__file__).parents[2]
NAMES = ("edm_ddpmpp_uncond", "edm_ncsnpp_uncond", "edm2_latent_uncond")
FIXTURES = [TESTS / "fixtures" / f"{name}.pkl" for name in NAMES]
SMALL = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)
)


WIDE = e2.Edm2(model_channels=64, channel_mult=(1,), num_blocks=0, attn_resolutions=(), channels_per_head=64)


def report(capsys: pytest.CaptureFixture[str], name: str, count: "collections.Counter[str]") -> None:
    with capsys.disabled():
        listed = ", ".join(f"{number} {what}" for what, number in sorted(count.items()))
        print(f"\n{name}: {count.total()} damaged checkpoints ({listed})")


# The file, and of so many damages that `make thorough` has one. `make fuzz` has every byte of each.
DENSE = [(path, 1) for path in FIXTURES]


@pytest.mark.parametrize(
    ("path", "one_in"), parts([(FIXTURES[0], 3), (FIXTURES[2], 3), *DENSE], DENSE), ids=lambda v: getattr(v, "stem", v)
)
def test_flipped_and_missing_bytes(path, one_in, capsys):
    """Of the bytes around the tensors one in 293, of their elements one in 4999 (999), of the lengths one in 997."""
    inside = Target(path).is_element
    edm2, lengths = path.stem.startswith("edm2"), range(0, len(inside), 997 * one_in)
    around, within = (
        np.flatnonzero(~inside)[:: 293 * one_in],
        np.flatnonzero(inside)[:: (999 if edm2 else 4999) * one_in],
    )
    flips = [*around.tolist(), *within.tolist()]
    count, wrong = run_cases(path, flips, lengths)
    report(capsys, path.name, count)
    assert not wrong
    assert count.total() == len(flips) + len(lengths)
    # Damage to the elements shows in the values only, damage elsewhere is mostly noticed.
    element, refused = (15, 90) if edm2 else (30, 150)
    assert count["flip element"] > element / one_in and count["flip refused"] > refused / one_in
    assert count["flip same"] + count["flip setting"] < count["flip refused"]


def test_flipped_and_missing_bytes_of_a_generator_with_hooks(tmp_path, capsys):
    """Layers that contain themselves, stored in float32."""
    path = of.write_pickle(tmp_path / "g.pkl", e2.generator(hooks="same"))
    size = path.stat().st_size
    count, wrong = run_cases(path, range(0, size, 997), range(0, size, 2503))
    report(capsys, "generator with hooks", count)
    assert not wrong and count["flip refused"] > 20


def test_flipped_and_missing_bytes_of_edm2s_training_state(tmp_path, capsys):
    path = of.write_torch(tmp_path / "a.pt", {"net": e2.state_dict(e2.network(WIDE))}, of.OLD)
    size = path.stat().st_size
    count, wrong = run_cases(path, range(1, size, size // 100), range(0, size, size // 20))
    report(capsys, "EDM2 training state", count)
    # The zip's checksums show damage to the elements.
    assert not wrong and not count["flip element"]


@pytest.mark.parametrize("kind", ["zip", "older"])
def test_flipped_and_missing_bytes_of_a_training_state(kind, tmp_path, capsys):
    net = of.randomize(build_network(SMALL))
    path = of.write_torch(tmp_path / "a.pt", {"net": of.official(net)}, older_format=kind == "older")
    size = path.stat().st_size
    count, wrong = run_cases(path, range(0, size, 1511), range(0, size, 2503))
    report(capsys, f"torch.save {kind}", count)
    assert not wrong
    # The zip's checksums show damage to the elements, too.
    assert (count["flip element"] == 0) == (kind == "zip")


def test_the_fuzzer_notices_what_it_is_for(monkeypatch):
    """With a reader that lets wrong values, other exceptions and unclean messages pass, cases are wrong."""
    target = Target(FIXTURES[1])
    element = int(np.flatnonzero(target.is_element)[0])
    assert target.flip(element) == "element"
    target.is_element[:] = False
    with pytest.raises(Wrong, match="1 elements differ"):
        target.flip(element)
    assert target.flip(0) == "refused"

    def broken(data: object, **options: object) -> None:
        raise KeyError("model")

    monkeypatch.setattr("fuzz_checkpoints.parse_checkpoint", broken)
    with pytest.raises(Wrong, match="KeyError"):
        target.flip(0)
    for message in ("no file named", "damaged.pkl: two\nlines", "damaged.pkl: " + "x" * 500, "damaged.pkl \x1b[2J"):
        with pytest.raises(Wrong, match="not a clean message"):
            check_message(message, "damaged.pkl")


def test_hostile_files(tmp_path, capsys):
    """Nothing of any file is imported, called or written; each is refused in one line, soon and in little memory."""
    net = of.randomize(build_network(SMALL))
    files = write_corpus(tmp_path / "corpus", net, itertools.chain(records(net), edm2_records()))
    (tmp_path / "link.pkl").symlink_to(tmp_path / "nowhere.pkl")
    os.mkfifo(tmp_path / "pipe.pkl")
    files |= {
        "a folder": tmp_path / "corpus",
        "a dangling link": tmp_path / "link.pkl",
        "a pipe": tmp_path / "pipe.pkl",
        "a device": Path("/dev/zero"),
    }
    good = of.write_pickle(tmp_path / "good.pkl", of.edm_snapshot(net))
    (tmp_path / "files.json").write_text(json.dumps([str(path) for path in files.values()]))
    done = subprocess.run(
        [sys.executable, str(TESTS / "workers" / "load_hostile.py"), str(tmp_path / "files.json"), str(good)],
        env={**os.environ, "PYTHONPATH": str(TESTS / "helpers")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    for name, path in files.items():
        found = seen[str(path)]
        assert found["outcome"].startswith("ValueError: "), (name, found)
        check_message(found["outcome"].removeprefix("ValueError: "), path.name)
        assert not found["attempts"], (name, found)
        assert found["seconds"] < SLOWEST, (name, found)
    assert not list(tmp_path.rglob("marker"))
    with capsys.disabled():
        print(f"\n{len(files)} hostile files: all refused, nothing ran")


def test_the_watch_sees_what_runs(tmp_path):
    """The hook that finds nothing in hostile files finds what Python's own unpickler does with them."""
    worker = (TESTS / "workers" / "load_hostile.py").read_text()
    assert worker.count("load_teacher(file)") == 1
    careless = worker.replace("load_teacher(file)", "__import__('pickle').load(open(file, 'rb'))")
    (tmp_path / "careless.py").write_text(f"import sys\nsys.path.insert(0, {str(TESTS / 'helpers')!r})\n{careless}")
    marker = tmp_path / "marker"
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04cos\nsystem\nX" + _sized(f"touch {marker}") + b"\x85R.")
    (tmp_path / "b.pkl").write_bytes(b"\x80\x04cbuiltins\nexec\nX" + _sized("x = 1") + b"\x85R.")
    good = of.write_pickle(tmp_path / "good.pkl", of.edm_snapshot(of.randomize(build_network(SMALL))))
    files = [str(tmp_path / "a.pkl"), str(tmp_path / "b.pkl")]
    (tmp_path / "files.json").write_text(json.dumps(files))
    done = prepared.run(tmp_path / "careless.py", tmp_path / "files.json", good, env=launch.environment())
    seen = json.loads(done.stdout)
    assert marker.exists() and any("os.system" in event for event in seen[files[0]]["attempts"])
    assert any(event.startswith("exec") for event in seen[files[1]]["attempts"])


def _sized(text: str) -> bytes:
    return len(text).to_bytes(4, "little") + text.encode()


def test_source_text_in_a_file_is_not_run(tmp_path):
    """Every object of a real file carries the source text of its class, which the training programs run on loading."""
    net = of.randomize(build_network(SMALL))
    source = f"open({str(tmp_path / 'marker')!r}, 'w')\nraise SystemExit\n"
    path = of.write_pickle(tmp_path / "a.pkl", of.edm_snapshot(net, source=source))
    assert source.splitlines()[0].encode() in path.read_bytes()
    assert load_teacher(path).config == SMALL
    assert not (tmp_path / "marker").exists()
