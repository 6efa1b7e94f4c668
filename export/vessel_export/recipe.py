"""Recipes (`engines/*.toml`): what is being made. Read once, at the edge, into a frozen dataclass."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import torch

from vessel_export.errors import RecipeError

__all__ = ["PRECISIONS", "Recipe", "load_recipe"]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """`capacity`: the KV cache's length in tokens, prompt and answer together; `max_new_tokens`: the longest answer."""

    name: str
    precision: str
    capacity: int
    max_new_tokens: int

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: not there, not TOML, a key missing, unknown or of the wrong kind.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        language_model = document.pop("language_model")
        recipe = Recipe(
            name=path.stem,
            precision=document.pop("precision"),
            capacity=language_model.pop("capacity"),
            max_new_tokens=language_model.pop("max_new_tokens"),
        )
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; those of the project are engines/*.toml") from None
    except (tomllib.TOMLDecodeError, KeyError, AttributeError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: not a recipe ({type(e).__name__}: {e}); engines/rtx3090.toml shows one") from e
    unknown = [*document, *(f"language_model.{key}" for key in language_model)]
    if unknown:
        raise RecipeError(f"{path}: unknown key {', '.join(unknown)}")
    if recipe.precision not in PRECISIONS:
        raise RecipeError(f"{path}: precision is {recipe.precision!r}, not one of {', '.join(PRECISIONS)}")
    sizes = (recipe.capacity, recipe.max_new_tokens)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise RecipeError(f"{path}: capacity and max_new_tokens are whole numbers above 0")
    return recipe
