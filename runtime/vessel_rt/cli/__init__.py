"""The command line: arguments in, one call a command, messages and an exit code out. Every other room is below it."""

from vessel_rt.cli.program import main

__all__ = ["main"]
