"""What can be wrong with the inputs of an export; all are VesselErrors, so the command line prints them and exits 1."""

from vessel_rt.errors import VesselError

__all__ = ["BaseModelError", "CheckpointError", "UnreadableFile"]


class CheckpointError(VesselError):
    """A checkpoint that cannot be read safely, or whose tensors do not fit the base model."""


class BaseModelError(VesselError):
    """A base model or SAM2 that cannot be found or is not what the checkpoint was trained on."""


class UnreadableFile(ValueError):
    """What is wrong with a file, in a phrase for another error's message: printable and short, whatever of the file's text is in it."""

    def __init__(self, phrase: str) -> None:
        super().__init__("".join(letter if letter.isprintable() else "?" for letter in phrase[:500]))
