"""The one base class of errors that a user can mend."""

__all__ = [
    "BundleError",
    "DeviceError",
    "EngineError",
    "GraphError",
    "ImageError",
    "OutOfMemory",
    "RecipeError",
    "VesselError",
    "first_line",
]


class VesselError(Exception):
    """Bad input: the message is one line that names the file and the mend; the command line prints it and exits 1.

    Every other exception is a bug and shows its traceback.
    """


class BundleError(VesselError):
    """A bundle that is missing, incomplete, damaged, or of a schema this version does not read."""


class RecipeError(VesselError):
    """A recipe that cannot be read, or whose settings do not fit the model or the GPU."""


class EngineError(VesselError):
    """An engine that is missing, damaged, or was built from other files, for another GPU or by another version: never loaded."""


class ImageError(VesselError):
    """An image that cannot be read or that the model cannot take: a run goes on, and the image's line in results.jsonl says why."""


class OutOfMemory(ImageError):
    """A device without room for what it was given: a smaller batch may pass."""


class GraphError(VesselError):
    """A graph that failed on a device, because of its input or of the device: Segmenter finds out which."""


class DeviceError(VesselError):
    """A device that fails on a known-good input, too: the run ends or goes on elsewhere, and no image fails because of it."""


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
