"""`ipfm completion`: a script by which a shell completes `ipfm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ipfm.engine.overview import Shell


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Print the script by which bash, zsh or fish completes commands, options and files.

    Example: ipfm completion bash > ~/.ipfm-completion.bash

    Once that is done, a line in the file that the shell reads at its start:

        bash  ~/.bashrc: source ~/.ipfm-completion.bash
        zsh   ~/.zshrc: fpath=(~/.zfunc $fpath); autoload -Uz compinit; compinit
              where the script is ~/.zfunc/_ipfm
        fish  none, where the script is ~/.config/fish/completions/ipfm.fish
    """

    shell: Annotated[tyro.conf.Positional[Shell], tyro.conf.arg(metavar="SHELL")]
    """bash, zsh or fish."""

    def run(self) -> None:
        """Print the script."""
        from ipfm.engine.cli import Command
        from ipfm.engine.overview import completion_script

        print(completion_script(Command, self.shell))
