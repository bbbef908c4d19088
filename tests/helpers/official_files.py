"""Writes networks in the layouts of the EDM family's checkpoints, as its training programs pickle them.

Objects of those programs are `Official` ones: a class name and attributes, pickled as the call that those programs
pickle, under the module names that they use. Tensors, ModuleDicts, sets and NumPy numbers pickle as themselves.
"""

import collections
import contextlib
import math
import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SOURCE = "raise SystemExit('source text of a checkpoint was run')\n" * 8


@dataclass(frozen=True)
class Style:
    """What the version of torch and NumPy that writes a file leaves in it."""

    new_torch: bool = True
    new_numpy: bool = True


NEW, OLD = Style(), Style(new_torch=False, new_numpy=False)
SNAPSHOT_ENTRIES = {"loss_fn", "augment_pipe", "dataset_kwargs"}


class Official:
    """An object of a decorated class."""

    def __init__(self, class_name: str, state: dict[str, Any], source: str = SOURCE) -> None:
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": class_name,
            "state": state,
        }  # fmt: skip


class Call:
    """Pickled as the call of a function, whatever that does."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments


def _foreign(module: str, name: str) -> Any:
    def function(*args: Any) -> None:
        raise AssertionError("only its name is written")

    function.__module__, function.__qualname__, function.__name__ = module, name, name
    return function


class EasyDict(dict):  # type: ignore[type-arg]
    """dnnlib's dictionary."""


EasyDict.__module__ = "dnnlib.util"
_RECONSTRUCT = _foreign("torch_utils.persistence", "_reconstruct_persistent_obj")
_OLD_SCALAR = _foreign("numpy.core.multiarray", "scalar")
_OLD_ARRAY = _foreign("numpy.core.multiarray", "_reconstruct")


@contextlib.contextmanager
def _foreign_modules() -> Iterator[None]:
    """The modules that pickle looks for before it writes their names."""
    contents = {
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _RECONSTRUCT},
        "dnnlib": {},
        "dnnlib.util": {"EasyDict": EasyDict},
        "numpy.core": {},
        "numpy.core.multiarray": {"scalar": _OLD_SCALAR, "_reconstruct": _OLD_ARRAY},
    }
    before = {name: sys.modules.get(name) for name in contents}
    for name, members in contents.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name, module_before in before.items():
            if module_before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module_before


def _pickler(style: Style) -> type[pickle.Pickler]:
    class Pickler(pickle.Pickler):
        def reducer_override(self, thing: Any) -> Any:
            if isinstance(thing, Official):
                return _RECONSTRUCT, (dict(thing.meta),)  # made anew each time, as theirs is
            if isinstance(thing, Call):
                return thing.reduced
            if isinstance(thing, np.float64) and not style.new_numpy:
                return _OLD_SCALAR, (thing.dtype, thing.tobytes())
            if isinstance(thing, np.ndarray) and not style.new_numpy:
                return _OLD_ARRAY, (np.ndarray, (0,), b"b"), thing.__reduce__()[2]
            return NotImplemented

    return Pickler


def write_pickle(path: Path, root: object, style: Style = NEW, *, protocol: int = 4) -> Path:
    """A plain pickle."""
    with _foreign_modules(), path.open("wb") as file:
        _pickler(style)(file, protocol=protocol).dump(root)
    return path


def write_torch(path: Path, root: object, style: Style = NEW, *, older_format: bool = False) -> Path:
    """A file of torch.save: the zip, or the format before it."""
    module = types.SimpleNamespace(Pickler=_pickler(style), dump=pickle.dump, __name__="pickle")
    with _foreign_modules():
        torch.save(root, path, pickle_module=module, _use_new_zipfile_serialization=not older_format)
    return path


# -- networks ---------------------------------------------------------------------------------------------------------

