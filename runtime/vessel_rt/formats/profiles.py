"""The shapes that a bundle's graphs run with: engines are built and memory is planned for them.

Knows the dynamic axes of docs/architecture.md. Does not know about builders and devices.
"""

from __future__ import annotations

import dataclasses
import re

from vessel_rt.errors import RecipeError
from vessel_rt.formats.bundle import Bundle, CineSpec, StageSpec
from vessel_rt.formats.recipe import EngineRecipe, Recipe

__all__ = [
    "BEST_FRAMES",
    "CPU_TILES",
    "CPU_TOKENS",
    "MASKS_AN_IMAGE",
    "MAX_TEXT_TOKENS",
    "MOST_CONDITIONING",
    "MOST_KEPT",
    "OPT_TEXT_TOKENS",
    "Profile",
    "Shapes",
    "Workload",
    "conditioning_frames",
    "engine_recipe",
    "keeps_cores_busy",
    "max_shape",
    "stage_profile",
    "workload_of",
]

Shapes = dict[str, tuple[int, ...]]

MOST_KEPT = 16  # positions of one call whose states are returned, at most: 1 when decoding, those of the draft when checking one
# What a CPU runs at once. In the 8B model 2,620 tokens (10 tiles) at once take 1.3 GB more than 512 at a time.
CPU_TOKENS = 512
CPU_TILES = 4
_LARGE = 1 << 30  # bytes of weights
MASKS_AN_IMAGE = 4  # at most, averaged over a batch; an answer seen in training has one
MOST_CONDITIONING = 8  # frames from which an object is tracked, at most; Sa2VA has 5
BEST_FRAMES = 3  # of a cine that `--propagate best-frame` asks about, at most
# Tokens of a prompt besides its image: the template and the question.
OPT_TEXT_TOKENS = 64  # that engines are tuned for: a short question
MAX_TEXT_TOKENS = 256  # that a bundle's cache always has room for


@dataclasses.dataclass(frozen=True)
class Workload:
    """The max and opt number of images in a batch, and the opt number of tiles of an image. The bundle has the max."""

    max_batch: int = 1
    opt_batch: int = 1
    opt_tiles: int = 1


@dataclasses.dataclass(frozen=True)
class Profile:
    """The min, opt and max shape of each input of one stage, by name."""

    min: Shapes
    opt: Shapes
    max: Shapes

    def options(self, prefix: str) -> dict[str, str]:
        """Options of ONNX Runtime's TensorRT providers: `<prefix>_min_shapes`, `_opt_` and `_max_`, each `name:1x3x448x448,...`."""
        kinds = {"min": self.min, "opt": self.opt, "max": self.max}
        return {
            f"{prefix}_{kind}_shapes": ",".join(f"{name}:{_shape_text(shape)}" for name, shape in shapes.items())
            for kind, shapes in kinds.items()
        }

    def texts(self) -> dict[str, str]:
        """As an engine's sidecar records it: each input's min, opt and max shape, `1x3x448x448, 2x3x448x448, 8x3x448x448`."""
        return {name: ", ".join(_shape_text(shapes[name]) for shapes in (self.min, self.opt, self.max)) for name in self.max}


def max_shape(text: str) -> tuple[int, ...]:
    """The max shape in one of `Profile.texts`; ValueError if there is none."""
    shape = text.rpartition(", ")[2]
    if not re.fullmatch(r"\d{1,9}(x\d{1,9})*", shape, re.ASCII):
        raise ValueError("not a shape")
    return tuple(map(int, shape.split("x")))


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def keeps_cores_busy(bundle: Bundle) -> bool:
    """Whether one image is enough work for all cores of a CPU, and two at the same time would take gigabytes more."""
    return sum(map(bundle.weight_bytes, bundle.stages)) >= _LARGE


def engine_recipe(recipe: Recipe) -> EngineRecipe:
    """The engines that `recipe` describes; RecipeError if it has none."""
    if recipe.engines is None:
        raise RecipeError(f"recipe {recipe.name}: has no [engines]; the recipe rtx3090 shows one")
    return recipe.engines


def workload_of(bundle: Bundle, recipe: Recipe) -> Workload:
    """The workload that `recipe` builds engines for.

    Raises:
        RecipeError: it has no engines, does not match `bundle`, or asks for more tiles than an image can have.
    """
    engines, name = engine_recipe(recipe), f"recipe {recipe.name}"
    asked = {"precision": recipe.precision, "language_model.capacity": recipe.language_model.capacity}
    has = {"precision": bundle.precision, "language_model.capacity": bundle.language_model.capacity}
    for key in asked:
        if asked[key] != has[key]:
            raise RecipeError(f"{name}: {key} is {asked[key]}, the bundle's is {has[key]}; change it, or export with this recipe")
    if engines.opt_tiles > bundle.tiles.most:
        raise RecipeError(f"{name}: engines.opt_tiles is {engines.opt_tiles}; an image has {bundle.tiles.most} at most")
    return Workload(engines.max_batch, engines.opt_batch, engines.opt_tiles)


def conditioning_frames(bundle: Bundle, propagate: str) -> int:
    """From how many frames of a cine `--propagate` tracks objects, at most. Raises BundleError if the bundle has no graphs for cines."""
    prompted = bundle.require_cine().prompted_frames
    return prompted if propagate == "sa2va" else BEST_FRAMES


def stage_profile(bundle: Bundle, stage: StageSpec, workload: Workload) -> Profile:
    """The shapes of `stage`'s inputs under `workload`. The three shapes of an input without a dynamic axis are equal."""
    axes = _axes(bundle, workload)
    return Profile(
        *(
            {spec.name: tuple(axis if isinstance(axis, int) else axes[axis][i] for axis in spec.shape) for spec in stage.inputs}
            for i in range(3)
        )
    )


def _axes(bundle: Bundle, workload: Workload) -> dict[str, tuple[int, int, int]]:
    """The min, opt and max size of each dynamic axis."""
    capacity, tiles = bundle.language_model.capacity, bundle.tiles
    prompt = min(workload.opt_tiles * tiles.tokens_per_tile + OPT_TEXT_TOKENS, capacity)
    return {
        "tiles": (1, workload.opt_batch * workload.opt_tiles, workload.max_batch * tiles.most),
        "batch": (1, workload.opt_batch, workload.max_batch),
        "sequence": (1, prompt, capacity),
        "live": (1, prompt, capacity),
        "kept": (1, 1, MOST_KEPT),
        "images": (1, workload.opt_batch, workload.max_batch),
        "masks": (1, workload.opt_batch, workload.max_batch * MASKS_AN_IMAGE),
        **_cine_axes(bundle.cine),
    }


def _cine_axes(cine: CineSpec | None) -> dict[str, tuple[int, int, int]]:
    """Those of sam2_memory_attention. Engines are tuned for a frame late in a cine."""
    if cine is None:
        return {}
    kinds = {"memories": cine.memories - 1, "pointers": cine.pointers - 1}
    return {axis: (1, cine.prompted_frames + tracked, MOST_CONDITIONING + tracked) for axis, tracked in kinds.items()}
