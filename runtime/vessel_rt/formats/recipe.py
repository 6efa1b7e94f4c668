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
from vessel_rt.formats.schema import Items, Text, decode, read_small, shown

__all__ = [
    "DEFAULT_RECIPE",
    "PRECISIONS",
    "SCHEMA",
    "WEIGHTS",
    "EngineRecipe",
    "LanguageModelRecipe",
    "Recipe",
    "RecipeFile",
    "load_recipe",
    "recipe_names",
]

SCHEMA = 1
PRECISIONS = ("fp32", "fp16", "bf16")
WEIGHTS = ("int8", "int4")  # types of quantized matrices
DEFAULT_RECIPE = "rtx3090"

_RECIPES = Path(__file__).parents[1] / "recipes"

_Tokens = Annotated[int, Meta(ge=1, le=2**20)]
_Count = Annotated[int, Meta(ge=1, le=1024)]


class LanguageModelRecipe(Struct, frozen=True, forbid_unknown_fields=True):
    """The limits of the language model's cache and answers.

    Attributes:
        capacity: the length of the KV cache in tokens, prompt and answer together.
        max_new_tokens: the longest answer, in tokens.
    """

    capacity: _Tokens
    max_new_tokens: _Tokens


class EngineRecipe(Struct, frozen=True, forbid_unknown_fields=True):
    """The GPU for which engines are built, and their input shapes.

    Attributes:
        gpu: the name of the GPU.
        architecture: `sm` and the compute capability of the GPU, such as `sm86`.
        memory_gib: the usable memory of the GPU, in GiB.
        max_batch: the maximum number of images in a batch; each may have as many tiles as the bundle allows.
        opt_batch: the batch size for which engines are tuned.
        opt_tiles: the number of tiles per image for which engines are tuned.
        language_model_partitions: the number of engines into which the language model is split.
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
        precision: the type of the activations: `fp32`, `fp16` or `bf16`.
        language_model: the limits of the language model's cache and answers.
        engines: the engines to build, if any. ONNX Runtime runs the bundle without them.
        weights: the type of the matrices: `int8` or `int4`. Without it, they have the precision of the activations.
        keep: patterns of the names of matrices that are not quantized, such as `layers.0.*`.
    """

    schema: Annotated[int, Meta(ge=1, le=SCHEMA)] = SCHEMA
    precision: Text
    language_model: LanguageModelRecipe
    engines: EngineRecipe | None = None
    weights: Text | None = None
    keep: Items[Text] = ()


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
    if recipe.weights not in (None, *WEIGHTS):
        yield f"weights is {shown(recipe.weights)}, not one of {', '.join(WEIGHTS)}"
    if recipe.keep and not recipe.weights:
        yield "keep names matrices that are not quantized, but there is no weights"
    engines = recipe.engines
    if engines and not re.fullmatch(r"sm\d{2,3}", engines.architecture, re.ASCII):
        yield f"engines.architecture is {shown(engines.architecture)}, not like sm86"
    if engines and engines.opt_batch > engines.max_batch:
        yield f"engines.opt_batch {engines.opt_batch} is above max_batch {engines.max_batch}"