_OLD_HOOKS = ("_backward_hooks", "_is_full_backward_hook", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks")
_OLD_HOOKS += ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_NEW_HOOKS = ("_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook", "_forward_hooks")
_NEW_HOOKS += ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks")
_NEW_HOOKS += ("_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks")
_NEW_HOOKS += ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")

_OPTIONS: dict[str, tuple[str, ...]] = {
    "EDMPrecond": ("sigma_min", "sigma_max", "sigma_data"),
    "VPPrecond": ("beta_d", "beta_min", "M", "epsilon_t"),
    "VEPrecond": ("sigma_min", "sigma_max"),
    "iDDPMPrecond": ("C_1", "C_2", "M"),
}
_ATTRIBUTES = {
    **{name: (*options, "sigma_min", "sigma_max") for name, options in _OPTIONS.items()},
    **{name: _OPTIONS[name] for name in ("EDMPrecond", "VEPrecond")},
    "SongUNet": ("label_dropout",),
    "DhariwalUNet": ("label_dropout",),
    "UNetBlock": ("in_channels", "out_channels", "emb_channels", "num_heads", "dropout", "skip_scale"),
    "Conv2d": ("in_channels", "out_channels", "up", "down", "fused_resample"),
    "Linear": ("in_features", "out_features"),
    "GroupNorm": ("num_groups", "eps"),
    "PositionalEmbedding": ("num_channels", "max_positions", "endpoint"),
    "FourierEmbedding": (),
}
_OPTIONAL = ("map_label", "map_augment", "skip")
_ALWAYS = {
    "SongUNet": ("embedding_type", "encoder_type", "decoder_type", "channel_mult_noise", "resample_filter"),
    "DhariwalUNet": (),
}
_UNET = ("model_channels", "channel_mult", "dropout")
_IF_UNUSUAL = ("num_blocks", "channel_mult_emb", "attn_resolutions", "augment_dim", "label_dropout")


def keywords(config: Any) -> dict[str, Any]:
    """What EDM's training program gives the constructor for `config`."""
    given = {"model_type": config.model_type}
    for name in (*_ALWAYS[config.model_type], *_UNET):
        value = getattr(config, name)
        given[name] = [int(v) for v in value] if isinstance(value, tuple) else value
    given["use_fp16"] = config.use_fp16
    usual = type(config)(img_resolution=32, img_channels=1, precond=config.precond, model_type=config.model_type)
    for name in (*_IF_UNUSUAL, *_OPTIONS[config.precond]):
        value = getattr(config, name)
        if value != getattr(usual, name):
            given[name] = list(value) if isinstance(value, tuple) else value
    return {**given, **{name: getattr(config, name) for name in ("img_resolution", "img_channels", "label_dim")}}


def official(
    net: nn.Module,
    *,
    style: Style = NEW,
    pfgmpp: bool | None = None,
    D: float = 128,
    with_keywords: bool = True,
    source: str = SOURCE,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Official:
    """`net` as the official object: `pfgmpp` and `D` as PFGM++ stores them.

    Attributes of parts are replaced as `changes` says, by path.
    """
    config: Any = net.config
    outer = keywords(config)
    own = {"model_type", "use_fp16", "img_channels", *_OPTIONS[config.precond]}
    inner = {k: v for k, v in outer.items() if k not in own}
    doubled = 2 if config.precond == "iDDPMPrecond" else 1
    inner |= {"in_channels": config.img_channels, "out_channels": doubled * config.img_channels}
    extra: dict[str, Any] = {}
    if pfgmpp is not None:
        extra = {"D": D, "N": config.img_channels * config.img_resolution**2, "pfgmpp": pfgmpp}
        outer |= {"pfgmpp": pfgmpp, "D": D}

    def convert(module: nn.Module, path: str) -> Any:
        name = next(kind.__name__ for kind in type(module).__mro__ if kind.__name__ in {*_ATTRIBUTES, "ModuleDict"})
        state = _bookkeeping(style, training=module.training)
        state["_parameters"].update({k: v for k, v in module._parameters.items() if v is not None})
        state["_buffers"].update(module._buffers)
        for child, part in module._modules.items():
            if part is not None:
                state["_modules"][child] = convert(part, f"{path}.{child}" if path else child)
        if name == "ModuleDict":
            container = nn.ModuleDict()
            vars(container).clear()
            vars(container).update(state | dict((changes or {}).get(path, {})))
            return container
        if path == "":
            state |= {k: getattr(config, k) for k in ("img_resolution", "img_channels", "label_dim", "use_fp16")}
        for attribute in _ATTRIBUTES[name]:
            state[attribute] = _as_stored(attribute, getattr(module if path else config, attribute))
        if name == "UNetBlock":
            state["adaptive_scale"] = module.adaptive_scale
        if name in ("Linear", "Conv2d"):
            state |= {key: None for key, value in module._parameters.items() if value is None}
        state |= {key: None for key in _OPTIONAL if hasattr(module, key) and getattr(module, key) is None}
        arguments = outer if path == "" else inner if path == "model" else {"dropout": config.dropout}
        state |= extra if path == "" else {}
        state |= {"_init_args": (), "_init_kwargs": dict(arguments) if with_keywords else None}
        return Official(name, state | dict((changes or {}).get(path, {})), source)

    return convert(net, "")


def _bookkeeping(style: Style, *, training: bool) -> dict[str, Any]:
    kind: Any = dict if style.new_torch else collections.OrderedDict
    state: dict[str, Any] = {"training": training, "_parameters": kind(), "_buffers": kind()}
    state["_non_persistent_buffers_set"] = set()
    for name in _NEW_HOOKS if style.new_torch else _OLD_HOOKS:
        state[name] = None if name == "_is_full_backward_hook" else collections.OrderedDict()
    return {**state, "_modules": kind()}


def _as_stored(name: str, value: Any) -> Any:
    if name == "skip_scale" and value != 1:
        return np.float64(value)
    return 0 if name == "sigma_min" and value == 0 else value


# -- files ------------------------------------------------------------------------------------------------------------


def edm_snapshot(net: nn.Module, style: Style = NEW, **options: Any) -> dict[str, Any]:
    settings = {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5, "_init_args": (), "_init_kwargs": {}}
    pipe = {"p": 0.12, "xflip": 1e8, "yflip": 1.0, "_init_args": (), "_init_kwargs": {"p": 0.12}}
    return {
        "ema": official(net, style=style, **options),
        "loss_fn": Official("EDMLoss", settings),
        "augment_pipe": Official("AugmentPipe", pipe),
        "dataset_kwargs": {"class_name": "training.dataset.ImageFolderDataset", "path": "data.zip", "cache": True},
    }


def adam_state(net: nn.Module, *, steps: int = 3, seed: int = 0) -> dict[str, Any]:
    """What torch's Adam holds after some steps on random gradients; the network itself is put back."""
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    adam = torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.9, 0.999), eps=1e-8)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        adam.step()
    net.zero_grad()
    net.load_state_dict(before)
    return adam.state_dict()


