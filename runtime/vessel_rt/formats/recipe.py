"""Recipes: what is being made, and for which GPU. Read once, at the edge, into frozen dataclasses.

Those of the project are in recipes/, and go by their names; engines/ links to them.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from vessel_rt.errors import RecipeError
from vessel_rt.formats.schema import Within, decode, read_small, shown

__all__ = ["DEFAULT_RECIPE", "PRECISIONS", "WEIGHTS", "EngineRecipe", "LanguageModelRecipe", "Recipe", "load_recipe", "recipe_names"]

PRECISIONS = ("fp32", "fp16", "bf16")
WEIGHTS = ("int8", "int4")  # types of quantized matrices
DEFAULT_RECIPE = "rtx3090"

_RECIPES = Path(__file__).parents[1] / "recipes"

_Tokens = Annotated[int, Within(1, 2**20)]
_Count = Annotated[int, Within(1, 1024)]


@dataclasses.dataclass(frozen=True)
class LanguageModelRecipe:
    """`capacity`: the KV cache's length in tokens, prompt and answer together; `max_new_tokens`: the longest answer."""

    capacity: _Tokens
    max_new_tokens: _Tokens


@dataclasses.dataclass(frozen=True)
class EngineRecipe:
    """The GPU that engines are for, and the shapes that they take.

    `architecture` is `sm` and the compute capability (`sm86`). A batch has 1 to `max_batch` images, each of 1 tile to the bundle's most;
    engines are tuned for `opt_batch` images of `opt_tiles` tiles. `language_model_partitions` engines share the language model's layers.
    """

    gpu: str
    architecture: str
    memory_gib: Annotated[float, Within(0.125, 4096)]
    max_batch: _Count
    opt_batch: _Count
    opt_tiles: _Count
    language_model_partitions: _Count


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe; `engines` is None where there are none to build.

    `precision` is the type of the activations. `weights` is the type of the matrices, None if it is the same. `keep` has
    patterns of the names of matrices that are not quantized (`layers.0.*`).
    """

    name: str
    precision: str
    language_model: LanguageModelRecipe
    engines: EngineRecipe | None = None
    weights: str | None = None
    keep: tuple[str, ...] = ()


def recipe_names() -> tuple[str, ...]:
    """The names of the project's own recipes."""
    return tuple(sorted(path.stem for path in _RECIPES.glob("*.toml")))


def load_recipe(source: Path | str) -> Recipe:
    """Read a recipe: a file, or one of the project's by its name.

    Raises:
        RecipeError: not there, not TOML, a key missing, unknown or of the wrong kind, or a value out of range.
    """
    path = _RECIPES / f"{source}.toml" if str(source) in recipe_names() else Path(source)
    try:
        document = tomllib.loads(read_small(path).decode("utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; take {' or '.join(recipe_names())}, or the path of a .toml file") from None
    except (OSError, ValueError, RecursionError) as e:  # TOML's errors are ValueErrors
        said = e.strerror if isinstance(e, OSError) else "nested too deeply" if isinstance(e, RecursionError) else e
        raise RecipeError(f"{path}: not a recipe ({said}); {_RECIPES / DEFAULT_RECIPE}.toml shows one") from e
    try:
        recipe: Recipe = decode(Recipe, document, name=path.stem)
    except ValueError as e:
        raise RecipeError(f"{path}: {e}; {_RECIPES / DEFAULT_RECIPE}.toml shows a whole recipe") from None
    for fault in _faults(recipe):
        raise RecipeError(f"{path}: {fault}")
    return recipe


def _faults(recipe: Recipe) -> Iterator[str]:
    """What `recipe` says that contradicts itself or that nothing can be made of."""
    if recipe.precision not in PRECISIONS:
        yield f"precision is {shown(recipe.precision)}, not one of {', '.join(PRECISIONS)}"
    if recipe.weights not in (None, *WEIGHTS):
        yield f"weights is {shown(recipe.weights)}, not one of {', '.join(WEIGHTS)}"
    if recipe.keep and not recipe.weights:
        yield "keep names matrices that are not quantized, but there is no weights"
    engines = recipe.engines
    if engines and not re.fullmatch(r"sm\d{2,3}", engines.architecture, re.ASCII):
        yield f"engines.architecture is {shown(engines.architecture)}, not like sm86"
    if engines and engines.opt_batch > engines.max_batch:
        yield f"engines.opt_batch {engines.opt_batch} is above max_batch {engines.max_batch}"
