"""Recipes (`engines/*.toml`): what is being made, and for which GPU. Read once, at the edge, into frozen dataclasses."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

from vessel_rt.errors import RecipeError

__all__ = ["PRECISIONS", "EngineRecipe", "LanguageModelRecipe", "Recipe", "load_recipe"]

PRECISIONS = ("fp32", "fp16", "bf16")


@dataclasses.dataclass(frozen=True)
class LanguageModelRecipe:
    """`capacity`: the KV cache's length in tokens, prompt and answer together; `max_new_tokens`: the longest answer."""

    capacity: int
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class EngineRecipe:
    """The GPU that engines are for, and the shapes that they take.

    `architecture` is `sm` and the compute capability (`sm86`). A batch has 1 to `max_batch` images, each of 1 tile to the bundle's most;
    engines are tuned for `opt_batch` images of `opt_tiles` tiles. `language_model_parts` engines share the language model's layers.
    """

    gpu: str
    architecture: str
    memory_gib: float
    max_batch: int
    opt_batch: int
    opt_tiles: int
    language_model_parts: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe; `engines` is None where there are none to build."""

    name: str
    precision: str
    language_model: LanguageModelRecipe
    engines: EngineRecipe | None = None


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: not there, not TOML, a key missing, unknown or of the wrong kind, or a value out of range.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; those of the project are engines/*.toml") from None
    except (tomllib.TOMLDecodeError, OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: not a recipe ({e}); engines/rtx3090.toml shows one") from e
    try:
        recipe: Recipe = _decode(Recipe, {"name": path.stem, **document}, "")
    except ValueError as e:
        raise RecipeError(f"{path}: {e}; engines/rtx3090.toml shows a whole recipe") from None
    for fault in _faults(recipe):
        raise RecipeError(f"{path}: {fault}")
    return recipe


def _decode(kind: Any, table: Any, where: str) -> Any:
    """`table` as the dataclass `kind`; ValueError says which key is missing, unknown or of the wrong kind."""
    if not isinstance(table, dict):
        raise ValueError(f"{where.rstrip('.')} is not a table")
    hints = typing.get_type_hints(kind)
    optional = {field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
    unknown, missing = sorted(table.keys() - hints.keys()), sorted(hints.keys() - table.keys() - optional)
    if unknown or missing:
        raise ValueError(
            "; ".join(f"{what} key {where}{key}" for what, keys in (("unknown", unknown), ("missing", missing)) for key in keys)
        )
    return kind(**{name: _value(hints[name], value, where + name) for name, value in table.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    kind = next((k for k in typing.get_args(kind) if k is not type(None)), kind)
    if dataclasses.is_dataclass(kind):
        return _decode(kind, value, where + ".")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {value!r}, not {'text' if kind is str else 'a number' if kind is float else 'a whole number'}")
    return value


def _faults(recipe: Recipe) -> list[str]:
    faults = []
    if recipe.precision not in PRECISIONS:
        faults.append(f"precision is {recipe.precision!r}, not one of {', '.join(PRECISIONS)}")
    numbers = {f"language_model.{key}": value for key, value in dataclasses.asdict(recipe.language_model).items()}
    if recipe.engines:
        numbers |= {f"engines.{key}": value for key, value in dataclasses.asdict(recipe.engines).items() if not isinstance(value, str)}
        if not re.fullmatch(r"sm\d{2,3}", recipe.engines.architecture):
            faults.append(f"engines.architecture is {recipe.engines.architecture!r}, not like sm86")
        if recipe.engines.opt_batch > recipe.engines.max_batch:
            faults.append(f"engines.opt_batch {recipe.engines.opt_batch} is above max_batch {recipe.engines.max_batch}")
    return faults + [f"{key} is {value}; it is a number above 0" for key, value in numbers.items() if value <= 0]
