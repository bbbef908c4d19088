"""Checkpoints whose objects are wrong: none may load, and none may cost memory or time by what it claims."""

import collections
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import official_edm2 as edm2
import torch
from official_files import Call, EasyDict, Official, edm_snapshot, official
from torch import nn


def part(root: Official, path: str) -> Any:
    """The attributes of a part of a network."""
    state: Any = root.meta["state"]
    for name in path.split(".") if path else ():
        child = state["_modules"][name]
        state = child.meta["state"] if isinstance(child, Official) else vars(child)
    return state


def rebuilt(tensor: torch.Tensor, offset: Any, size: Any, stride: Any) -> Call:
    """A tensor of the elements of another one, as a pickle describes it."""
    hooks: dict[str, Any] = collections.OrderedDict()
    storage = torch.storage.TypedStorage(
        wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True
    )  # fmt: skip
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, hooks)


KEYWORDS: dict[str, dict[str, Any]] = {
    "resolution of 10^9": {"img_resolution": 10**9},
    "resolution of 2^100": {"img_resolution": 2**100},
    "10^9 blocks": {"num_blocks": 10**9},
    "10^9 channels": {"model_channels": 10**9},
    "10^9 image channels": {"img_channels": 10**9},
    "levels of width 10^9": {"channel_mult": [10**9, 10**9]},
    "10^5 levels": {"channel_mult": [1] * 100_000},
    "10^12 labels": {"label_dim": 10**12},
    "attention at 10^5 sides": {"attn_resolutions": list(range(1, 100_001))},
    "attention elsewhere": {"attn_resolutions": [8]},
    "a filter of 10^5 taps": {"resample_filter": [1] * 100_000},
    "another filter": {"resample_filter": [1, 2]},
    "a filter of four taps": {"resample_filter": [1, 3, 3, 1]},
    "a filter of zeros": {"resample_filter": [1, -1]},
    "text for a number": {"num_blocks": "1"},
    "nothing for a number": {"num_blocks": None},
    "a list for a number": {"model_channels": [8]},
    "a fraction": {"num_blocks": 1.5},
    "a dictionary for a list": {"channel_mult": {"a": 1}},
    "an object for a list": {"channel_mult": Official("list", {})},
    "lists of lists": {"channel_mult": [[1], [1]]},
    "a long text": {"encoder_type": "standard" * 100_000},
    "an unknown text": {"encoder_type": "\x1b[31m\n"},
    "an unknown U-Net": {"model_type": "os.system"},
    "another U-Net": {"model_type": "DhariwalUNet"},
    "no U-Net": {"model_type": None},
    "an unknown argument": {"exec": "import os"},
    "an argument with escapes": {"\x1b[2J\n" * 100: 1},
    "dropout of 2": {"dropout": 2.0},
    "dropout of NaN": {"dropout": math.nan},
    "sigma_data of 0": {"sigma_data": 0.0},
    "another sigma_data": {"sigma_data": 0.25},
    "half precision maybe": {"use_fp16": "yes", "sigma_data": 0.25},
    "negative noise": {"sigma_min": -1.0},
    "D without pfgmpp": {"D": 128},
    "pfgmpp without D": {"pfgmpp": True, "D": -3},
    "pfgmpp of text": {"pfgmpp": "True", "D": 128},
    "another embedding": {"embedding_type": "fourier"},
    "another width of the noise": {"channel_mult_noise": 2},
}

ATTRIBUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "arguments without names": ("", {"_init_args": (8,)}),
    "a list of arguments": ("", {"_init_kwargs": [1]}),
    "arguments with numbers for names": ("", {"_init_kwargs": {1: 2}}),
    "another resolution": ("", {"img_resolution": 16}),
    "sigma_data that differs": ("", {"sigma_data": 0.7}),
    "sigma_max of NaN": ("", {"sigma_max": math.nan}),
    "sigma_data of text": ("", {"sigma_data": "0.5"}),
    "no parts": ("", {"_modules": {}}),
    "parts of text": ("", {"_modules": {"model": "SongUNet"}}),
    "a list of parts": ("", {"_modules": ["model"]}),
    "D of text": ("", {"pfgmpp": True, "D": "128"}),
    "D of 0": ("", {"pfgmpp": True, "D": 0}),
    "D of nothing": ("", {"pfgmpp": True, "D": None}),
    "label dropout": ("model", {"label_dropout": 0.5}),
    "arguments of its U-Net": ("model", {"_init_kwargs": {"in_channels": 4}}),
    "unknown arguments of its U-Net": ("model", {"_init_kwargs": {"eval": 4}}),
    "heads": ("model.dec.4x4_in0", {"num_heads": 2}),
    "no attention": ("model.dec.4x4_in0", {"num_heads": 0}),
    "scale of the skip connection": ("model.enc.8x8_block0", {"skip_scale": np.float64(1)}),
    "scale of a complex number": ("model.enc.8x8_block0", {"skip_scale": np.complex128(1)}),
    "scale of a half": ("model.enc.8x8_block0", {"skip_scale": np.float16(1)}),
    "way of the embedding": ("model.enc.8x8_block0", {"adaptive_scale": True}),
    "groups": ("model.enc.8x8_block0.norm0", {"num_groups": 1}),
    "eps": ("model.enc.8x8_block0.norm0", {"eps": 1e-5}),
    "order of filter and convolution": ("model.enc.4x4_down.conv0", {"fused_resample": True}),
    "direction": ("model.enc.4x4_down.conv0", {"down": False, "up": True}),
    "end of the frequencies": ("model.map_noise", {"endpoint": False}),
    "a list of hidden buffers": ("model", {"_non_persistent_buffers_set": ["u"]}),
    "hidden buffers": ("model.enc.4x4_down.conv0", {"_non_persistent_buffers_set": {"resample_filter"}}),
    "text for a parameter": ("model.map_layer0", {"_parameters": {"weight": "0"}}),
    "no parameters": ("model.map_layer0", {"_parameters": None}),
    "a parameter of another name": ("model.map_layer0", {"_parameters": {"model.map_layer0.weight": torch.zeros(1)}}),
    "a parameter with escapes": ("model.map_layer0", {"_parameters": {"\x1b[2J\n": torch.zeros(1)}}),
}

META: dict[str, dict[str, Any]] = {
    "another type": {"type": "function"},
    "another version": {"version": 7},
    "a version of text": {"version": "6"},
    "a class of the standard library": {"class_name": "os.system"},
    "a class with escapes": {"class_name": "\x1b[2J\n" * 1000},
    "a class of a number": {"class_name": 7},
    "another preconditioner": {"class_name": "VEPrecond"},
    "a loss": {"class_name": "EDMLoss"},
    "state of a list": {"state": [1, 2]},
    "no state": {"state": None},
    "state by numbers": {"state": {1: 2}},
    "one key more": {"code": "import os"},
}


