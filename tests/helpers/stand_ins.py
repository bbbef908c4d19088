"""Small files under the names that the pages use: checkpoints, data, run folders. What is documented works on them.

`provide` finds in a text the names below and puts a stand-in in the place of each. A page that names another file fails
in `test_documented_commands.py`, with a message that points here.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import idx_files
import launch
import numpy as np
import official_edm2
import official_files
import tiny_inception
import torch
from PIL import Image
from tiny_vae import tiny_vae

from ipfm.engine.objectives.lpips_weights import shapes
from ipfm.models import EDMPrecond, NetworkConfig, Precond, build_network, presets, save_model

NAME = r"[\w.+-]+"
# What a recipe leaves open is chosen by a simulation of every layout.
LAYOUT: Mapping[str, object] = MappingProxyType({"zero": 0, "backward": "joint", "activation-checkpointing": "off"})
AS_LAID_OUT = [word for name, value in LAYOUT.items() for word in (f"--{name}", str(value))]
KIMG = 512
"""What a training state has seen, in thousands of images, where its name has no number."""


def thin(network: NetworkConfig) -> NetworkConfig:
    """The same architecture with the fewest levels, blocks and channels."""
    return replace(network, model_channels=8, channel_mult=(1, 1), num_blocks=1, attn_resolutions=())


# The presets under their names, thin.
THIN_PRESETS: Mapping[str, NetworkConfig] = MappingProxyType(
    {name: thin(network) for name, network in presets.TABLE.items()}
)


def network(preset: str, D: float = math.inf) -> Precond:
    """A thin network with random weights, whose samples are no plain zeros."""
    net = EDMPrecond(replace(THIN_PRESETS[preset], D=D))
    return official_files.randomize(net)  # type: ignore[return-value]


def preset_of(name: str) -> str:
    """The preset that a published file's name, or a model folder's, speaks of; CIFAR-10's NCSN++ when of none."""
    if "imagenet" in name:
        return "imagenet64-adm"
    family = "ncsnpp" if re.search(r"-ve\b|ncsnpp", name) else "ddpmpp"
    for data, prefix in (("ffhq", "ffhq64"), ("afhqv2", "afhqv2-64")):
        if data in name:
            return f"{prefix}-{family}"
    return "cifar10-ddpmpp" if "-vp" in name else "cifar10-ncsnpp"


def kimg_of(name: str) -> int:
    """Thousands of images that a training state of this name has seen."""
    found = re.search(r"training-state-(\d+)", name)
    return int(found[1]) if found else KIMG


def _training_state(path: Path) -> None:
    D = 128 if "128" in path.stem else 2048
    net = network(preset_of(path.name), D)
    average = official_files.shifted(net, 0.01)
    state = official_files.pfgmpp_state(net, average, step=1000 * kimg_of(path.name), pfgmpp=True, D=D)
    (official_files.write_pickle if path.suffix == ".pkl" else official_files.write_torch)(path, state)


def _distillation_state(path: Path) -> None:
    official_files.write_torch(path, official_files.sid_state(network("cifar10-ddpmpp")))


def _converted(path: Path) -> None:
    D = float(re.findall(r"_D_(\d+)", path.name)[0])
    net = network(preset_of(path.name), D)
    both = {name: official_files.official(net, pfgmpp=True, D=D) for name in ("ema", "net")}
    official_files.write_pickle(path, both)


def _snapshot(path: Path) -> None:
    official_files.write_pickle(path, official_files.edm_snapshot(network(preset_of(path.name))))


def _model(path: Path) -> None:
    save_model(network(preset_of(path.name)), path)


def _statistics(path: Path) -> None:
    np.savez(path, mu=np.zeros(tiny_inception.DIM), sigma=np.eye(tiny_inception.DIM))


def _statistics_of_edm2(path: Path) -> None:
    both = {"mu": np.zeros(tiny_inception.DIM), "sigma": np.eye(tiny_inception.DIM)}
    path.write_bytes(pickle.dumps({"num_images": 50_000, "fid": both}))


def smooth_images(count: int, side: int) -> np.ndarray:
    """(N, H, W, 3) uint8: plain colours that fall off, so that there is something to tell apart from noise."""
    colours = np.random.default_rng(0).integers(0, 256, (count, 1, 1, 3)) * np.linspace(0.5, 1, side)[:, None, None]
    return np.broadcast_to(colours, (count, side, side, 3)).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _zip(path: Path) -> None:
    side = re.search(r"(\d+)x\1", path.name)
    with zipfile.ZipFile(path, "w") as archive:
        for i, pixels in enumerate(smooth_images(24, int(side[1]) if side else 8)):
            archive.writestr(f"00000/img{i:08d}.png", _png(pixels))


