"""Recipes: what is being made, and for which GPU. Read once, at the edge.

Those of the project are in recipes/, and go by their names; engines/ links to them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from vessel_rt.errors import RecipeError
from vessel_rt.formats.schema import Text, decode, read_small, shown

__all__ = [
    "DEFAULT_RECIPE",
    "PRECISIONS",
    "SCHEMA",
    "EngineRecipe",
    "LanguageModelRecipe",
    "Recipe",
    "RecipeFile",
    "load_recipe",
    "recipe_names",
]

SCHEMA = 1
PRECISIONS = ("fp32", "fp16", "bf16")
DEFAULT_RECIPE = "rtx3090"

_RECIPES = Path(__file__).parents[1] / "recipes"

_Tokens = Annotated[int, Meta(ge=1, le=2**20)]
_Count = Annotated[int, Meta(ge=1, le=1024)]


class LanguageModelRecipe(Struct, frozen=True, forbid_unknown_fields=True):
    """The language model's cache and answers.

    Attributes:
        capacity: the length of the KV cache in tokens, prompt and answer together.
        max_new_tokens: the longest answer, in tokens.
    """

    capacity: _Tokens
    max_new_tokens: _Tokens


class EngineRecipe(Struct, frozen=True, forbid_unknown_fields=True):
    """The GPU that engines are for, and the shapes that they take.

    Attributes:
        gpu: the name of the GPU.
        architecture: `sm` and its compute capability, such as `sm86`.
        memory_gib: the memory that programs can use on it.
        max_batch: the greatest number of images in a batch, each of 1 tile to the bundle's most.
        opt_batch: the number of images that engines are tuned for.
        opt_tiles: the number of tiles of an image that engines are tuned for.
        language_model_partitions: engines that share the language model's layers.
    """

    gpu: Text
    architecture: Text
    memory_gib: Annotated[float, Meta(ge=0.125, le=4096)]
    max_batch: _Count
    opt_batch: _Count
    opt_tiles: _Count
    language_model_partitions: _Count


class RecipeFile(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A recipe, in TOML.

    Attributes:
        schema: the version of this format.
        precision: `fp32`, `fp16` or `bf16`.
        language_model: the language model's cache and answers.
        engines: the engines to build. Without them a bundle runs with ONNX Runtime only.
    """

    schema: Annotated[int, Meta(ge=1, le=SCHEMA)] = SCHEMA
    precision: Text
    language_model: LanguageModelRecipe
    engines: EngineRecipe | None = None


class Recipe(RecipeFile, frozen=True, kw_only=True):
    """A recipe, read. `name` is not part of the file."""

    name: str


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
        document = tomllib.loads(read_small(path).decode("utf-8-sig"))  # Windows' editors put a mark there
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; take {' or '.join(recipe_names())}, or the path of a .toml file") from None
    except (OSError, ValueError, RecursionError) as e:  # TOML's errors are ValueErrors
        said = e.strerror if isinstance(e, OSError) else "nested too deeply" if isinstance(e, RecursionError) else e
        raise RecipeError(f"{path}: not a recipe ({said}); {_RECIPES / DEFAULT_RECIPE}.toml shows one") from e
    try:
        recipe = Recipe(**msgspec.structs.asdict(decode(document, RecipeFile, SCHEMA)), name=path.stem)
    except ValueError as e:
        raise RecipeError(f"{path}: {e}; {_RECIPES / DEFAULT_RECIPE}.toml shows a whole recipe") from None
    for fault in _faults(recipe):
        raise RecipeError(f"{path}: {fault}")
    return recipe


def _faults(recipe: Recipe) -> Iterator[str]:
    """What `recipe` says that contradicts itself or that nothing can be made of."""
    if recipe.precision not in PRECISIONS:
        yield f"precision is {shown(recipe.precision)}, not one of {', '.join(PRECISIONS)}"
    engines = recipe.engines
    if engines and not re.fullmatch(r"sm\d{2,3}", engines.architecture, re.ASCII):
        yield f"engines.architecture is {shown(engines.architecture)}, not like sm86"
    if engines and engines.opt_batch > engines.max_batch:
        yield f"engines.opt_batch {engines.opt_batch} is above max_batch {engines.max_batch}"