def tensors() -> Iterator[tuple[str, Any]]:
    """Parameters in place of the weight (32, 8) of a layer."""
    good = torch.arange(256.0)
    for name, (offset, size, stride) in {
        "an offset beyond the end": (1, (32, 8), (8, 1)),
        "a negative offset": (-1, (32, 8), (8, 1)),
        "an offset of 2^62": (2**62, (32, 8), (8, 1)),
        "a stride beyond the end": (0, (32, 8), (9, 1)),
        "a negative stride": (255, (32, 8), (-8, -1)),
        "a stride of 2^47": (0, (32, 8), (2**47, 1)),
        "overlap": (0, (32, 8), (1, 1)),
        "one element everywhere": (0, (32, 8), (0, 0)),
        "a shape of 2^94": (0, (2**47, 2**47), (2**47, 1)),
        "a negative size": (0, (-32, -8), (8, 1)),
        "a missing stride": (0, (32, 8), (1,)),
        "9 axes": (0, (1,) * 9, (1,) * 9),
        "a list as shape": (0, [32, 8], [8, 1]),
        "text as offset": ("0", (32, 8), (8, 1)),
        "a truth value as offset": (False, (32, 8), (8, 1)),
        "another shape": (0, (8, 32), (32, 1)),
    }.items():
        yield name, rebuilt(good, offset, size, stride)
    hooks: dict[str, Any] = collections.OrderedDict()
    yield "no storage at all", Call(torch._utils._rebuild_tensor_v2, b"0123", 0, (32, 8), (8, 1), False, hooks)
    yield (
        "a blob of nothing",
        Call(torch._utils._rebuild_tensor_v2, Call(torch.storage._load_from_bytes, b""), 0, (1,), (1,), False, hooks),
    )
    yield (
        "a blob that runs",
        Call(
            torch._utils._rebuild_tensor_v2,
            Call(torch.storage._load_from_bytes, b"cos\nsystem\n(S'true'\ntR."),
            *(0, (1,), (1,), False, hooks),
        ),
    )
    yield "a parameter of a parameter's name", Call(torch._utils._rebuild_parameter, "weight", False, hooks)
    yield "whole numbers", torch.arange(256).reshape(32, 8)
    yield "double precision", torch.zeros(32, 8, dtype=torch.float64)
    yield "complex numbers", torch.zeros(32, 8, dtype=torch.complex64)
    yield "NaN", torch.full((32, 8), math.nan)
    yield "infinity", torch.full((32, 8), -math.inf)
    yield "NumPy's array", np.zeros((32, 8), np.float32)


