"""Errors in the inputs of an export. Except for UnreadableFile they are VesselErrors: the command line prints them and exits with 1."""

from vessel_rt.errors import VesselError

__all__ = ["BaseModelError", "CheckpointError", "UnreadableFile"]


class CheckpointError(VesselError):
    """A checkpoint that cannot be read safely, whose tensors do not fit the base model, or whose bundle cannot be written."""


class BaseModelError(VesselError):
    """A base model or SAM2 that cannot be found or is not what the checkpoint was trained on."""


class UnreadableFile(ValueError):
    """A file's fault, as a phrase for another error's message. It is printable and short even if it quotes the file."""

    def __init__(self, phrase: str) -> None:
        super().__init__("".join(letter if letter.isprintable() else "?" for letter in phrase[:500]))
