"""The shapes that a bundle's graphs are run with: what engines are built for, and what memory is planned for.

Knows the dynamic axes of docs/architecture.md; knows nothing of builders or devices.
"""

from __future__ import annotations

import dataclasses

from vessel_rt.errors import RecipeError
from vessel_rt.formats.bundle import Bundle, StageSpec
from vessel_rt.formats.recipe import EngineRecipe, Recipe

__all__ = ["MASKS_AN_IMAGE", "MOST_KEPT", "Profile", "Shapes", "Workload", "engine_recipe", "shape_text", "stage_profile", "workload_of"]

Shapes = dict[str, tuple[int, ...]]

MOST_KEPT = 16  # positions of one call whose states are asked for: decoding takes 1, verification those of an answer
MASKS_AN_IMAGE = 4  # at most, on a batch's average; an answer of training has one
_TEXT_TOKENS = 64  # of the likeliest prompt: the template and a short question


@dataclasses.dataclass(frozen=True)
class Workload:
    """How many images a batch has, at most and likeliest, and how many tiles an image has likeliest; at most, the bundle says."""

    max_batch: int = 1
    opt_batch: int = 1
    opt_tiles: int = 1


@dataclasses.dataclass(frozen=True)
class Profile:
    """The least, likeliest and greatest shape of each input of one stage, by name."""

    least: Shapes
    likeliest: Shapes
    greatest: Shapes

    def options(self, prefix: str) -> dict[str, str]:
        """As ONNX Runtime's TensorRT providers are told: `<prefix>_min_shapes`, `_opt_` and `_max_`, each `name:1x3x448x448,...`."""
        kinds = {"min": self.least, "opt": self.likeliest, "max": self.greatest}
        return {
            f"{prefix}_{kind}_shapes": ",".join(f"{name}:{shape_text(shape)}" for name, shape in shapes.items())
            for kind, shapes in kinds.items()
        }


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape in words: `1x3x448x448`."""
    return "x".join(map(str, shape))


def engine_recipe(recipe: Recipe) -> EngineRecipe:
    """What `recipe` says of engines; RecipeError if it makes none."""
    if recipe.engines is None:
        raise RecipeError(f"recipe {recipe.name}: has no [engines]; the recipe rtx3090 shows one")
    return recipe.engines


def workload_of(bundle: Bundle, recipe: Recipe) -> Workload:
    """What `recipe` makes engines for.

    Raises:
        RecipeError: it makes none, is not what `bundle` was exported with, or asks for more tiles than an image can have.
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


def stage_profile(bundle: Bundle, stage: StageSpec, workload: Workload) -> Profile:
    """The shapes of `stage`'s inputs under `workload`; an input without a dynamic axis has one shape."""
    axes = _axes(bundle, workload)
    least, likeliest, greatest = (
        {spec.name: tuple(axis if isinstance(axis, int) else axes[axis][i] for axis in spec.shape) for spec in stage.inputs}
        for i in range(3)
    )
    return Profile(least, likeliest, greatest)


def _axes(bundle: Bundle, workload: Workload) -> dict[str, tuple[int, int, int]]:
    """The least, likeliest and greatest size of each dynamic axis."""
    capacity, tiles = bundle.language_model.capacity, bundle.tiles
    prompt = min(workload.opt_tiles * tiles.tokens_per_tile + _TEXT_TOKENS, capacity)
    return {
        "tiles": (1, workload.opt_batch * workload.opt_tiles, workload.max_batch * tiles.most),
        "batch": (1, workload.opt_batch, workload.max_batch),
        "sequence": (1, prompt, capacity),
        "live": (1, prompt, capacity),
        "kept": (1, 1, MOST_KEPT),
        "images": (1, workload.opt_batch, workload.max_batch),
        "masks": (1, workload.opt_batch, workload.max_batch * MASKS_AN_IMAGE),
    }
