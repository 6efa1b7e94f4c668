from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.paths import ROOT
from vessel_rt.errors import RecipeError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.profiles import Workload, stage_profile, workload_of
from vessel_rt.formats.recipe import EngineRecipe, Recipe, load_recipe


@pytest.fixture
def recipe() -> Recipe:
    return replace(load_recipe(ROOT / "engines" / "rtx3090.toml"), name="test")


def with_engines(recipe: Recipe, **changes: int) -> Recipe:
    assert recipe.engines
    return replace(recipe, engines=replace(recipe.engines, **changes))  # type: ignore[arg-type]


def test_every_dynamic_axis_of_every_stage_has_its_sizes(fp16_bundle: Path, recipe: Recipe) -> None:
    bundle = Bundle.load(fp16_bundle)
    workload = workload_of(bundle, with_engines(recipe, max_batch=2, opt_batch=2, opt_tiles=3))
    assert workload == Workload(2, 2, 3)
    profiles = {name: stage_profile(bundle, stage, workload) for name, stage in bundle.stages.items()}
    vision = profiles["vision_encoder"]
    side = bundle.tiles.size
    assert [shapes["pixel_values"] for shapes in (vision.min, vision.opt, vision.max)] == [
        (1, 3, side, side),
        (6, 3, side, side),
        (26, 3, side, side),  # 12 tiles and a thumbnail, twice
    ]
    language = profiles["language_model"]
    capacity, tokens = bundle.language_model.capacity, 3 * bundle.tiles.tokens_per_tile + 64
    assert (language.min["inputs_embeds"][1], language.opt["position_ids"]) == (1, (2, tokens))
    assert language.max["kv_positions"] == (capacity,)
    sizes = bundle.language_model
    assert language.min["past_key.0"] == (1, sizes.kv_heads, capacity, sizes.head_dim)
    assert language.max["past_key.0"] == (2, sizes.kv_heads, capacity, sizes.head_dim)
    assert profiles["sam2_mask_decoder"].max["image_index"] == (8,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engines": None}, r"recipe test: has no \[engines\]"),
        ({"precision": "bf16"}, "precision is bf16, the bundle's is fp16"),
        ({"language_model": {"capacity": 8192}}, "language_model.capacity is 8192, the bundle's is 4096"),
        ({"opt_tiles": 14}, "engines.opt_tiles is 14; an image has 13 at most"),
    ],
)
def test_a_recipe_that_is_not_the_bundles(fp16_bundle: Path, recipe: Recipe, change: dict[str, object], message: str) -> None:
    if "opt_tiles" in change:
        other = with_engines(recipe, opt_tiles=14)
    elif "language_model" in change:
        other = replace(recipe, language_model=replace(recipe.language_model, capacity=8192))
    else:
        other = replace(recipe, **change)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=message):
        workload_of(Bundle.load(fp16_bundle), other)


def test_the_likeliest_prompt_is_not_longer_than_the_cache(standin: Bundle) -> None:
    profile = stage_profile(standin, standin.stages["language_model"], Workload(opt_tiles=60))
    assert profile.opt["kv_positions"] == profile.max["kv_positions"] == (standin.language_model.capacity,)


def test_recipes_fields_are_those_of_a_workload() -> None:
    assert {field.name for field in dataclasses.fields(Workload)} <= set(EngineRecipe.__struct_fields__)
