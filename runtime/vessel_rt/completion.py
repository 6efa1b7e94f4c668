"""`--print-completion SHELL`: a script for the shell that completes commands, options and paths. Does not know the commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_completion"]


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Add the option to `parser`. Commands and options that are added later are completed too."""
    parser.add_argument(
        "--print-completion", action=_PrintCompletion, metavar="SHELL", help="a script that completes commands: bash, zsh, tcsh"
    )


class _PrintCompletion(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        import shtab

        if values not in shtab.SUPPORTED_SHELLS:
            parser.error(f"no completion for {values!r}: take one of {', '.join(shtab.SUPPORTED_SHELLS)}")
        _mark_paths(parser, shtab.FILE)
        print(shtab.complete(parser, values))
        parser.exit()


def _mark_paths(parser: argparse.ArgumentParser, as_file: Any) -> None:
    """Mark the arguments that are paths: those of type Path, and positional ones that take several values."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_paths(command, as_file)
        elif action.type is Path or action.nargs == "+":
            action.complete = as_file  # type: ignore[attr-defined]