def _labelled_zip(path: Path) -> None:
    """The same with ten classes."""
    _zip(path)
    with zipfile.ZipFile(path, "a") as archive:
        names = archive.namelist()
        labels = [[name, i % 10] for i, name in enumerate(names)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


# Eighths of pictures of 64 pixels a side.
LATENT = {"img_resolution": 8, "label_dim": 2}


def _latents(path: Path) -> None:
    """Latents of two classes, as EDM2 stores them."""
    random = np.random.default_rng(0)
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(24):
            name, file = f"00000/img-mean-std-{i:08d}.npy", io.BytesIO()
            mean, std = random.normal(size=(4, 8, 8)), random.uniform(0.1, 1, (4, 8, 8))
            np.save(file, np.concatenate([mean, std]).astype(np.float32))
            archive.writestr(name, file.getvalue())
            labels.append([name, i % 2])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


def _autoencoder(path: Path) -> None:
    """A latent has an eighth of the picture's side, as Stable Diffusion's."""
    tiny_vae(
        path,
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def _teacher_of_latents(path: Path) -> None:
    net = build_network(replace(THIN_PRESETS["edm2-img512-xs"], **LATENT))
    save_model(official_files.randomize(net), path, extra={"task": "teacher"})


def _generator_of_latents(path: Path) -> None:
    net = build_network(replace(THIN_PRESETS["edm2-img512-xs"], **LATENT, logvar_channels=0))
    save_model(official_files.randomize(net), path, extra={"task": "generator", "sigmas": [2.5]})


def _edm2_file(path: Path) -> None:
    """A thin teacher as EDM2 publishes them: of latents of two classes, or of pixels."""
    latent = "img512" in path.name
    arch = official_edm2.Edm2(
        img_resolution=64, img_channels=4 if latent else 3, label_dim=2, channel_mult=(1, 1), attn_resolutions=()
    )
    official_files.write_pickle(path, official_edm2.snapshot(official_edm2.network(arch), latent=latent))


def _photos(path: Path) -> None:
    """JPEGs of odd sizes in two folders."""
    for i, pixels in enumerate(smooth_images(20, 90)):
        place = path / f"{('cats', 'dogs')[i % 2]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[: 60 + i, : 85 - 2 * i]).save(place / f"{i:02d}.jpg")


def _folder(path: Path) -> None:
    """Images in two folders, which are classes where the data set has any."""
    for i, pixels in enumerate(smooth_images(8, 80)):
        place = path / f"n{i % 2:08d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:05d}.png").write_bytes(_png(pixels))


def cifar_archive(path: Path) -> Path:
    """CIFAR-10's archive of 48 smooth images, by its name for Python or binary."""
    binary = "binary" in path.name
    with tarfile.open(path, "w:gz") as archive:
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            pixels = smooth_images(8, 32).transpose(0, 3, 1, 2).reshape(8, 3072)
            labels = list(range(8))
            if binary:
                content = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1).tobytes()
            else:
                batch = {b"data": pixels, b"labels": labels, b"batch_label": b"x", b"filenames": [b"x.png"] * 8}
                # The name that NumPy 1, with which the archive was written, had for its module.
                content = pickle.dumps(batch, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin" if binary else f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def lpips_weights() -> dict[str, torch.Tensor]:
    """Random weights by the names of lpips.LPIPS(net="vgg")."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, generator=generator) / math.prod(shape[1:]) for name, shape in sorted(shapes().items())
    }


def _lpips(path: Path) -> None:
    torch.save(lpips_weights(), path)


def _digits_run(path: Path) -> None:
    from ipfm.recipes import digits_ipfm

    digits_ipfm.main([
        "--teacher-steps", "2", "--max-steps", "2", "--eval-every", "1", "--log-every", "1", "--eval-images", "16",
        "--heun-steps", "2", *AS_LAID_OUT, "--out", str(path),
    ])  # fmt: skip


def _teacher_run(path: Path) -> None:
    """A training on the digits that kept two averages and snapshots of them."""
    from ipfm.recipes import train_teacher

    data = path.parent / "stand-in-8x8.zip"
    data.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(data, "w") as archive:
        for i, pixels in enumerate(smooth_images(8, 8)):
            archive.writestr(f"00000/img{i:08d}.png", _png(pixels[..., 0]))
    train_teacher.main([
        "--data", str(data), "--D", "128", "--model-channels", "4", "--channel-mult", "1", "--num-blocks", "1",
        "--batch", "2", "--max-steps", "24", "--log-every", "24", "--eval-every", "0", "--checkpoint-every", "24",
        "--snapshot-every", "3", "--keep-snapshots", "0", "--ema", "0.05", "0.1", "--zero", "0",
        "--activation-checkpointing", "off", "--micro-batch", "2", "--heun-steps", "2", "--eval-images", "16",
        "--out", str(path),
    ])  # fmt: skip


def _weak_model(path: Path) -> None:
    """A smaller network of the digits at the same D."""
    net = build_network(replace(THIN_PRESETS["digits"], model_channels=4, D=128.0))
    save_model(official_files.randomize(net), path, extra={"task": "teacher"})


def _raw_snapshots(path: Path) -> None:
    """Two widths at eight times, as EDM2 names and stores them."""
    path.mkdir(parents=True)
    net = official_edm2.network()
    for i in range(1, 9):
        for std in (0.05, 0.1):
            snapshot = official_edm2.snapshot(net)
            official_files.write_pickle(path / f"network-snapshot-{i * 2147483 // 8:07d}-{std:.3f}.pkl", snapshot)


def _repeat(path: Path) -> None:
    """The same run once more."""
    first = path.with_name("digits-D128-alpha1-K1")
    if not first.exists():
        _digits_run(first)
    shutil.copytree(first, path)


def _cifar_run(path: Path) -> None:
    from ipfm.recipes import cifar_ipfm

    with_teacher = path.parent / "stand-in-teacher_D_2048.pkl"
    _converted(with_teacher)
    reference, inception = path.parent / "stand-in.npz", tiny_inception.write(path.parent / "stand-in.pt")
    _statistics(reference)
    cifar_ipfm.main([
        "--teacher", str(with_teacher), "--batch", "4", "--max-steps", "2", "--eval-every", "1", "--log-every", "1",
        "--eval-images", "16", "--heun-steps", "2", "--reference", str(reference), "--inception", str(inception),
        *AS_LAID_OUT, "--out", str(path),
    ])  # fmt: skip


def _shards(path: Path) -> None:
    """Tars of two parts, as WebDataset has ImageNet."""
    path.mkdir(parents=True)
    out = io.BytesIO()
    Image.new("RGB", (80, 70), "olive").save(out, "JPEG")
    for part in ("train", "validation"):
        with tarfile.open(path / f"{part}-000000.tar", "w") as archive:
            for name, data in (("0.jpg", out.getvalue()), ("0.cls", b"0"), ("1.jpg", out.getvalue()), ("1.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def _released(path: Path) -> None:
    """What the repository holds itself."""
    kept = launch.ROOT / "release" / path.name
    (shutil.copytree if kept.is_dir() else shutil.copyfile)(kept, path)


# Names in the pages -> what puts a stand-in there. Folders of runs and models are whole once they are named.
MAKERS: Mapping[str, Callable[[Path], object]] = {
    r"runs/digits-D128-alpha1-K1(?=[/\s\"']|$)": _digits_run,
    r"runs/seed\d(?=[/\s\"']|$)": _repeat,
    r"runs/cifar-D2048-alpha1-K1(?=[/\s\"']|$)": _cifar_run,
    r"runs/teacher(?=[/\s\"']|$)": _teacher_run,
    r"runs/weak/model\b": _weak_model,
    rf"release/{NAME}": _released,
    r"\braw-snapshots\b": _raw_snapshots,
    rf"models/(?:cifar10|ffhq|afhqv2|imagenet64){NAME}": _model,
    rf"(?:{NAME}/)*{NAME}_D_\d+\.pkl": _converted,
    rf"(?:{NAME}/)*sid-{NAME}/training-state-{NAME}\.pt": _distillation_state,
    rf"(?:{NAME}/)*training-state-{NAME}\.(?:pt|pkl)": _training_state,
    rf"(?:{NAME}/)*(?:network-snapshot-|edm-){NAME}\.pkl": _snapshot,
    r"\bedm2-img(?:512|64)-\w+-\d+-[\d.]+\.pkl": _edm2_file,
    rf"(?:{NAME}/)*cifar-10-(?:python|binary)\.tar\.gz": cifar_archive,
    r"\bdigits\.zip": _labelled_zip,
    r"\bimagenet-latents\.zip": _latents,
    rf"(?:{NAME}/)*{NAME}\.zip": _zip,
    r"\bimg\d+\.pkl": _statistics_of_edm2,
    r"\bsd-vae-ft-mse\b": _autoencoder,
    r"\bTEACHER\b": _teacher_of_latents,
    r"\bRUN/generator\b": _generator_of_latents,
    rf"(?:{NAME}/)*{NAME}x{NAME}\.npz": _statistics,
    rf"(?:{NAME}/)*inception-2015-12-05\.pt": tiny_inception.write,
    rf"(?:{NAME}/)*(?:lpips-)?vgg\.pth": _lpips,
    r"\bmy-photos\b": _photos,
    r"\bimagenet-1k/data\b": _shards,
    r"\bfashion-mnist\b": idx_files.write_idx,
    r"\b(?:ffhq/images1024x1024|imagenet/train|my-images)\b": _folder,
}


def provide(text: str, place: Path, cache: Path) -> None:
    """Put a stand-in for every name in `text` that is known, and not there yet, into the folder `place`.

    Args:
        text: command line or code.
        place: where it will run.
        cache: folder that keeps what was made, for the next place.
    """
    for pattern, make in MAKERS.items():
        for name in re.findall(pattern, text):
            if (place / name).exists():
                continue
            made = cache / name
            if not made.exists():
                made.parent.mkdir(parents=True, exist_ok=True)
                make(made)
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if made.is_dir() else shutil.copyfile)(made, place / name)
