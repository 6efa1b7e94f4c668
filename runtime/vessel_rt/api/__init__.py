"""The Python API, which users import as `vessel_rt` (docs/api.md). Does not know about output folders."""

from vessel_rt.api.arguments import ImageLike
from vessel_rt.api.model import Model, frame_count, load
from vessel_rt.api.result import Result
from vessel_rt.model.result import Mask

__all__ = ["ImageLike", "Mask", "Model", "Result", "frame_count", "load"]
