"""User-facing errors, under one base class. Does not know who raises or prints them."""

__all__ = [
    "BundleError",
    "DeviceError",
    "EngineError",
    "GraphError",
    "ImageError",
    "LoadMemoryError",
    "OutOfMemory",
    "PlacementError",
    "RecipeError",
    "VesselError",
    "first_line",
]


class VesselError(Exception):
    """Bad input. The message is one line: what happened, where, and what to do. The command line prints it and exits 1.

    Every other exception is a bug and shows its traceback.
    """


class BundleError(VesselError):
    """A bundle that is missing, incomplete, damaged, or of a schema that this version does not read."""


class RecipeError(VesselError):
    """A recipe that cannot be read, or whose settings do not fit the model or the GPU."""


class EngineError(VesselError):
    """An engine that is missing, damaged, or was built from other files, for another GPU or by another version. It is never loaded."""


class ImageError(VesselError):
    """An image that cannot be read or that the model cannot take. A run continues, and the image's line in results.jsonl says why."""


class OutOfMemory(ImageError):
    """A device without enough memory: a smaller batch may fit."""


class LoadMemoryError(VesselError):
    """A device without enough memory to load a graph."""


class PlacementError(VesselError):
    """A graph, or slow operators of it, that ONNX Runtime would run on the CPU instead of the requested device."""


class GraphError(VesselError):
    """A graph that failed on a device, because of its input or because of the device. Segmenter finds out which."""


class DeviceError(VesselError):
    """A device that also fails on a known-good input. The run ends or continues on another device, and no image fails because of it."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error; its type if it has no text."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
