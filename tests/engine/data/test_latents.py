"""Latents in EDM2's format: what `ipfm dataset --latents` writes, what readers make of it, and what is refused."""

import io
import json
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_vae import FACTOR, tiny_vae

from ipfm.engine.commands.dataset import Dataset
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.data.image_grid import pixels
from ipfm.engine.data.latents import decoded, encode_latents
from ipfm.engine.data.open_dataset import open_dataset
from ipfm.engine.data.zip_writer import encode_png, latent_name, write_dataset_zip
from ipfm.engine.runtime.commandline import BadInput, parse
from ipfm.models.autoencoder import BIAS, SCALE, load_autoencoder

COUNT, SIDE = 6, 4


def some_latents(count: int = COUNT, side: int = SIDE) -> np.ndarray:
    """(N, 8, h, w): mean, and a deviation above 0."""
    random = np.random.default_rng(3)
    return np.concatenate(
        [random.normal(size=(count, 4, side, side)), random.uniform(0.1, 1, (count, 4, side, side))], 1
    ).astype(np.float32)


def zipped(place: Path, stored: np.ndarray, labels: list[int] | None = None) -> Path:
    kept = None if labels is None else torch.tensor(labels)
    write_dataset_zip(place, map(encode_latents, stored), kept, latent_name)
    return place


@pytest.fixture
def latents(tmp_path) -> Path:
    return zipped(tmp_path / "latents.zip", some_latents(), [0, 1, 2, 0, 1, 2])


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_zip_and_a_folder_and_lazily(latents, tmp_path):
    with zipfile.ZipFile(latents) as archive:
        assert archive.namelist()[0] == "00000/img-mean-std-00000000.npy"
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        archive.extractall(tmp_path / "folder")
    index = torch.arange(COUNT)
    found = [
        open_dataset(latents),
        open_dataset(tmp_path / "folder"),
        open_dataset(latents, memory_limit=0),
    ]
    for data in found:
        assert (data.shape, len(data), data.classes, data.latents) == ((4, SIDE, SIDE), COUNT, 3, True)
        assert data.labels.tolist() == [0, 1, 2, 0, 1, 2]
        ours, first = (one.batch(2, index, batch_size=COUNT, seed=5) for one in (data, found[0]))
        assert torch.equal(ours.images, first.images)
        assert torch.equal(ours.labels, first.labels)


def test_a_read_is_a_sample_of_the_posterior(latents):
    data = open_dataset(latents)
    stored = torch.from_numpy(some_latents())
    drawn = torch.cat([data.batch(step, torch.arange(60), batch_size=60, seed=0).images for step in range(50)])
    # Each epoch holds each picture once.
    noise = (drawn - BIAS) / SCALE
    mean, std = stored.chunk(2, 1)
    assert torch.allclose(noise.mean(0), mean.mean(0), atol=0.12)
    spread = (std.square().mean(0) + mean.var(0, unbiased=False)).sqrt()
    assert torch.allclose(noise.std(0), spread, rtol=0.08)


def test_a_sample_is_a_function_of_seed_step_and_position_alone(latents):
    """So it depends neither on ranks nor on micro-batches, and a resumed run reads the same."""
    data = open_dataset(latents)
    whole = data.batch(7, torch.arange(4), batch_size=4, seed=1).images
    parts = [data.batch(7, torch.tensor([i]), batch_size=4, seed=1).images for i in (3, 1, 0, 2)]
    assert torch.equal(whole[[3, 1, 0, 2]], torch.cat(parts))
    # With one picture every read is of the same posterior, and still fresh.
    one = ImageDataset(torch.from_numpy(some_latents(1)), latents=True)
    reads = [one.batch(step, torch.tensor([0]), batch_size=2, seed=s).images for step, s in ((0, 0), (1, 0), (0, 1))]
    other = one.batch(0, torch.tensor([1]), batch_size=2, seed=0).images
    assert all(not torch.equal(reads[0], read) for read in (*reads[1:], other))


def test_take_reads_the_same_sample_of_a_picture_at_every_time(latents):
    data = open_dataset(latents)
    assert torch.equal(data.take(2, 3), torch.cat([data.take(i, 1) for i in (2, 3, 4)]))
    assert not torch.equal(data.take(0, 1), (torch.from_numpy(some_latents()[:1, :4]) * SCALE + BIAS))


def test_samples_themselves_are_taken_as_they_are():
    final = torch.randn(3, 4, 2, 2)
    assert torch.equal(ImageDataset(final, latents=True).take(0, 3), final)


def test_half_precision_and_arrays_by_columns(tmp_path):
    stored = some_latents(2)
    places = []
    for index, array in enumerate((stored[0].astype(np.float16), np.asfortranarray(stored[1]))):
        buffer = io.BytesIO()
        np.save(buffer, array)
        places.append((latent_name(index), buffer.getvalue()))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, content in places:
            archive.writestr(name, content)
    images = open_dataset(tmp_path / "x.zip").images
    assert np.array_equal(images[0], stored[0].astype(np.float16).astype(np.float32))
    assert np.array_equal(images[1], stored[1])