def records(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Whole checkpoints by what is wrong with them; `net` is an unconditional 8×8 SongUNet with two levels."""

    def snapshot() -> Any:
        return edm_snapshot(net)

    for name, changes in KEYWORDS.items():
        root = snapshot()
        part(root["ema"], "")["_init_kwargs"].update(changes)
        yield f"argument: {name}", root
    for name, (path, changes) in ATTRIBUTES.items():
        root = snapshot()
        part(root["ema"], path).update(changes)
        yield f"attribute: {name}", root
    for name, changes in META.items():
        root = snapshot()
        root["ema"].meta.update(changes)
        yield f"record: {name}", root
    for name, tensor in tensors():
        root = snapshot()
        part(root["ema"], "model.map_layer0")["_parameters"]["weight"] = tensor
        yield f"tensor: {name}", root

    root = snapshot()
    del root["ema"].meta["module_src"]
    yield "a record without a key", root
    root = snapshot()
    part(root["ema"], "model")["_modules"]["map_layer0"] = part(root["ema"], "model")["_modules"]["map_layer1"]
    yield "one part in two places", root
    root = snapshot()
    del part(root["ema"], "model.dec")["_modules"]["8x8_aux_norm"]
    yield "a missing part", root
    root = snapshot()
    entries = part(root["ema"], "model.enc")["_modules"]
    entries["99999x99999_block0"] = entries.pop("8x8_block0")
    yield "a level of 99999", root
    root = snapshot()
    part(root["ema"], "model")["_modules"]["more"] = nn.ModuleDict()
    yield "an additional part", root
    root = snapshot()
    part(root["ema"], "model.dec")["_modules"] = dict(reversed(part(root["ema"], "model.dec")["_modules"].items()))
    yield "parts in another order", root
    tower = nn.ModuleDict()
    for _ in range(40):
        above = nn.ModuleDict()
        above._modules["a"] = tower
        tower = above
    root = snapshot()
    part(root["ema"], "")["_modules"]["model"] = tower
    yield "40 parts inside each other", root
    twins = nn.ModuleDict()
    for _ in range(12):
        above = nn.ModuleDict()
        above._modules.update(a=twins, b=twins)
        twins = above
    root = snapshot()
    part(root["ema"], "model")["_modules"]["dec"] = twins
    yield "2^12 parts", root
    circle = nn.ModuleDict()
    circle._modules["a"] = circle
    root = snapshot()
    part(root["ema"], "model")["_modules"]["enc"] = circle
    yield "a part in itself", root
    yield "a network by itself", official(net)
    yield "a network under a number", {1: official(net)}
    yield "a network of a name with escapes", {"ema\x1b[2J\n": official(net)}
    yield "only other objects", {"loss_fn": Official("EDMLoss", {"P_mean": -1.2})}
    yield "networks of unknown roles", {"a": official(net), "b": official(net)}


def edm2_records() -> Iterator[tuple[str, Any]]:
    """Checkpoints of EDM2's family with something wrong: hooks, circles, arrays, state dicts."""
    for name, array in {
        "objects": np.array([{}, "import os"], dtype=object),
        "records of fields": np.zeros(2, [("a", "f4")]),
        "texts": np.array(["os.system"]),
        "complex numbers": np.zeros(2, np.complex64),
    }.items():
        root = edm2.snapshot(edm2.network())
        root["encoder"].meta["state"]["scale"] = array
        yield f"EDM2: an array of {name}", root
    for name, content in {"fewer bytes": b"1234", "more bytes": bytes(64), "text": "1234" * 4}.items():
        root = edm2.snapshot(edm2.network())
        root["encoder"].meta["state"]["scale"] = _Array(np.dtype("f4"), (4,), content)
        yield f"EDM2: an array of {name}", root
    root = edm2.snapshot(edm2.network())
    root["encoder"].meta["state"]["scale"] = _Array(np.dtype("f4"), (2**40, 2**40), bytes(16))
    yield "EDM2: an array of 2^80 numbers", root
    layer = Official("MPConv", {})
    for name, call in {
        "another attribute": Call(getattr, layer, "__class__"),
        "a method of text": Call(getattr, "os", edm2.HOOK),
        "a method of a method": Call(getattr, Call(getattr, layer, edm2.HOOK), edm2.HOOK),
        "a default": Call(getattr, layer, edm2.HOOK, eval),
    }.items():
        root = edm2.generator()
        part(root["ema"], "unet.out_conv")["_forward_pre_hooks"] = {0: call}
        yield f"EDM2: {name}", root
    root = edm2.generator(hooks="same")
    part(root["ema"], "unet")["_modules"]["out_conv"] = Call(getattr, root["ema"], edm2.HOOK)
    yield "EDM2: a hook in the place of a layer", root
    root = edm2.generator(hooks="same")
    part(root["ema"], "unet.enc")["_modules"]["8x8_conv"] = part(root["ema"], "unet")["_modules"]["out_conv"]
    yield "EDM2: one layer in two places", root
    root = edm2.generator()
    part(root["ema"], "unet.enc")["_modules"]["8x8_block0"] = root["ema"]
    yield "EDM2: a network in itself", root
    for name, changes in {
        "gains of a list": {"unet.out_gain": [1.0]},
        "a weight of text": {"unet.out_gain": "1"},
        "a level of 99999": {"unet.dec.99999x99999_block0.conv_res1.weight": torch.zeros(8, 8, 3, 3)},
        "rows of nothing": {"unet.out_conv.weight": torch.zeros(0, 4, 3, 3)},
        "frequencies of nothing": {"unet.emb_fourier.freqs": torch.zeros(0)},
        "a flat weight": {"unet.dec.4x4_block0.conv_res1.weight": torch.zeros(8)},
        "infinity": {"unet.out_gain": torch.tensor(math.inf)},
    }.items():
        yield f"EDM2: a state dict with {name}", {"net": edm2.state_dict(edm2.network()) | changes}
    averages = {"stds": [0.1] * 1000, "emas": [{}] * 1000}
    yield "EDM2: a thousand averages of nothing", {"ema": averages}
    yield "EDM2: averages of another network", {"ema": {"stds": [0.1], "emas": [{"a": torch.zeros(1)}]}}
    yield "EDM2: an EasyDict in itself", _circle()


class _Array(Call):
    """An array with a state that NumPy would not write."""

    def __init__(self, kind: Any, shape: Any, content: Any) -> None:
        rebuild = np.zeros(1).__reduce__()[0]
        self.reduced = rebuild, (np.ndarray, (0,), b"b"), (1, shape, kind, False, content)


def _circle() -> EasyDict:
    root = EasyDict()
    root["ema"] = root
    return root