def edm_state(net: nn.Module, style: Style = NEW, **options: Any) -> dict[str, Any]:
    return {"net": official(net, style=style, **options), "optimizer_state": adam_state(net)}


def pfgmpp_state(net: nn.Module, ema: nn.Module, style: Style = NEW, *, step: int, **options: Any) -> dict[str, Any]:
    return {
        "optimizer_state": adam_state(net),
        "step": step,
        "ema": official(ema, style=style, **options),
        "net": official(net, style=style, **options),
    }


def sid_state(net: nn.Module, names: tuple[str, ...] = ("fake_score", "G", "G_ema"), **options: Any) -> dict[str, Any]:
    """A state of SiD, or with more averages of pfgmpp-idmd; network i is `net` with i added to its weights."""
    networks = {name: official(shifted(net, i), **options) for i, name in enumerate(names)}
    optimizers = {"fake_score_optimizer_state": adam_state(net), "g_optimizer_state": adam_state(net, seed=1)}
    return {**networks, **optimizers}


IDMD = ("fake_score", "G", "G_ema", "G_ema990", "G_ema995", "G_ema999")


def distillation_snapshot(net: nn.Module, **options: Any) -> dict[str, Any]:
    names = ("generator", "student", "ema_0_9900", "ema_0_9990", "ema_0_9950")
    networks = {name: official(shifted(net, i), **options) for i, name in enumerate(names)}
    states = {"generator_optimizer_state": adam_state(net), "student_optimizer_state": adam_state(net)}
    return {**networks, **states, "cur_nimg": 1024}


def shifted(net: nn.Module, amount: float) -> nn.Module:
    """A copy of `net` with `amount` added to every parameter."""
    import copy

    moved = copy.deepcopy(net)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(amount)
    return moved


def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in every parameter, also in those that start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            noise: Tensor = torch.randn(p.shape, generator=generator)
            p.copy_(noise / math.sqrt(max(p[0].numel(), 1)) if p.ndim > 1 else 1 + noise / 4)
    return net.eval()
