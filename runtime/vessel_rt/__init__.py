"""vessel-rt: the lean runtime: a bundle and images in, masks out. Imports neither torch nor the exporter.

`load` is the way in; docs/api.md describes what is here. Importing this module imports no library: `load` and the classes do, on first use.
"""

from vessel_rt.errors import BundleError, DeviceError, EngineError, ImageError, OutOfMemory, VesselError

TYPE_CHECKING = False  # as typing's, whose import would take longer than all of this
if TYPE_CHECKING:
    from vessel_rt.api import ImageLike, Mask, Model, Result, frame_count, load

__all__ = [
    "BundleError",
    "DeviceError",
    "EngineError",
    "ImageError",
    "ImageLike",
    "Mask",
    "Model",
    "OutOfMemory",
    "Result",
    "VesselError",
    "frame_count",
    "load",
]

__version__ = "0.1.0"

if not TYPE_CHECKING:  # to a type checker, every name would be there

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import vessel_rt.api

        return getattr(vessel_rt.api, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
