"""Export to a folder as model hubs take it: our model folder with a model card, samples and the plain program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.export import ExportedProgram

from ipfm.engine.commands.export.model_card import Origin, is_untouched, model_card
from ipfm.engine.commands.export.network import ExportedNetwork
from ipfm.engine.commands.export.program import save_program
from ipfm.engine.data.image_grid import save_grid
from ipfm.models import save_model
from ipfm.models.atomic_files import atomic_folder, sync, write_durably
from ipfm.models.store import CONFIG_FILE, TENSOR_FILE

CARD, GRID, LOADER = "README.md", "samples.png", "generate.py"
PROGRAMS = {True: "generator.pt2", False: "denoiser.pt2"}
FILES = frozenset({CONFIG_FILE, TENSOR_FILE, CARD, GRID, LOADER, *PROGRAMS.values()})


def export_folder(
    network: ExportedNetwork, program: ExportedProgram, path: Path, *, origin: Origin, draw: Callable[[], Tensor] | None
) -> float:
    """Write the folder `path`, replaced whole or not at all. `load_model` and `ipfm sample` read it as it is.

    Args:
        network: what is exported.
        program: made of it, in plain PyTorch.
        path: the folder.
        origin: the run that it comes from, for the model card.
        draw: makes the images (B, 1 or 3, H, W) of the picture; None leaves it out.

    Returns:
        The largest difference between what the plain program computes and the network, see `largest_difference`.

    Raises:
        ExportFailed: the program computes something else; `path` is what it was.
        OSError: the disk refuses.
    """
    generates = network.is_generator
    card = model_card(
        network,
        origin,
        program=PROGRAMS[generates],
        loader=LOADER if generates else None,
        grid=GRID if draw is not None else None,
    )
    with atomic_folder(path) as folder:
        save_model(network.net, folder, extra=network.about.to_json())
        with (folder / PROGRAMS[generates]).open("wb") as file:
            difference = save_program(network, program, file)
        sync(folder / PROGRAMS[generates])
        if generates:
            write_durably(folder / LOADER, Path(__file__).with_name("plain.py").read_bytes())
        if draw is not None:
            save_grid(draw(), folder / GRID)
        write_durably(folder / CARD, card.encode())
    return difference


def obstacle(path: Path) -> str | None:
    """What in the folder `path` was not left by `export_folder`, or was changed since; None where nothing was."""
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in FILES)
    if foreign:
        return f"it holds {foreign[0]!r}"
    try:
        card = (path / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return f"it has no {CARD} of an export" if any(path.iterdir()) else None
    return None if is_untouched(card) else f"its {CARD} was edited"