# -- what is refused ---------------------------------------------------------------------------------------------------


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_headers_are_parsed_one_at_a_time(tmp_path, monkeypatch):
    """Python 3.11's parser does not bear several threads."""
    read, inside, most = np.lib.format.read_array_header_1_0, [], []

    def slow(file):
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.005)
        inside.pop()
        return read(file)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", slow)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number in range(12):
            archive.writestr(latent_name(number), npy(some_latents()[0]))
    assert len(open_dataset(tmp_path / "x.zip")) == 12
    assert len(most) >= 12 and set(most) == {1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            npy(some_latents()[0, :4]),
            r"is an array \(4, 4, 4\) of float32; latents are \(8, h, w\) float32.*; 4 channels are a mean alone, or",
        ),
        (npy(some_latents()[0].astype(np.float64)), r"is an array \(8, 4, 4\) of float64"),
        (npy(np.array([{}])), r"is an array \(1,\) of object"),
        (npy(some_latents()[0][:, :, :2]), "holds latents 4x2, but they must be square"),
        (npy(some_latents()[0])[:-4], "is shorter than its header says"),
        (npy(some_latents()[0]) + b"0", "is longer than its header says"),
        (npy(some_latents()[0] * np.float32("nan")), "holds numbers that are not finite, or negative deviations"),
        (npy(some_latents()[0][::-1]), "negative deviations"),
        (b"\x93NUMPY\x01\x00", "is no array of NumPy that can be read"),
        (b"text", "is no array of NumPy that can be read"),
        (npy(some_latents(1, 2)[0]), "holds latents 8x2x2, the data set's first 8x4x4"),
    ],
    ids=["samples", "doubles", "objects", "oblong", "short", "long", "NaN", "swapped", "cut", "text", "smaller"],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, content, words):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(latent_name(0), npy(some_latents()[0]))
        archive.writestr(latent_name(1), content)
    with pytest.raises(ValueError, match=words) as error:
        open_dataset(tmp_path / "x.zip")
    assert latent_name(1) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_file_can_be_left_out(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for index, content in enumerate((b"text", npy(some_latents()[0]))):
            archive.writestr(latent_name(index), content)
    data = open_dataset(tmp_path / "x.zip", skip_unreadable=True)
    assert torch.equal(data.images[0], data.images[1])
    assert "image 1 left out" in capsys.readouterr().err


def test_mirroring_is_refused(latents):
    with pytest.raises(ValueError, match="holds latents, and a mirrored latent is not that of the mirrored picture"):
        open_dataset(latents, xflip=True)


def test_an_npz_is_no_set_of_latents(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"it is an .npz \(mu\)"):
        open_dataset(tmp_path / "x.npz")


def test_arrays_beside_images_are_left_out(tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(encode_png(np.zeros((3, 8, 8), np.uint8)))
    (tmp_path / "latents.npy").write_bytes(npy(some_latents()[0]))
    assert not open_dataset(tmp_path).latents
    assert "files .npy: 1 (latents.npy)" in capsys.readouterr().err


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return tiny_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture
def pictures(tmp_path) -> Path:
    random = np.random.default_rng(1)
    for index in range(10):
        place = tmp_path / "pictures" / "ab"[index % 2] / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encode_png(random.integers(0, 256, (1 if index == 3 else 3, 8, 8), dtype=np.uint8)))
    return tmp_path / "pictures"


def dataset(*argv: object) -> None:
    parse(Dataset, [str(word) for word in argv], prog="ipfm dataset", description="").run()


def test_the_command_writes_what_the_autoencoder_makes(pictures, vae, tmp_path, capsys):
    out = tmp_path / "latents.zip"
    dataset(pictures, out, "--latents", vae, "--json")
    said = json.loads(capsys.readouterr().out)
    assert (said["latents"], said["latent_shape"], said["resolution"]) == (str(vae), [4, 4, 4], 8)
    plain = tmp_path / "plain.zip"
    dataset(pictures, plain, "--channels", 3)
    images, data = open_dataset(plain), open_dataset(out)
    assert torch.equal(data.images, load_autoencoder(vae).encode(images.images))
    assert data.labels.tolist() == images.labels.tolist()
    first = out.read_bytes()
    dataset(pictures, out, "--latents", vae, "--overwrite")
    assert out.read_bytes() == first
    assert f"10 images 8x8, RGB, as latents 4x4x4: {out}" in capsys.readouterr().out


def test_the_command_refuses_before_it_writes(pictures, vae, tmp_path, latents):
    out = tmp_path / "out.zip"
    for argv, words in (
        ((pictures, out, "--latents", vae, "--resolution", 7), "must be a multiple of 2: give --resolution"),
        ((pictures, out, "--latents", vae, "--channels", 1), "latents are of RGB images"),
        ((pictures, out, "--latents", tmp_path / "none"), "does not exist: a VAE is the folder of an AutoencoderKL"),
        ((latents, out), "holds latents already, which are read as they are"),
    ):
        with pytest.raises(BadInput, match=words):
            dataset(*argv)
        assert not out.exists()


def test_decoded_pictures_of_a_set(latents, vae):
    data = open_dataset(latents)
    shown = decoded(data, load_autoencoder(vae))
    assert shown.shape == (3, SIDE * FACTOR, SIDE * FACTOR)
    assert (len(shown), shown.labels.tolist()) == (COUNT, data.labels.tolist())
    assert torch.equal(pixels(shown.take(1, 2)), pixels(load_autoencoder(vae).decode(data.take(1, 2))))


# -- training on them --------------------------------------------------------------------------------------------------


def test_a_teacher_is_trained_on_latents_without_augmentation(tmp_path, capsys):
    from ipfm.recipes.train_teacher import main

    latents = zipped(tmp_path / "latents.zip", some_latents(side=64))
    argv = ["--data", str(latents), "--out", str(tmp_path / "run")]
    main([*argv, "--scale", "full", "--dry-run"])
    said = capsys.readouterr().out
    with pytest.raises(BadInput, match=r"augment was given, but .* holds latents, which cannot be turned"):
        main([*argv, "--augment", "0.1"])
    with pytest.raises(BadInput, match="a mirrored latent is not that of the mirrored picture"):
        main([*argv, "--xflip"])
    assert "4x64x64" in said
    assert "augment 0," in said
    assert "none, as the images are latents" in said
